"""Pages on the host: what is logged, and that nothing but the last bytes under the right key is accepted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from memwall.errors import InputError, MissingDependency
from memwall.retrieve.untrusted import READ, TAG_BYTES, WRITE, HostFile, HostMemory, SealedPages, Tampered, aes_gcm

pytest.importorskip("cryptography", reason="pages are sealed with the extra `oblivious`")
KEY = bytes(range(32))


def pages(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.uint32)


def plain(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 40), np.uint8)


@pytest.fixture(params=["memory", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> HostMemory | HostFile:
    if request.param == "memory":
        return HostMemory(7, 40 + TAG_BYTES, logged=True)
    return HostFile(tmp_path / "pages", 7, 40 + TAG_BYTES, logged=True)


def test_pages_come_back(store: HostMemory | HostFile) -> None:
    sealed = SealedPages(store, KEY)
    sealed.write(pages(3, 0, 6), plain(3))
    np.testing.assert_array_equal(sealed.read(pages(6, 3)), plain(3)[[2, 0]])
    sealed.write(pages(3), plain(1, seed=1))
    np.testing.assert_array_equal(sealed.read(pages(3, 0)), [plain(1, seed=1)[0], plain(3)[1]])


def test_every_access_is_logged_and_nothing_else(store: HostMemory | HostFile) -> None:
    sealed = SealedPages(store, KEY)
    sealed.write(pages(3, 0), plain(2))
    sealed.read(pages(0))
    ops, seen = store.trace.arrays()
    assert ops.tolist() == [WRITE, WRITE, READ]
    assert seen.tolist() == [3, 0, 0]
    assert store.trace.visible_bytes == 3 * 56
    store.trace.clear()
    assert store.trace.visible_bytes == len(store.trace.arrays()[0]) == 0


def test_equal_pages_have_different_bytes(store: HostMemory | HostFile) -> None:
    sealed = SealedPages(store, KEY)
    same = np.zeros((3, 40), np.uint8)
    sealed.write(pages(0, 1, 2), same)
    first = store.data.copy()
    sealed.write(pages(0, 1, 2), same)
    forms = {row.tobytes() for row in [*first[:3], *store.data[:3]]}
    assert len(forms) == 6
    assert len({len(form) for form in forms}) == 1


def test_no_nonce_comes_twice(store: HostMemory | HostFile) -> None:
    used: list[bytes] = []
    for _ in range(2):  # the second time as a state that was saved and taken up again, under the same key
        sealed = SealedPages(store, KEY)
        cipher = sealed._cipher

        class Watched:
            def encrypt(self, nonce: bytes, data: bytes, told: None, inner: object = cipher) -> bytes:
                used.append(nonce)
                return inner.encrypt(nonce, data, told)  # type: ignore[attr-defined, no-any-return]

        sealed._cipher = Watched()
        for _ in range(20):
            sealed.write(pages(*range(7)), plain(7))
    assert len(used) == len(set(used)) == 280


@pytest.mark.parametrize("change", ["a bit", "another page", "an earlier form", "another key"])
def test_what_was_not_written_last_is_refused(change: str, store: HostMemory | HostFile) -> None:
    sealed = SealedPages(store, KEY)
    sealed.write(pages(1, 2), plain(2))
    before = store.data.copy()
    sealed.write(pages(1, 2), plain(2, seed=1))
    if change == "a bit":
        store.data[1, 17] ^= 4
    elif change == "another page":
        store.data[1] = store.data[2]
    elif change == "an earlier form":
        store.data[1] = before[1]
    else:
        sealed = SealedPages(store, bytes(32), sealed.versions)
    with pytest.raises(Tampered, match="not the one written last"):
        sealed.read(pages(1))
    if change != "another key":
        np.testing.assert_array_equal(sealed.read(pages(2)), plain(2, seed=1)[1:])


def test_a_file_keeps_pages_and_has_its_size(tmp_path: Path) -> None:
    store = HostFile(tmp_path / "pages", 5, 8)
    store.write(pages(4), np.arange(8, dtype=np.uint8)[None])
    store.sync()
    store.close()
    assert (tmp_path / "pages").stat().st_size == 40
    again = HostFile(tmp_path / "pages", 5, 8, make=False)
    assert again.read(pages(4)).tolist() == [list(range(8))]
    again.close()
    with pytest.raises(InputError, match="40 bytes; 6 pages of 8 bytes are 48"):
        HostFile(tmp_path / "pages", 6, 8, make=False)


def test_sizes_are_checked() -> None:
    with pytest.raises(InputError, match="one byte at least"):
        HostMemory(3, 0)


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers.aead", None)
    with pytest.raises(MissingDependency, match=r"memwall\[oblivious\]"):
        aes_gcm(KEY)

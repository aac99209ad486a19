"""Other libraries' indexes, where they are installed: what they answer; and how it is told that they are not."""

from __future__ import annotations

import numpy as np
import pytest

from memwall.studies import vector_peers
from memwall.studies.vector_peers import PAGE_BYTES, PeerAbsent, ask
from tests.retrieve.test_head_tree import drawn, squared

X, ASKED = drawn(1500, 16), drawn(10, 16, seed=4)


def test_what_is_absent_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PeerAbsent, match="unheard"):
        ask("unheard", X, ASKED)


def test_pages_of_a_stretch() -> None:
    assert list(vector_peers._pages(PAGE_BYTES - 1, 2)) == [0, 1]
    assert list(vector_peers._pages(PAGE_BYTES, PAGE_BYTES)) == [1]


def test_faiss_tells_where_its_lists_lie() -> None:
    pytest.importorskip("faiss")
    told = ask("faiss", X, ASKED, lists=40, rounds=3, ranked=20)
    assert told["owner"].min() >= 0
    assert told["ranking"].shape == (10, 20)
    lengths = np.bincount(told["owner"], minlength=40)
    assert (told["pages"] >= -(-lengths * (16 * 4 + 8) // PAGE_BYTES)).all()


def test_hnswlib_holds_all_vectors() -> None:
    pytest.importorskip("hnswlib")
    told = ask("hnswlib", X, ASKED, edges=8, ef=50, top=5)
    assert told["index_bytes"] > X.nbytes
    best = squared(ASKED, X).argsort(axis=1)[:, :5]
    assert np.mean([len({*a} & {*b}) / 5 for a, b in zip(told["found"], best, strict=True)]) > 0.8

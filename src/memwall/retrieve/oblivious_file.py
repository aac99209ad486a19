"""An oblivious map that outlives its process: a folder with sealed pages, sealed private state, and a journal.

    state            header (JSON: what anyone may know), then the private memory, sealed under the map's key
    pages-E          the host's pages, as the state with epoch E left them
    journal-G        pages written since the state of generation G was saved

Private memory is lost with its process unless it is saved, and pages mean nothing without it. So pages are written to
the journal, never over those that the saved state knows; `commit` saves the state under a new name, renames it, and
only then copies the journal into the pages. Whatever stops a process or a machine, opening the map finds the last
commit: a journal of the generation before was committed, and its copy is made up for; one of this generation was not,
and goes. But what was read after the commit has been seen, and pairs of bins are good for one use: the map is then
placed anew under a new page key, which reads and writes everything once.

The state's length follows from its settings. The host can give back the whole folder of an earlier time, which only a
counter out of its reach would tell: after putting back a copy yourself, call `rebuild`, so that no pair serves twice.

Values have any length up to `value_bytes`: two more bytes hold it. Pages have room for one item more than the paper's
bound, which small maps pass: with 2^8 and 2^10 items and c = 8, 10^9 accesses led to one load above it (simulated).
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from memwall.errors import DoesNotFit, InputError
from memwall.formats import checked_json
from memwall.formats.checked_json import Fields
from memwall.retrieve.bolt import DELETE, GET, MOST_ITEMS, PUT, MapSettings, ObliviousMap, PrivateStore, Replies
from memwall.retrieve.oblivious_ring import derived_key
from memwall.retrieve.untrusted import KEY_BYTES, TAG_BYTES, HostFile, Tampered, UntrustedStore, aes_gcm

MAGIC = b"MWMAP001"
LENGTH_BYTES = 2
_SEALED_AT_ONCE = 1 << 24
_COPIED_AT_ONCE = 1 << 12
MOST_HEADER_BYTES = 1 << 14


def new_key(path: Path) -> bytes:
    """32 random bytes in a new file that only its owner reads."""
    key = secrets.token_bytes(KEY_BYTES)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(key)
        file.flush()
        os.fsync(file.fileno())
    return key


def read_key(path: Path) -> bytes:
    """InputError for a file that is no key."""
    with path.open("rb") as file:
        key = file.read(KEY_BYTES + 1)
    if len(key) != KEY_BYTES:
        raise InputError(f"{path}: not a key of {KEY_BYTES} bytes (`memwall map create` makes one)")
    return key


class _Journaled(UntrustedStore):
    """Pages whose new forms go to a journal until they are copied."""

    def __init__(self, pages: HostFile, journal: Path, *, logged: bool) -> None:
        super().__init__(pages.num_pages, pages.page_bytes, logged=logged)
        self._pages, self._path = pages, journal
        self._journal: int | None = None
        self.changed = np.zeros(pages.num_pages, np.bool_)

    @property
    def begun(self) -> bool:
        """Whether there was an access; some move no page."""
        return self._journal is not None

    def begin(self) -> None:
        """The journal is on the disk before anything is read: that it is there says that something was."""
        if self._journal is None:
            self._journal = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            _sync_folder(self._path.parent)

    def _load(self, pages: np.ndarray) -> np.ndarray:
        found = self._pages.data[pages]
        for place in np.flatnonzero(self.changed[pages]):
            assert self._journal is not None
            data = os.pread(self._journal, self.page_bytes, int(pages[place]) * self.page_bytes)
            found[place] = np.frombuffer(data, np.uint8)
        return found

    def _save(self, pages: np.ndarray, data: np.ndarray) -> None:
        assert self._journal is not None
        for page, row in zip(pages.tolist(), data, strict=True):
            os.pwrite(self._journal, row.tobytes(), page * self.page_bytes)
        self.changed[pages] = True

    def sync(self) -> None:
        if self._journal is not None:
            os.fsync(self._journal)

    def close(self) -> None:
        if self._journal is not None:
            os.close(self._journal)
            self._journal = None


class MapFile:
    """An opened map. One process has it at a time; nothing lasts that was not committed."""

    def __init__(self, path: Path, key: bytes, *, logged: bool = False) -> None:
        """key: the map's, 32 bytes. logged: keep the trace of every access, not only its counts."""
        self.path, self._key, self._logged = path, key, logged
        if not (path / "state").is_file():
            raise InputError(f"{path}: no oblivious map (`memwall map create` makes one)")
        self._lock = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise InputError(f"{path}: another process has this map open") from None
        self.recovered = False
        try:
            self._open()
            if self._journal_path(self.generation).exists():
                self.recovered = True
                self.rebuild()
        except BaseException:
            os.close(self._lock)
            raise

    @classmethod
    def create(
        cls, path: Path, settings: MapSettings, key: bytes, items: Iterable[tuple[int, bytes]] = (), **more: Any
    ) -> MapFile:
        """A new folder, which appears whole or not at all. settings.value_bytes: the longest value."""
        if path.exists():
            raise InputError(f"{path} exists; a new map needs a name of its own")
        if settings.value_bytes >= 1 << 16:
            raise InputError(f"value_bytes {settings.value_bytes:,}: at most {(1 << 16) - 1:,}")
        inner = _inner(settings)
        keys, values = _rows(items, inner.value_bytes)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        try:
            _write(folder, inner, key, keys, values, epoch=0, generation=0)
            os.rename(folder, path)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        _sync_folder(path.parent)
        return cls(path, key, **more)

    def _journal_path(self, generation: int) -> Path:
        return self.path / f"journal-{generation}"

    def _open(self) -> None:
        header, page_key, private, changed = _read_state(self.path / "state", self._key)
        self.generation, self._epoch, settings = header["generation"], header["epoch"], private.settings
        shape = (settings.num_pages, settings.page_bytes)
        self._pages = HostFile(self.path / f"pages-{self._epoch}", *shape, make=False)
        committed = self._journal_path(self.generation - 1)
        if committed.exists():
            self._copy(committed, np.flatnonzero(changed))
        for other in self.path.glob("pages-*"):
            if other.name != f"pages-{self._epoch}":
                other.unlink()
        for other in self.path.glob("journal-*"):
            if other != self._journal_path(self.generation):
                other.unlink()
        self._store = _Journaled(self._pages, self._journal_path(self.generation), logged=self._logged)
        self.map = ObliviousMap(settings, self._store, page_key, private=private)

    def _copy(self, journal: Path, pages: np.ndarray) -> None:
        size = self._pages.page_bytes
        with journal.open("rb") as file:
            for start in range(0, len(pages), _COPIED_AT_ONCE):
                for page in pages[start : start + _COPIED_AT_ONCE].tolist():
                    self._pages.data[page] = np.frombuffer(os.pread(file.fileno(), size, page * size), np.uint8)
        self._pages.sync()
        journal.unlink()

    @property
    def settings(self) -> MapSettings:
        """As given: without the two bytes that hold a length, and the slot more that pages have."""
        told = replace(self.map.settings, value_bytes=self.map.settings.value_bytes - LENGTH_BYTES, page_slots=None)
        return told if _inner(told) == self.map.settings else replace(told, page_slots=self.map.settings.page_slots)

    @property
    def store(self) -> UntrustedStore:
        """What the host sees is in its `trace`."""
        return self._store

    def access(self, commands: Iterable[tuple[int, int, bytes]]) -> Replies:
        """(op, key, value) each, in order; of GET and DELETE the value does not matter. Values as they are stored."""
        told = list(commands)
        pairs = [(key, value if op == PUT else b"") for op, key, value in told]
        keys, values = _rows(pairs, self.map.settings.value_bytes)
        ops = np.array([op for op, _, _ in told], np.uint8)
        self._store.begin()
        return self.map.access(ops, keys, values)

    def get(self, keys: Iterable[int]) -> list[bytes | None]:
        """The value of each key, or None."""
        return self._values(self.access([(GET, key, b"") for key in keys]))

    def put(self, items: Mapping[int, bytes] | Iterable[tuple[int, bytes]]) -> list[bytes | None]:
        """What each key had before. DoesNotFit where the map is full: those before it are in."""
        pairs = list(items.items() if isinstance(items, Mapping) else items)
        found = self.access([(PUT, key, value) for key, value in pairs])
        full = np.flatnonzero(found.statuses == 2)
        if len(full):
            raise DoesNotFit(
                f"the map is full ({self.settings.capacity:,} items): {len(full)} of {len(pairs)} keys are not in, "
                f"{pairs[full[0]][0]} first; `memwall map rebuild --capacity` makes it larger"
            )
        return self._values(found)

    def delete(self, keys: Iterable[int]) -> list[bytes | None]:
        """What each key had."""
        return self._values(self.access([(DELETE, key, b"") for key in keys]))

    def _values(self, found: Replies) -> list[bytes | None]:
        return [
            unpacked(value) if status == 1 else None
            for status, value in zip(found.statuses.tolist(), found.values, strict=True)
        ]

    def commit(self) -> None:
        """All accesses so far last. After an error that stopped the map it is refused: open it again."""
        if not self._store.begun:
            return
        self.map._check_running()
        self._store.sync()
        changed = self._store.changed
        _write_state(
            self.path / "state", self.map, self._key, epoch=self._epoch, generation=self.generation + 1, changed=changed
        )
        self._store.close()
        self._copy(self._journal_path(self.generation), np.flatnonzero(changed))
        self.generation += 1
        trace, self._store = self._store.trace, _Journaled(
            self._pages, self._journal_path(self.generation), logged=self._logged
        )  # fmt: skip
        self._store.trace = trace
        self.map.pages.store = self._store

    def rebuild(self, settings: MapSettings | None = None) -> None:
        """Places all items of the last commit anew: new pairs, a new page key, and where given another shape.

        settings: as for `create`; values must not become shorter than those that are held.
        """
        if self._store.begun:
            raise InputError(f"{self.path}: accesses that were not committed; commit before a rebuild")
        inner = self.map.settings
        if settings is not None:
            inner = _inner(settings)
        keys, values = self.map.items()
        if values.shape[1] != inner.value_bytes:
            keys, values = _rows(
                [(key, unpacked(value)) for key, value in zip(keys.tolist(), values, strict=True)], inner.value_bytes
            )
        self._store.close()
        self._pages.close()
        _write(self.path, inner, self._key, keys, values, epoch=self.generation + 1, generation=self.generation + 1)
        self._journal_path(self.generation).unlink(missing_ok=True)
        self._open()

    def close(self) -> None:
        """Without a commit before it, accesses since the last one are undone, and the next to open places anew."""
        self._store.close()
        self._pages.close()
        os.close(self._lock)

    def __enter__(self) -> MapFile:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Commits where nothing went wrong."""
        try:
            if kind is None:
                self.commit()
        finally:
            self.close()


def _inner(settings: MapSettings) -> MapSettings:
    """Of the map inside a file."""
    slots = int(settings.load_bound) + 1 if settings.page_slots is None else settings.page_slots
    return replace(settings, value_bytes=settings.value_bytes + LENGTH_BYTES, page_slots=slots)


def unpacked(row: np.ndarray) -> bytes:
    """A value without its length."""
    data = row.tobytes()
    return data[LENGTH_BYTES : LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES], "little")]


def _rows(items: Iterable[tuple[int, bytes]], value_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys, and values with their lengths, filled up with zeros."""
    pairs = list(items)
    most = value_bytes - LENGTH_BYTES
    for key, value in pairs:
        if len(value) > most:
            raise InputError(f"the value of key {key} has {len(value):,} bytes; this map's have at most {most:,}")
        if not 0 <= key < 1 << 32:
            raise InputError(f"key {key}: a whole number from 0 to {(1 << 32) - 1:,}")
    data = b"".join([len(value).to_bytes(LENGTH_BYTES, "little") + value.ljust(most, b"\0") for _, value in pairs])
    return np.array([key for key, _ in pairs], np.uint32), np.frombuffer(data, np.uint8).reshape(-1, value_bytes)


# ---- the state file ------------------------------------------------------------------------------------------------


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(
    folder: Path,
    settings: MapSettings,
    key: bytes,
    keys: np.ndarray,
    values: np.ndarray,
    *,
    epoch: int,
    generation: int,
) -> None:
    """Pages and a state of a map with these items."""
    store = HostFile(folder / f"pages-{epoch}", settings.num_pages, settings.page_bytes)
    try:
        made = ObliviousMap(settings, store, secrets.token_bytes(KEY_BYTES))
        made.fill(keys, values)
        store.sync()
    finally:
        store.close()
    nothing = np.zeros(settings.num_pages, np.bool_)
    _write_state(folder / "state", made, key, epoch=epoch, generation=generation, changed=nothing)


def _write_state(
    path: Path, made: ObliviousMap, key: bytes, *, epoch: int, generation: int, changed: np.ndarray
) -> None:
    header = json.dumps(
        {"settings": asdict(made.settings), "epoch": epoch, "generation": generation, "nonce": secrets.token_hex(8)}
    ).encode()
    private = made.private
    parts = [made.pages.key, private.seed.to_bytes(8, "little")]
    parts += [private.arrays[name].tobytes() for name in PrivateStore.shapes(made.settings)]
    payload = b"".join(parts)
    payload += np.packbits(changed).tobytes()
    cipher, prefix = aes_gcm(derived_key(key, "memwall map state")), bytes.fromhex(json.loads(header)["nonce"])
    temporary = path.with_name("state.new")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(MAGIC + len(header).to_bytes(4, "little") + header)
        for place, start in enumerate(range(0, len(payload), _SEALED_AT_ONCE)):
            part = payload[start : start + _SEALED_AT_ONCE]
            file.write(cipher.encrypt(prefix + place.to_bytes(4, "little"), part, header))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def _read_header(path: Path, head: bytes) -> tuple[dict[str, Any], MapSettings]:
    fields = Fields(checked_json.parse(head, f"{path}: header", max_depth=3), f"{path}: header")
    fields.only("settings", "epoch", "generation", "nonce")
    inner = Fields(fields.mapping("settings"), f"{path}: settings")
    names = ("capacity", "value_bytes", "bin_items", "private_share", "slots_per_item", "page_slots")
    inner.only(*names)
    slots = inner.integer("page_slots", 1, 32) if inner.values.get("page_slots") is not None else None
    settings = MapSettings(
        capacity=inner.integer("capacity", 4, MOST_ITEMS),
        value_bytes=inner.integer("value_bytes", 1, 1 << 20),
        bin_items=inner.integer("bin_items", 1, 24),
        private_share=inner.number("private_share", 0, 1),
        slots_per_item=inner.number("slots_per_item", 1.25, 64),
        page_slots=slots,
    )
    nonce = fields.text("nonce")
    if len(nonce) != 16 or not all(letter in "0123456789abcdef" for letter in nonce):
        raise fields.error("nonce", nonce, "16 hexadecimal digits")
    found = {name: fields.integer(name, 0, 1 << 62) for name in ("epoch", "generation")}
    return {**found, "nonce": bytes.fromhex(nonce)}, settings


def _read_state(path: Path, key: bytes) -> tuple[dict[str, Any], bytes, PrivateStore, np.ndarray]:
    from cryptography.exceptions import InvalidTag

    cipher = aes_gcm(derived_key(key, "memwall map state"))
    with path.open("rb") as file:
        start = file.read(len(MAGIC) + 4)
        length = int.from_bytes(start[len(MAGIC) :], "little")
        if not start.startswith(MAGIC) or length > MOST_HEADER_BYTES:
            raise InputError(f"{path}: no state of an oblivious map")
        head = file.read(length)
        header, settings = _read_header(path, head)
        shapes = PrivateStore.shapes(settings)
        sizes = {name: int(np.prod(shape)) * np.dtype(dtype).itemsize for name, (shape, dtype) in shapes.items()}
        size = KEY_BYTES + 8 + sum(sizes.values()) + -(-settings.num_pages // 8)
        wanted = len(start) + length + size + TAG_BYTES * -(-size // _SEALED_AT_ONCE)
        if os.fstat(file.fileno()).st_size != wanted:
            raise InputError(f"{path}: its header speaks of {wanted:,} bytes; it has {path.stat().st_size:,}")
        payload = bytearray()
        try:
            for place, done in enumerate(range(0, size, _SEALED_AT_ONCE)):
                part = file.read(min(_SEALED_AT_ONCE, size - done) + TAG_BYTES)
                payload += cipher.decrypt(header["nonce"] + place.to_bytes(4, "little"), part, head)
        except InvalidTag:
            raise Tampered(f"{path}: the key is another one, or the file was changed") from None
    page_key, at, arrays = bytes(payload[:KEY_BYTES]), KEY_BYTES + 8, {}
    for name, (shape, dtype) in shapes.items():
        arrays[name] = np.frombuffer(payload, dtype, int(np.prod(shape)), at).reshape(shape).copy()
        at += sizes[name]
    changed = np.unpackbits(np.frombuffer(payload, np.uint8, offset=at), count=settings.num_pages).astype(np.bool_)
    seed = int.from_bytes(payload[KEY_BYTES : KEY_BYTES + 8], "little")
    return header, page_key, PrivateStore(settings, arrays, seed), changed

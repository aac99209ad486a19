"""Lists of vectors in pages: where each lies, what stands in front of them, and how one is coded.

    header          int32: lists, vectors, dimensions, page where lists begin
    a record a list int32 page after that, uint16 place in the page, int32 vectors, uint16 pages; compressed: uint64
                    bytes first
    to 4096, zeros; then the lists: [int32 id | vector] for each vector, or with `ids_last` all vectors, then all ids

This is the layout of microsoft/SPTAG's lists. A list goes where its bytes in excess of whole pages fill what is left of
the current page best, so it touches ceil(bytes / 4096) pages and never one more.

`delta` keeps the difference of a vector's bits from its head's (as unsigned numbers, so nothing is lost); `compress`
packs each list with Zstandard and a dictionary learned from some lists (library `zstandard`).

Units: bytes, pages of 4096 bytes. Cost: 12 bytes a list resident (20 compressed), 4 for its checksum.
"""

from __future__ import annotations

import bisect
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from memwall.errors import InputError, MissingDependency

LIST_PAGE_BYTES = 4096
_HEADER_COUNT = 4
_RECORD = np.dtype([("page", "<i4"), ("place", "<u2"), ("count", "<i4"), ("pages", "<u2")])
_PACKED_RECORD = np.dtype([("nbytes", "<u8"), *_RECORD.descr])
_MOST_PAGES = (1 << 16) - 1
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}


@dataclass(frozen=True, slots=True, kw_only=True)
class ListFormat:
    """How a list is coded. dictionary: of compression, empty for none."""

    dtype: np.dtype[Any]
    dimensions: int
    ids_last: bool = False
    delta: bool = False
    compress: bool = False
    dictionary: bytes = b""

    @property
    def vector_bytes(self) -> int:
        return self.dimensions * self.dtype.itemsize

    @property
    def entry_bytes(self) -> int:
        """Of a vector with its id."""
        return self.vector_bytes + 4

    def longest(self, page_limit: int) -> int:
        """Vectors of a list of so many pages, before it is compressed."""
        count = page_limit * LIST_PAGE_BYTES // self.entry_bytes
        if count < 1:
            least = -(-self.entry_bytes // LIST_PAGE_BYTES)
            raise InputError(f"a list of {page_limit} pages holds no vector: one takes {least}; allow so many")
        return count

    def encode(self, ids: np.ndarray, vectors: np.ndarray, head: np.ndarray) -> bytes:
        """ids int32 [n], vectors [n, d] and their head [d] -> the bytes of a list."""
        if self.delta:
            vectors = (self._bits(vectors) - self._bits(head)).view(self.dtype)
        found = self._joined(np.ascontiguousarray(ids, "<i4"), np.ascontiguousarray(vectors))
        return self._compressor().compress(found) if self.compress else found

    def decode(self, stored: memoryview | bytes, count: int, head: np.ndarray) -> np.ndarray:
        """The bytes of a list -> uint8, the same uncompressed and without delta."""
        raw = bytes(stored)
        if self.compress:
            try:
                raw = self._decompressor().decompress(raw, max_output_size=count * self.entry_bytes)
            except _zstandard().ZstdError as error:
                raise InputError(f"a list cannot be unpacked: {error}") from None
        if len(raw) != count * self.entry_bytes:
            raise InputError(f"a list of {count} vectors has {len(raw)} bytes, not {count * self.entry_bytes}")
        found = np.frombuffer(raw, np.uint8).copy()
        if self.delta:
            vectors = self.vectors(found, count)
            vectors[...] = (self._bits(np.ascontiguousarray(vectors)) + self._bits(head)).view(self.dtype)
        return found

    def vectors(self, plain: np.ndarray, count: int) -> np.ndarray:
        """A view of the vectors [n, d] in the bytes of an uncompressed list."""
        if self.ids_last:
            return plain[: count * self.vector_bytes].view(self.dtype).reshape(count, self.dimensions)
        return plain.view(self._entry())["vector"]

    def ids(self, plain: np.ndarray, count: int) -> np.ndarray:
        """The same of ids."""
        return plain[count * self.vector_bytes :].view("<i4") if self.ids_last else plain.view(self._entry())["id"]

    def _entry(self) -> np.dtype[Any]:
        return np.dtype([("id", "<i4"), ("vector", self.dtype, (self.dimensions,))])

    def _joined(self, ids: np.ndarray, vectors: np.ndarray) -> bytes:
        if self.ids_last:
            return vectors.tobytes() + ids.tobytes()
        found = np.empty(len(ids), self._entry())
        found["id"], found["vector"] = ids, vectors
        return found.tobytes()

    def _bits(self, x: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(x, self.dtype).view(_UNSIGNED[self.dtype.itemsize])

    def _compressor(self) -> Any:
        return _zstandard().ZstdCompressor(level=3, dict_data=self._dict_data(), write_content_size=False)

    def _decompressor(self) -> Any:
        return _zstandard().ZstdDecompressor(dict_data=self._dict_data())

    def _dict_data(self) -> Any:
        return _zstandard().ZstdCompressionDict(self.dictionary) if self.dictionary else None


def learned_dictionary(lists: list[bytes], nbytes: int) -> bytes:
    """Learned from uncompressed lists; empty where they are too few to learn from."""
    zstandard = _zstandard()
    try:
        return zstandard.train_dictionary(nbytes, lists).as_bytes()
    except zstandard.ZstdError:
        return b""


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError:
        raise MissingDependency("zstandard", "zstd") from None
    return zstandard


# ---- places --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Directory:
    """Where lists lie: a record [h] each, as the file has it. entry_bytes: of a vector with its id, uncompressed."""

    records: np.ndarray
    num_vectors: int
    dimensions: int
    entry_bytes: int

    @property
    def compressed(self) -> bool:
        return self.records.dtype == _PACKED_RECORD

    @property
    def nbytes(self) -> np.ndarray:
        """int64 [h]: of each list as it is stored."""
        return stored_bytes(self.records, self.entry_bytes)

    @property
    def first_page(self) -> int:
        """Where lists begin."""
        return -(-(_HEADER_COUNT * 4 + self.records.nbytes) // LIST_PAGE_BYTES)

    @property
    def total_bytes(self) -> int:
        """Of header and lists, in whole pages."""
        ends = self.records["page"].astype(np.int64) + self.records["pages"]
        return (self.first_page + int(ends.max(initial=0))) * LIST_PAGE_BYTES

    def to_bytes(self) -> bytes:
        """Header and records, up to where lists begin."""
        told = np.array([len(self.records), self.num_vectors, self.dimensions, self.first_page], "<i4")
        return (told.tobytes() + self.records.tobytes()).ljust(self.first_page * LIST_PAGE_BYTES, b"\0")

    @classmethod
    def parse(cls, stored: np.ndarray, entry_bytes: int, compressed: bool, source: str) -> Directory:
        """stored: uint8, all of header and lists, of which the lists are not looked at. InputError where they cannot
        lie there as they are told to.
        """
        record = _PACKED_RECORD if compressed else _RECORD
        if len(stored) < 16:
            raise InputError(f"{source}: {len(stored)} bytes are too few for lists")
        num_lists, num_vectors, dimensions, first = stored[:16].view("<i4").tolist()
        end = 16 + num_lists * record.itemsize
        if not (num_lists >= 0 and num_vectors >= 0 and dimensions > 0 and end <= len(stored)):
            raise InputError(f"{source}: tells of {num_lists} lists of {num_vectors} vectors: it is too short for them")
        found = cls(
            records=np.array(stored[16:end]).view(record), num_vectors=num_vectors, dimensions=dimensions,
            entry_bytes=entry_bytes,
        )  # fmt: skip
        rows = found.records
        wrong = (rows["page"] < 0) | (rows["count"] < 0) | (rows["count"] > num_vectors)
        if compressed:
            wrong |= rows["nbytes"] > len(stored)
        wrong |= rows["place"] >= LIST_PAGE_BYTES
        touched = -(-(rows["place"].astype(np.int64) + found.nbytes) // LIST_PAGE_BYTES)
        wrong |= rows["pages"] != touched
        wrong |= (rows["page"].astype(np.int64) + touched + first) * LIST_PAGE_BYTES > len(stored)
        if wrong.any() or first != found.first_page or found.total_bytes != len(stored):
            at = int(np.argmax(wrong)) if wrong.any() else 0
            raise InputError(f"{source}: list {at} of {num_lists} is not where {len(stored):,} bytes could hold it")
        return found


def stored_bytes(records: np.ndarray, entry_bytes: int) -> np.ndarray:
    """int64: bytes of lists by their records."""
    if records.dtype == _PACKED_RECORD:
        return records["nbytes"].astype(np.int64)
    return records["count"].astype(np.int64) * entry_bytes


def placed(
    counts: np.ndarray, nbytes: np.ndarray, *, num_vectors: int, dimensions: int, entry_bytes: int, compressed: bool
) -> Directory:
    """Places for lists of so many vectors and bytes, best fit on what they take beyond whole pages."""
    most = int(nbytes.max(initial=0))
    if -(-most // LIST_PAGE_BYTES) > _MOST_PAGES:
        raise InputError(f"a list of {most:,} bytes is too long: at most {_MOST_PAGES} pages; set a limit on pages")
    excess = nbytes % LIST_PAGE_BYTES
    waiting: dict[int, list[int]] = {}
    for at in np.flatnonzero(nbytes)[::-1].tolist():
        waiting.setdefault(int(excess[at]), []).append(at)
    sizes = sorted(waiting)
    records = np.zeros(len(nbytes), _PACKED_RECORD if compressed else _RECORD)
    now = 0
    while sizes:
        free = -now % LIST_PAGE_BYTES  # 0 at a page's beginning, where anything fits: the largest excess first
        fitting = bisect.bisect_right(sizes, free) - 1 if free else len(sizes) - 1
        if fitting < 0 or (free and sizes[fitting] == 0):  # whole pages begin at a page
            now += free
            continue
        size = sizes[fitting]
        at = waiting[size].pop()
        if not waiting[size]:
            del sizes[fitting]
        records[at]["page"], records[at]["place"] = divmod(now, LIST_PAGE_BYTES)
        now += int(nbytes[at])
    records["count"] = counts
    records["pages"] = -(-(records["place"].astype(np.int64) + nbytes) // LIST_PAGE_BYTES)
    if compressed:
        records["nbytes"] = nbytes
    return Directory(records=records, num_vectors=num_vectors, dimensions=dimensions, entry_bytes=entry_bytes)


def checksum(stored: bytes | memoryview) -> int:
    """CRC-32 of a list's stored bytes."""
    return zlib.crc32(stored)

"""Reader of GGUF files (versions 2 and 3, little-endian): metadata, and tensors as raw blocks through a memory map.

Such files come from strangers: each length is checked against what is left of the file before anything is built from
it, tensors against the file's size and each other. Block forms are in `gguf_blocks`.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from memwall.errors import InputError
from memwall.formats.checked_json import shown
from memwall.formats.gguf_blocks import BLOCKS, Block

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
MAX_NAME_BYTES = 1024
MAX_ARRAY_DEPTH = 2
MAX_ALIGNMENT = 1 << 16
STRING, ARRAY, BOOL = 8, 9, 7
NUMBERS: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"), 1: np.dtype("i1"), 2: np.dtype("<u2"), 3: np.dtype("<i2"), 4: np.dtype("<u4"),
    5: np.dtype("<i4"), 6: np.dtype("<f4"), BOOL: np.dtype("?"), 10: np.dtype("<u8"), 11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}  # fmt: skip
LEAST_ITEM_BYTES = {STRING: 8, ARRAY: 12} | {kind: dtype.itemsize for kind, dtype in NUMBERS.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """shape: rows first, as NumPy has it. start: of its bytes, from the beginning of the file."""

    name: str
    block: Block
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.block.values * self.block.nbytes


class GgufFile:
    """metadata: key -> number, text, flag, list of texts, or array of numbers."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._file = open(self.path, "rb")  # noqa: SIM115 - the map reads it until `close`
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read: {error.strerror or error}") from None
        try:
            self.nbytes = os.fstat(self._file.fileno()).st_size
            if self.nbytes < 24 or self._file.read(4) != MAGIC:
                raise InputError(f"{self.path}: not a GGUF file")
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
            self.metadata, self.tensors = self._read()
        except BaseException:
            self._file.close()
            raise

    def raw(self, name: str) -> np.ndarray:
        """uint8 [..., blocks of a row, bytes of a block] on the map; the leading axes are the tensor's."""
        info = self.info(name)
        flat = np.frombuffer(self._map, np.uint8, info.nbytes, info.start)
        return flat.reshape(*info.shape[:-1], info.shape[-1] // info.block.values, info.block.nbytes)

    def info(self, name: str) -> GgufTensor:
        try:
            return self.tensors[name]
        except KeyError:
            raise InputError(f"{self.path}: holds no tensor {shown(name)}") from None

    def drop_pages(self) -> None:
        """Takes the file's pages out of this process's resident memory; they are read again when touched."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close()

    def _read(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        reader = _Reader(self._map, str(self.path))
        version = reader.number(4)
        if version not in VERSIONS:
            hint = " (big-endian?)" if version > 1 << 16 else ""
            raise InputError(f"{self.path}: GGUF version {version}{hint}; versions 2 and 3 are read")
        num_tensors, num_keys = reader.count(LEAST_ITEM_BYTES[STRING] + 16), reader.count(LEAST_ITEM_BYTES[STRING] + 5)
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = reader.text(MAX_NAME_BYTES)
            if key in metadata:
                raise InputError(f"{self.path}: the key {shown(key)} stands twice")
            metadata[key] = reader.value(reader.number(4))
        infos = [_info(reader) for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise InputError(f"{self.path}: general.alignment is {shown(alignment)}; it must be a power of two")
        start = -(-reader.position // alignment) * alignment
        return metadata, self._placed(infos, start, alignment)

    def _placed(
        self, infos: list[tuple[str, tuple[int, ...], int, int]], data: int, alignment: int
    ) -> dict[str, GgufTensor]:
        """Tensors where they lie; refuses those that leave the file or overlap."""
        found: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in infos:
            place = f"{self.path}: tensor {shown(name)}"
            if name in found:
                raise InputError(f"{place} stands twice")
            if kind not in BLOCKS:
                known = ", ".join(block.name for block in BLOCKS.values())
                raise InputError(f"{place} has the type {kind}, which is not read; known are {known}")
            block = BLOCKS[kind]
            if offset % alignment or shape[-1] % block.values:
                raise InputError(f"{place}: shape {list(shape)} or place {offset} does not suit {block.name}")
            info = found[name] = GgufTensor(name=name, block=block, shape=shape, start=data + offset)
            if info.start + info.nbytes > self.nbytes:
                raise InputError(f"{place} reaches beyond the end of the file ({self.nbytes:,} bytes): truncated?")
        last, end = "", data
        for info in sorted(found.values(), key=lambda info: info.start):
            if info.start < end:
                raise InputError(f"{self.path}: tensors {shown(last)} and {shown(info.name)} overlap")
            last, end = info.name, info.start + info.nbytes
        return found


def _info(reader: _Reader) -> tuple[str, tuple[int, ...], int, int]:
    name, num_dims = reader.text(MAX_NAME_BYTES), reader.number(4)
    if not 1 <= num_dims <= MAX_DIMENSIONS:
        raise InputError(f"{reader.source}: tensor {shown(name)} has {num_dims} dimensions")
    shape = tuple(reader.number(8) for _ in range(num_dims))[::-1]
    if any(not 0 < size < 1 << 40 for size in shape) or math.prod(shape) >= 1 << 48:
        raise InputError(f"{reader.source}: tensor {shown(name)} has the absurd shape {list(shape)}")
    return name, shape, reader.number(4), reader.number(8)


class _Reader:
    """Walks over the header's bytes, never past the end."""

    def __init__(self, data: mmap.mmap, source: str) -> None:
        self._data, self.source, self.position = data, source, len(MAGIC)

    def number(self, nbytes: int) -> int:
        return int(struct.unpack("<I" if nbytes == 4 else "<Q", self._take(nbytes))[0])

    def count(self, least_bytes: int) -> int:
        """How many things of at least so many bytes follow; never more than the file can hold."""
        found = self.number(8)
        if found > (len(self._data) - self.position) // least_bytes:
            raise InputError(
                f"{self.source}: declares {found:,} entries, more than the file holds: damaged or truncated"
            )
        return found

    def text(self, most_bytes: int) -> str:
        length = self.number(8)
        if length > most_bytes:
            raise InputError(f"{self.source}: a name of {length:,} bytes; the most is {most_bytes:,}")
        return self._take(length).decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == STRING:
            return self.text(len(self._data))
        if kind == ARRAY:
            if depth == MAX_ARRAY_DEPTH:
                raise InputError(f"{self.source}: arrays nested deeper than {MAX_ARRAY_DEPTH}")
            of = self.number(4)
            if of not in LEAST_ITEM_BYTES:
                raise InputError(f"{self.source}: an array of unknown type {of}")
            count = self.count(LEAST_ITEM_BYTES[of])
            if of in NUMBERS:
                return np.frombuffer(self._take(count * NUMBERS[of].itemsize), NUMBERS[of])
            return [self.value(of, depth + 1) for _ in range(count)]
        if kind not in NUMBERS:
            raise InputError(f"{self.source}: a value of unknown type {kind}")
        return np.frombuffer(self._take(NUMBERS[kind].itemsize), NUMBERS[kind])[0].item()

    def _take(self, nbytes: int) -> bytes:
        taken = self._data[self.position : self.position + nbytes]
        if len(taken) < nbytes:
            raise InputError(f"{self.source}: ends in the middle of its header: truncated?")
        self.position += nbytes
        return taken


class GgufFields:
    """Checked reading of metadata, with the architecture's prefix where a key begins with a dot."""

    def __init__(self, metadata: Mapping[str, Any], source: str) -> None:
        self.metadata, self.source = metadata, source
        self.architecture = self.text("general.architecture")

    def has(self, key: str) -> bool:
        return self._full(key) in self.metadata

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 40:
            raise self._error(key, value, "a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self._error(key, value, "a number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self._error(key, value, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._error(key, value, "a text")
        return value

    def texts(self, key: str) -> list[str]:
        value = self._get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._error(key, value, "a list of texts")
        return value

    def numbers(self, key: str) -> Iterator[float]:
        value = self._get(key, np.empty(0))
        if not isinstance(value, np.ndarray):
            raise self._error(key, value, "a list of numbers")
        return iter(value.tolist())

    def _full(self, key: str) -> str:
        return self.architecture + key if key.startswith(".") else key

    def _get(self, key: str, default: Any) -> Any:
        return self.metadata.get(self._full(key) if key.startswith(".") else key, default)

    def _error(self, key: str, value: Any, wanted: str) -> InputError:
        got = "missing" if value is None else shown(value)
        return InputError(f"{self.source}: {self._full(key)} must be {wanted}, got {got}")

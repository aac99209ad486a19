"""Own reader and writer of safetensors files.

The reader maps the file and checks the whole header before it hands out anything: declared sizes against the file's
size, dtypes, shapes, gaps, overlaps. Arrays are views on the map, so a tensor costs memory only while it is read;
`drop_pages` gives that back.

The writer puts the header first from declared shapes, takes tensors in any order and in pieces, and renames the
finished file into place, so that an interrupt leaves no half file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np

from memwall.errors import DoesNotFit, InputError
from memwall.formats import checked_json
from memwall.formats.checked_json import shown

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 16
MAX_NAME_LENGTH = 4096
ALIGNMENT_BYTES = 64
_LENGTH_BYTES = 8
_COPY_BYTES = 1 << 20
_FOLIO_BYTES = 2 << 20
"""The most that one touched page of a mapped file brings in with it on Linux: a huge page's worth."""

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(dtype: Any) -> str:
    """Safetensors name of a NumPy (or ml_dtypes) dtype; a safetensors name passes through."""
    if isinstance(dtype, str) and dtype in DTYPES:
        return dtype
    name = _NAMES.get(np.dtype(dtype))
    if name is None:
        raise InputError(f"dtype {dtype} has no place in a safetensors file; known are {', '.join(DTYPES)}")
    return name


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Where one tensor lies. `start` and `stop` are bytes from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        return DTYPES[self.dtype]


def parse_header(header: bytes, data_bytes: int, source: str) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and metadata of a header whose file holds `data_bytes` after it. Refuses all that does not add up."""
    document = checked_json.parse(header, f"{source}: header", max_depth=4)
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{source}: __metadata__ must map strings to strings")
    data_start = _LENGTH_BYTES + len(header)
    tensors = {name: _tensor_info(name, entry, data_start, data_bytes, source) for name, entry in document.items()}
    _check_layout(tensors.values(), data_start, data_bytes, source)
    return tensors, metadata


def _tensor_info(name: str, entry: Any, data_start: int, data_bytes: int, source: str) -> TensorInfo:
    place = f"{source}: tensor {shown(name)}"
    if len(name) > MAX_NAME_LENGTH:
        raise InputError(f"{place}: name longer than {MAX_NAME_LENGTH} characters")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{place}: expected exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputError(f"{place}: unknown dtype {shown(dtype)}; known are {', '.join(DTYPES)}")
    if not _are_counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise InputError(f"{place}: the shape must be at most {MAX_DIMENSIONS} whole numbers from 0 to 2^48")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise InputError(f"{place}: data_offsets must be two whole numbers from 0 to 2^48")
    start, stop = offsets
    if not start <= stop <= data_bytes:
        raise InputError(
            f"{place}: bytes {start} to {stop} are out of range: the file holds {data_bytes} bytes of data"
        )
    wanted = math.prod(shape) * DTYPES[dtype].itemsize
    if wanted != stop - start:
        raise InputError(f"{place}: {dtype} {shape} needs {wanted} bytes, but data_offsets span {stop - start}")
    if math.prod(size for size in shape if size) >= 2**60:
        raise InputError(f"{place}: absurd shape {shape}")
    return TensorInfo(name=name, dtype=dtype, shape=tuple(shape), start=data_start + start, stop=data_start + stop)


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= 2**48 for value in values)


def _check_layout(tensors: Iterable[TensorInfo], data_start: int, data_bytes: int, source: str) -> None:
    position = data_start
    for info in sorted(tensors, key=lambda info: (info.start, info.stop)):
        if info.start != position:
            fault = "overlaps the tensor before it" if info.start < position else "leaves a gap before it"
            raise InputError(f"{source}: tensor {shown(info.name)} {fault} (at byte {info.start - data_start})")
        position = info.stop
    if position != data_start + data_bytes:
        raise InputError(f"{source}: {data_start + data_bytes - position} bytes after the last tensor belong to none")


def read_header(path: Path) -> tuple[bytes, int]:
    """Header bytes of a file and the count of data bytes behind it; the declared length is checked first."""
    try:
        with open(path, "rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            first = file.read(_LENGTH_BYTES)
            if len(first) < _LENGTH_BYTES:
                raise InputError(f"{path}: {len(first)} bytes are too few for a safetensors file")
            length = int.from_bytes(first, "little")
            if length > MAX_HEADER_BYTES:
                raise InputError(
                    f"{path}: declares a header of {length:,} bytes; the most allowed is {MAX_HEADER_BYTES:,}"
                )
            if _LENGTH_BYTES + length > file_bytes:
                raise InputError(
                    f"{path}: declares a header of {length:,} bytes, but the file has {file_bytes:,}: truncated?"
                )
            header = file.read(length)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    if len(header) != length or not header.startswith(b"{"):
        raise InputError(f"{path}: not a safetensors file (the header is no JSON object)")
    return header, file_bytes - _LENGTH_BYTES - length


class SafetensorsFile:
    """A checked, memory-mapped safetensors file. Arrays it gives are read-only views that keep the map alive."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        header, data_bytes = read_header(self.path)
        self._tensors, self.metadata = parse_header(header, data_bytes, str(self.path))
        self.header_sha256 = hashlib.sha256(header).hexdigest()
        self.data_start = _LENGTH_BYTES + len(header)
        self.nbytes = self.data_start + data_bytes
        self._file = open(self.path, "rb")  # noqa: SIM115 - `pieces` maps parts of it until `close`
        if os.fstat(self._file.fileno()).st_size != self.nbytes:
            self._file.close()
            raise InputError(f"{self.path}: changed while it was being opened")
        self._map: mmap.mmap | None = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)

    def names(self) -> list[str]:
        return list(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def info(self, name: str) -> TensorInfo:
        try:
            return self._tensors[name]
        except KeyError:
            raise InputError(f"{self.path}: holds no tensor {shown(name)}") from None

    def tensor(self, name: str) -> np.ndarray:
        """Read-only view on the file; nothing is read before it is touched."""
        info = self.info(name)
        if info.nbytes == 0:
            return np.empty(info.shape, info.numpy_dtype)
        flat = np.frombuffer(self._mapped(), info.numpy_dtype, math.prod(info.shape), info.start)
        return flat.reshape(info.shape)

    def alone(self, name: str) -> np.ndarray:
        """The tensor on a map of its own, which goes with the array: no page beside the tensor becomes resident.

        On the map of the whole file a touched page may bring in all that the system keeps beside it (2 MiB with large
        folios).
        """
        info = self.info(name)
        return self._window(info, info.start, info.shape) if info.nbytes else self.tensor(name)

    def pieces(self, name: str, most_bytes: int, multiple: int = 1) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, rows) of a tensor in order, read-only, in pieces of a multiple of `multiple` rows that take
        at most `most_bytes` where so few rows do.

        Each piece has a map of its own, as in `alone`: no more than the piece becomes resident.
        """
        info = self.info(name)
        if not info.shape or not info.nbytes:
            yield 0, self.tensor(name)
            return
        row_bytes = info.nbytes // info.shape[0]
        step = max(most_bytes // row_bytes // multiple, 1) * multiple
        for first in range(0, info.shape[0], step):
            count = min(step, info.shape[0] - first)
            yield first, self._window(info, info.start + first * row_bytes, (count, *info.shape[1:]))

    def _window(self, info: TensorInfo, start: int, shape: tuple[int, ...]) -> np.ndarray:
        self._mapped()
        count = math.prod(shape)
        begin = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        nbytes = start - begin + count * info.numpy_dtype.itemsize
        window = mmap.mmap(self._file.fileno(), nbytes, access=mmap.ACCESS_READ, offset=begin)
        return np.frombuffer(window, info.numpy_dtype, count, start - begin).reshape(shape)

    def drop_pages(self, name: str | None = None, start: int = 0, stop: int | None = None) -> None:
        """Takes pages of a tensor (or of bytes `start` to `stop` of the file) out of this process's resident memory.

        They are read again from the file when touched. What the system may have brought in beside them goes too.
        """
        if name is not None:
            info = self.info(name)
            start, stop = info.start, info.stop
        stop = self.nbytes if stop is None else min(stop, self.nbytes)
        first = start // _FOLIO_BYTES * _FOLIO_BYTES
        stop = min(-(-stop // _FOLIO_BYTES) * _FOLIO_BYTES, self.nbytes)
        if stop > first and hasattr(mmap, "MADV_DONTNEED"):
            self._mapped().madvise(mmap.MADV_DONTNEED, first, stop - first)

    def close(self) -> None:
        """Unmaps the file; while arrays on it live, the map stays until the last of them goes."""
        mapped, self._map = self._map, None
        self._file.close()
        if mapped is not None:
            try:
                mapped.close()
            except BufferError:
                return

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close()

    def _mapped(self) -> mmap.mmap:
        if self._map is None:
            raise ValueError(f"{self.path} is closed")
        return self._map


def build_header(
    specs: Sequence[tuple[str, Any, Sequence[int]]], metadata: Mapping[str, str], *, as_given: bool = False
) -> tuple[bytes, dict[str, TensorInfo]]:
    """First bytes of a file (length and header) and where each tensor will lie.

    Tensors are laid out by the largest power of two that divides their size, and the header is padded, so that every
    tensor starts on a multiple of that power (at most 64 bytes): a mapped file can be used by kernels as it is, and
    there are no gaps. as_given: in the order of `specs` instead, wherever they then start.
    """
    sized = []
    for name, dtype, shape in specs:
        sizes = tuple(int(size) for size in shape)
        kind = dtype_name(dtype)
        sized.append((name, kind, sizes, math.prod(sizes) * DTYPES[kind].itemsize))
    if len({name for name, *_ in sized}) != len(sized):
        raise InputError("two tensors of one file have the same name")
    if not as_given:
        sized.sort(key=lambda item: -math.gcd(item[3], ALIGNMENT_BYTES))
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, kind, sizes, nbytes in sized:
        entries[name] = {"dtype": kind, "shape": list(sizes), "data_offsets": [position, position + nbytes]}
        position += nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + _LENGTH_BYTES) % ALIGNMENT_BYTES)
    start = _LENGTH_BYTES + len(text)
    infos = {}
    for name, kind, sizes, nbytes in sized:
        first = start + entries[name]["data_offsets"][0]
        infos[name] = TensorInfo(name=name, dtype=kind, shape=sizes, start=first, stop=first + nbytes)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text, infos


class SafetensorsWriter:
    """Writes one safetensors file in pieces, under a temporary name until `close`.

    Use it as a context manager: any exception, an interrupt too, removes the temporary file and leaves an older file as
    it was. specs: (name, dtype, shape) of every tensor. The disk space is reserved at once, so a full disk shows before
    the work is done.
    """

    def __init__(
        self,
        path: str | Path,
        specs: Sequence[tuple[str, Any, Sequence[int]]],
        metadata: Mapping[str, str] | None = None,
        *,
        as_given: bool = False,
    ) -> None:
        """as_given: see `build_header`."""
        self.path = Path(path)
        head, self.infos = build_header(specs, metadata or {}, as_given=as_given)
        self.nbytes = len(head) + sum(info.nbytes for info in self.infos.values())
        self.sha256: str | None = None
        self._written = dict.fromkeys(self.infos, 0)
        self._digest = hashlib.sha256()
        self._hashed_bytes = 0
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
        self._descriptor = -1
        try:
            self._descriptor = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
            self._reserve()
            self._put(head, 0)
        except OSError as error:
            self.abort()
            raise self._failure(error) from None
        except BaseException:
            self.abort()
            raise

    def write(self, name: str, piece: np.ndarray | bytes | memoryview) -> None:
        """Appends bytes to the tensor `name`: the whole array at once, or row blocks in order."""
        info = self.infos.get(name)
        if info is None:
            raise InputError(f"{self.path}: tensor {shown(name)} was not declared")
        if isinstance(piece, np.ndarray):
            if piece.dtype != info.numpy_dtype:
                raise InputError(f"{self.path}: tensor {shown(name)} is declared {info.dtype}, got {piece.dtype}")
            piece = np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
        done = self._written[name]
        if done + len(piece) > info.nbytes:
            raise InputError(f"{self.path}: tensor {shown(name)} gets more than its {info.nbytes} bytes")
        try:
            self._put(piece, info.start + done)
        except OSError as error:
            self.abort()
            raise self._failure(error) from None
        self._written[name] = done + len(piece)

    def close(self) -> str:
        """Flushes, renames into place and gives the SHA-256 of the file."""
        short = [name for name, info in self.infos.items() if self._written[name] != info.nbytes]
        if short:
            self.abort()
            raise InputError(
                f"{self.path}: tensor {shown(short[0])} is incomplete ({len(short)} in all); nothing written"
            )
        try:
            self._hash_rest()
            os.fsync(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1
            os.replace(self._temporary, self.path)
        except OSError as error:
            self.abort()
            raise self._failure(error) from None
        except BaseException:
            self.abort()
            raise
        _sync_directory(self.path.parent)
        self.sha256 = self._digest.hexdigest()
        return self.sha256

    def abort(self) -> None:
        """Removes the temporary file. Harmless after `close`."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        if self.sha256 is None:
            self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abort()
        elif self.sha256 is None and self._descriptor >= 0:
            self.close()

    def __del__(self) -> None:
        # an interrupt can strike between construction and `with`
        if getattr(self, "_descriptor", -1) >= 0:
            self.abort()

    def _reserve(self) -> None:
        try:
            os.posix_fallocate(self._descriptor, 0, self.nbytes)
        except AttributeError:
            return  # no such call on this system: a full disk shows while writing
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise

    def _put(self, piece: bytes | memoryview, position: int) -> None:
        rest = memoryview(piece)
        if position == self._hashed_bytes:
            self._digest.update(rest)
            self._hashed_bytes += len(rest)
        while rest:
            count = os.pwrite(self._descriptor, rest, position)
            rest, position = rest[count:], position + count

    def _hash_rest(self) -> None:
        """Hashes what came out of file order by reading it again."""
        while self._hashed_bytes < self.nbytes:
            block = os.pread(self._descriptor, _COPY_BYTES, self._hashed_bytes)
            if not block:
                raise OSError(errno.EIO, "the file became shorter while it was written")
            self._digest.update(block)
            self._hashed_bytes += len(block)

    def _failure(self, error: OSError) -> Exception:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return DoesNotFit(
                f"{self.path}: needs {self.nbytes:,} bytes of disk and there is too little left; nothing written"
            )
        return InputError(f"{self.path}: cannot be written: {error.strerror or error}")


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Sequences of memory accesses as a core makes them, and files of them.

A `Trace` has, for each access: its address (48 bits), its kind, how many other instructions come before it, how many
accesses ago its address was loaded (0: it was known), and the process. Fetches tell that code of another line begins;
they count as no instruction. Kernels that make traces are in `access_kernels`.

Files: `.npy` with one array, either of addresses or with fields named as below (`save_trace` writes that); or text with
an access a line, `KIND ADDRESS [GAP [DEPENDS [PROCESS]]]`, `#` before remarks. Kinds are r, w, f (fetch), i (the page's
translation changes and is invalidated), p (all of a process's are flushed), h (all of the host's). Addresses are
decimal, or hexadecimal after 0x; a line that is an address alone is a read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from memwall.errors import InputError

KINDS = "rwfiph"
READ, WRITE, FETCH, INVALIDATE, FLUSH_PROCESS, FLUSH_HOST = range(6)
DEFAULT_GAP = 3
"""Instructions before an access, where a file does not tell."""
ADDRESS_BITS = 48
PAGE_BITS = 12
FIELDS = {"address": "u8", "kind": "u1", "gap": "u1", "depends": "u1", "process": "u1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """Bytes of a process that were filled, in order, before a trace begins."""

    process: int
    start: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Accesses in order: addresses uint64, all others uint8, all of one length. regions: () for what is touched."""

    name: str
    addresses: np.ndarray
    kinds: np.ndarray
    gaps: np.ndarray
    depends: np.ndarray
    processes: np.ndarray
    regions: tuple[Region, ...] = ()

    def __len__(self) -> int:
        return len(self.addresses)

    def __getitem__(self, part: slice) -> Trace:
        """The same regions."""
        return Trace(
            name=self.name, addresses=self.addresses[part], kinds=self.kinds[part], gaps=self.gaps[part],
            depends=self.depends[part], processes=self.processes[part], regions=self.regions,
        )  # fmt: skip

    @property
    def instructions(self) -> int:
        """Accesses and what lies between them."""
        return int(np.sum(self.gaps[self.kinds <= WRITE], dtype=np.int64)) + int(np.sum(self.kinds <= WRITE))

    def mapped_runs(self) -> Iterator[tuple[int, int, int]]:
        """(process, first page, pages) that are mapped before the trace begins, in order."""
        for region in self.regions:
            first, last = region.start >> PAGE_BITS, (region.start + region.num_bytes - 1) >> PAGE_BITS
            yield region.process, first, last - first + 1
        if self.regions:
            return
        touched = self.kinds <= FETCH
        keys = self.processes[touched].astype(np.uint64) << np.uint64(56) | self.addresses[touched] >> np.uint64(12)
        pages = np.unique(keys)
        starts = np.flatnonzero(np.diff(pages, prepend=pages[:1] - np.uint64(2)) != 1)
        for start, end in zip(starts, [*starts[1:], len(pages)], strict=True):
            first = int(pages[start])
            yield first >> 56, first & ((1 << 56) - 1), int(end - start)


def made_trace(name: str, addresses: Any, *, kinds: Any = READ, gaps: Any = DEFAULT_GAP, depends: Any = 0,
               processes: Any = 0, regions: tuple[Region, ...] = ()) -> Trace:  # fmt: skip
    """A trace of arrays, or of one value for all accesses."""
    count = len(addresses)
    columns = {
        key: np.ascontiguousarray(np.broadcast_to(np.asarray(value, np.uint8), (count,)))
        for key, value in (("kinds", kinds), ("gaps", gaps), ("depends", depends), ("processes", processes))
    }
    return Trace(name=name, addresses=np.ascontiguousarray(addresses, np.uint64), regions=regions, **columns)


def read_trace(path: Path, limit: int | None = None) -> Trace:
    """A file of accesses, at most `limit` of them; InputError that names the line or field that is wrong."""
    try:
        trace = _read_array(path, limit) if path.suffix == ".npy" else _read_text(path, limit)
    except (OSError, UnicodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    if not len(trace):
        raise InputError(f"{path}: holds no access; lines such as `r 0x7f00 3` are wanted, or an array of addresses")
    return trace


def save_trace(path: Path, trace: Trace) -> None:
    """As `.npy`, which `read_trace` reads."""
    table = np.empty(len(trace), np.dtype(list(FIELDS.items())))
    columns = (trace.addresses, trace.kinds, trace.gaps, trace.depends, trace.processes)
    for name, column in zip(FIELDS, columns, strict=True):
        table[name] = column
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as file:
            np.save(file, table, allow_pickle=False)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _read_array(path: Path, limit: int | None) -> Trace:
    try:
        table = np.load(path, mmap_mode="r", allow_pickle=False)[:limit]
    except (ValueError, TypeError, EOFError, IndexError) as error:
        raise InputError(f"{path}: not an array that can be read: {error}") from None
    names = table.dtype.names
    if table.ndim != 1 or (names is None and table.dtype.kind not in "iu") or (names and "address" not in names):
        raise InputError(f"{path}: wanted are whole numbers, or the fields {', '.join(FIELDS)}; this has {table.dtype}")
    defaults = {"kind": READ, "gap": DEFAULT_GAP, "depends": 0, "process": 0}
    columns = {name: np.full(len(table), default) for name, default in defaults.items()}
    addresses = np.asarray(table if names is None else table["address"])
    for name in names or ():
        if name not in FIELDS or table[name].dtype.kind not in "iu" or table[name].ndim != 1:
            raise InputError(
                f"{path}: field {name} ({table.dtype[name]}); whole numbers in {', '.join(FIELDS)} are read"
            )
        if name != "address":
            columns[name] = np.asarray(table[name])
    _check_range(path, "address", addresses, (1 << ADDRESS_BITS) - 1)
    for name, column in columns.items():
        _check_range(path, name, column, len(KINDS) - 1 if name == "kind" else 255)
    return made_trace(
        path.stem, addresses.astype(np.uint64), kinds=columns["kind"], gaps=columns["gap"], depends=columns["depends"],
        processes=columns["process"],
    )  # fmt: skip


def _check_range(path: Path, name: str, column: np.ndarray, most: int) -> None:
    if len(column) and (int(column.min()) < 0 or int(column.max()) > most):
        wrong = int(np.flatnonzero((column < 0) | (column > most))[0])
        raise InputError(f"{path}: {name} {int(column[wrong])} of access {wrong}; it lies between 0 and {most:,}")


def _read_text(path: Path, limit: int | None) -> Trace:
    rows: list[tuple[int, int, int, int, int]] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if limit is not None and len(rows) >= limit:
                break
            words = line.split("#", 1)[0].split()
            if words:
                rows.append(_row(words, f"{path}, line {number}"))
    columns = np.array(rows, np.uint64).reshape(-1, 5).T
    kinds, addresses, gaps, depends, processes = columns
    return made_trace(path.stem, addresses, kinds=kinds, gaps=gaps, depends=depends, processes=processes)


def _row(words: list[str], place: str) -> tuple[int, int, int, int, int]:
    kind = words.pop(0) if words[0] in tuple(KINDS) else "r"
    if not 1 <= len(words) <= 4:
        raise InputError(f"{place}: wanted is KIND ADDRESS [GAP [DEPENDS [PROCESS]]], KIND one of {', '.join(KINDS)}")
    found = []
    for name, word, most in zip(("address", "gap", "depends", "process"), words, ((1 << 48) - 1, 255, 255, 255),
                                strict=False):  # fmt: skip
        try:
            value = int(word, 16) if word.lower().startswith("0x") else int(word)
        except ValueError:
            raise InputError(f"{place}: {name} {word[:40]!r} is no number; write 4096 or 0x1000") from None
        if not 0 <= value <= most:
            raise InputError(f"{place}: {name} {word[:40]}; it lies between 0 and {most:,}")
        found.append(value)
    return (KINDS.index(kind), *(found + [0, DEFAULT_GAP, 0, 0][len(found) :]))  # type: ignore[return-value]

"""Files whose tensors hold the rows of several of ours, such as queries, keys and values in one matrix.

Where the rows of one of ours lie together it is a plain view on the file. Where they come in groups (some rows of each
equal part of the stored tensor) they are put together as they are read, a group's map at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from memwall.errors import InputError
from memwall.formats.checked_json import shown
from memwall.formats.safetensors_file import SafetensorsFile, TensorInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Of each of `groups` equal parts of a stored tensor, with `of` rows, the `count` rows from `first` on."""

    groups: int
    first: int
    count: int
    of: int

    def indices(self) -> np.ndarray:
        """Of these rows in the stored tensor."""
        return (np.arange(self.groups)[:, None] * self.of + self.first + np.arange(self.count)).reshape(-1)


Names = Callable[[str], Mapping[str, Rows | None]]
"""names(stored name) -> our names, and which rows each has; None: all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A tensor as files of the family have it, and which of ours make it up (one that is None: all its rows)."""

    name: str
    shape: tuple[int, ...]
    parts: Mapping[str, Rows | None]


def joined(stored: Stored, parts: Mapping[str, np.ndarray]) -> np.ndarray:
    """The stored tensor from ours, by name, all of one dtype."""
    first = next(iter(parts.values()))
    whole = np.empty(stored.shape, first.dtype)
    for name, rows in stored.parts.items():
        if rows is None:
            return parts[name]
        places = whole.reshape(rows.groups, rows.of, *stored.shape[1:])[:, rows.first : rows.first + rows.count]
        places[...] = parts[name].reshape(places.shape)
    return whole


@dataclass(frozen=True, slots=True, kw_only=True)
class _Grouped(TensorInfo):
    """A tensor whose rows lie in groups. start and stop span all of them; step: bytes from one group to the next."""

    groups: int
    step: int

    @property
    def nbytes(self) -> int:
        return self.group_bytes * self.groups

    @property
    def group_bytes(self) -> int:
        return self.stop - self.start - (self.groups - 1) * self.step


class FusedFile(SafetensorsFile):
    """A safetensors file by our names. Arrays whose rows lie in groups are copies."""

    def __init__(self, path: str | Path, names: Names) -> None:
        super().__init__(path)
        found: dict[str, TensorInfo] = {}
        try:
            for stored, info in self._tensors.items():
                for name, rows in names(stored).items():
                    if name in found:
                        raise InputError(f"{path}: two tensors go by the name {shown(name)}")
                    found[name] = info if rows is None else self._part(info, name, rows)
        except BaseException:
            self.close()
            raise
        self._tensors = found

    def _part(self, info: TensorInfo, name: str, rows: Rows) -> TensorInfo:
        if not info.shape or info.shape[0] != rows.groups * rows.of:
            raise InputError(
                f"{self.path}: {shown(info.name)} has shape {list(info.shape)}; the configuration says "
                f"{rows.groups * rows.of} rows"
            )
        row_bytes = info.nbytes // info.shape[0]
        start, step = info.start + rows.first * row_bytes, rows.of * row_bytes
        stop = start + (rows.groups - 1) * step + rows.count * row_bytes
        shape = (rows.groups * rows.count, *info.shape[1:])
        told: dict[str, Any] = {"name": name, "dtype": info.dtype, "shape": shape, "start": start, "stop": stop}
        return TensorInfo(**told) if rows.groups == 1 else _Grouped(**told, groups=rows.groups, step=step)

    def tensor(self, name: str) -> np.ndarray:
        """See `SafetensorsFile`; a copy where rows lie in groups."""
        info = self.info(name)
        return self._gathered(info, 0, info.shape[0]) if isinstance(info, _Grouped) else super().tensor(name)

    def alone(self, name: str) -> np.ndarray:
        """See `SafetensorsFile`; a copy where rows lie in groups."""
        return self.tensor(name) if isinstance(self.info(name), _Grouped) else super().alone(name)

    def pieces(self, name: str, most_bytes: int, multiple: int = 1) -> Iterator[tuple[int, np.ndarray]]:
        """See `SafetensorsFile`. Pieces end where groups do if their rows are multiples of `multiple`, and are views
        then; else they are copies.
        """
        info = self.info(name)
        if not isinstance(info, _Grouped) or not info.nbytes:
            yield from super().pieces(name, most_bytes, multiple)
            return
        rows, in_group = info.shape[0], info.shape[0] // info.groups
        row_bytes = info.nbytes // rows
        step = max(most_bytes // row_bytes // multiple, 1) * multiple
        first = 0
        while first < rows:
            end = min(first + step, rows)
            if in_group % multiple == 0:
                end = min(end, (first // in_group + 1) * in_group)
            yield first, self._gathered(info, first, end)
            first = end

    def _gathered(self, info: _Grouped, first: int, end: int) -> np.ndarray:
        """Rows [first, end), read-only: a view where they lie in one group."""
        in_group = info.shape[0] // info.groups
        row_bytes = info.group_bytes // in_group
        found = []
        while first < end:
            group, row = divmod(first, in_group)
            stop = min(end, (group + 1) * in_group)
            at = info.start + group * info.step + row * row_bytes
            found.append((at, (stop - first, *info.shape[1:])))
            first = stop
        if len(found) == 1:
            return self._window(info, *found[0])
        whole = np.empty((sum(shape[0] for _, shape in found), *info.shape[1:]), info.numpy_dtype)
        place = 0
        for at, shape in found:  # one map at a time: its pages leave before the next is read
            whole[place : place + shape[0]] = self._window(info, at, shape)
            place += shape[0]
        whole.flags.writeable = False
        return whole

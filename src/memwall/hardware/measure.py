"""Measures this machine: memory bandwidth and latency, arithmetic, disk. About ten seconds, or two with `quick`.

Bandwidth is that of wide reads over buffers well past the last cache, on huge pages; the arithmetic loops keep their
operands in registers; disk reads go round the page cache. All figures come as best and median of many short passes:
on a machine that is shared, the best is what the hardware can do and the median what was to be had at that moment.
"""

from __future__ import annotations

import importlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from memwall import __version__
from memwall.errors import InputError, MemwallError
from memwall.hardware.probe_store import load_rates, save_report
from memwall.hardware.report import Arithmetic, Bandwidth, Disk, DiskRead, Latency, ProbeReport
from memwall.hardware.system import (
    System,
    available_memory_bytes,
    cache_directory,
    describe_system,
    file_system,
    is_in_memory,
    is_remote,
    processor_order,
)
from memwall.hardware.units import KIB, MIB, format_bytes

Progress = Callable[[int, int, str], None]
"""Called with steps done, steps in all, and what is being measured."""

_DTYPES = ("float32", "int8", "bfloat16", "float16")
_WRITE_BLOCK_BYTES = 1 * MIB
_BUSY_BELOW = 0.5
"""A median below this share of the best means that something else took the processors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Effort:
    """How long to look at each thing."""

    pass_seconds: float
    disk_seconds: float
    buffer_bytes: int
    disk_file_bytes: int
    disk_write_seconds: float
    reads: tuple[tuple[int, int, bool], ...]
    """(block bytes, depth, random)"""


_FULL = _Effort(
    pass_seconds=0.2,
    disk_seconds=0.15,
    buffer_bytes=256 * MIB,
    disk_file_bytes=512 * MIB,
    disk_write_seconds=1.5,
    reads=tuple(
        (block, depth, random)
        for random in (False, True)
        for block in (4 * KIB, 128 * KIB, MIB)
        for depth in (1, 4, 16)
    ),
)
_QUICK = _Effort(
    pass_seconds=0.08,
    disk_seconds=0.06,
    buffer_bytes=128 * MIB,
    disk_file_bytes=128 * MIB,
    disk_write_seconds=0.3,
    reads=((4 * KIB, 1, True), (4 * KIB, 16, True), (128 * KIB, 16, True), (MIB, 1, False), (MIB, 16, False)),
)


def probe(
    *,
    quick: bool = False,
    disk_directory: str | Path | None = None,
    progress: Progress | None = None,
    save: bool = True,
) -> ProbeReport:
    """Measures this machine and keeps the result in the user's cache (`load_cached` finds it again).

    disk_directory: measure the disk there (a temporary file is made and removed); by default the one that holds the
    cache.
    """
    if disk_directory is not None:
        _disk_directory(disk_directory)  # whether it will do is said before anything is measured
    native = _native()
    effort = _QUICK if quick else _FULL
    start = time.perf_counter()
    system = describe_system()
    notes: list[str] = []
    steps = _Steps(progress, effort, system)
    try:
        bandwidths = _measure_bandwidth(native, system, effort, steps)
        latencies = _measure_latency(native, system, effort, steps)
        arithmetic = _measure_arithmetic(native, system, effort, steps)
    finally:
        native.probe_release()
    disk = _measure_disk(native, disk_directory, effort, steps, notes)
    typical = [row.median_bytes_per_s / row.best_bytes_per_s for row in bandwidths]
    typical += [row.median_flop_per_s / row.best_flop_per_s for row in arithmetic]
    if min(typical) < _BUSY_BELOW:
        notes.append("Other work was running: some medians lie far below the best, which may itself be too low.")
    report = ProbeReport(
        memwall_version=__version__,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        quick=quick,
        instruction_set=native.isa(),
        system=system,
        bandwidths=tuple(bandwidths),
        latencies=tuple(latencies),
        arithmetic=tuple(arithmetic),
        disk=disk,
        notes=tuple(notes),
        seconds=time.perf_counter() - start,
        rates=load_rates(),
    )
    if save and not save_report(report):
        report = replace(report, notes=(*report.notes, f"The result could not be kept in {cache_directory()}."))
    return report


class _Steps:
    """Counts steps for the progress callback."""

    def __init__(self, progress: Progress | None, effort: _Effort, system: System) -> None:
        self._progress = progress
        counts = thread_counts(system.num_processors)
        few = len({1, counts[-1]})
        self._total = len(counts) + 2 * few + len(_working_sets(system, effort)) + len(_DTYPES) * few
        self._total += 1 + len(effort.reads)
        self._done = 0

    def next(self, text: str) -> None:
        if self._progress is not None:
            self._progress(self._done, self._total, text)
        self._done += 1


def thread_counts(num_processors: int) -> list[int]:
    """1, 2, 3, ... for small machines, powers of two for large ones, and always all."""
    if num_processors <= 4:
        return list(range(1, num_processors + 1))
    counts = [1 << power for power in range(num_processors.bit_length()) if 1 << power < num_processors]
    return [*counts, num_processors]


def _measure_bandwidth(native: Any, system: System, effort: _Effort, steps: _Steps) -> list[Bandwidth]:
    counts = thread_counts(system.num_processors)
    few = sorted({1, counts[-1]})
    nbytes, processors = _buffer_bytes(system, effort), processor_order()
    found = []
    for kind, threads_tried in (("read", counts), ("write", few), ("copy", few)):
        for threads in threads_tried:
            steps.next(f"memory: {kind} with {threads} of {counts[-1]} threads")
            if system.num_nodes > 1:
                native.probe_release()  # pages live near the thread that touched them first
            rates = native.probe_memory(kind, nbytes, threads, processors, effort.pass_seconds)
            found.append(
                Bandwidth(
                    kind=kind,
                    threads=threads,
                    best_bytes_per_s=max(rates),
                    median_bytes_per_s=statistics.median(rates),
                )
            )
    return found


def _measure_latency(native: Any, system: System, effort: _Effort, steps: _Steps) -> list[Latency]:
    found = []
    for nbytes in _working_sets(system, effort):
        steps.next(f"latency within {format_bytes(nbytes)}")
        found.append(Latency(nbytes=nbytes, seconds=native.probe_latency(nbytes, effort.pass_seconds / 3)))
    return found


def _measure_arithmetic(native: Any, system: System, effort: _Effort, steps: _Steps) -> list[Arithmetic]:
    found = []
    for dtype in _DTYPES:
        for threads in sorted({1, system.num_processors}):
            steps.next(f"arithmetic: {dtype} with {threads} threads")
            rates = native.probe_arithmetic(dtype, threads, processor_order(), effort.pass_seconds / 2)
            if rates:
                found.append(
                    Arithmetic(
                        dtype=dtype,
                        threads=threads,
                        best_flop_per_s=max(rates),
                        median_flop_per_s=statistics.median(rates),
                    )
                )
    return found


def _buffer_bytes(system: System, effort: _Effort) -> int:
    """Several times the last cache, but never more than a quarter of the memory that is free."""
    wanted = max(effort.buffer_bytes, 4 * system.last_cache_bytes)
    return max(min(wanted, available_memory_bytes() // 4), 16 * MIB)


def _working_sets(system: System, effort: _Effort) -> list[int]:
    """Half of each cache, then the whole buffer, which no cache holds."""
    return [cache.nbytes // 2 for cache in system.caches] + [_buffer_bytes(system, effort)]


def _measure_disk(
    native: Any, directory: str | Path | None, effort: _Effort, steps: _Steps, notes: list[str]
) -> Disk | None:
    """The disk under `directory`; None, with a note, where there is none to measure."""
    place = _disk_directory(directory)
    kind = file_system(place)
    if is_in_memory(kind):
        notes.append(
            f"{place} lies in memory ({kind}): no disk was measured. Name a directory on a disk to measure it."
        )
        return None
    if is_remote(kind):
        notes.append(f"{place} lies on another machine ({kind}): the disk figures include the network.")
    space = os.statvfs(place)
    room = space.f_bavail * space.f_frsize
    if room < 4 * _WRITE_BLOCK_BYTES * 16:
        notes.append(f"{place} has only {format_bytes(room)} free: no disk was measured.")
        return None
    try:
        with _scratch_file(place) as (descriptor, direct):
            if not direct:
                notes.append(f"{place} ({kind or 'unknown'}) has no direct I/O: disk figures may be the page cache's.")
            steps.next("disk: write")
            file_bytes, write_rate = _measure_write(native, descriptor, min(room // 4, effort.disk_file_bytes), effort)
            reads = _measure_reads(native, descriptor, direct, file_bytes, effort, steps)
    except OSError as error:
        notes.append(f"The disk under {place} could not be measured: {error}.")
        return None
    return Disk(
        directory=str(place),
        file_system=kind,
        direct=direct,
        capacity_bytes=space.f_blocks * space.f_frsize,
        file_bytes=file_bytes,
        write_bytes_per_s=write_rate,
        reads=tuple(reads),
    )


def _measure_reads(
    native: Any, descriptor: int, direct: bool, file_bytes: int, effort: _Effort, steps: _Steps
) -> list[DiskRead]:
    found = []
    for block_bytes, depth, random in effort.reads:
        steps.next(f"disk: read {block_bytes // KIB} KiB, {depth} in flight")
        if not direct:
            _drop_cache(descriptor)
        count, seconds, latency = native.probe_disk_read(
            descriptor, file_bytes, block_bytes, depth, random, effort.disk_seconds
        )
        found.append(
            DiskRead(
                block_bytes=block_bytes,
                depth=depth,
                random=random,
                bytes_per_s=count * block_bytes / seconds,
                reads_per_s=count / seconds,
                median_latency_seconds=latency,
            )
        )
    return found


def _measure_write(native: Any, descriptor: int, most_bytes: int, effort: _Effort) -> tuple[int, float]:
    """Writes a little, then as much as the time allows at that rate. Returns the file's bytes and the rate."""
    block = _WRITE_BLOCK_BYTES
    file_bytes = 16 * block
    seconds = native.probe_disk_write(descriptor, file_bytes, block, 4)
    affordable = int(file_bytes / seconds * effort.disk_write_seconds) // block * block
    larger = min(most_bytes // block * block, affordable)
    if larger > 2 * file_bytes:
        file_bytes = larger
        seconds = native.probe_disk_write(descriptor, file_bytes, block, 4)
    return file_bytes, file_bytes / seconds


def _disk_directory(directory: str | Path | None) -> Path:
    if directory is not None:
        place = Path(directory)
        if not place.is_dir():
            raise InputError(f"{place} is not a directory; name one on the disk to be measured")
        if not os.access(place, os.W_OK):
            raise InputError(f"{place} cannot be written; name a directory in which a temporary file can be made")
        return place.resolve()
    cache = cache_directory()
    candidates = [cache, *cache.parents, Path("/var/tmp"), Path(tempfile.gettempdir())]
    for place in candidates:
        if place.is_dir() and os.access(place, os.W_OK) and not is_in_memory(file_system(place)):
            return place
    return Path(tempfile.gettempdir())


@contextmanager
def _scratch_file(directory: Path) -> Iterator[tuple[int, bool]]:
    """A file without a name, so that nothing is left even if the process dies; and whether it takes direct I/O."""
    descriptor, name = tempfile.mkstemp(prefix=".memwall-probe-", dir=directory)
    try:
        direct = False
        if sys.platform == "darwin":
            import fcntl

            fcntl.fcntl(descriptor, 48, 1)  # F_NOCACHE
            direct = True
        elif hasattr(os, "O_DIRECT"):
            try:
                other = os.open(name, os.O_RDWR | os.O_DIRECT)
            except OSError:
                pass  # the file system has no direct I/O; the caller says so
            else:
                os.close(descriptor)
                descriptor, direct = other, True
        os.unlink(name)
        name = ""
        yield descriptor, direct
    finally:
        os.close(descriptor)
        if name:
            os.unlink(name)


def _drop_cache(descriptor: int) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _native() -> Any:
    try:
        return importlib.import_module("memwall._native")
    except ImportError as error:
        raise MemwallError(f"the compiled part of memwall is missing ({error}); install memwall again") from None

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from memwall.hardware import ProbeReport
from memwall.hardware.report import Arithmetic, Bandwidth, Disk, DiskRead, Latency
from memwall.hardware.system import Cache, System


@pytest.fixture(scope="session")
def make_report() -> Callable[..., ProbeReport]:
    """A made-up report, with the fields that are named changed."""
    return _make_report


def _make_report(**changes: object) -> ProbeReport:
    disk_read = DiskRead(
        block_bytes=4096, depth=1, random=True, bytes_per_s=70e6, reads_per_s=17e3, median_latency_seconds=58e-6
    )
    report = ProbeReport(
        memwall_version="0.1.0",
        measured_at="2026-01-02T03:04:05+00:00",
        quick=False,
        instruction_set="avx2",
        system=System(
            processor="Test",
            num_processors=2,
            memory_bytes=24 * 2**30,
            num_nodes=1,
            caches=(Cache(level=1, nbytes=32768, num_sharing=1),),
            system="Linux x86_64",
        ),
        bandwidths=tuple(
            Bandwidth(kind=kind, threads=threads, best_bytes_per_s=threads * 20e9, median_bytes_per_s=threads * 18e9)
            for kind in ("read", "write")
            for threads in (1, 2)
        ),
        latencies=(Latency(nbytes=16384, seconds=1e-9), Latency(nbytes=2**28, seconds=110e-9)),
        arithmetic=(Arithmetic(dtype="float32", threads=2, best_flop_per_s=2e11, median_flop_per_s=1.9e11),),
        disk=Disk(
            directory="/somewhere",
            file_system="ext4",
            direct=True,
            capacity_bytes=10**12,
            file_bytes=2**29,
            write_bytes_per_s=1e9,
            reads=(disk_read, replace(disk_read, block_bytes=2**20, depth=16, random=False, bytes_per_s=4e9)),
        ),
        rates={"linear/int4-g64": 14e9},
    )
    return replace(report, **changes)  # type: ignore[arg-type]

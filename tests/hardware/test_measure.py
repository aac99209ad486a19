from __future__ import annotations

import os
from pathlib import Path

import pytest

from memwall.errors import InputError
from memwall.hardware import load_cached, measure, probe
from memwall.hardware.measure import _QUICK, _Effort, thread_counts
from memwall.hardware.report import ProbeReport
from memwall.hardware.units import KIB, MIB

native = pytest.importorskip("memwall._native")

TINY = _Effort(
    pass_seconds=0.01,
    disk_seconds=0.01,
    buffer_bytes=16 * MIB,
    disk_file_bytes=16 * MIB,
    disk_write_seconds=0.05,
    reads=((4 * KIB, 1, True), (128 * KIB, 4, False)),
)


@pytest.fixture(autouse=True)
def tiny_effort(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(measure, "_QUICK", TINY)
    monkeypatch.setattr(measure, "_buffer_bytes", lambda system, effort: 16 * MIB)


def test_a_probe_measures_everything_and_is_found_again(tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    report = probe(quick=True, disk_directory=tmp_path, progress=lambda *step: seen.append(step))
    assert load_cached() == report
    assert {row.kind for row in report.bandwidths} == {"read", "write", "copy"}
    assert {row.dtype for row in report.arithmetic} >= {"float32", "int8"}
    for row in report.bandwidths:
        assert 0 < row.median_bytes_per_s <= row.best_bytes_per_s < 1e14
    for row in report.arithmetic:
        assert 0 < row.median_flop_per_s <= row.best_flop_per_s < 1e16
    assert all(0 < row.seconds < 1e-3 for row in report.latencies)
    assert report.to_machine().tier("ram").capacity_bytes == report.system.memory_bytes
    assert [done for done, _, _ in seen] == list(range(len(seen)))
    assert all(done < total for done, total, _ in seen)
    if report.disk is None:
        assert "no disk was measured" in " ".join(report.notes)
    else:
        assert seen[-1][0] == seen[-1][1] - 1
        assert len(report.disk.reads) == 2
        assert report.disk.direct or "no direct I/O" in " ".join(report.notes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]  # the temporary file is gone
    assert isinstance(report, ProbeReport)


def test_without_direct_io_the_disk_is_measured_with_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "file_system", lambda path: "oddfs")
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    monkeypatch.setattr(measure.sys, "platform", "linux")
    report = probe(quick=True, disk_directory=tmp_path, save=False)
    assert report.disk is not None
    assert not report.disk.direct
    assert "oddfs) has no direct I/O" in " ".join(report.notes)
    assert load_cached() is None


def test_a_directory_in_memory_is_not_called_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "file_system", lambda path: "tmpfs")
    report = probe(quick=True, disk_directory=tmp_path, save=False)
    assert report.disk is None
    assert "lies in memory (tmpfs)" in report.notes[0]


def test_a_directory_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a directory"):
        probe(quick=True, disk_directory=tmp_path / "absent")


def test_native_calls_check_their_arguments(tmp_path: Path) -> None:
    for call in (
        lambda: native.probe_memory("shout", 1 << 20, 1, [], 0.01),
        lambda: native.probe_memory("read", 1 << 20, 0, [], 0.01),
        lambda: native.probe_memory("read", 100, 1, [], 0.01),
        lambda: native.probe_latency(10, 0.01),
        lambda: native.probe_arithmetic("float12", 1, [], 0.01),
        lambda: native.probe_disk_read(0, 4096, 100, 1, False, 0.01),
        lambda: native.probe_disk_read(0, 4096, 4096, 0, False, 0.01),
    ):
        with pytest.raises(ValueError):
            call()
    with pytest.raises(OSError):
        native.probe_disk_read(-1, 1 << 20, 4096, 2, False, 0.01)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set_measures(isa: str) -> None:
    before = native.isa()
    try:
        native.force_isa(isa)
    except ValueError:
        pytest.skip(f"this processor or build lacks {isa}")
    try:
        for kind in ("read", "write", "copy"):
            assert min(native.probe_memory(kind, 16 << 20, 2, [0, 0], 0.01)) > 0
        for dtype in ("float32", "int8"):
            assert min(native.probe_arithmetic(dtype, 2, [], 0.01)) > 0
    finally:
        native.probe_release()
        native.force_isa(before)


def test_thread_counts() -> None:
    assert thread_counts(1) == [1]
    assert thread_counts(4) == [1, 2, 3, 4]
    assert thread_counts(8) == [1, 2, 4, 8]
    assert thread_counts(24) == [1, 2, 4, 8, 16, 24]


def test_quick_is_the_smaller_effort() -> None:
    assert len(_QUICK.reads) < len(measure._FULL.reads)
    assert _QUICK.pass_seconds < measure._FULL.pass_seconds

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from memwall.errors import InputError
from memwall.hardware import Machine, ProbeReport

MakeReport = Callable[..., ProbeReport]


def test_reports_survive_json(make_report: MakeReport) -> None:
    for report in (make_report(), make_report(disk=None, latencies=(), notes=("a note",))):
        assert ProbeReport.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_a_report_describes_a_machine(make_report: MakeReport) -> None:
    machine = make_report().to_machine()
    assert machine.tier("ram").read_bytes_per_s == 40e9
    assert machine.tier("ram").latency_seconds == 110e-9
    assert machine.tier("disk").read_bytes_per_s == 4e9
    assert machine.tier("disk").latency_seconds == 58e-6
    assert machine.flop_per_s("cpu", "float32") == 2e11
    assert "2026-01-02" in machine.tier("ram").reference
    assert Machine.from_json(machine.to_json()) == machine
    assert not make_report(disk=None).to_machine().has_tier("disk")


def test_figures_can_be_asked_for(make_report: MakeReport) -> None:
    report = make_report()
    assert report.bytes_per_s() == 40e9
    assert report.bytes_per_s("write", 1) == 20e9
    assert report.flop_per_s("float32") == 2e11
    assert report.flop_per_s("float16") is None
    assert report.disk is not None
    assert report.disk.read_bytes_per_s(4096) == 70e6
    assert report.disk.read_bytes_per_s(4096, 2) is None
    with pytest.raises(InputError, match="3 threads"):
        report.bytes_per_s("read", 3)


def test_rows_are_text_in_groups(make_report: MakeReport) -> None:
    rows = make_report().rows()
    assert {row.group for row in rows} == {"memory", "latency", "arithmetic", "kernels", "disk"}
    assert rows[0].setting == "read, 1 thread"
    assert rows[0].figure == "20.0 GB/s"
    assert rows[1].setting == "read, 2 threads"


@pytest.mark.parametrize("data", [None, [], {}, {"format": 99}, {"format": 1}, {"format": 1, "system": 3}])
def test_what_is_no_report_is_refused(data: object) -> None:
    with pytest.raises(InputError):
        ProbeReport.from_json(data)  # type: ignore[arg-type]

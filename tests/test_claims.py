"""How claims are judged, reported and turned into an exit status."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from memwall.claims import Claim, Progress, describe_machine, main, not_run, run_evidence
from memwall.errors import InputError


class Fixed:
    """An experiment with a known outcome."""

    def __init__(self, *passed: bool | None) -> None:
        self.passed = passed
        self.asked: tuple[bool, Path | None] | None = None

    def run(self, quick: bool, data: Path | None, progress: Progress | None = None) -> list[Claim]:
        self.asked = quick, data
        if progress is not None:
            for done in range(3):
                progress(done, 4, f"part {done}")
        return [Claim(claim="c", measured="m", required="r", passed=passed) for passed in self.passed]


def test_report() -> None:
    report = run_evidence("kivi", Fixed(True, None))
    assert not report.failed
    assert [claim.verdict for claim in report.claims] == ["pass", "not run"]
    assert report.to_dict()["claims"][1] == {"claim": "c", "measured": "m", "required": "r", "passed": None}
    assert set(report.to_dict()) == {"slug", "claims", "seconds", "machine"}
    assert "not run" in report.to_table()
    assert run_evidence("kivi", Fixed(True, False)).failed


def test_what_a_machine_cannot_judge_is_never_passed() -> None:
    claim = not_run("faster on a GPU", "ratio > 1")
    assert claim.passed is None
    assert claim.measured == "not run: needs GPU"


def test_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    experiment = Fixed(True)
    assert main("kivi", experiment, ["--quick", "--data", str(tmp_path), "--json"]) == 0
    assert experiment.asked == (True, tmp_path)
    told = capsys.readouterr()
    assert json.loads(told.out)["slug"] == "kivi"
    assert "0%     0 s  part 0" in told.err
    assert "part 1" not in told.err  # too soon after the one before
    assert main("kivi", Fixed(False), []) == 1
    assert "fail" in capsys.readouterr().out
    assert main("kivi", experiment, ["--data", str(tmp_path / "absent")]) == 2
    assert "absent" in capsys.readouterr().err


def test_bad_input_inside_an_experiment_ends_with_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = Fixed()

    def refuse(*_: object) -> list[Claim]:
        raise InputError("text too short")

    run: Callable[..., list[Claim]] = refuse
    monkeypatch.setattr(experiment, "run", run)
    assert main("kivi", experiment, []) == 2


def test_machine_names_its_cores() -> None:
    assert "cores" in describe_machine()

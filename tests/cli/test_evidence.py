"""`memwall evidence` on an experiment made for the test."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from memwall import systems
from memwall.claims import Claim, not_run
from memwall.cli import evidence

GOOD = Claim(claim="it shrinks", measured="2.0 times", required="at least 1.5 times", passed=True)
BAD = Claim(claim="it is fast", measured="0.5 times", required="at least 1 time", passed=False)


@pytest.fixture
def experiment(monkeypatch: pytest.MonkeyPatch) -> Any:
    """experiment([claims]) puts an experiment with these findings behind kivi; returns what it was called with."""

    def install(claims: list[Claim]) -> list[tuple[bool, Path | None]]:
        calls: list[tuple[bool, Path | None]] = []

        def run(quick: bool, data: Path | None, progress: Any = None) -> list[Claim]:
            calls.append((quick, data))
            return claims

        module = ModuleType("experiment")
        module.run = run  # type: ignore[attr-defined]
        monkeypatch.setattr(evidence, "load_experiment", lambda system: module)
        return calls

    return install


def test_claims_that_hold(memwall: Any, experiment: Any, tmp_path: Path) -> None:
    calls = experiment([GOOD, not_run("it is faster on a GPU", "ratio above 1")])
    result = memwall("evidence", "kivi", "--quick", "--data", tmp_path)
    assert result.exit_code == 0, result.stderr
    assert calls == [(True, tmp_path)]
    for word in ("pass", "it shrinks", "2.0 times", "at least 1.5 times", "not run: needs GPU"):
        assert word in result.stdout


def test_a_claim_that_fails_is_status_1(memwall: Any, experiment: Any) -> None:
    experiment([GOOD, BAD])
    result = memwall("evidence", "kivi", "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert document.keys() >= {"slug", "claims", "seconds", "machine"}
    assert [claim["passed"] for claim in document["claims"]] == [True, False]
    assert document["claims"][0].keys() == {"claim", "measured", "required", "passed"}


def test_data_must_exist(memwall: Any, experiment: Any, tmp_path: Path) -> None:
    calls = experiment([GOOD])
    result = memwall("evidence", "kivi", "--data", tmp_path / "no.txt")
    assert result.exit_code == 2
    assert "no.txt" in result.stderr
    assert not calls


def test_data_that_is_no_text_is_bad_input_and_named(memwall: Any, experiment: Any, tmp_path: Path) -> None:
    noise = tmp_path / "noise.bin"
    noise.write_bytes(b"a\xff")
    experiment([GOOD])
    module = evidence.load_experiment(systems.find_system("kivi"))
    module.run = lambda quick, data, progress=None: (data or noise).read_text("utf-8")  # type: ignore[attr-defined]
    result = memwall("evidence", "kivi", "--data", noise)
    assert result.exit_code == 2
    assert "noise.bin: not UTF-8 text (byte 1 " in result.stderr
    assert isinstance(memwall("evidence", "kivi").exception, UnicodeDecodeError), "what is not the user's stays a fault"


@pytest.mark.parametrize(
    "system", [system for system in systems.all_systems() if system.evidence_path is not None], ids=lambda s: s.slug
)
def test_experiments_load(system: systems.System) -> None:
    assert callable(evidence.load_experiment(system).run)

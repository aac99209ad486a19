"""`memwall simulate paging`: a table of policies, JSON, and bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "accesses.txt"
    path.write_text("".join(f"{at % 5}\n" for at in range(200)))
    return path


def test_the_table_and_its_json(memwall: Callable, trace: Path) -> None:
    done = memwall("simulate", "paging", trace, "--slots", "4")
    assert done.exit_code == 0, done.stderr
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines()[2:]}
    assert rows["lru"][-1] == "0.0%"  # a loop over more keys than there are slots
    assert rows["flush"][2:] == rows["lfd"][2:]
    assert "0 wrong zeros" in done.stderr
    done = memwall(
        "simulate",
        "paging",
        trace,
        trace,
        "--slots",
        "4",
        "--flip-zeros",
        "0.5",
        "--flip-ones",
        "0.5",
        "--policies",
        "all",
        "--json",
    )
    told = json.loads(done.stdout)
    assert [len(one["policies"]) for one in told["traces"]] == [16, 16]
    whole = {one["policy"]: one for one in told["policies"]}
    assert whole["lru"]["faults"] == 400
    assert whole["lfd"]["times_least"] == 1
    assert sum(told["traces"][0]["wrong_bits"]["discard"]) > 50


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--policies", "lrv"], "did you mean lru"),
        (["--policies", ","], "name one at least"),
        (["--slots", "0"], "slots"),
        (["--flip-zeros", "1.5"], "between 0 and 1"),
        (["--flip-ones", "nan"], "between 0 and 1"),
        (["--predictions", "noisy", "--sigma", "nan"], "sigma nan"),
        (["--predictions", "noisy", "--sigma", "1e9"], "between 0 and 20"),
        (["--predictions", "popu", "--train", "1"], "share of 1"),
        (["--predictions", "seen", "--flip-ones", "0.1"], "--flip-ones goes with --predictions oracle, not seen"),
        (["--train", "0.3"], "popu or pleco or learned, not oracle"),
        (["--predictions", "seen", "--policies", "lmarker"], "which lmarker must be told"),
        (["--predictions", "popu", "--slots", "1000"], "fewer than the 1000 slots"),
        (["--limit", "0"], "limit"),
    ],
)
def test_bad_input(memwall: Callable, trace: Path, options: list[str], says: str) -> None:
    done = memwall("simulate", "paging", trace, *options)
    assert done.exit_code == 2
    assert says in done.stderr
    assert memwall("simulate", "paging", trace.parent / "none.txt").exit_code == 2


def test_policies_that_cannot_be_told_are_named(memwall: Callable, trace: Path) -> None:
    done = memwall("simulate", "paging", trace, "--predictions", "seen", "--policies", "lru,lmarker")
    assert done.exit_code == 0, done.stderr
    assert "left out: seen does not say when a key comes next, which lmarker must be told" in done.stderr
    told = json.loads(
        memwall("simulate", "paging", trace, "--predictions", "seen", "--policies", "lru,lmarker", "--json").stdout
    )
    assert told["left_out"] == ["lmarker"]

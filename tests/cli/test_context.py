"""`memwall simulate context`: tables, JSON, pictures, and bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

PUBLISHED = ("--bandwidth", "2TB/s", "--link", "20GB/s", "--context", "4000,50000", "--attention", "48x4096")


def test_the_paper_s_example(memwall: Callable) -> None:
    done = memwall("simulate", "context", "34b", *PUBLISHED, "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    short, long = told["contexts"]
    assert (short["users"], long["users"]) == (18, 1)
    assert long["kv_bytes"] == 12_288_000_000
    assert long["prefill_seconds"] == pytest.approx(14.05, abs=0.01)
    assert long["ratio_to_first"]["prefill"] == pytest.approx(15.75, abs=0.01)
    assert told["critical_batch"] == 156
    assert told["model"]["attention"] == {"layers": 48, "width": 4096, "causal": True}
    assert long["bottlenecks"]["answer"]["bound_by"] == "bandwidth"
    assert long["bottlenecks"]["switch"]["derivative"]["link"] < 0


def test_tables(memwall: Callable, tmp_path: Path) -> None:
    picture = tmp_path / "costs.svg"
    done = memwall(
        "simulate", "context", "34b", *PUBLISHED, "--rank", "--methods", "snapkv(0.25)+kivi(2bit)", "--simulate",
        "--sweep", "h100-sxm,desktop-rtx-4090", "--plot", picture,
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    for text in ("50,000 tokens", "memory bandwidth", "simulated, in turn", "takes 3", "yoco", "Gains of the methods"):
        assert text in done.stdout
    assert "attention 48 layers x 4096, causal" in done.stderr
    assert "20 GB/s" in done.stderr or "20.0 GB/s" in done.stderr
    drawn = picture.read_text()
    assert drawn.startswith("<svg")
    assert drawn.count("<circle") == 10


def test_methods_move_what_they_should(memwall: Callable) -> None:
    plain = json.loads(memwall("simulate", "context", "34b", *PUBLISHED, "--json").stdout)
    done = memwall("simulate", "context", "34b", *PUBLISHED, "--methods", "kivi(2bit)", "--rank", "--json")
    told = json.loads(done.stdout)
    assert told["contexts"][1]["users"] > 5 * plain["contexts"][1]["users"]
    assert told["contexts"][1]["prefill_seconds"] == plain["contexts"][1]["prefill_seconds"]
    assert told["methods"][1]["left"]["memory"] < 0.2
    assert told["ranking"]["prefill"][0] == "yoco"
    assert told["ranked"][-1]["methods"] == "kivi(2bit)"


def test_a_model_and_this_machine(memwall: Callable) -> None:
    done = memwall("simulate", "context", "demo", "--machine", "here", "--context", "512,1k", "--simulate", "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["device"]["name"] == "here"
    assert told["contexts"][1]["simulated_side_by_side"]["sessions_per_s"] > 0


def test_what_does_not_fit_says_what_would(memwall: Callable) -> None:
    done = memwall("simulate", "context", "34b", "--machine", "desktop-rtx-4090", "--context", "4k")
    assert done.exit_code == 1
    assert "try --devices 3" in done.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--machine", "a100"], "a100-80gb"),
        (["--context", "0"], "counts of tokens"),
        (["--context", "4x"], "not a count"),
        (["--methods", "kiwi(2bit)"], "kivi"),
        (["--methods", "cla(2)+yoco"], "both about layer"),
        (["--shares", "1,1"], "three"),
        (["--shares", "a"], "three shares"),
        (["--attention", "60"], "48x4096"),
        (["--memory", "80G"], "80GB"),
        (["--compute", "312"], "312TFLOP/s"),
        (["--reading", "-1"], "reading"),
        (["--weights", "int99"], "int99"),
        (["--plot", "/nowhere/x.svg"], "nowhere"),
        (["--sweep", ","], "name one machine"),
        (["--users", "0"], "users"),
        (["--users", "501", "--simulate"], "500 users at most"),
    ],
)
def test_bad_input(memwall: Callable, options: list[str], says: str) -> None:
    done = memwall("simulate", "context", "34b", *options)
    assert done.exit_code == 2, done.stdout
    assert says in done.stderr

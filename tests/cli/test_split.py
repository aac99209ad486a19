"""`memwall simulate split`: the paper's models, a directory's, slow networks, a watched trace, and bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Memwall = Callable[..., Any]
FEW = ("--requests", "40", "--prompt-tokens", "300", "--output-tokens", "60")


def test_the_published_model(memwall: Memwall, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = memwall("simulate", "split", "opt-13b", "--devices", "3", *FEW, "--json", "--html", page)
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["plan"]["goodput_per_device"] >= told["runners_up"][0]["goodput_per_device"] > 0
    assert told["segment_map"] is None
    assert len(told["attainment"]["over_rate"]) == 7
    assert "<svg" in page.read_text()
    table = memwall("simulate", "split", "opt-13b", "--devices", "2", *FEW, "--no-fill")
    assert "objectives x 0.4" in table.stdout
    assert "the paper's" in table.stderr


def test_as_many_instances_as_a_rate_takes(memwall: Memwall) -> None:
    options = ("simulate", "split", "opt-13b", "--devices", "2", *FEW, "--json")
    few, many = (json.loads(memwall(*options, "--rate", rate).stdout)["plan"] for rate in ("2", "40"))
    assert many["devices"] > few["devices"]
    assert many["goodput"] == pytest.approx(40)


def test_any_model_on_slow_nodes(memwall: Memwall) -> None:
    done = memwall(
        "simulate", "split", "demo", "--machine", "h100-sxm", "--nodes", "2", "--devices", "2", "--network",
        "10Gbit/s", "--slow-network", "--slo-first", "0.01", "--slo-token", "0.01", *FEW, "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    plans = [told["plan"], *told["runners_up"]]
    assert {plan["segments"] for plan in plans} == {1, 2}
    assert "formulas are fitted" in memwall("simulate", "split", "demo", "--devices", "2", *FEW).stderr


def test_a_trace_is_watched(memwall: Memwall, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    for n in range(160):
        minute, second = divmod(n // 4, 60)
        lines.append(f"2024-01-01 00:{minute:02d}:{second:02d}.{n % 4}00000,{200 if n < 80 else 1500},{60 + n % 5}")
    trace.write_text("\n".join(lines))
    options = ("simulate", "split", "opt-13b", "--devices", "4", "--requests", "40", "--slo-first", "0.5")
    done = memwall(*options, "--trace", trace, "--watch", "30", "--rate", "4", "--json")
    assert done.exit_code == 0, done.stderr
    changes = json.loads(done.stdout)["replanned"]
    assert len(changes) >= 2
    assert "prompt tokens" in changes[-1]["shifted"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--attainment", "2"), "--attainment is 2.0"),
        (("--slo-first", "0"), "--slo-first is 0.0"),
        (("--slo-token", "nan"), "--slo-token is nan"),
        (("--rate", "nan"), "--rate is nan"),
        (("--rate", "0"), "--rate is 0.0"),
        (("--watch", "20"), "--watch needs a --trace with times"),
        (("--prompt-tokens", "300000"), "does not fit the"),
        (("--html", "/nowhere/page.html"), "is not a directory"),
    ],
)
def test_bad_input(memwall: Memwall, options: tuple[str, ...], said: str) -> None:
    done = memwall("simulate", "split", "opt-13b", "--devices", "2", "--requests", "20", *options)
    assert done.exit_code == 2
    assert said in done.stderr


def test_objectives_that_nothing_meets(memwall: Memwall) -> None:
    for options in (("--rate", "2"), (), ("--slow-network",)):
        done = memwall("simulate", "split", "opt-13b", "--devices", "2", *FEW, *options, "--slo-token", "0.001")
        assert done.exit_code == 1
        assert "loosen" in done.stderr

"""`memwall bench trace`: figures of a trace, and a new one that `bench serve` could replay."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memwall.engine.arrivals import read_trace
from memwall.serve.traces import make_trace, read_columns, write_columns

Memwall = Callable[..., Any]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Ten minutes of bursts with conversations and failures."""
    rng = np.random.default_rng(1)
    at = np.cumsum(rng.gamma(0.4, 0.5, 3000))
    at = at[at < 600]
    n = len(at)
    prompt = rng.integers(1, 500, n)
    output = np.where(rng.random(n) < 0.05, 0, prompt // 3 + 1)
    trace = make_trace(at, prompt, output, "x", session=rng.integers(0, n // 3, n), models=("ChatGPT",), kinds=("API",))
    write_columns(trace, tmp_path / "in.csv")
    return tmp_path / "in.csv"


def test_figures_and_a_new_trace(memwall: Memwall, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    done = memwall("bench", "trace", source, "--generate", out, "--scale", "3", "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    made = told["generated"]
    assert made["requests"] == pytest.approx(3 * told["requests"], rel=0.15)
    assert told["failures"] == pytest.approx(0.05, abs=0.02)
    assert made["failures"] == 0
    assert told["windows"]["gamma_better"] > 0.8
    assert made["windows"]["cv_median"] == pytest.approx(told["windows"]["cv_median"], rel=0.15)
    assert made["rank_correlation"] > 0.95
    assert told["daily"] is None
    assert len(read_columns(out)) == made["requests"]
    assert len(read_trace(out, 50)) == 50  # what `bench serve --trace` reads
    table = memwall("bench", "trace", source, "--thin", "0.5")
    assert "CV of gaps" in table.stdout


def test_conversations(memwall: Memwall, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    done = memwall(
        "bench", "trace", source, "--generate", out, "--conversations", "2000", "--lengths", "zipf", "--json"
    )
    assert done.exit_code == 0, done.stderr
    made = read_columns(out)
    assert made.turn.max() > 0
    assert (made.prompt + made.output).max() <= 2048
    assert json.loads(done.stdout)["generated"]["turns_mean"] > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "GPT-9"), "there are ChatGPT"),
        (("--thin", "0"), "above 0"),
        (("--generate", "x.csv", "--scale", "0"), "above zero"),
    ],
)
def test_bad_input(memwall: Memwall, source: Path, arguments: tuple[str, ...], message: str) -> None:
    done = memwall("bench", "trace", source, *arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert not Path("x.csv").exists()

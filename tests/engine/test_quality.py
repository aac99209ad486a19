"""Quality figures against slow formulas, and their limits: nothing lost is zero, more lost is more."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.engine.quality import Divergence, Evaluator, evaluate, log_softmax
from memwall.errors import InputError
from memwall.models import model_directory

DEMO = model_directory("demo")
TEXT = "The library holds several thousand books. Readers may take three of them home for a month. " * 6


def slow(logits: np.ndarray, targets: np.ndarray, reference: np.ndarray) -> tuple[float, float, float]:
    """(perplexity, KL, agreement) by the definitions, in float64."""
    p = np.exp(reference.astype(float))
    p /= p.sum(axis=1, keepdims=True)
    q = np.exp(logits.astype(float))
    q /= q.sum(axis=1, keepdims=True)
    rows = np.arange(len(targets))
    same = (p.argmax(axis=1) == q.argmax(axis=1)).mean()
    return float(np.exp(-np.log(q[rows, targets]).mean())), float((p * np.log(p / q)).sum(axis=1).mean()), float(same)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), rows=st.integers(1, 7), width=st.integers(2, 40), pieces=st.integers(1, 3))
def test_divergence_equals_the_definitions(seed: int, rows: int, width: int, pieces: int) -> None:
    random = np.random.default_rng(seed)
    logits = random.standard_normal((rows, width)).astype(np.float32) * 3
    reference = logits + random.standard_normal((rows, width)).astype(np.float32)
    targets = random.integers(0, width, rows)
    sums = Divergence()
    for part in np.array_split(np.arange(rows), pieces):
        if len(part):
            sums.add(logits[part], targets[part], reference[part])
    figures = sums.figures(bits_per_weight=4.0, kv_bits_per_value=None)
    expected = slow(logits, targets, reference)
    assert figures.tokens == rows
    assert (figures.perplexity, figures.kl_nats, figures.top1_agreement) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_extreme_logits_stay_finite() -> None:
    logits = np.array([[1e30, -1e30, 0.0], [0.0, 0.0, 0.0]], np.float32)
    assert np.isfinite(log_softmax(logits)[1]).all()
    sums = Divergence()
    sums.add(logits[1:], np.array([2]), logits[1:])
    assert sums.figures(bits_per_weight=1, kv_bits_per_value=None).kl_nats == 0


def test_the_float_model_loses_nothing_and_fewer_bits_lose_more() -> None:
    evaluator = Evaluator(DEMO, TEXT, limit_tokens=100, threads=1)
    exact, eight, three = (evaluator.score(weights) for weights in ("float16", "int8", "int3"))
    assert exact.kl_nats == pytest.approx(0, abs=1e-6)
    assert exact.top1_agreement == 1
    assert exact.reference_perplexity == pytest.approx(exact.perplexity)
    assert exact.kl_nats is not None
    assert eight.kl_nats is not None
    assert three.kl_nats is not None
    assert exact.kl_nats < eight.kl_nats < three.kl_nats
    assert exact.bits_per_weight == 16
    assert exact.tokens == eight.tokens == 100
    assert exact.kv_bits_per_value is None


def test_decoding_through_an_exact_cache_equals_the_prompt_form() -> None:
    evaluator = Evaluator(DEMO, TEXT, limit_tokens=100, threads=1)
    decoded = evaluator.score("float16", "float32")
    assert decoded.kl_nats == pytest.approx(0, abs=1e-5)
    coded = evaluator.score("float16", "kivi(bits=2,group=32,residual=32)")
    assert coded.kl_nats is not None
    assert decoded.kl_nats is not None
    assert coded.kl_nats > decoded.kl_nats
    assert coded.kv_bits_per_value is not None
    assert decoded.kv_bits_per_value is not None
    assert coded.kv_bits_per_value < decoded.kv_bits_per_value


def test_windows_cover_the_limit_and_report_progress() -> None:
    evaluator = Evaluator(DEMO, TEXT, limit_tokens=70, window_tokens=32, threads=1)
    seen: list[tuple[int, int]] = []
    figures = evaluator.score("int8", progress=lambda done, total: seen.append((done, total)))
    assert figures.tokens == 70
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_text_files_are_checked(tmp_path: Path) -> None:
    good = tmp_path / "good.txt"
    good.write_text(TEXT, encoding="utf-8")
    assert evaluate(DEMO, good, weights="int8", limit_tokens=20, threads=1).tokens == 20
    bad = {"empty": b"", "blank": b" \n ", "binary": b"\x00\x01\x02", "latin": b"caf\xe9 " * 20}
    for name, content in bad.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(InputError, match=name):
            evaluate(DEMO, path, weights="int8", threads=1)
    with pytest.raises(InputError, match="absent"):
        evaluate(DEMO, tmp_path / "absent", weights="int8", threads=1)
    with pytest.raises(InputError, match="limit is 1"):
        evaluate(DEMO, good, weights="int8", limit_tokens=1, threads=1)
    with pytest.raises(InputError, match="int9"):
        evaluate(DEMO, good, weights="int9", limit_tokens=8, threads=1)


BUDGET_SCRIPT = """
import sys
from memwall.engine import evaluate
from memwall.memory import Budget, peak_resident_bytes
from memwall.models import DEMO_DIRECTORY
text, kv, limit, ram = sys.argv[1:]
budget = Budget(tiers={"ram": int(ram)})
evaluate(DEMO_DIRECTORY, text, weights="int4", kv=kv or None, limit_tokens=int(limit), budget=budget, threads=1)
print(peak_resident_bytes())
"""


@pytest.mark.parametrize(("kv", "limit"), [("", 700), ("kivi", 120)])
def test_both_models_share_one_budget(kv: str, limit: int) -> None:
    def run(ram: int) -> subprocess.CompletedProcess[str]:
        arguments = [sys.executable, "-c", BUDGET_SCRIPT, TEXT * 12, kv, str(limit), str(ram)]
        return subprocess.run(arguments, capture_output=True, text=True, check=False)

    smallest = re.search(r"try --memory (\d+)", run(60_000_000).stderr)
    assert smallest
    done = run(int(smallest[1]))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= int(smallest[1])


def test_nothing_stays_behind_an_evaluation() -> None:
    evaluator = Evaluator(DEMO, TEXT, limit_tokens=60, threads=1)
    evaluator.score("int4")
    reference = evaluator._reference
    assert reference is not None
    before = reference.ledger.total("ram")
    evaluator.score("int8", "kivi")
    assert reference.ledger.total("ram") == before

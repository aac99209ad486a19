"""The benchmark's figures from made-up measurements: ratios, shares of bandwidth, verdicts, the table."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "decode_report.py"
SPEC = importlib.util.spec_from_file_location("decode_report", PATH)
decode_report = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(decode_report)


def _contender(rate: float, *, bits: float, prefill: float, peak_bytes: int, ledger: dict | None = None) -> dict:
    status = {"peak_bytes": peak_bytes, "resident_bytes": peak_bytes, "anonymous_bytes": 1, "file_bytes": 2}
    return {
        "about": {"version": "1", "settings": "none"},
        "weight_bits": bits,
        "kv_bytes_per_value": 2.0,
        "decode": {"0": [rate] * 3, "100": [rate / 2] * 3},
        "bandwidth": {"0": [1e9] * 3, "100": [1e9] * 3},
        "prefill": [prefill] * 3,
        "startup_seconds": [0.5],
        "memory": {
            "before_load": status,
            "context_0": status | {"ledger": ledger or {}},
            "context_100": status | {"ledger": ledger or {}},
        },
    }


@pytest.fixture
def model() -> dict:
    return {
        "shape": {"num_layers": 1, "hidden": 2, "num_heads": 1, "num_kv_heads": 1, "intermediate": 4, "vocab": 8},
        "num_matrix_weights": 1_000_000,
        "kv_values_per_token": 1000,
        "bandwidth_measure": {"version": "probe"},
        "agreement": {},
        "contenders": {
            "memwall": _contender(1600, bits=4, prefill=90, peak_bytes=110, ledger={"runtime": 20, "weights/int4": 80}),
            "llama.cpp": _contender(1000, bits=4.5, prefill=100, peak_bytes=200),
            "llama.cpp-unpacked": _contender(500, bits=4.5, prefill=10, peak_bytes=100),
            "transformers-float32": {"not_run": "no torch"},
        },
    }


def test_bytes_of_a_step_are_weights_and_cache(model):
    own = model["contenders"]["memwall"]
    assert decode_report.bytes_per_step(model, own, 0) == 500_000
    assert decode_report.bytes_per_step(model, own, 100) == 500_000 + 100 * 1000 * 2
    assert decode_report.bandwidth_shares(model, own, "0") == pytest.approx([0.8] * 3)


def test_verdicts_take_the_best_variant_of_each_row(model):
    rows = {row["claim"]: row for row in decode_report.wanted_rows(model)}
    assert rows["decode at context 0, times llama.cpp"]["passed"]
    assert rows["decode at context 0, share of read bandwidth"]["passed"]
    assert not rows["decode at context 100, share of read bandwidth"]["passed"]
    assert rows["prefill, times llama.cpp"]["passed"]
    memory = rows["peak resident set up to context 0"]
    assert "llama.cpp-unpacked" in memory["required"]
    assert memory["passed"]


def test_a_peak_over_the_allowance_fails(model):
    greedy = copy.deepcopy(model)
    for status in greedy["contenders"]["memwall"]["memory"].values():
        status["peak_bytes"] = 121
    rows = {row["claim"]: row for row in decode_report.wanted_rows(greedy)}
    assert not rows["peak resident set up to context 0"]["passed"]


def test_without_memwall_nothing_passes(model):
    model["contenders"]["memwall"] = {"not_run": "broken"}
    assert [row["passed"] for row in decode_report.wanted_rows(model)] == [False]


def test_agreement_is_held_against_the_most_exact(model):
    contenders = model["contenders"]
    contenders["memwall"]["check_logits"] = {"logits": [1.0, 0.0], "finite": True}
    contenders["llama.cpp"]["check_logits"] = {"logits": [1.0, 1.0], "finite": True}
    found = decode_report.agreement(contenders)
    assert found["llama.cpp"] == pytest.approx(1)
    assert found["memwall"] == pytest.approx(0.5**0.5)
    assert "check_logits" not in contenders["memwall"]


def test_the_table_names_all_and_says_what_did_not_run(model):
    model["agreement"] = dict.fromkeys(("memwall", "llama.cpp", "llama.cpp-unpacked"), 1.0)
    model["wanted"] = decode_report.wanted_rows(model)
    text = decode_report.markdown(
        {
            "date": "today",
            "hardware": {"cpu": "a chip", "cores": 2, "vector": [], "memory_bytes": 10**9, "system": "Linux"},
            "others_share": 0.5,
            "settings": {"threads": 2, "rounds": 3, "contexts": [0, 100], "prefill_tokens": 512},
            "models": {"small": model},
        }
    )
    assert "transformers-float32: not run: no torch" in text
    assert "| FAIL |" in text
    assert "not quiet" in text
    assert "| pass |" in text

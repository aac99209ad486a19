"""The JSON form of a plan: whole, versioned, and strict about what it reads."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.plan.base import PLAN_VERSION, Choice, Option, Plan, PlanRow, Quality

names = st.text(st.characters(codec="utf-8"), max_size=12)
sizes = st.integers(0, 2**62)
reals = st.floats(0, 1e9, allow_nan=False)
choices = st.builds(
    Choice,
    weights=names,
    kv=names,
    context=st.integers(1, 2**20),
    batch=st.integers(1, 64),
    threads=st.integers(1, 64),
    device=names,
)
qualities = st.none() | st.builds(
    Quality,
    kl_nats=reals,
    perplexity=reals,
    top1_agreement=st.floats(0, 1),
    measured_on=names,
    tokens=st.integers(0, 10**6),
)
peaks = st.dictionaries(names, sizes, max_size=3)
options = st.builds(
    Option, choice=choices, peak_bytes=peaks, bits_per_weight=reals, kv_bits_per_value=reals,
    decode_tokens_per_s=st.none() | reals, quality=qualities, note=names,
)  # fmt: skip
plans = st.builds(
    Plan, model=names, fingerprint=names, machine=names, budget=peaks, choice=choices,
    rows=st.lists(st.builds(PlanRow, owner=names, tier=names, nbytes=sizes), max_size=4).map(tuple),
    peak_bytes=peaks, bits_per_weight=reals, kv_bits_per_value=reals, decode_tokens_per_s=st.none() | reals,
    prefill_tokens_per_s=st.none() | reals, quality=qualities, explanation=names,
    runners_up=st.lists(options, max_size=2).map(tuple),
)  # fmt: skip


@settings(max_examples=50, deadline=None, derandomize=True)
@given(plan=plans)
def test_json_round_trip(plan: Plan) -> None:
    assert Plan.from_json(plan.to_json()) == plan


def small_plan(**changes: Any) -> Plan:
    settings: dict[str, Any] = {
        "model": "toy", "fingerprint": "0", "machine": "m", "budget": {"ram": 100},
        "choice": Choice(weights="int4", kv="float16", context=8),
        "rows": (PlanRow(owner="weights/int4", tier="ram", nbytes=90),),
        "peak_bytes": {"ram": 90}, "bits_per_weight": 4.25, "kv_bits_per_value": 16.0,
    }  # fmt: skip
    return Plan(**(settings | changes))


def test_version_comes_first_and_rows_say_bytes() -> None:
    body = json.loads(small_plan().to_json())
    assert next(iter(body)) == "version"
    assert body["version"] == PLAN_VERSION
    assert body["rows"] == [{"owner": "weights/int4", "tier": "ram", "bytes": 90}]


def test_fits_checks_every_tier() -> None:
    assert small_plan().fits
    assert not small_plan(budget={"ram": 89}).fits
    assert not small_plan(budget={"ram": 100, "gpu": 10}, peak_bytes={"ram": 90, "gpu": 11}).fits


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"version": 2}, "version 2"),
        ({"version": None}, "version None"),
        ({"speed": 1}, "'speed'"),
        ({"choice": None}, "choice"),
        ({"choice": {"weights": "int4"}}, "choice is incomplete"),
        ({"rows": {}}, "rows"),
        ({"rows": [3]}, "rows"),
        ({"quality": []}, "quality"),
        ({"runners_up": [{}]}, "runners_up"),
    ],
)
def test_unreadable_plans_are_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        Plan.from_dict(small_plan().to_dict() | change)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000])
def test_text_that_is_no_plan(text: str) -> None:
    with pytest.raises(InputError):
        Plan.from_json(text)

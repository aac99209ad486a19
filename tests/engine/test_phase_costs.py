"""The cost model: by hand, monotone in the share, contention by the formula, and fits that find what was put in."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.engine.phase_costs import Costs, Demand, Operator, fit_contention, fit_operator
from memwall.errors import InputError
from tests.engine.phased_loads import SIZE

PLAIN = Operator(seconds_per_flop=1e-13, seconds_per_byte=2e-12)
COSTS = Costs(
    size=SIZE, prefill_dense=PLAIN, prefill_attention=PLAIN, decode_dense=PLAIN, decode_attention=PLAIN, contention=1.0
)


def test_an_operator_by_hand() -> None:
    one = Operator(seconds_per_flop=1e-12, saturation=0.5, decay=0.4)
    assert one.compute(1e12, 0.25) == pytest.approx(4.0)
    assert one.compute(1e12, 1.0) == pytest.approx(1 / 0.7)  # 0.5 + 0.4 x 0.5
    bound = Operator(seconds_per_flop=1e-15, seconds_per_byte=1e-9, reach=0.5)
    assert bound.seconds(1.0, 1e9, 1.0) == pytest.approx(1.0)
    assert bound.seconds(1.0, 1e9, 0.25) == pytest.approx(2.0)


def test_bandwidth_left_is_the_papers() -> None:
    demand = Demand.of([(900, 100)], [1000] * 4)
    mine, keys, weights = 4000 * SIZE.kv_bytes, 1000 * SIZE.kv_bytes, SIZE.weight_bytes
    part = COSTS.attention_part(demand, 0.5)
    assert COSTS.bandwidth_left(demand, 0.5) == pytest.approx(
        part * mine / (mine + keys) + (1 - part) * mine / (mine + weights)
    )
    assert COSTS.bandwidth_left(replace(demand, prefill_tokens=0), 0.5) == 1.0
    assert replace(COSTS, contention=0.0).bandwidth_left(demand, 0.5) == pytest.approx(1.0)
    assert Demand.of([(2, 3)], []).prefill_pairs == 3 + 4 + 5


@settings(max_examples=200, deadline=None)
@given(
    first=st.integers(0, 20_000), count=st.integers(0, 2048), batch=st.integers(0, 64), length=st.integers(1, 8000),
    saturation=st.floats(0.1, 1.0), decay=st.floats(0.0, 1.0), contention=st.floats(0.0, 1.0), reach=st.floats(0, 1),
)  # fmt: skip
def test_more_share_is_never_slower_and_parts_are_parts(
    first: int, count: int, batch: int, length: int, saturation: float, decay: float, contention: float, reach: float
) -> None:
    shape = replace(PLAIN, saturation=saturation, decay=decay, reach=reach)
    costs = replace(COSTS, prefill_dense=shape, decode_dense=shape, decode_attention=shape, contention=contention)
    demand = Demand.of([(first, count)] if count else [], [length] * batch)
    shares = [step / 20 for step in range(1, 20)]
    prefill = [costs.prefill(demand, share) for share in shares]
    decode = [costs.decode(demand, share, 0.5) for share in shares]
    for seconds in (prefill, decode):
        assert all(math.isfinite(one) and one >= 0 for one in seconds)
        assert all(a >= b * (1 - 1e-12) for a, b in pairwise(seconds))
    for share in shares:
        assert 0 <= costs.attention_part(demand, share) <= 1
        assert 0 < costs.bandwidth_left(demand, share) <= 1
    assert costs.decode(demand, 0.5) >= replace(costs, contention=0.0).decode(demand, 0.5)


@pytest.mark.parametrize(
    "truth",
    [
        Operator(seconds_per_flop=3e-13, saturation=0.6, decay=0.3),
        Operator(seconds_per_flop=3e-13, saturation=1.0),
        Operator(seconds_per_flop=1e-14, seconds_per_byte=5e-12, saturation=1.0, reach=0.4),
    ],
)
def test_a_fit_predicts_what_was_put_in(truth: Operator) -> None:
    shares = (0.1, 0.25, 0.5, 0.75, 1.0)
    work = [(1e10, 1e9), (1e12, 1e9)]
    points = [(flop, nbytes, share, truth.seconds(flop, nbytes, share)) for flop, nbytes in work for share in shares]
    found = fit_operator(points)
    for flop, nbytes, share, seconds in points:
        assert found.seconds(flop, nbytes, share) == pytest.approx(seconds, rel=0.1)
    with pytest.raises(InputError, match="no measurement"):
        fit_operator([])


def test_contention_is_found_again() -> None:
    truth = replace(COSTS, contention=0.2)
    points = [
        (demand, share, 1 - share, truth.decode(demand, 1 - share, share))
        for demand in (Demand.of([(0, 512)], [2000] * 8), Demand.of([(8000, 512)], [2000] * 8))
        for share in (0.3, 0.7)
    ]
    assert fit_contention(replace(COSTS, contention=0.0), points).contention == 0.2
    assert fit_contention(truth, []) == truth

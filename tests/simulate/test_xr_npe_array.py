"""Cycles, bytes and energy of an array of XR-NPE's units: by hand, within bounds, and where AXI is the limit."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.formats.xr_npe import FORMATS, FP4, POSIT4, POSIT8, POSIT16, LaneFormat
from memwall.simulate.xr_npe_array import (
    CHANGES,
    PAPER,
    UnitArray,
    area_of_parts,
    energy_per_product,
    energy_per_word,
    model_cost,
    product_cost,
    total,
)


def test_one_tile_by_hand() -> None:
    array = UnitArray(rows=4, columns=4, axi_bytes=8)
    cost = product_cost(4, 64, 4, POSIT8, array)
    # 32 words for each of 4 rows and 4 columns, two bytes a word; 16 outputs of a byte
    assert cost.moved_bytes == 8 * 64 + 16
    assert cost.compute_cycles == 32
    assert cost.cycles == 512 // 8 + 32 + 16 // 8 + (4 + 4)
    assert cost.products == 4 * 4 * 64


def test_what_stays_in_the_buffer_is_loaded_once() -> None:
    words = 2 * 256
    large = product_cost(32, 1024, 64, FP4, UnitArray(buffer_bytes=1 << 20))
    assert large.moved_bytes == (32 + 64) * words + 32 * 64 // 2
    tiny = product_cost(32, 1024, 64, FP4, UnitArray(buffer_bytes=1 << 10))
    assert tiny.moved_bytes == (32 * 8 + 64 * 4) * words + 32 * 64 // 2


@given(
    st.integers(1, 70), st.integers(1, 300), st.integers(1, 70), st.sampled_from(FORMATS), st.integers(1, 64),
    st.integers(64, 1 << 16),
)  # fmt: skip
def test_cycles_lie_between_the_slower_side_and_both(
    m: int, k: int, n: int, found: LaneFormat, axi_bytes: int, buffer_bytes: int
) -> None:
    array = UnitArray(rows=5, columns=7, axi_bytes=axi_bytes, buffer_bytes=buffer_bytes)
    cost = product_cost(m, k, n, found, array)
    compute = math.ceil(m / 5) * math.ceil(n / 7) * math.ceil(k / found.lanes)
    assert cost.compute_cycles == compute
    moving = cost.moved_bytes / axi_bytes
    tiles = math.ceil(m / 5) * math.ceil(n / 7)
    assert max(compute, moving) <= cost.cycles <= compute + moving + 12 + 2 * tiles + 2
    least = (m + n) * 2 * math.ceil(k / found.lanes)
    assert cost.moved_bytes >= least


def test_lanes_set_the_pace_until_axi_does() -> None:
    """4 : 2 : 1 where units are the limit; alike where outputs have to leave."""
    fast = UnitArray(axi_bytes=1 << 20, buffer_bytes=1 << 24)
    seconds = {found.name: product_cost(64, 4096, 64, found, fast).seconds for found in FORMATS}
    assert seconds["posit16_1"] / seconds["posit8_0"] == pytest.approx(2, rel=0.01)
    assert seconds["posit16_1"] / seconds["fp4"] == pytest.approx(4, rel=0.01)
    slow = UnitArray(axi_bytes=1, buffer_bytes=1 << 24)
    bound = [product_cost(256, 4, 256, found, slow, out_bits=16) for found in FORMATS]
    assert {cost.bound for cost in bound} == {"AXI"}
    assert max(cost.cycles for cost in bound) < 1.05 * min(cost.cycles for cost in bound)


def test_gating_saves_most_where_least_is_used() -> None:
    saved = {f.name: energy_per_product(f, gated=False) / energy_per_product(f) for f in FORMATS}
    assert saved["fp4"] > saved["posit16_1"]
    assert energy_per_product(POSIT16) == pytest.approx(PAPER["energy"].value)
    assert energy_per_word(POSIT4)["leakage"] < energy_per_word(POSIT8)["leakage"] < energy_per_word(POSIT16)["leakage"]
    assert energy_per_word(FP4, gated=False)["leakage"] == pytest.approx(energy_per_word(POSIT16)["leakage"])
    assert set(CHANGES[True]) == set(CHANGES[False]) == {found.name for found in FORMATS}
    assert sum(figure.value for figure in area_of_parts().values()) == pytest.approx(PAPER["area"].value)


def test_a_model_is_the_sum_of_its_matrices() -> None:
    shapes = {"a": (32, 64), "b": (64, 32)}
    costs = model_cost(shapes, {"a": FP4, "b": POSIT8}, 3)
    both = total(list(costs.values()))
    assert both.products == 2 * 3 * 32 * 64
    assert both.moved_bytes == costs["a"].moved_bytes + costs["b"].moved_bytes
    assert both.energy_j == pytest.approx(sum(cost.energy_j for cost in costs.values()))
    assert both.to_dict()["bound"] in ("compute", "AXI")


def test_bad_sizes() -> None:
    with pytest.raises(InputError, match="rows is 0"):
        UnitArray(rows=0)
    with pytest.raises(InputError, match="must be positive"):
        product_cost(0, 1, 1, FP4)

"""Packed products: equal to 32-bit arithmetic up to the derived interval, wrong just past it, for every width."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.simulate.dsp_packing import Packing, best_packing, packed_dot, packed_product, worst_case, wrapped

PACKINGS = (
    Packing(code_bits=2, lanes=3, spacing=12),
    Packing(code_bits=2, lanes=2, spacing=12),
    Packing(code_bits=4, lanes=2, spacing=16),
    Packing(code_bits=4, lanes=2, spacing=14, signed=True),
    Packing(code_bits=8, lanes=2, spacing=18, signed=True),
    Packing(code_bits=8, lanes=2, spacing=18, signed=True, activation_low=-127),
    Packing(code_bits=3, lanes=2, spacing=13),
    Packing(code_bits=1, lanes=3, spacing=10),
)


def plain(codes: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.einsum("...lk,...k->...l", codes.astype(np.int64), x.astype(np.int64))


def test_limits_by_hand() -> None:
    # 2 bits x 8: products -384 .. 381, lanes of 12 bits hold -2048 .. 2047
    assert Packing(code_bits=2, lanes=3, spacing=12).limit == 5
    # two 8-bit products at 18: eight times (-128)(-128) is one too many
    assert Packing(code_bits=8, lanes=2, spacing=18, signed=True).limit == 7
    symmetric = Packing(code_bits=8, lanes=2, spacing=18, signed=True, activation_low=-127)
    assert symmetric.limit == 8  # 8 * 128 * 127 = 130,048
    assert Packing(code_bits=4, lanes=2, spacing=16).limit == 17
    assert Packing(code_bits=2, lanes=3, spacing=12).rate(1) == pytest.approx(2.5)


@pytest.mark.parametrize("packing", PACKINGS, ids=lambda p: f"{p.name}{'s' if p.signed else ''}{p.activation_low}")
def test_right_up_to_the_limit_and_wrong_past_it(packing: Packing) -> None:
    for count in range(1, min(packing.limit, 60) + 1):
        codes, x = worst_case(packing, count)
        np.testing.assert_array_equal(packed_dot(packing, codes, x, interval=count), plain(codes, x))
    past = packing.limit + 1
    codes, x = worst_case(packing, past)
    assert not np.array_equal(packed_dot(packing, codes, x, interval=past), plain(codes, x))
    np.testing.assert_array_equal(packed_dot(packing, codes, x), plain(codes, x))


@pytest.mark.parametrize("packing", [p for p in PACKINGS if p.code_bits <= 4])
def test_all_codes_and_activations(packing: Packing) -> None:
    low, high = packing.codes
    values = np.arange(low, high + 1)
    codes = np.stack(np.meshgrid(*[values] * packing.lanes, indexing="ij"), axis=-1).reshape(-1, packing.lanes, 1)
    x = np.arange(packing.activation_low, packing.activation_high + 1)
    shape = (len(codes), len(x))
    many = np.broadcast_to(codes[:, None], (*shape, packing.lanes, 1))
    got = packed_dot(packing, many, np.broadcast_to(x[None, :, None], (*shape, 1)))
    np.testing.assert_array_equal(got, plain(many, np.broadcast_to(x[None, :, None], (*shape, 1))))


def test_every_pair_of_lane_sums_splits() -> None:
    """All sums that two neighbouring lanes can have at the limit come apart, whatever the third holds."""
    packing = Packing(code_bits=2, lanes=3, spacing=12)
    low, high = (packing.limit * each for each in packing.product_range)
    first, second = np.arange(low, high + 1), np.arange(low, high + 1, 7)
    for third in (low, -1, 0, high):
        both = first[:, None] + (second[None, :] << 12) + (np.int64(third) << 24)
        got = packing.split(both)
        assert (got[..., 0] == first[:, None]).all()
        assert (got[..., 1] == second[None, :]).all()
        assert (got[..., 2] == third).all()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(PACKINGS), st.integers(1, 90), st.integers(1, 7), st.integers(0, 1 << 30))
def test_products_equal_integers(packing: Packing, length: int, rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    low, high = packing.codes
    codes = rng.integers(low, high + 1, (rows, length))
    x = rng.integers(packing.activation_low, packing.activation_high + 1, length)
    zeros = rng.integers(low, high + 1, rows)
    interval = int(rng.integers(1, packing.limit + 1))
    got = packed_product(packing, codes, zeros, x, interval=interval)
    np.testing.assert_array_equal(got, (codes - zeros[:, None]) @ x)


def test_best_packings() -> None:
    found = {bits: best_packing(bits) for bits in (2, 4, 8)}
    assert [found[bits].lanes for bits in (2, 4, 8)] == [3, 2, 2]
    assert best_packing(2, flush_cycles=4).lanes == 2  # a costly flush favours long intervals
    assert best_packing(8, signed=True).spacing == 18


def test_bad_packings_are_refused() -> None:
    for bad, says in (
        ({"code_bits": 2, "lanes": 3, "spacing": 13}, "port"),
        ({"code_bits": 8, "lanes": 2, "spacing": 19, "signed": True}, "port"),  # -128 above and below: one bit more
        ({"code_bits": 4, "lanes": 3, "spacing": 11}, "runs into"),
        ({"code_bits": 0, "lanes": 1, "spacing": 4}, "at least 1"),
        ({"code_bits": 2, "lanes": 2, "spacing": 12, "activation_high": 1 << 18}, "activations"),
    ):
        with pytest.raises(InputError, match=says):
            Packing(**bad)
    packing = PACKINGS[0]
    with pytest.raises(InputError, match="codes must be"):
        packed_dot(packing, np.full((3, 2), 4), np.ones(2, np.int64))
    with pytest.raises(InputError, match="at least 1"):
        packed_dot(packing, np.ones((3, 2), np.int64), np.ones(2, np.int64), interval=0)
    assert wrapped(np.array([1 << 11, -1]), 12).tolist() == [-2048, -1]

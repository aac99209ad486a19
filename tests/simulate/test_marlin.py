"""The roofline of batches: figures of the paper, the knee, and the fit."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.hardware import load_machine
from memwall.simulate.base import Device
from memwall.simulate.marlin import SPARSE_BITS, SPARSE_FLOP, Engine, knee, moved_bytes, seconds, speedup, step_seconds

A10 = Engine(bytes_per_s=600e9, flop_per_s=125e12)
LARGE = (18432, 73728)


def test_figures_of_the_paper() -> None:
    """3.88 is the ideal in groups of 128 (section 3.1); an A10 leaves it at about 50 tokens and keeps 1.6 at 128."""
    assert speedup(A10, LARGE, 1) == pytest.approx(3.88, abs=0.01)
    assert SPARSE_BITS == 3.125
    assert speedup(A10, LARGE, 1, SPARSE_BITS) == pytest.approx(5.12, abs=0.01)
    assert knee(A10) == pytest.approx(125e12 * 4.125 / 16 / 600e9)
    assert speedup(A10, LARGE, 16) == pytest.approx(3.88, abs=0.05)
    assert speedup(A10, LARGE, 64) == pytest.approx(3.1, abs=0.3)
    assert speedup(A10, LARGE, 128) == pytest.approx(1.6, abs=0.1)
    # sparse tensor cores skip half of the arithmetic, so the gain lasts longer
    assert speedup(A10, LARGE, 128, SPARSE_BITS, flop_share=SPARSE_FLOP) > 1.9 * speedup(A10, LARGE, 128)


def test_machines_by_name() -> None:
    engine = Engine.of(Device.of(load_machine("a100-80gb")))
    assert 25 < knee(engine) < 50  # a weight serves 25 to 50 multiply-adds before arithmetic binds


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.floats(1e9, 1e12), st.floats(1e10, 1e14), st.integers(1, 500), st.sampled_from([3.125, 4.125, 8.0]))
def test_flat_and_then_falling(bytes_per_s: float, flop_per_s: float, tokens: int, bits: float) -> None:
    engine = Engine(bytes_per_s=bytes_per_s, flop_per_s=flop_per_s)
    gains = [speedup(engine, LARGE, m, bits) for m in (tokens, tokens + 1, 2 * tokens)]
    assert gains == sorted(gains, reverse=True)
    assert gains[-1] * (1 + 1e-9) >= 1
    assert gains[0] <= 16 / bits * (1 + 1e-9)
    at = knee(engine, bits)
    if tokens < 0.9 * at:
        assert seconds(engine, LARGE, tokens, bits) == moved_bytes(LARGE, tokens, bits) / bytes_per_s
    if tokens > 1.2 * at and tokens < 1000:
        assert seconds(engine, LARGE, tokens, bits) == pytest.approx(2.0 * tokens * LARGE[0] * LARGE[1] / flop_per_s)


def test_fitted_on_two_points_gives_them_back() -> None:
    points = [(m, seconds(A10, LARGE, m)) for m in (1, 256)]
    fitted = Engine.fitted(LARGE, 4.125, *points)
    assert (fitted.bytes_per_s, fitted.flop_per_s) == (pytest.approx(600e9), pytest.approx(125e12))
    with pytest.raises(InputError, match="a small and a large batch"):
        Engine.fitted(LARGE, 4.125, points[1], points[0])
    with pytest.raises(InputError, match="must be positive"):
        Engine(bytes_per_s=0, flop_per_s=1)
    with pytest.raises(InputError, match="0 or more"):
        Engine(bytes_per_s=1, flop_per_s=1, value_bytes=-1)


def test_laying_weights_out_anew_adds_a_pass_from_the_second_token_on() -> None:
    plain = Engine(bytes_per_s=40e9, flop_per_s=800e9, value_bytes=0)
    laying = Engine(bytes_per_s=40e9, flop_per_s=800e9, value_bytes=0, lays_out=True)
    read = moved_bytes(LARGE, 1, 32.0, 0) / 40e9
    assert seconds(laying, LARGE, 1, 32.0) == seconds(plain, LARGE, 1, 32.0)
    for tokens in (2, 8, 256):
        assert seconds(laying, LARGE, tokens, 32.0) == pytest.approx(read + seconds(plain, LARGE, tokens, 32.0))
    points = [(m, seconds(laying, LARGE, m, 32.0)) for m in (1, 256)]
    fitted = Engine.fitted(LARGE, 32.0, *points, value_bytes=0, lays_out=True)
    assert fitted.flop_per_s == pytest.approx(800e9)
    with pytest.raises(InputError, match="no longer than laying"):
        Engine.fitted(LARGE, 32.0, points[0], (2, points[0][1] / 2), lays_out=True)
    with pytest.raises(InputError, match="one token and many"):
        Engine.fitted(LARGE, 32.0, (2, 1.0), (4, 9.0), lays_out=True)


def test_unpacking_that_is_not_hidden() -> None:
    slow = Engine(bytes_per_s=600e9, flop_per_s=125e12, dequantized_per_s=1e11)
    assert seconds(slow, LARGE, 1) == LARGE[0] * LARGE[1] / 1e11


def test_whole_steps() -> None:
    assert step_seconds(1e9, 1e10, 1e9, 1e11) == 0.1
    assert step_seconds(1e9, 1e10, 64e9, 1e11) == 0.64

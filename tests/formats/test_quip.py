"""QuIP's form: turns that keep lengths, packing, and what random turns are for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.formats import codec
from memwall.formats.quip import QuipCodec, factors

QUICK = settings(max_examples=40, deadline=None, derandomize=True)


@QUICK
@given(st.integers(1, 300), st.sampled_from(["rows", "cols"]), st.integers(0, 9), st.booleans())
def test_turns_are_orthogonal_and_undone(size: int, side: str, seed: int, hadamard: bool) -> None:
    turn = factors(size, side, seed, hadamard)
    assert len(turn.left) * len(turn.right) == size
    np.testing.assert_array_equal(np.sort(turn.order), np.arange(size))
    x = np.random.default_rng(seed).standard_normal((3, size)).astype(np.float32)
    turned = turn.turn(x)
    np.testing.assert_allclose(np.linalg.norm(turned, axis=1), np.linalg.norm(x, axis=1), rtol=1e-4)
    np.testing.assert_allclose(turn.turn_back(turned), x, atol=1e-4)


def test_factors_are_small_near_the_square_root_and_of_their_seed() -> None:
    turn = factors(4096, "cols", 0, False)
    assert (len(turn.left), len(turn.right)) == (64, 64)
    assert (len(factors(704, "cols", 0, False).left), len(factors(704, "cols", 0, False).right)) == (22, 32)
    assert np.abs(factors(64, "cols", 0, False).left - factors(64, "rows", 0, False).left).max() > 0.1
    assert np.abs(factors(64, "cols", 0, False).left - factors(64, "cols", 1, False).left).max() > 0.1
    np.testing.assert_allclose(np.abs(factors(64, "cols", 0, True).left), 8**-0.5, rtol=1e-6)


def test_the_random_numbers_are_those_of_splitmix64() -> None:
    """A file's seed must mean the same turn for ever: the first outputs of the published generator for seed 0."""
    from memwall.formats.quip import _splitmix

    assert [hex(int(x)) for x in _splitmix(np.uint64(0), 2)] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4"]


@QUICK
@given(st.integers(1, 40), st.integers(1, 300), st.integers(2, 8), st.booleans(), st.integers(0, 9))
def test_packing_keeps_every_part(rows: int, columns: int, bits: int, hadamard: bool, seed: int) -> None:
    random = np.random.default_rng(seed)
    form = QuipCodec(bits=bits, hadamard=hadamard)
    codes = random.integers(0, 1 << bits, (rows, columns), np.uint8)
    shrink = np.exp(random.standard_normal(columns)).astype(np.float16)
    packed = form.pack(codes, shrink, 0.25, seed)
    np.testing.assert_array_equal(form.unpack(packed), codes)
    tiles, groups = -(-rows // 16), -(-columns // 128)
    assert packed.nbytes == form.nbytes((rows, columns)) == tiles * groups * 256 * bits + 2 * columns + 12
    values = 0.25 * form.levels.decode(codes)
    by_rows, by_cols = form.turns((rows, columns), seed)
    back = by_rows.turn_back(by_cols.turn_back(values).T).T * shrink.astype(np.float32)
    np.testing.assert_allclose(form.decode(packed), back, atol=1e-4 * max(np.abs(back).max(), 1e-6))


@pytest.mark.parametrize("spec", ["quip2", "quip2-hadamard", "quip4"])
def test_outliers_are_gone_once_turned(spec: str) -> None:
    """Plain rounding with one scale loses nearly all of a matrix with a few large weights; turned, little."""
    random = np.random.default_rng(0)
    weight = 0.01 * random.standard_normal((256, 256)).astype(np.float32)
    weight.reshape(-1)[random.integers(0, weight.size, 100)] = 1.0
    form = codec(spec)
    found = form.decode(form.encode(weight))
    lost = np.square(found - weight).sum() / np.square(weight).sum()
    normal = random.standard_normal((256, 256)).astype(np.float32)
    level = np.square(form.decode(form.encode(normal)) - normal).sum() / np.square(normal).sum()
    assert lost < 1.4 * level


def test_true_bits() -> None:
    weight = np.random.default_rng(0).standard_normal((1024, 1024), np.float32)
    assert codec("quip2").encode(weight).bits_per_value == pytest.approx(2 + 16 / 1024, abs=1e-3)


@pytest.mark.parametrize("spec", ["quip1", "quip9", "quip", "quip2-x"])
def test_specs_that_name_nothing(spec: str) -> None:
    with pytest.raises(InputError):
        codec(spec)


def test_numbers_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="NaN"):
        codec("quip2").encode(np.full((4, 8), np.nan, np.float32))

"""The next token of a sequence, stored and attended in one recorded call, against the two calls it stands for."""

from __future__ import annotations

import numpy as np
import pytest

from memwall import kernels
from memwall.kernels import attention
from tests.kernels.test_attention import TYPES, stored

HEADS, KV_HEADS, CAPACITY = 6, 2, 40


def room(dtype: str, dim: int) -> np.ndarray:
    return np.zeros((CAPACITY, KV_HEADS, dim + (2 if dtype == "int8" else 0)), TYPES[dtype])


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("dim", [20, 64])
@pytest.mark.parametrize("dtype", TYPES)
def test_equals_storing_and_attending(isa: str, threads: int, dtype: str, dim: int, window: int | None) -> None:
    rng = np.random.default_rng(0)
    q, new_k, new_v = (rng.standard_normal((1, heads, dim)).astype(np.float32) for heads in (HEADS, KV_HEADS, KV_HEADS))
    k, v, place, out = room(dtype, dim), room(dtype, dim), np.zeros(1, np.int64), np.empty_like(q)
    program = kernels.Program()
    attention.record_attend_next(program, q, new_k, new_v, k, v, place, scale=0.3, window=window, out=out)
    want_k, want_v = room(dtype, dim), room(dtype, dim)
    for token in range(5):
        for x in (q, new_k, new_v):
            x[:] = 3 * rng.standard_normal(x.shape)
        want_k[token], want_v[token] = stored(new_k, dtype)[0][0], stored(new_v, dtype)[0][0]
        place[0] = token
        program.run()
        want = np.empty_like(q)
        attention.attend_float(
            q, want_k[: token + 1], want_v[: token + 1], scale=0.3, first_position=token, window=window, out=want
        )
        np.testing.assert_array_equal(out, want)
    assert k.tobytes() == want_k.tobytes()
    assert v.tobytes() == want_v.tobytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves_are_rounded_as_numpy_does(isa: str, dtype: str) -> None:
    special = [0.0, -0.0, 1e-8, -6e-8, 65519.0, 65520.0, -1e30, np.inf, -np.inf, 1.00048828125, 1.00146484375, 3e38]
    numbers = np.concatenate([np.array(special), np.random.default_rng(1).standard_normal(52) * 1e-4]).astype(
        np.float32
    )
    x = np.zeros((1, KV_HEADS, len(numbers)), np.float32)
    x[0, 1] = numbers
    k, v = room(dtype, len(numbers)), room(dtype, len(numbers))
    q = np.zeros((1, HEADS, len(numbers)), np.float32)
    program = kernels.Program()
    attention.record_attend_next(program, q, x, x, k, v, np.array([7]), scale=1.0, out=np.empty_like(q))
    program.run()
    with np.errstate(over="ignore"):
        want = x[0].astype(TYPES[dtype])
    assert k[7].tobytes() == v[7].tobytes() == want.tobytes()
    assert not k[6].any()


def test_what_is_no_number_stays_none(isa: str) -> None:
    x = np.full((1, KV_HEADS, 8), np.nan, np.float32)
    q = np.zeros((1, HEADS, 8), np.float32)
    for dtype in ("float16", "bfloat16"):
        k, v, program = room(dtype, 8), room(dtype, 8), kernels.Program()
        attention.record_attend_next(program, q, x, x, k, v, np.array([0]), scale=1.0, out=np.empty_like(q))
        program.run()
        assert np.isnan(k[0].astype(np.float32)).all()


@pytest.mark.parametrize("place", [-1, CAPACITY])
def test_a_place_outside_is_refused(place: int) -> None:
    x, q = np.zeros((1, KV_HEADS, 8), np.float32), np.zeros((1, HEADS, 8), np.float32)
    k, v, program = room("float16", 8), room("float16", 8), kernels.Program()
    attention.record_attend_next(program, q, x, x, k, v, np.array([place]), scale=1.0, out=np.empty_like(q))
    with pytest.raises(IndexError, match=f"place {place} of {CAPACITY}"):
        program.run()


def test_other_shapes_are_refused() -> None:
    x, q, program = np.zeros((1, KV_HEADS, 8), np.float32), np.zeros((1, HEADS, 8), np.float32), kernels.Program()
    k, v = room("float16", 8), room("float16", 8)
    with pytest.raises(ValueError, match="one token's"):
        attention.record_attend_next(
            program, q, x[:, :1].copy(), x, k, v, np.zeros(1, np.int64), scale=1.0, out=np.empty_like(q)
        )
    with pytest.raises(ValueError, match="place holds one"):
        attention.record_attend_next(program, q, x, x, k, v, np.zeros(2, np.int64), scale=1.0, out=np.empty_like(q))

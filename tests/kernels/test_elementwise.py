from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from memwall import kernels
from memwall.formats import codec
from memwall.kernels import reference


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (2, 256), (300, 515)])
def test_rms_norm(shape: tuple[int, int], isa: str) -> None:
    x, weight = normal(*shape), normal(shape[1], seed=1)
    want = reference.rms_norm(torch.from_numpy(x), torch.from_numpy(weight), 1e-5)
    torch.testing.assert_close(
        torch.from_numpy(kernels.rms_norm(x, weight, 1e-5, np.empty_like(x))), want, rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(torch.from_numpy(kernels.rms_norm(x, weight, 1e-5, x)), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "half"), [((1, 1, 2), 1), ((5, 3, 64), 32), ((7, 2, 40), 20), ((2, 3, 80), 11), ((300, 4, 64), 32)]
)
def test_rope(shape: tuple[int, int, int], half: int, isa: str) -> None:
    x, angles = normal(*shape), normal(shape[0], half, seed=1)
    cos, sin = np.cos(angles), np.sin(angles)
    want = reference.rope(*(torch.from_numpy(array) for array in (x, cos, sin)))
    torch.testing.assert_close(torch.from_numpy(kernels.rope(x.copy(), cos, sin)), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (3, 19), (1, 8192), (40, 1025)])
def test_swiglu(shape: tuple[int, int], isa: str) -> None:
    gate, up = 8 * normal(*shape), normal(*shape, seed=1)
    want = reference.swiglu(torch.from_numpy(gate), torch.from_numpy(up))
    torch.testing.assert_close(
        torch.from_numpy(kernels.swiglu(gate, up, np.empty_like(up))), want, rtol=2e-6, atol=1e-6
    )
    torch.testing.assert_close(torch.from_numpy(kernels.swiglu(gate, up, gate)), want, rtol=2e-6, atol=1e-6)


def test_swiglu_at_the_ends_of_the_range(isa: str) -> None:
    gate = np.float32([[-1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30]])
    got = kernels.swiglu(gate, np.ones_like(gate), np.empty_like(gate))
    np.testing.assert_allclose(got[0, 3:], gate[0, 3:])
    np.testing.assert_allclose(got[0, 1:3], 0.0, atol=1e-30)


def test_bad_shapes_are_named() -> None:
    with pytest.raises(ValueError, match="weight"):
        kernels.rms_norm(normal(2, 3), normal(4), 1e-5, normal(2, 3))
    with pytest.raises(ValueError, match="token"):
        kernels.rope(normal(2, 1, 4), normal(3, 2), normal(3, 2))
    with pytest.raises(ValueError, match="shape"):
        kernels.swiglu(normal(2, 3), normal(2, 4), normal(2, 3))


def test_a_program_runs_its_calls_in_a_row() -> None:
    rng = np.random.default_rng(0)
    x, up, normed, out = (rng.standard_normal((1, 48)).astype(np.float32) for _ in range(4))
    weight, eye = rng.standard_normal(48).astype(np.float32), np.eye(48, dtype=np.float32)
    program = kernels.Program()
    program.rms_norm(x, weight, 1e-5, normed)
    program.linear(normed, [kernels.matrix(codec("float32").encode(2 * eye))], [out])
    program.swiglu(out, up, out)
    assert len(program) == 3
    for _ in range(2):
        program.run()
        expected = 2 * kernels.rms_norm(x, weight, 1e-5, np.empty_like(x))
        np.testing.assert_array_equal(out, kernels.swiglu(expected, up, expected))
    with pytest.raises(ValueError, match="weight must have"):
        program.rms_norm(x, weight[:3], 1e-5, out)
    assert len(program) == 3


@pytest.mark.parametrize("count", [1, 5, 16, 67])
def test_8_bit_floats_are_the_nearest(count: int, isa: str) -> None:
    every_half = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)  # ties among them
    every_half = every_half[~np.isnan(every_half)]
    between = np.nextafter(every_half, np.float32(np.inf))  # and what is just above them
    x = np.concatenate([every_half, between, 500 * normal(4096), 0.01 * normal(4096), np.float32([1e-30, 3e38, -3e38])])
    x = np.concatenate([x, np.full(-len(x) % count + count, np.nan, np.float32)]).reshape(-1, count)
    places = np.random.default_rng(0).permutation(len(x) + 3)[: len(x)]
    out = np.zeros((len(x) + 3, count), ml_dtypes.float8_e4m3fn)
    kernels.store_float8(x, places, out)
    with np.errstate(invalid="ignore"):
        want = np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(out[places].astype(np.float32), want.astype(np.float32))
    assert (np.signbit(out[places]) == np.signbit(want))[~np.isnan(x)].all()
    assert not out[np.setdiff1d(np.arange(len(out)), places)].view(np.uint8).any()


def test_8_bit_floats_are_checked() -> None:
    x, places, out = normal(2, 4), np.array([0, 1]), np.zeros((2, 4), ml_dtypes.float8_e4m3fn)
    with pytest.raises(TypeError, match="float8_e4m3fn, not uint8"):
        kernels.store_float8(x, places, out.view(np.uint8))
    for wrong, words in (
        ((x, places[:1], out), "needs a place"),
        ((x, places + 1, out), "outside"),
        ((x, places, out[:, :3].copy()), "one width"),
    ):
        with pytest.raises(ValueError, match=words):
            kernels.store_float8(*wrong)

from __future__ import annotations

import math

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


@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (2, 256), (300, 515)])
def test_layer_norm(shape: tuple[int, int], isa: str) -> None:
    x, weight, bias = normal(*shape) + 3, normal(shape[1], seed=1), normal(shape[1], seed=2)
    wide = x.astype(np.float64) - x.mean(1, keepdims=True, dtype=np.float64)
    want = wide / np.sqrt(np.square(wide).mean(1, keepdims=True) + 1e-5) * weight + bias
    np.testing.assert_allclose(kernels.layer_norm(x, weight, bias, 1e-5, np.empty_like(x)), want, rtol=1e-5, atol=4e-6)
    np.testing.assert_allclose(
        reference.layer_norm(*(torch.from_numpy(array) for array in (x, weight, bias)), 1e-5).numpy(), want, atol=1e-6
    )
    np.testing.assert_allclose(kernels.layer_norm(x, weight, bias, 1e-5, x), want, rtol=1e-5, atol=4e-6)


def test_layer_norm_far_from_zero(isa: str) -> None:
    """The variance is that of what is left without the mean; mean of squares less square of the mean would be noise."""
    x = normal(2, 300) + np.float32(3000)
    one, none = np.ones(300, np.float32), np.zeros(300, np.float32)
    got = kernels.layer_norm(x, one, none, 0.0, np.empty_like(x))
    np.testing.assert_allclose(got.std(axis=1), 1, rtol=1e-4)
    np.testing.assert_allclose(
        kernels.layer_norm(x[:, :1].copy(), one[:1], one[:1], 1e-5, np.empty((2, 1), np.float32)), 1
    )


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


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 19), (1, 8192), (40, 1025)])
def test_gelu(shape: tuple[int, int], near: bool, isa: str) -> None:
    x = 3 * normal(*shape)
    wide = x.astype(np.float64)
    cubed = np.tanh(np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3))
    want = wide / 2 * (1 + (cubed if near else np.vectorize(math.erf)(wide / np.sqrt(2))))
    np.testing.assert_allclose(kernels.gelu(x, np.empty_like(x), near=near), want, rtol=2e-6, atol=3e-7)
    np.testing.assert_allclose(reference.gelu(torch.from_numpy(x), near=near).numpy(), want, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(kernels.gelu(x, x, near=near), want, rtol=2e-6, atol=3e-7)


@pytest.mark.parametrize("near", [False, True])
def test_gelu_over_its_range(near: bool, isa: str) -> None:
    """Exact forms keep small tails, and neither overflows where x does not."""
    x = np.float32([[-1e30, -200.0, -20.0, 0.0, 20.0, 200.0, 1e30]])
    got = kernels.gelu(x, np.empty_like(x), near=near)
    np.testing.assert_allclose(got[0, 3:], x[0, 3:])
    np.testing.assert_allclose(got[0, :3], 0.0, atol=1e-6)
    if not near:
        tail = np.linspace(-8, 0, 401, dtype=np.float32)[None]
        want = [value / 2 * math.erfc(-value / math.sqrt(2)) for value in tail[0].tolist()]
        np.testing.assert_allclose(kernels.gelu(tail, np.empty_like(tail))[0], want, rtol=2e-5, atol=1e-30)


def test_bad_shapes_are_named() -> None:
    with pytest.raises(ValueError, match="weight"):
        kernels.rms_norm(normal(2, 3), normal(4), 1e-5, normal(2, 3))
    with pytest.raises(ValueError, match="weight and bias"):
        kernels.layer_norm(normal(2, 3), normal(3), normal(4), 1e-5, normal(2, 3))
    with pytest.raises(ValueError, match="gelu: out"):
        kernels.gelu(normal(2, 3), normal(2, 4))
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
    program.layer_norm(out, weight, up[0], 1e-5, out)
    program.gelu(out, True, out)
    assert len(program) == 5
    for _ in range(2):
        program.run()
        expected = 2 * kernels.rms_norm(x, weight, 1e-5, np.empty_like(x))
        kernels.layer_norm(kernels.swiglu(expected, up, expected), weight, up[0], 1e-5, expected)
        np.testing.assert_array_equal(out, kernels.gelu(expected, expected, near=True))
    with pytest.raises(ValueError, match="weight must have"):
        program.rms_norm(x, weight[:3], 1e-5, out)
    assert len(program) == 5


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 5), (40, 3, 64), (700, 2, 67)])
def test_int8_rows(shape: tuple[int, int, int], isa: str) -> None:
    x = normal(*shape) * 10.0 ** np.random.default_rng(1).integers(-4, 4, (*shape[:2], 1)).astype(np.float32)
    x[0, 0] = 0
    places = np.random.default_rng(0).permutation(len(x) + 3)[: len(x)]
    out = np.zeros((len(x) + 3, shape[1], shape[2] + 2), np.int8)
    kernels.store_int8(x, places, out)
    top = np.abs(x).max(-1, keepdims=True)
    scales = (top / np.float32(127)).astype(np.float16)
    short = 127 * scales.astype(np.float32) < top
    scales[short] = np.nextafter(scales[short], np.float16(np.inf))
    np.testing.assert_array_equal(np.ascontiguousarray(out[places][..., -2:]).view(np.float16), scales)
    inverse = np.float32(1) / np.where(scales > 0, scales.astype(np.float32), np.float32(np.inf))
    np.testing.assert_array_equal(out[places][..., :-2], np.clip(np.rint(x * inverse), -127, 127))
    assert not out[np.setdiff1d(np.arange(len(out)), places)].any()
    off = np.abs(kernels.int8_rows(out)[places] - x)
    assert (off <= 0.5001 * scales.astype(np.float32)).all()


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("place", [0, 18])
def test_what_is_no_number_stays_none(odd: float, place: int, isa: str) -> None:
    x, out = normal(1, 2, 19), np.empty((1, 2, 21), np.int8)
    x[0, 1, place] = odd
    held = kernels.int8_rows(kernels.store_int8(x, np.array([0]), out))
    assert np.isfinite(held[0, 0]).all()
    assert not np.isfinite(held[0, 1]).any()


def test_int8_rows_are_checked() -> None:
    x, places, out = normal(2, 1, 4), np.array([0, 1]), np.zeros((2, 1, 6), np.int8)
    wrong = (
        ((x, places[:1], out), "needs a place"),
        ((x, places + 1, out), "outside"),
        ((x, places, out[..., :5].copy()), "two bytes longer"),
    )
    for arguments, words in wrong:
        with pytest.raises(ValueError, match=words):
            kernels.store_int8(*arguments)


def test_added_rows_recorded() -> None:
    x, out = normal(3, 17), normal(3, 17, seed=1)
    program, wanted = kernels.Program(), out + x
    program.add(x, out)
    program.run()
    np.testing.assert_array_equal(out, wanted)
    with pytest.raises(ValueError, match="shape of x"):
        program.add(x, out[:2])

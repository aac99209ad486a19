from __future__ import annotations

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

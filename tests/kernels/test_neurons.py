"""Neurons in rows give what the same matrices give, at all sizes, forms and instruction sets."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall import kernels
from memwall.kernels.neurons import add_neurons

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
ISAS = ("portable", "avx2", "avx512")


def packed(parts: list[np.ndarray], form: str, padding: int) -> np.ndarray:
    numbers = np.concatenate(parts, axis=1).astype(DTYPES[form])
    rows = np.full((len(numbers), numbers.shape[1] * numbers.dtype.itemsize + padding), 0xFF, np.uint8)
    rows[:, : rows.shape[1] - padding] = numbers.view(np.uint8)
    return rows


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(sorted(DTYPES)), gated=st.booleans(), biased=st.booleans(), count=st.integers(0, 40),
    width=st.integers(1, 150), tokens=st.integers(1, 9), padding=st.sampled_from((0, 8, 64)),
    threshold=st.sampled_from((0.0, 0.3)), isa=st.sampled_from(ISAS), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_same_as_matrices(
    form: str, gated: bool, biased: bool, count: int, width: int, tokens: int, padding: int, threshold: float,
    isa: str, seed: int,
) -> None:  # fmt: skip
    draw = np.random.default_rng(seed)
    parts = [draw.standard_normal((count, width)).astype(DTYPES[form]) for _ in range(3 if gated else 2)]
    x, out = (draw.standard_normal((tokens, width)).astype(np.float32) for _ in range(2))
    biases = draw.standard_normal((count, len(parts) - 1)).astype(np.float32) if biased else None
    wide = [part.astype(np.float64) for part in parts]
    firsts = [x @ part.T + (0 if biases is None else biases[:, i]) for i, part in enumerate(wide[:-1])]
    h = np.where(firsts[0] <= threshold, 0, firsts[0]) * (firsts[1] if gated else 1)
    # what lies at the threshold may fall on either side of it, and is of its size
    near = np.abs(firsts[0] - threshold).min(initial=1.0) < 1e-4
    active = np.full((tokens, count), np.nan, np.float32)
    wanted = out + h @ wide[-1]
    before = kernels.isa()
    try:
        kernels.force_isa(isa)
    except ValueError:
        return
    try:
        add_neurons(form, packed(parts, form, padding), x, out, active, gated=gated, biases=biases, threshold=threshold)
    finally:
        kernels.force_isa(before)
    if not (near and threshold):
        np.testing.assert_allclose(active, h, rtol=1e-4, atol=1e-4 * max(width, 1) ** 0.5)
        np.testing.assert_allclose(out, wanted, rtol=1e-4, atol=1e-4 * (width * max(count, 1)) ** 0.5)


def test_any_number_of_threads_gives_the_same_bits() -> None:
    draw = np.random.default_rng(0)
    parts = [draw.standard_normal((700, 256)).astype(np.float16) for _ in range(2)]
    rows, x = packed(parts, "float16", 0), draw.standard_normal((3, 256)).astype(np.float32)
    before, found = kernels.num_threads(), []
    try:
        for threads in (1, 2, 3):
            kernels.set_num_threads(threads)
            out, active = np.zeros((3, 256), np.float32), np.empty((3, 700), np.float32)
            found.append(add_neurons("float16", rows, x, out, active).tobytes())
    finally:
        kernels.set_num_threads(before)
    assert len(set(found)) == 1


def test_what_is_no_number_shows() -> None:
    rows = packed([np.array([[np.nan, 1.0]]), np.ones((1, 2))], "float32", 0)
    out = add_neurons(
        "float32", rows, np.ones((1, 2), np.float32), np.zeros((1, 2), np.float32), np.empty((1, 1), np.float32)
    )
    assert np.isnan(out).all()


def test_wrong_shapes_are_told() -> None:
    good = {
        "form": "float16", "rows": np.zeros((3, 32), np.uint8), "x": np.zeros((1, 8), np.float32),
        "out": np.zeros((1, 8), np.float32), "active": np.zeros((1, 3), np.float32),
    }  # fmt: skip
    add_neurons(**good)
    for change, said in (
        ({"form": "int8"}, "not int8"),
        ({"rows": np.zeros((3, 30), np.uint8)}, "shorter"),
        ({"rows": np.zeros((3, 33), np.uint8)}, "whole number"),
        ({"gated": True}, "shorter"),
        ({"out": np.zeros((1, 7), np.float32)}, "shape of x"),
        ({"active": np.zeros((1, 4), np.float32)}, "active must"),
        ({"biases": np.zeros((3, 2), np.float32)}, "biases must"),
        ({"threshold": -1.0}, "zero or more"),
    ):
        with pytest.raises(ValueError, match=said):
            add_neurons(**{**good, **change})


@pytest.mark.parametrize("threshold", [0.0, 0.2])
def test_relu_of_arrays(threshold: float) -> None:
    draw = np.random.default_rng(1)
    x, up = (draw.standard_normal((3, 77)).astype(np.float32) for _ in range(2))
    wanted = np.where(x > threshold, x, 0)
    np.testing.assert_array_equal(kernels.relu(x, np.empty_like(x), threshold=threshold), wanted)
    np.testing.assert_array_equal(kernels.relu(x, np.empty_like(x), threshold=threshold, up=up), wanted * up)
    program, out = kernels.Program(), np.empty_like(x)
    program.relu(x, threshold, out)
    program.run()
    np.testing.assert_array_equal(out, wanted)
    program = kernels.Program()
    program.reglu(x, up, threshold, out)
    program.run()
    np.testing.assert_array_equal(out, wanted * up)

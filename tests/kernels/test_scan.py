"""What lies between the products of a state space layer, on every instruction set, against plain NumPy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from memwall import kernels
from memwall.errors import InputError
from memwall.formats import codec
from memwall.formats.static8 import MOST_COLUMNS
from memwall.kernels import scan

pytestmark = pytest.mark.usefixtures("isa", "threads")


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def softplus(x: np.ndarray) -> np.ndarray:
    return np.log1p(np.exp(x))


@pytest.mark.parametrize(("tokens", "channels", "taps"), [(1, 64, 4), (7, 37, 4), (3, 5, 2), (2, 70, 3)])
def test_convolution_goes_on_from_its_state(tokens: int, channels: int, taps: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2 * tokens, channels), np.float32)
    wide = np.zeros((2 * tokens, channels + 9), np.float32)
    wide[:, 4 : 4 + channels] = x
    weight, bias = rng.standard_normal((channels, taps), np.float32), rng.standard_normal(channels, np.float32)
    past = rng.standard_normal((taps - 1, channels), np.float32)
    whole = np.concatenate([past, x])
    want = silu(np.stack([(whole[t : t + taps] * weight.T).sum(0) + bias for t in range(2 * tokens)]))
    state, out = past.copy(), np.empty_like(x)
    for part in (slice(0, tokens), slice(tokens, None)):
        scan.conv_silu(wide[part, 4 : 4 + channels], state, weight, bias, out[part])
    np.testing.assert_allclose(out, want, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(state, whole[len(whole) - taps + 1 :])


def test_convolution_of_bytes_is_that_of_their_floats() -> None:
    rng = np.random.default_rng(1)
    x = rng.integers(-127, 128, (9, 50)).astype(np.int8)
    weight, bias = rng.standard_normal((50, 4), np.float32), rng.standard_normal(50, np.float32)
    in_scale = rng.uniform(0.001, 0.02, 50).astype(np.float32)
    inverse = rng.uniform(20, 60, 50).astype(np.float32)
    floats = np.empty((9, 50), np.float32)
    scan.conv_silu(x * in_scale, np.zeros((3, 50), np.float32), weight, bias, floats)
    out, state = np.empty((9, 50), np.int8), np.zeros((3, 50), np.int8)
    scan.conv_silu(x, state, weight, bias, out, in_scale=in_scale, out_inverse=inverse)
    want = np.clip(np.rint(floats * inverse), -127, 127)
    assert np.abs(out - want).max() <= 1  # a hair from a half may round either way
    assert (out != want).mean() < 0.01
    np.testing.assert_array_equal(state, x[-3:])


def scanned(x, b, c, dt, dt_bias, decay, skip, limits, state):
    """The recurrence, token by token in float64."""
    heads, size, n = state.shape
    groups = b.shape[1] // n
    state = state.astype(np.float64)
    out = []
    for t in range(len(x)):
        d = np.clip(softplus(dt[t] + dt_bias), *limits)
        own = x[t].reshape(heads, size)
        bs, cs = (np.repeat(v[t].reshape(groups, n), heads // groups, axis=0) for v in (b, c))
        state = np.exp(d[:, None] * decay)[:, None, :] * state + (d[:, None] * own)[:, :, None] * bs[:, None, :]
        out.append(((state * cs[:, None, :]).sum(2) + skip[:, None] * own).reshape(-1))
    return np.array(out), state


@pytest.mark.parametrize(
    ("heads", "size", "n", "groups", "vector"), [(4, 16, 32, 2, False), (6, 7, 20, 1, False), (10, 1, 16, 1, True)]
)
def test_scan_is_the_recurrence(heads: int, size: int, n: int, groups: int, vector: bool) -> None:
    rng = np.random.default_rng(2)
    tokens = 11
    x, y = rng.standard_normal((tokens, heads * size), np.float32), np.empty((tokens, heads * size), np.float32)
    b, c = (rng.standard_normal((tokens, groups * n), np.float32) for _ in range(2))
    dt, dt_bias = rng.standard_normal((tokens, heads), np.float32), rng.standard_normal(heads, np.float32)
    decay = -rng.uniform(0.1, 4, (heads, n if vector else 1)).astype(np.float32)
    skip, state = rng.standard_normal(heads, np.float32), rng.standard_normal((heads, size, n), np.float32)
    limits = (0.01, 1.5)
    want, last = scanned(x, b, c, dt, dt_bias, decay, skip, limits, state)
    scratch = np.empty(scan.scan_scratch_shape(size, n, kernels.num_threads()), np.float32)
    peak = np.zeros((heads * size, n), np.float32)
    for part in (slice(0, 1), slice(1, 4), slice(4, None)):  # the state goes on between calls
        scan.selective_scan(
            x[part], b[part], c[part], dt[part], dt_bias=dt_bias, decay=decay, skip=skip, dt_limits=limits,
            state=state, y=y[part], scratch=scratch, peak=peak,
        )  # fmt: skip
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(state, last, rtol=1e-4, atol=1e-4)
    assert (peak.reshape(state.shape) >= np.abs(state) - 1e-6).all()


@pytest.mark.parametrize(("size", "n", "vector"), [(16, 32, False), (70, 16, False), (1, 16, True)])
def test_scan_of_bytes_is_that_of_their_floats(size: int, n: int, vector: bool) -> None:
    rng = np.random.default_rng(3)
    tokens, heads, groups, rows = 6, 4, 2, 5
    x, b, c, dt = (
        rng.integers(-127, 128, (tokens, width)).astype(np.int8)
        for width in (heads * size, groups * n, groups * n, heads)
    )
    tables = scan.ScanTables(
        range=rng.integers(0, rows, heads * size).astype(np.int32),
        x=rng.uniform(0.005, 0.02, rows).astype(np.float32),
        b=rng.uniform(0.005, 0.02, groups).astype(np.float32),
        c=rng.uniform(0.005, 0.02, groups).astype(np.float32),
        dt=0.01,
        state=rng.uniform(0.05, 0.1, (rows, n)).astype(np.float32),
    )
    assert tables.state is not None
    held = rng.integers(-50, 50, (heads, size, n)).astype(np.int8)
    decay = -rng.uniform(0.1, 2, (heads, n if vector else 1)).astype(np.float32)
    bias, skip = rng.standard_normal(heads, np.float32), rng.standard_normal(heads, np.float32)
    steps = tables.state[tables.range].reshape(heads, size, n)
    b_scale, c_scale = (np.repeat(v, n) for v in (tables.b, tables.c))
    want, last = scanned(
        x * tables.x[tables.range], b * b_scale, c * c_scale, dt * np.float32(0.01),
        bias, decay, skip, (0.0, np.inf), held * steps,
    )  # fmt: skip
    y = np.empty((tokens, heads * size), np.float32)
    scratch = np.empty(scan.scan_scratch_shape(size, n, kernels.num_threads()), np.float32)
    scan.selective_scan(
        x, b, c, dt, dt_bias=bias, decay=decay, skip=skip, dt_limits=(0.0, float("inf")),
        state=held, y=y, scratch=scratch, tables=tables,
    )  # fmt: skip
    np.testing.assert_allclose(y, want, rtol=1e-3, atol=1e-3)
    assert held.dtype == np.int8
    assert np.abs(held - np.clip(last / steps, -127, 127)).max() <= 0.51


@pytest.mark.parametrize("groups", [1, 2])
def test_gated_norm(groups: int) -> None:
    rng = np.random.default_rng(4)
    y, z = rng.standard_normal((5, 46), np.float32), rng.integers(-127, 128, (5, 46)).astype(np.int8)
    weight = rng.standard_normal(46, np.float32)
    gated = y * silu(z * np.float32(0.03))
    parts = gated.reshape(5, groups, -1)
    normed = (parts / np.sqrt((parts**2).mean(-1, keepdims=True) + 1e-5)).reshape(5, 46) * weight
    out = np.empty_like(y)
    scan.gated_norm(y, z, weight, 1e-5, out, groups=groups, z_scale=0.03)
    np.testing.assert_allclose(out, normed, rtol=1e-4, atol=1e-5)
    scan.gated_norm(y, z * np.float32(0.03), None, 1e-5, out)
    np.testing.assert_allclose(out, gated, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [1, 2, 64, 12, 48, 12 * 64, 20, 40, 40 * 16, 1536])
def test_hadamard_turns_without_changing_lengths(width: int) -> None:
    rng = np.random.default_rng(5)
    matrix = scan.hadamard_rows(np.eye(width, dtype=np.float32))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(width), atol=5e-6)
    np.testing.assert_allclose(np.abs(matrix), width**-0.5, rtol=1e-5)
    x = rng.standard_normal((3, width), np.float32)
    np.testing.assert_allclose(scan.hadamard_rows(x.copy()), x @ matrix, atol=1e-5)


def test_hadamard_names_the_sizes_it_has() -> None:
    with pytest.raises(InputError, match="12 or 20 times"):
        scan.hadamard_rows(np.zeros((1, 28), np.float32))


@pytest.mark.parametrize("spec", ["static8", "static4-g32", "static4-g128"])
@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_static_products_are_exact(spec: str, tokens: int) -> None:
    rng = np.random.default_rng(6)
    weight = rng.standard_normal((37, 640), np.float32) * rng.uniform(0.1, 3, (37, 1)).astype(np.float32)
    packed = codec(spec).encode(weight)
    x = rng.integers(-127, 128, (tokens, 640)).astype(np.int8)
    want = (x * 0.02) @ codec(spec).decode(packed).astype(np.float64).T
    matrix, out = scan.StaticMatrix(packed), np.ones((tokens, 37), np.float32)
    matrix.multiply(x, 0.02, out, accumulate=True)
    np.testing.assert_allclose(out, want + 1, rtol=1e-5, atol=1e-4)
    inverse = (100 / np.abs(want).max(axis=0)).astype(np.float32)
    rounded = np.empty((tokens, 37), np.int8)
    matrix.multiply_rounded(x, 0.02, rounded, inverse)
    assert np.abs(rounded - want * inverse).max() < 0.501


@pytest.mark.parametrize("spec", ["static8", "static4-g128"])
def test_static_sums_hold_the_longest_row_that_is_taken(spec: str, isa: str) -> None:
    """Largest codes times largest inputs; a row any longer is refused, by the format and by the product."""
    form, longest = codec(spec), np.ones((1, MOST_COLUMNS), np.float32)
    x = np.full((2, MOST_COLUMNS), 127, np.int8)
    for tokens in (1, 2):
        out = np.empty((tokens, 1), np.float32)
        scan.StaticMatrix(form.encode(longest)).multiply(x[:tokens], 1.0, out)
        np.testing.assert_allclose(out, 127.0 * MOST_COLUMNS, rtol=0.01)
    for refused in (
        lambda: form.buffers((1, MOST_COLUMNS + 128)),
        lambda: form.encode(np.ones((1, MOST_COLUMNS + 128))),
        lambda: scan.StaticMatrix(replace(form.encode(longest), shape=(1, MOST_COLUMNS + 128))),
    ):
        with pytest.raises(InputError, match="65,536"):
            refused()


def test_static_rounding() -> None:
    x = np.array([[0.4, -3.0, 1000.0, 0.0]], np.float32)
    out = scan.round_static(x, 0.1, np.empty((1, 4), np.int8))
    np.testing.assert_array_equal(out, [[4, -30, 127, 0]])


def test_shapes_that_do_not_fit_are_refused() -> None:
    x, z = np.zeros((2, 8), np.float32), np.zeros((2, 7), np.float32)
    with pytest.raises(ValueError, match="one shape"):
        scan.gated_norm(x, z, None, 1e-5, x)
    packed = codec("static8").encode(np.ones((3, 40), np.float32))
    with pytest.raises(InputError, match="whole groups"):
        scan.StaticMatrix(packed)

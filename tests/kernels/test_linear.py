from __future__ import annotations

import gc
import subprocess
import sys

import numpy as np
import pytest
import torch

from memwall import kernels
from memwall.errors import InputError
from memwall.formats import codec
from memwall.kernels import reference

TILE_SPECS = [f"int{bits}-g{group}{asym}" for bits in range(2, 9) for group in (32, 64, 128) for asym in ("", "-asym")]
FLOAT_SPECS = ["float32", "float16", "bfloat16"]
SHAPES = [(1, 1), (16, 64), (37, 100), (50, 200), (129, 544)]  # most divide by nothing


def weights(rows: int, cols: int, spec: str, seed: int = 0):
    dense = np.random.default_rng(seed).standard_normal((rows, cols), dtype=np.float32)
    packed = codec(spec).encode(dense)
    decoded = torch.from_numpy(np.array(codec(spec).decode(packed), np.float32))
    return kernels.matrix(packed), decoded


def activations(tokens: int, cols: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((tokens, cols), dtype=np.float32)


def product(x: np.ndarray, matrix: kernels.Matrix, **options) -> torch.Tensor:
    out = np.full((len(x), matrix.rows), np.nan, np.float32)
    kernels.linear(x, [matrix], [out], **options)
    return torch.from_numpy(out)


def assert_close(got: torch.Tensor, want: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """Within 1e-5 of what the largest sums could be: rounding of float32, nothing more."""
    bound = 1e-5 * (x.abs().double() @ weight.abs().double().T) + 1e-6
    assert (got.isfinite() & ((got.double() - want.double()).abs() <= bound)).all()


@pytest.mark.parametrize("spec", TILE_SPECS)
def test_tiles_times_rounded_activations(spec: str, isa: str) -> None:
    group = codec(spec).group
    for rows, cols in SHAPES:
        matrix, weight = weights(rows, cols, spec)
        for tokens in (1, 3, 8, 21):
            x = torch.from_numpy(activations(tokens, cols))
            rounded = reference.round_activations(x, group)
            assert_close(product(x.numpy(), matrix), reference.linear(rounded, weight), rounded, weight)


@pytest.mark.parametrize("spec", ["int8", "int4-g128", "int5-g64-asym", "nf4", "nf4-dq", "fp4", "mxfp4", "posit8"])
def test_the_matrix_unit_changes_no_bit(spec: str) -> None:
    matrix, _ = weights(150, 1100, spec)
    with_vectors, with_unit = [], []
    try:
        for isa, products in (("avx512", with_vectors), ("amx", with_unit)):
            kernels.force_isa(isa)
            products.extend(product(activations(tokens, 1100), matrix) for tokens in (12, 13, 16, 33, 64, 270))
    except ValueError:
        pytest.skip("this processor has no matrix unit")
    finally:
        kernels.force_isa(kernels.best_isa())
    for one, other in zip(with_vectors, with_unit, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("spec", ["int4-g128", "int3-g32-asym", "int8-g64", "int4-g64-asym"])
def test_a_token_s_results_do_not_depend_on_how_many_there_are(spec: str, isa: str) -> None:
    """To the bit, rounded and exact: few tokens share weights in registers, in blocks, many in a panel."""
    for rows, cols in ((37, 100), (200, 544)):
        matrix, _ = weights(rows, cols, spec)
        x = activations(40, cols)
        for exact in (False, True):
            whole = product(x, matrix, exact=exact).numpy()
            for tokens in (1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33):
                np.testing.assert_array_equal(product(x[:tokens], matrix, exact=exact).numpy(), whole[:tokens])


@pytest.mark.parametrize("spec", TILE_SPECS)
def test_tiles_exact(spec: str, isa: str) -> None:
    for rows, cols in SHAPES:
        matrix, weight = weights(rows, cols, spec)
        for tokens in (1, 9):
            x = torch.from_numpy(activations(tokens, cols))
            assert_close(product(x.numpy(), matrix, exact=True), reference.linear(x, weight), x, weight)


@pytest.mark.parametrize("spec", FLOAT_SPECS)
def test_dense(spec: str, isa: str) -> None:
    for rows, cols in SHAPES:
        matrix, weight = weights(rows, cols, spec)
        for tokens in (1, 2, 3, 4, 7, 8, 13, 40):
            x = torch.from_numpy(activations(tokens, cols))
            assert_close(product(x.numpy(), matrix), reference.linear(x, weight), x, weight)


def test_dense_sums_are_cut_in_short_ones(isa: str) -> None:
    """A sum that starts with the largest numbers loses most to rounding; many tokens add up 64 columns at a time."""
    weight = np.sort(np.random.default_rng(0).random((16, 8192), np.float32), axis=1)[:, ::-1].copy()
    exact = weight.astype(np.float64).sum(axis=1)
    off = np.abs(
        product(np.ones((20, 8192), np.float32), kernels.matrix(codec("float32").encode(weight))).numpy() - exact
    )
    in_one_run = np.abs(np.cumsum(weight, axis=1, dtype=np.float32)[:, -1] - exact)
    assert off.mean() < in_one_run.mean() / 4


@pytest.mark.parametrize("spec", ["int4-g64", "int3-g32-asym", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 2, 300])
def test_threads_blocks_biases_and_accumulation(spec: str, tokens: int, threads: int) -> None:
    """Sizes that pass the thresholds of threads and of token blocks; several matrices and forms in one call."""
    x = torch.from_numpy(activations(tokens, 576))
    parts = [
        weights(rows, 576, form, seed) for seed, (rows, form) in enumerate([(1100, spec), (70, "float32"), (333, spec)])
    ]
    biases = [torch.randn(1100), None, torch.randn(333)]
    outs = [np.full((tokens, matrix.rows), 2.0, np.float32) for matrix, _ in parts]
    kernels.linear(
        x.numpy(),
        [matrix for matrix, _ in parts],
        outs,
        accumulate=True,
        exact=True,
        biases=[None if bias is None else bias.numpy() for bias in biases],
    )
    for (_, weight), bias, out in zip(parts, biases, outs, strict=True):
        assert_close(torch.from_numpy(out), reference.linear(x, weight, bias) + 2.0, x, weight)


def test_many_matrices_of_different_groups_share_a_call() -> None:
    x = torch.from_numpy(activations(5, 160))
    parts = [weights(40 + i, 160, f"int{2 + i % 7}-g{(32, 64, 128)[i % 3]}-asym", i) for i in range(11)]
    outs = [np.empty((5, matrix.rows), np.float32) for matrix, _ in parts]
    kernels.linear(x.numpy(), [matrix for matrix, _ in parts], outs)
    for i, ((_, weight), out) in enumerate(zip(parts, outs, strict=True)):
        rounded = reference.round_activations(x, (32, 64, 128)[i % 3])
        assert_close(torch.from_numpy(out), reference.linear(rounded, weight), rounded, weight)


def test_extreme_activations(isa: str) -> None:
    """Largest codes times largest activations: the sums that would overflow 16 bits if they were added carelessly."""
    for spec in TILE_SPECS:
        matrix = kernels.matrix(codec(spec).encode(np.tile(np.float32([1.0, 1.0, 1.0, 0.0]), (16, 64))))
        weight = torch.from_numpy(
            codec(spec).decode(codec(spec).encode(np.tile(np.float32([1.0, 1.0, 1.0, 0.0]), (16, 64))))
        )
        for sign in (1.0, -1.0):
            x = torch.full((9, 256), sign * 3.0)
            assert_close(product(x.numpy(), matrix), reference.linear(x, weight), x, weight)
            assert_close(product(x.numpy()[:1], matrix), reference.linear(x[:1], weight), x[:1], weight)


def test_zero_and_tiny_activations_give_zero() -> None:
    matrix, _ = weights(20, 64, "int4-g64")
    assert (product(np.zeros((2, 64), np.float32), matrix) == 0).all()
    assert (product(np.full((1, 64), 1e-38, np.float32), matrix).abs() < 1e-35).all()


@pytest.mark.parametrize("spec", [*TILE_SPECS, *FLOAT_SPECS])
def test_gather_rows_equals_decode(spec: str) -> None:
    matrix, weight = weights(37, 100, spec)
    ids = np.array([0, 36, 15, 16, 16], np.int32)
    out = np.empty((5, 100), np.float32)
    np.testing.assert_array_equal(kernels.gather_rows(matrix, ids, out), weight.numpy()[ids])


def test_nothing_to_do() -> None:
    matrix, _ = weights(5, 64, "int4-g64")
    kernels.linear(np.empty((0, 64), np.float32), [matrix], [np.empty((0, 5), np.float32)])
    kernels.linear(np.ones((1, 64), np.float32), [], [])
    assert kernels.gather_rows(matrix, np.empty(0, np.int64), np.empty((0, 64), np.float32)).shape == (0, 64)


def test_matrix_keeps_its_buffers_alive_and_says_what_it_is() -> None:
    packed = codec("int4-g64").encode(np.ones((20, 70), np.float32))
    matrix = kernels.matrix(packed)
    assert (matrix.rows, matrix.cols, matrix.spec, matrix.nbytes) == (20, 70, "int4-g64", packed.nbytes)
    del packed
    gc.collect()
    np.testing.assert_allclose(product(np.ones((1, 70), np.float32), matrix), 70.0, rtol=1e-3)


def test_read_only_buffers_are_taken() -> None:
    packed = codec("float32").encode(np.ones((3, 4), np.float32))
    for buffer in packed.buffers.values():
        buffer.flags.writeable = False
    assert kernels.matrix(packed).rows == 3


def test_scratch_is_reused_and_counted() -> None:
    matrix, _ = weights(64, 128, "int4-g64")
    product(activations(4, 128), matrix)
    before = kernels.scratch_bytes()
    product(activations(4, 128), matrix)
    assert kernels.scratch_bytes() == before > 0


@pytest.mark.parametrize("tokens", [1, 5, 700])
def test_scratch_is_predicted(tokens: int) -> None:
    """In a process of its own, because scratch never shrinks."""
    program = f"""
import numpy as np
from memwall import kernels
for cols, group in [(200, 64), (512, 64)]:
    matrix = kernels.matrix(kernels.encode(f"int4-g{{group}}", np.ones((16, cols), np.float32)))
    kernels.linear(np.ones(({tokens}, cols), np.float32), [matrix], [np.empty(({tokens}, 16), np.float32)])
    assert kernels.scratch_bytes() == kernels.predict_scratch_bytes({tokens}, cols, group=group)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_bad_arguments_are_named() -> None:
    matrix, _ = weights(5, 64, "int4-g64")
    x, out = np.ones((1, 64), np.float32), np.empty((1, 5), np.float32)
    with pytest.raises(ValueError, match="64"):
        kernels.linear(np.ones((1, 63), np.float32), [matrix], [out])
    with pytest.raises(ValueError, match=r"\[1, 5\]"):
        kernels.linear(x, [matrix], [np.empty((2, 5), np.float32)])
    with pytest.raises(ValueError, match="number"):
        kernels.linear(x, [matrix], [])
    with pytest.raises(ValueError, match="bias"):
        kernels.linear(x, [matrix], [out], biases=[np.ones(4, np.float32)])
    with pytest.raises(ValueError, match="row 5"):
        kernels.gather_rows(matrix, np.array([5]), np.empty((1, 64), np.float32))
    with pytest.raises(InputError, match="two dimensions"):
        kernels.matrix(codec("float32").encode(np.ones(3, np.float32)))
    with pytest.raises(InputError, match="tile"):
        kernels.matrix(codec("int4-g64-rows").encode(np.ones((2, 64), np.float32)))


def test_scratch_is_predicted_for_other_threads() -> None:
    one, two, four = (kernels.predict_scratch_bytes(1, 64, group=0, threads=n) for n in (1, 2, 4))
    assert four - two == 2 * (two - one) > 0

"""Products with level formats: the integer path against its own levels, the exact path against the decoded matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from memwall import kernels
from memwall.errors import InputError
from memwall.formats import Packed, codec
from memwall.formats.leveled import LevelCodec, ResidualBinaryCodec
from memwall.kernels import reference
from memwall.kernels.level_tables import integer_levels

SPECS = [
    "nf4",
    "nf4-dq",
    "irnf4",
    "nf4-g32-f16",
    "fp4",
    "fp4-g128-dq",
    "e2m1",
    "e2m1-g128-e8m0",
    "e2m2",
    "e2m3-g32",
    "e3m2",
]
SPECS += ["e4m3", "e5m2-g128", "e3m3", "e2m4", "e3m1"]
SPECS += [
    "posit4",
    "posit5es0",
    "posit5es1",
    "posit6es0-g32",
    "posit6es1",
    "posit7es0",
    "posit7es1",
    "posit8",
    "posit8es1",
]
SPECS += [
    "mxfp4",
    "mxfp6",
    "mxfp6e3m2",
    "mxfp8",
    "mxfp8e5m2",
    "mxint8",
    "bfp2-g64",
    "bfp4",
    "bfp6-g128",
    "bfp7",
    "bfp8",
]
SPECS += [
    "bipolar1-g32",
    "bipolar2",
    "bipolar3-g128",
    "bipolar4",
    "bipolar5",
    "bipolar6",
    "bipolar7",
    "bipolar8",
    "ternary",
]
SPECS += ["binary", "binary2", "binary2-g32", "dual2-g32", "dual2-g64", "dual2-g128"]
SHAPES = [(1, 1), (16, 64), (37, 100), (129, 544)]  # most divide by nothing
EXACT_AS_INTEGERS = {
    "fp4",
    "e2m1",
    "e2m3",
    "e3m2",
    "posit4",
    "posit8",
    "mxfp4",
    "mxint8",
    "bfp8",
    "bipolar8",
    "ternary",
}


def normal(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, cols), np.float32)


def encoded(spec: str, rows: int, cols: int, seed: int = 0) -> tuple[LevelCodec, Packed]:
    form = codec(spec)
    assert isinstance(form, LevelCodec)
    return form, form.encode(normal(rows, cols, seed))


def integer_weights(form: LevelCodec, packed: Packed) -> torch.Tensor:
    """What products with 8-bit activations take the weights for."""
    if isinstance(form, ResidualBinaryCodec):
        return torch.from_numpy(form.decode(packed))
    codes, scales = form.unpack(packed)
    found = integer_levels(form)
    each = np.repeat(scales[0].astype(np.float64), form.group, axis=-1)[:, : packed.shape[1]]
    each = each * found.counts[codes] * found.unit
    for shifts in scales[1:]:
        each += np.repeat(shifts, form.group, axis=-1)[:, : packed.shape[1]]
    return torch.from_numpy(each)


def inexact(spec: str) -> bool:
    """Whether integers of 16 bits cannot be the levels."""
    form = codec(spec)
    assert isinstance(form, LevelCodec)
    found = integer_levels(form)
    return not np.array_equal(found.counts[form.levels.codes] * found.unit, form.levels.levels.astype(np.float64))


def product(x: torch.Tensor, matrix: kernels.Matrix, **options) -> torch.Tensor:
    out = np.full((len(x), matrix.rows), np.nan, np.float32)
    kernels.linear(x.numpy(), [matrix], [out], **options)
    return torch.from_numpy(out)


def assert_close(got: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, slack: float = 0.0) -> None:
    """Within 1e-5 of what the largest sums could be: rounding of float32, nothing more.

    slack: share of the largest weight by which each may be off.
    """
    want = reference.linear(x, weight)
    bound = 1e-5 * (x.abs().double() @ weight.abs().double().T) + 1e-6
    bound += slack * x.abs().double().sum(dim=1, keepdim=True) * weight.abs().max()
    assert (got.isfinite() & ((got.double() - want.double()).abs() <= bound)).all()


@pytest.mark.parametrize("spec", SPECS)
def test_products_with_rounded_activations(spec: str, isa: str) -> None:
    for rows, cols in SHAPES:
        form, packed = encoded(spec, rows, cols)
        matrix, weight = kernels.matrix(packed), integer_weights(form, packed)
        for tokens in (1, 3, 8, 21):
            x = torch.from_numpy(normal(tokens, cols, seed=1))
            rounded = reference.round_activations(x, form.group)
            # some instruction sets multiply float levels where others round them to 16 bits
            assert_close(product(x, matrix), rounded, weight, slack=2e-5 if inexact(spec) else 0.0)


@pytest.mark.parametrize("spec", SPECS)
def test_exact_products(spec: str, isa: str) -> None:
    for rows, cols in SHAPES:
        form, packed = encoded(spec, rows, cols)
        matrix, weight = kernels.matrix(packed), torch.from_numpy(form.decode(packed))
        for tokens in (1, 9):
            x = torch.from_numpy(normal(tokens, cols, seed=1))
            assert_close(product(x, matrix, exact=True), x, weight)


@pytest.mark.parametrize("spec", SPECS)
def test_gathered_rows_equal_decoding(spec: str) -> None:
    form, packed = encoded(spec, 37, 100)
    out = np.empty((5, 100), np.float32)
    ids = np.array([0, 36, 15, 16, 16])
    # twice quantized scales are one rounding apart where the compiler fuses
    np.testing.assert_allclose(
        kernels.gather_rows(kernels.matrix(packed), ids, out),
        form.decode(packed)[ids],
        rtol=0 if "dq" not in spec else 1e-6,
        atol=1e-6 if spec == "irnf4" else 0,
    )


@pytest.mark.parametrize("spec", SPECS)
def test_integer_levels_are_the_levels(spec: str) -> None:
    """Exactly where integers of 16 bits can be, else within half of one in 32,767."""
    form = codec(spec)
    assert isinstance(form, LevelCodec)
    found, levels = integer_levels(form), form.levels
    difference = np.abs(found.counts[levels.codes] * found.unit - levels.levels) / levels.largest
    assert difference.max() <= (1e-7 if spec in EXACT_AS_INTEGERS else 1.6e-5)


@pytest.mark.parametrize("spec", SPECS)
def test_extreme_activations(spec: str, isa: str) -> None:
    """Largest levels of both signs times largest activations: what would overflow if it were added carelessly."""
    for sign in (1.0, -1.0):
        form = codec(spec)
        assert isinstance(form, LevelCodec)
        packed = form.encode(np.full((17, 256), sign, np.float32))
        matrix, weight = kernels.matrix(packed), integer_weights(form, packed)
        for value in (3.0, -3.0):
            x = torch.full((9, 256), value)
            assert_close(product(x, matrix), x, weight)
            assert_close(product(x[:1], matrix), x[:1], weight, slack=2e-5 if inexact(spec) else 0.0)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_compiled_encoder_gives_the_bytes_of_the_codec(spec: str, dtype: str) -> None:
    form = codec(spec)
    kind = codec(dtype).dtype
    for rows, cols in [(1, 1), (17, 100), (32, 256), (0, 5), (5, 0)]:
        values = normal(rows, cols).astype(kind)
        if values.size > 5:
            values[0, :5] = [0, -0.0, 1, -1, 0.5]
        expected, found = form.encode(values), kernels.encode(spec, values)
        assert found.shape == expected.shape
        for name, buffer in expected.buffers.items():
            np.testing.assert_array_equal(found.buffers[name].view(np.uint8), buffer.view(np.uint8), err_msg=name)


@pytest.mark.parametrize("spec", ["nf4", "e4m3", "posit8", "mxfp4", "bipolar3"])
def test_compiled_search_on_hard_numbers(spec: str, isa: str) -> None:
    """Every threshold of the format, and its neighbours, as numbers of one group."""
    form = codec(f"{spec}")
    assert isinstance(form, LevelCodec)
    marks = form.levels.thresholds
    hard = np.concatenate([marks, np.nextafter(marks, np.float32(-9)), np.nextafter(marks, np.float32(9))])
    top = np.float32(form.levels.largest)
    count = form.group - 1
    hard = np.resize(hard, (-(-len(hard) // count), count))
    values = np.concatenate([hard, np.full((len(hard), 1), top)], axis=1)
    expected = form.encode(values)
    np.testing.assert_array_equal(kernels.encode(spec, values).buffers["codes"], expected.buffers["codes"])


def test_into_given_buffers_slab_by_slab() -> None:
    for spec in ("nf4-dq", "mxfp8", "binary2"):
        values, form = normal(80, 300), codec(spec)
        whole = {name: np.zeros(shape, dtype) for name, (shape, dtype) in form.buffers(values.shape).items()}
        for start, stop in [(0, 32), (32, 80)]:
            slab = {name: array[start // 16 : stop // 16] for name, array in whole.items()}
            kernels.encode(form.spec, values[start:stop], out=slab)
        for name, buffer in form.encode(values).buffers.items():
            np.testing.assert_array_equal(whole[name], buffer)


@pytest.mark.parametrize("tokens", [1, 2, 300])
def test_threads_blocks_biases_and_accumulation(tokens: int, threads: int) -> None:
    x = torch.from_numpy(normal(tokens, 576, seed=1))
    parts = [
        encoded(spec, rows, 576, i) for i, (spec, rows) in enumerate([("nf4", 1100), ("mxfp4", 70), ("e4m3", 333)])
    ]
    outs = [np.full((tokens, packed.shape[0]), 2.0, np.float32) for _, packed in parts]
    bias = torch.randn(70)
    kernels.linear(
        x.numpy(),
        [kernels.matrix(packed) for _, packed in parts],
        outs,
        accumulate=True,
        biases=[None, bias.numpy(), None],
    )
    for (form, packed), out, extra in zip(parts, outs, (None, bias, None), strict=True):
        got = torch.from_numpy(out) - 2.0 - (0 if extra is None else extra)
        rounded, weight = reference.round_activations(x, form.group), integer_weights(form, packed)
        # among so many activations some lie so near a half that the reference rounds them the other way: one step of
        # 1/127 of the largest, times the largest weight
        step = x.abs().amax(dim=1, keepdim=True) / 127 * weight.abs().amax(dim=1)
        bound = 1e-5 * (rounded.abs().double() @ weight.abs().T) + 2 * step
        assert ((got.double() - reference.linear(rounded, weight).double()).abs() <= bound).all()


def test_matrices_say_what_they_hold() -> None:
    for spec in SPECS:
        form, packed = encoded(spec, 40, 300)
        matrix = kernels.matrix(packed)
        assert (matrix.rows, matrix.cols, matrix.spec, matrix.nbytes) == (40, 300, form.spec, packed.nbytes)


def test_other_layouts_are_refused() -> None:
    for spec in ("nf4-flat", "nf4-g64-rows"):
        with pytest.raises(InputError, match=r"encode with nf4-g64$"):
            kernels.matrix(codec(spec).encode(normal(4, 64)))


def test_codes_without_a_number() -> None:
    """A damaged file may hold them: exact products and rows give NaN, which shows, and sums stay within bounds."""
    _form, packed = encoded("e4m3", 16, 64)
    codes = np.full_like(packed.buffers["codes"], 0x7F)
    matrix = kernels.matrix(Packed(spec=packed.spec, shape=packed.shape, buffers={**packed.buffers, "codes": codes}))
    x = torch.ones(1, 64)
    assert product(x, matrix, exact=True).isnan().all()
    assert product(x, matrix).isfinite().all()
    assert (product(torch.ones(9, 64), matrix) == 0).all()
    assert np.isnan(kernels.gather_rows(matrix, np.array([3]), np.empty((1, 64), np.float32))).all()

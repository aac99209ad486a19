"""Programs compiled as C++ against the interpreter, on every instruction set of this processor."""

from __future__ import annotations

import numpy as np
import pytest

from memwall import kernels
from memwall.errors import InputError
from memwall.kernels import tilus, tilus_check
from memwall.kernels.tile_build import NoCompiler, build, find_compiler
from memwall.kernels.tile_cpp import emit
from memwall.kernels.tile_cpp_memory import upper, where
from memwall.kernels.tile_infer import infer
from memwall.kernels.tile_interpreter import run
from memwall.kernels.tile_layout import local, spatial
from memwall.kernels.tile_memory import column_major_memory
from memwall.kernels.tile_program import TileProgram
from memwall.kernels.tile_types import PUBLISHED, tile_type
from memwall.kernels.tilus import Config
from memwall.kernels.tilus_check import check, model_product, product_arrays, random_weights

try:
    find_compiler()
except NoCompiler as error:
    pytest.skip(str(error), allow_module_level=True)


def casts(dtypes: list[str]) -> TileProgram:
    """All codes of several types to float32, as bytes of a thread's packed slots."""
    p = TileProgram("casts", grid=(1,))
    for name in dtypes:
        bits = tile_type(name).bits
        size, slots = (1 << bits), max((1 << bits) // 32, 8)
        count = slots * 32
        source = p.global_view(f"x_{name}", "u8", (count * bits // 8,))
        target = p.global_view(f"y_{name}", "f32", (count,))
        assert count % size == 0
        raw = p.load_global(source, (0,), (count * bits // 8,), layout=spatial(32).compose(local(slots * bits // 8)))
        codes = p.view(raw, name, spatial(32).compose(local(slots)))
        p.store_global(target, p.cast(codes, "f32"), (0,))
    return infer(p)


def test_every_code_of_every_type(isa: str) -> None:
    types = [*PUBLISHED, "f2e1m0", "f5e4m0", "f8e2m5"] if isa != "portable" else ["i3", "f7e5m1", "f8e4m3", "f8e5m2"]
    arrays, want = {}, {}
    for name in types:
        form = tile_type(name)
        count = max((1 << form.bits) // 32, 8) * 32
        codes = np.resize(np.arange(1 << form.bits), count).astype(np.uint8)
        stream = np.unpackbits(codes[:, None], axis=1, bitorder="little")[:, : form.bits].ravel()
        arrays[f"x_{name}"] = np.packbits(stream, bitorder="little")
        arrays[f"y_{name}"], want[name] = np.zeros(count, np.float32), form.values[codes]
    build(casts(types), isa=isa, fast=False)(arrays)
    for name in types:
        np.testing.assert_array_equal(arrays[f"y_{name}"], want[name])
        np.testing.assert_array_equal(np.signbit(arrays[f"y_{name}"]), np.signbit(want[name]))


@pytest.mark.parametrize("dtype", ["u3", "f6e3m2"])
def test_products_equal_the_model_bit_for_bit(dtype: str, isa: str) -> None:
    config = Config(warp_spatial=(1, 1), warp_repeat=(1, 2, 1), split_k=2)
    weights = random_weights(dtype, 256, 32, columns=32)
    x = np.random.default_rng(1).normal(size=(21, 256)).astype(np.float16)
    compiled = build(tilus.matmul_program(dtype, 21, 32, 256, config=config), isa=isa, fast=False)
    for threads in (1, 2, 4):
        arrays = product_arrays(x, weights, np.float16)
        compiled(arrays, threads=threads)
        np.testing.assert_array_equal(arrays["out"], model_product(x, weights, 2).astype(np.float16))


@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("tile", [(16, 16), (32, 32)])
@pytest.mark.parametrize("dtype", ["i7", "i8", "u4"])
def test_matvec_reads_the_same_packed_weights(dtype: str, tile: tuple[int, int], by_columns: bool, isa: str) -> None:
    weights = random_weights(dtype, 128, 64, columns=64)
    codes = tilus.unpack_weights(weights.packed, dtype)
    weights = tilus.prepare(codes, weights.scales, dtype, weight_tile=tile, columns=64)
    x = np.random.default_rng(1).normal(size=(2, 128)).astype(np.float32)
    config = Config(cpu_tiles=64 // tile[1])
    program = tilus.matvec_program(dtype, 2, 64, 128, weight_tile=tile, config=config, by_columns=by_columns)
    arrays = product_arrays(x, weights, np.float32)
    if by_columns:
        arrays["packed"] = weights.by_columns()
    build(program, isa=isa, fast=False)(arrays, threads=2)
    np.testing.assert_allclose(arrays["out"], x @ weights.decode(), atol=1e-5)


def everything() -> TileProgram:
    """Elementwise operations, reductions over slots and threads, reshapes, views of floats, rounding, edges."""
    p = TileProgram("everything", grid=(2,))
    x = p.global_view("x", "f32", (13, 20))
    y = p.global_view("y", "f32", (2, 8, 16, 16))
    half = p.global_view("half", "f16", (16, 16), column_major_memory((16, 16)))
    brain = p.global_view("brain", "bf16", (16, 16))
    raw = p.global_view("raw", "u8", (512,))
    at = p.block(0) * 8
    tile = p.load_global(x, (at, 0), (16, 16))
    zero = p.register_tensor("f32", (16, 16))
    total = p.register_tensor("f32", (16, 16), init=0.5)
    with p.loop(3) as i:
        p.assign(total, p.add(total, p.mul(tile, total)))
        with p.when(i.equals(1)):
            p.assign(total, p.binary("sub", total, tile))
    rounded = p.cast(tile, "f16")
    results = [
        p.where(p.binary("lt", tile, zero), p.unary("neg", tile), tile),
        p.binary("max", tile, p.reduce("max", tile, (1,))),
        p.binary("sub", tile, p.reduce("sum", tile, (0,))),
        p.unary("exp", p.binary("min", tile, zero)),
        p.binary("div", tile, p.unary("sqrt", p.add(p.unary("abs", tile), total))),
        p.reshape(p.reshape(tile, (32, 8)), (16, 16)),
        total,
        p.cast(p.add(rounded, p.mul(rounded, rounded)), "f32"),
    ]
    for number, result in enumerate(results):
        p.store_global(y, result, (p.block(0), number, 0, 0))
    with p.when(p.block(0).equals(0)):
        p.store_global(half, rounded, (0, 0))
        p.store_global(brain, p.cast(tile, "bf16"), (0, 0))
        p.store_global(raw, p.view(rounded, "u8", spatial(32).compose(local(16))), (0,))
    return infer(p)


def test_all_instructions_agree_with_the_interpreter(isa: str) -> None:
    program = everything()
    x = np.random.default_rng(0).normal(size=(13, 20)).astype(np.float32)
    made = []
    for execute in (lambda arrays: run(program, arrays), build(program, isa=isa, fast=False)):
        arrays = {
            "x": x,
            "y": np.zeros((2, 8, 16, 16), np.float32),
            "half": np.zeros((16, 16), np.float16),
            "brain": np.zeros((16, 16), tile_type("bf16").dtype),
            "raw": np.zeros(512, np.uint8),
        }
        execute(arrays)
        made.append(arrays)
    np.testing.assert_allclose(made[0]["y"], made[1]["y"], rtol=2e-6, atol=2e-6)
    for name in ("half", "brain", "raw"):
        np.testing.assert_array_equal(made[0][name].view(np.uint8), made[1][name].view(np.uint8))
    assert made[0]["raw"].any()


def test_float16_is_rounded_as_numpy_rounds_it(isa: str) -> None:
    p = TileProgram("halves", grid=(64,))
    x, y = p.global_view("x", "f32", (4096,)), p.global_view("y", "f16", (4096,))
    p.store_global(y, p.cast(p.load_global(x, (p.block(0) * 64,), (64,)), "f16"), (p.block(0) * 64,))
    random = np.random.default_rng(0)
    values = random.normal(size=4096).astype(np.float32) * np.float32(2.0) ** random.integers(-30, 18, 4096)
    values[:8] = [65504, 65519.9, 65520, np.inf, -np.inf, 2.0**-24, 2.0**-25, 0.0]
    values[8:1032] = np.arange(1024) * 2.0**-25  # halfway between subnormals
    out = np.zeros(4096, np.float16)
    build(infer(p), isa=isa, fast=False)({"x": values.astype(np.float32), "y": out})
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(out, values.astype(np.float32).astype(np.float16))


def test_a_condition_narrows_what_is_checked() -> None:
    step = TileProgram("p", grid=(1,)).block(0)
    assert where(step + 2 < 5, {"block0": 9}) == {"block0": 2}
    assert where(step < 5, {"block0": 3}) == {"block0": 3}
    assert where(step.equals(2), {"block0": 3}) == {"block0": 3}
    assert upper((step + 2) * 16 % 12, {"block0": 9}) == 11
    # copies inside of the product's loop stay within the weights: none is checked
    assert "else std::memset" not in emit(tilus.matmul_program("i4", 16, 128, 512), 8)


def test_what_the_back_end_does_not_do() -> None:
    p = TileProgram("p", grid=(1,))
    x = p.global_view("x", "u4", (64,))
    p.store_global(p.global_view("y", "f32", (64,)), p.cast(p.load_global(x, (0,), (64,)), "f32"), (0,))
    with pytest.raises(InputError, match="load u8 and view it"):
        emit(infer(p), 8)
    with pytest.raises(InputError, match="vectors of 5"):
        emit(infer(TileProgram("q", grid=(1,))), 5)


def test_check_finds_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tilus_check, "instruction_sets", lambda: [str(kernels.isa())])
    assert [row.what for row in check("i4") if not row.same] == []


def test_prefetch_asks_for_each_run_of_bytes_apart() -> None:
    """Rows of tiles are one run, columns of tiles one each; a step of k is as far ahead as the layout says."""
    source = emit(tilus.matvec_program("i8", 1, 128, 256, config=Config(cpu_tiles=4)), 16)
    assert "for (long at = 0; at < 1024; at += 64) __builtin_prefetch(p_r2 + 8192 + at);" in source
    source = emit(tilus.matvec_program("i8", 1, 128, 256, config=Config(cpu_tiles=4), by_columns=True), 16)
    loop = next(line for line in source.splitlines() if "__builtin_prefetch" in line)
    assert "< 4; ++run" in loop
    assert "at < 256; at += 64" in loop
    assert "* 4096L)" in loop


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("dtype", ["i8", "u8", "i7", "u5", "i4", "i3", "u1", "f4e2m1"])
def test_rounded_activations_make_integer_dots_with_the_same_numbers(dtype: str, tokens: int, isa: str) -> None:
    """Sums of integers are exact in float32: four products at once are the interpreter's numbers, bit for bit."""
    weights = random_weights(dtype, 256, 32, columns=32)
    codes, scales = tilus.round_activations(np.random.default_rng(1).normal(size=(tokens, 256)))
    codes[0, :2] = np.int8(-128).view(np.uint8)  # no activation is rounded to this, and it works
    program = tilus.matvec_program(dtype, tokens, 32, 256, config=Config(cpu_tiles=2), by_columns=True, rounded=True)
    arrays = {"x": codes, "x_scales": scales, "packed": weights.by_columns(), "scales": weights.scales}
    expected, found = ({**arrays, "out": np.zeros((tokens, 32), np.float32)} for _ in range(2))
    run(program, expected)
    compiled = build(program, isa=isa, fast=False)
    assert ("dot4(VI{}, " in compiled.source) == (dtype != "f4e2m1")
    compiled(found)
    np.testing.assert_array_equal(found["out"], expected["out"])
    x = codes.view(np.int8).astype(np.float32) * np.repeat(scales, 128, axis=1)
    np.testing.assert_allclose(found["out"], x @ weights.decode(), atol=1e-4)


def test_rounding_keeps_each_group_within_half_a_step() -> None:
    x = np.random.default_rng(0).normal(size=(3, 256)).astype(np.float32)
    x[1] = 0
    codes, scales = tilus.round_activations(x)
    steps = np.repeat(scales, 128, axis=1)
    assert (np.abs(codes.view(np.int8) * steps - x) <= 0.501 * steps).all()
    assert not codes[1].any()

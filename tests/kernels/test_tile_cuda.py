"""Emitted CUDA: executed thread by thread on the CPU (see cuda_on_cpu.h), and compiled by nvcc where there is one."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from memwall.errors import InputError
from memwall.kernels import tilus
from memwall.kernels.tile_build import NoCompiler, build, compile_source, find_compiler
from memwall.kernels.tile_cuda import emit
from memwall.kernels.tile_infer import infer, plan_shared
from memwall.kernels.tile_interpreter import as_bytes, run
from memwall.kernels.tile_layout import local, spatial
from memwall.kernels.tile_program import TileProgram
from memwall.kernels.tile_types import PUBLISHED, tile_type
from memwall.kernels.tilus import Config
from memwall.kernels.tilus_check import model_product, product_arrays, random_weights

SHIM = (Path(__file__).parent / "cuda_on_cpu.h").read_text()
SMALL = Config(warp_spatial=(1, 2), warp_repeat=(1, 2, 1), num_stages=2)


def execute(program: TileProgram, arrays: dict[str, np.ndarray]) -> None:
    """Run emitted CUDA with a thread of the system for every thread of a block."""
    try:
        find_compiler()
    except NoCompiler as error:
        pytest.skip(str(error))
    grid = (*program.grid, 1, 1)[:3]
    calls = ", ".join(f"static_cast<uint8_t*>(arrays[{i}])" for i in range(len(program.params)))
    _, shared = plan_shared(program)
    source = emit(program, SHIM) + (
        'extern "C" int tile_try(void* const* arrays, int* semaphores) {\n'
        f"    return launch([&] {{ tile_kernel({calls}, semaphores); }}, {{{', '.join(map(str, grid))}}}, "
        f"{program.threads}, {shared});\n}}\n"
    )
    library = ctypes.CDLL(
        str(compile_source(source, ("-std=c++20", "-O1", "-fPIC", "-shared", "-pthread", "-ffp-contract=off", "-w")))
    )
    data = as_bytes(program, arrays)
    pointers = (ctypes.c_void_p * len(data))(*(each.ctypes.data for each in data.values()))
    assert library.tile_try(pointers, (ctypes.c_int * 64)()) == 0, "an access is not aligned to its width"


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy at an address that is a multiple of 16, as GPU allocations are."""
    room = np.zeros(array.nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    found = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    found[...] = array
    return found


@pytest.mark.parametrize(("dtype", "split"), [("u3", 1), ("i4", 2), ("f8e4m3", 1), ("i8", 1), ("u4", 1), ("f5e2m2", 1)])
def test_products_equal_the_model_bit_for_bit(dtype: str, split: int) -> None:
    config = Config(warp_spatial=(1, 2), warp_repeat=(1, 2, 1), num_stages=3, split_k=split)
    weights = random_weights(dtype, 128, 32, columns=32)
    x = np.random.default_rng(1).normal(size=(5, 128)).astype(np.float16)
    arrays = {name: aligned(array) for name, array in product_arrays(x, weights, np.float16).items()}
    execute(tilus.matmul_program(dtype, 5, 32, 128, config=config), arrays)
    np.testing.assert_array_equal(arrays["out"], model_product(x, weights, split).astype(np.float16))


def test_bfloat16_without_shared_memory() -> None:
    weights = random_weights("i5", 128, 32, columns=32)
    kind = tile_type("bf16").dtype
    x = np.random.default_rng(1).normal(size=(5, 128)).astype(kind)
    arrays = {name: aligned(array) for name, array in product_arrays(x, weights, kind.type).items()}
    execute(tilus.direct_program("i5", 5, 32, 128, config=SMALL, activations="bf16"), arrays)
    want = x.astype(np.float32) @ weights.decode()
    np.testing.assert_allclose(arrays["out"].astype(np.float32), want, atol=0.03 * np.abs(want).max())


def test_sums_over_threads() -> None:
    weights = random_weights("u7", 128, 16, columns=16)
    x = np.random.default_rng(1).normal(size=(2, 128)).astype(np.float32)
    arrays = {name: aligned(array) for name, array in product_arrays(x, weights, np.float32).items()}
    execute(tilus.matvec_program("u7", 2, 16, 128, config=Config(cpu_tiles=1)), arrays)
    np.testing.assert_allclose(arrays["out"], x @ weights.decode(), atol=1e-5)


@pytest.mark.parametrize("dtype", PUBLISHED)
def test_every_type_has_a_source(dtype: str) -> None:
    text = emit(tilus.matmul_program(dtype, 16, 128, 256))
    assert "mma_f16(" in text
    assert "ldmatrix_4(" in text
    assert "copy_async<16>(" in text


def test_what_is_refused() -> None:
    p = TileProgram("p", grid=(1,), warps=2)
    p.reduce("sum", p.register_tensor("f32", (64,), layout=spatial(64)), (0,))
    with pytest.raises(InputError, match="within a warp"):
        emit(infer(p))
    p = TileProgram("p", grid=(1,))
    x = p.global_view("x", "u4", (64,))
    p.load_global(x, (0,), (64,), layout=spatial(32).compose(local(2)))
    with pytest.raises(InputError, match="load u8 and view it"):
        emit(infer(p))


def test_a_view_keeps_what_was_there_when_it_was_taken() -> None:
    p = TileProgram("p", grid=(1,))
    y = p.global_view("y", "f32", (2, 64))
    tile = p.register_tensor("f32", (64,), init=1.0)
    before = p.reshape(tile, (1, 64))
    p.assign(tile, p.add(tile, tile))
    p.store_global(y, before, (0, 0))
    p.store_global(y, tile, (1, 0))
    arrays = {"y": aligned(np.zeros((2, 64), np.float32))}
    execute(infer(p), arrays)
    assert (arrays["y"] == [[1], [2]]).all()
    for other in (lambda held: run(p, held), build(p, fast=False)):
        held = {"y": np.zeros((2, 64), np.float32)}
        other(held)
        assert (held["y"] == [[1], [2]]).all()


def test_four_and_eight_bits_need_no_extraction() -> None:
    """Four pairs of a word: one logical step each and a permutation, in place of a shift and a mask for every code."""
    for dtype, permuted in (("i4", 16), ("u8", 16), ("i5", 0)):
        text = emit(tilus.matmul_program(dtype, 16, 128, 256)).split('extern "C"')[1]
        assert text.count("__byte_perm") == permuted


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_nvcc_compiles_it_without_spilling(tmp_path: Path) -> None:
    source, target = tmp_path / "product.cu", tmp_path / "product.cubin"
    source.write_text(emit(tilus.matmul_program("u3", 16, 256, 1024, config=Config(split_k=2))))
    done = subprocess.run(
        ["nvcc", "-arch=sm_80", "-cubin", "-Xptxas", "-v", "-o", str(target), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "0 bytes spill stores" in done.stderr

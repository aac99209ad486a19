"""The static cost pass: bytes, vectors, sectors, conflicts and registers by hand."""

from __future__ import annotations

import pytest

from memwall.kernels import tilus
from memwall.kernels.tile_cost import cost, divisor, registers, run_counts
from memwall.kernels.tile_infer import infer
from memwall.kernels.tile_layout import column_spatial, local, spatial
from memwall.kernels.tile_memory import row_major_memory
from memwall.kernels.tile_program import TileProgram, instructions
from memwall.kernels.tile_types import PUBLISHED, tile_type
from memwall.kernels.tilus import Config


@pytest.mark.parametrize("dtype", PUBLISHED)
def test_weights_move_once_and_copies_are_wide(dtype: str) -> None:
    found = cost(tilus.matmul_program(dtype, 16, 256, 1024, config=Config(split_k=2)))
    assert found.read_bytes["packed"] == 256 * 1024 * tile_type(dtype).bits // 8
    assert found.conflicts == 0
    assert found.multiply_adds == 16 * 256 * 1024
    copies = [a for a in found.accesses if a.op == "copy_async" and a.memory == "packed"]
    assert {a.vector_bytes for a in copies} == {16}
    assert all(a.sectors * 32 == a.tile_bytes for a in copies)


@pytest.mark.parametrize(("bits", "width"), [(1, 4), (2, 8), (3, 4), (4, 16), (5, 4), (6, 8), (7, 4), (8, 16)])
def test_register_loads_are_as_wide_as_a_threads_bytes_allow(bits: int, width: int) -> None:
    found = cost(tilus.matmul_program(f"u{bits}", 16, 256, 1024, weight_tile=(32, 32)))
    loads = [a for a in found.accesses if a.op == "load_shared" and a.memory == "s1"]
    assert [a.vector_bytes for a in loads] == [width]


def load(layout: object, shape: tuple[int, ...], offset: int = 0) -> TileProgram:
    p = TileProgram("p", grid=(1,))
    x = p.global_view("x", "f32", (64, 64))
    p.load_global(x, (0, offset), shape, layout=layout)  # type: ignore[arg-type]
    return infer(p)


@pytest.mark.parametrize(
    ("layout", "shape", "offset", "vector", "requests", "sectors"),
    [
        (spatial(2, 16).compose(local(1, 4)), (2, 64), 0, 16, 1, 16),
        (spatial(2, 16).compose(local(1, 4)), (2, 64), 2, 8, 2, 33),
        (spatial(1, 32), (1, 32), 0, 4, 1, 4),
        (spatial(1, 32), (1, 32), 1, 4, 1, 5),
        (column_spatial(32, 1), (32, 1), 0, 4, 1, 32),
        (local(1, 2).compose(spatial(1, 32)), (1, 64), 0, 4, 2, 8),
    ],
)
def test_vectors_and_sectors(
    layout: object, shape: tuple[int, int], offset: int, vector: int, requests: int, sectors: int
) -> None:
    access = cost(load(layout, shape, offset)).accesses[0]
    assert (access.vector_bytes, access.requests, access.sectors) == (vector, requests, sectors)


def test_without_a_swizzle_ldmatrix_has_conflicts() -> None:
    p = TileProgram("p", grid=(1,))
    shared = p.shared_tensor("f16", (16, 64), row_major_memory((16, 64)))
    a = p.load_shared(shared, (0, 0), (16, 64))
    p.dot(a, p.register_tensor("f16", (64, 8)), p.register_tensor("f32", (16, 8)))
    access = cost(infer(p)).accesses[0]
    assert (access.op, access.vector_bytes, access.requests) == ("ldmatrix", 16, 4)
    assert access.conflicts == 16 * 7


def test_counts_follow_loops_and_conditions() -> None:
    p = TileProgram("p", grid=(3, 2))
    x = p.global_view("x", "f32", (32,))
    with p.loop(5) as i:
        p.load_global(x, (0,), (32,))
        with p.when(i + 2 < 5):
            p.load_global(x, (0,), (32,))
        with p.when(p.block(1).equals(1)):
            p.load_global(x, (0,), (32,))
    counts = run_counts(infer(p))
    assert [counts[id(step)] for step in instructions(p.body)] == [30, 18, 15]
    assert cost(p).read_bytes == {"x": (30 + 18 + 15) * 128}


def test_registers_are_shared_by_views() -> None:
    p = TileProgram("p", grid=(1,))
    x = p.global_view("x", "u8", (512,))
    raw = p.load_global(x, (0,), (512,), layout=spatial(32).compose(local(16)))
    wide = p.cast(p.view(raw, "u4", spatial(8, 4).compose(local(4, 8))), "f16")
    p.add(wide, wide)
    assert registers(infer(p)) == 32  # 16 for the sum and 16 for what it is of; the bytes are dead by then


def test_divisors() -> None:
    p = TileProgram("p", grid=(4,))
    block = p.block(0)
    assert divisor(block * 48 + 16) == 16
    assert divisor(block) == 1
    assert divisor(block * 64 % 32) == 32
    assert divisor(0 * block) == 0

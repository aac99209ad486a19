"""The byte-exact interpreter: instructions one by one, views that are real, copies that must be waited for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from memwall.errors import InputError
from memwall.kernels.tile_infer import infer
from memwall.kernels.tile_interpreter import UNWRITTEN, read_bits, run
from memwall.kernels.tile_layout import Layout, local, spatial
from memwall.kernels.tile_program import TileProgram
from memwall.kernels.tile_types import pack, tile_type


def viewed(layout: Layout) -> np.ndarray:
    """64 bytes as 3-bit codes in a [8, 16] tile, each thread's two by this layout of bytes."""
    p = TileProgram("p", grid=(1,))
    source, target = p.global_view("x", "u8", (96,)), p.global_view("y", "f32", (16, 16))
    raw = p.load_global(source, (0,), (96,), layout=layout)
    codes = p.view(raw, "u3", spatial(8, 4).compose(local(2, 4)))
    p.store_global(target, p.cast(codes, "f32"), (0, 0))
    y = np.zeros((16, 16), np.float32)
    run(infer(p), {"x": np.random.default_rng(0).integers(0, 256, 96, np.uint8), "y": y})
    return y


def test_a_wrong_layout_in_a_view_gives_wrong_numbers() -> None:
    right, wrong = viewed(spatial(32).compose(local(3))), viewed(local(3).compose(spatial(32)))
    data = np.random.default_rng(0).integers(0, 256, 96, np.uint8)
    codes = read_bits(data, np.arange(256) * 3, 3).reshape(32, 8)
    want = np.empty((16, 16))
    table = spatial(8, 4).compose(local(2, 4)).table()
    want[table[..., 0], table[..., 1]] = codes
    np.testing.assert_array_equal(right, want)
    assert (wrong != want).mean() > 0.5


def test_narrow_global_memory_is_a_stream_of_bits() -> None:
    codes = np.random.default_rng(0).integers(0, 32, (8, 12), np.uint8)
    p = TileProgram("p", grid=(1,))
    source, target = p.global_view("x", "u5", (8, 12)), p.global_view("y", "f16", (8, 12))
    p.store_global(target, p.cast(p.load_global(source, (0, 0), (8, 16)), "f16"), (0, 0))
    y = np.zeros((8, 12), np.float16)
    run(infer(p), {"x": pack(tile_type("u5"), codes.reshape(1, -1)), "y": y})
    np.testing.assert_array_equal(y, codes)


@pytest.mark.parametrize("waits", [True, False])
def test_copies_arrive_when_they_have_been_waited_for(waits: bool) -> None:
    p = TileProgram("p", grid=(1,))
    source, target = p.global_view("x", "u8", (2, 64)), p.global_view("y", "u8", (2, 64))
    shared = p.shared_tensor("u8", (2, 64))
    for row in range(2):
        p.copy_async(shared, source, (row, 0), (row, 0), (1, 64))
        p.commit_group()
    p.wait_group(0 if waits else 1)
    p.store_global(target, p.load_shared(shared, (0, 0), (2, 64)), (0, 0))
    x, y = np.arange(128, dtype=np.uint8).reshape(2, 64), np.zeros((2, 64), np.uint8)
    run(infer(p), {"x": x, "y": y})
    np.testing.assert_array_equal(y[0], x[0])
    np.testing.assert_array_equal(y[1], x[1] if waits else UNWRITTEN)


def test_computing() -> None:
    p = TileProgram("p", grid=(1,))
    x, y = p.global_view("x", "f32", (8, 16)), p.global_view("y", "f32", (6, 8, 16))
    tile = p.load_global(x, (0, 0), (8, 16))
    zero = p.register_tensor("f32", (8, 16))
    negative = p.binary("lt", tile, zero)
    results = [
        p.where(negative, p.unary("neg", tile), tile),
        p.binary("max", tile, p.reduce("max", tile, (1,))),
        p.binary("sub", tile, p.reduce("sum", tile, (0,))),
        p.unary("exp", p.binary("min", tile, zero)),
        p.binary("div", tile, p.unary("sqrt", p.unary("abs", tile))),
        p.reshape(p.reshape(tile, (16, 8)), (8, 16)),
    ]
    for at, result in enumerate(results):
        p.store_global(y, result, (at, 0, 0))
    a, out = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32), np.zeros((6, 8, 16), np.float32)
    run(infer(p), {"x": a, "y": out})
    want = [abs(a), np.broadcast_to(a.max(1, keepdims=True), a.shape), a - a.sum(0), np.exp(np.minimum(a, 0)),
            a / np.sqrt(abs(a)), a]  # fmt: skip
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)


def test_semaphores_put_blocks_in_order() -> None:
    p = TileProgram("p", grid=(8,))
    y = p.global_view("y", "f32", (32,))
    p.lock(0, p.block(0))
    tile = p.load_global(y, (0,), (32,))
    two, one = p.register_tensor("f32", (32,), init=2.0), p.register_tensor("f32", (32,), init=1.0)
    p.store_global(y, p.add(p.mul(tile, two), one), (0,))
    p.release(0, p.block(0) + 1)
    for seed in range(4):
        out = np.zeros(32, np.float32)
        run(infer(p), {"y": out}, seed=seed)
        assert (out == 255).all()


def test_blocks_that_wait_for_ever_are_an_error() -> None:
    p = TileProgram("p", grid=(2,))
    p.global_view("y", "f32", (32,))
    p.lock(0, 5)
    with pytest.raises(InputError, match="nobody releases"):
        run(infer(p), {"y": np.zeros(32, np.float32)})


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({}, "needs an array"),
        ({"y": np.zeros(32, np.float16)}, "takes a contiguous float32"),
        ({"y": np.zeros(31, np.float32)}, "128 bytes or more"),
        ({"y": np.zeros((32, 2), np.float32)[:, 0]}, "contiguous"),
    ],
)
def test_arrays_that_do_not_fit(arrays: dict[str, Any], says: str) -> None:
    p = TileProgram("p", grid=(1,))
    y = p.global_view("y", "f32", (32,))
    p.store_global(y, p.register_tensor("f32", (32,)), (0,))
    with pytest.raises(InputError, match=says):
        run(infer(p), arrays)


def test_shared_memory_has_bounds() -> None:
    p = TileProgram("p", grid=(1,))
    p.load_shared(p.shared_tensor("f32", (32,)), (8,), (32,))
    with pytest.raises(InputError, match="outside of"):
        run(infer(p), {})

"""Weight-only products for every narrow type: stored form, programs, splits, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.kernels import tilus
from memwall.kernels.tile_infer import plan_shared
from memwall.kernels.tile_interpreter import run
from memwall.kernels.tile_types import PUBLISHED, pack, tile_type
from memwall.kernels.tilus import Config
from memwall.kernels.tilus_check import model_product, product_arrays, random_weights

SMALL = Config(warp_spatial=(1, 2), warp_repeat=(1, 2, 2))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(PUBLISHED), st.sampled_from([(16, 16), (16, 8), (32, 32), (64, 16)]), st.integers(1, 3),
    st.integers(1, 3), st.integers(0, 2**31),
)  # fmt: skip
def test_weights_are_packed_without_a_bit_more(dtype: str, tile: tuple[int, int], a: int, b: int, seed: int) -> None:
    bits = tile_type(dtype).bits
    rows, columns = a * tile[0], b * tile[1]
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, columns), np.uint8)
    if tilus.tile_layout(tile).num_slots * bits % 8:
        with pytest.raises(InputError, match="no whole bytes"):
            tilus.thread_bytes(dtype, tile)
        return
    packed = tilus.pack_weights(codes, dtype, tile)
    assert packed.nbytes * 8 == rows * columns * bits
    np.testing.assert_array_equal(tilus.unpack_weights(packed, dtype, tile), codes)


@pytest.mark.parametrize("dtype", ["u3", "i5", "f6e3m2", "u8"])
def test_packing_is_a_tile_program_too(dtype: str) -> None:
    codes = np.random.default_rng(0).integers(0, 1 << tile_type(dtype).bits, (48, 32), np.uint8)
    want = tilus.pack_weights(codes, dtype)
    got = np.zeros_like(want)
    run(tilus.prelayout_program(dtype, 48, 32), {"codes": pack(tile_type(dtype), codes.reshape(1, -1)), "packed": got})
    np.testing.assert_array_equal(got, want)


def test_a_tile_by_hand() -> None:
    """Lane 5 of the fragment holds column 1 and rows 2, 3, 10, 11, then the same of column 9."""
    codes = (np.arange(256).reshape(16, 16) % 16).astype(np.uint8)
    codes[:, :] = np.arange(16)[:, None]
    packed = tilus.pack_weights(codes, "u4").reshape(32, 4)
    assert packed[5].tolist() == [0x32, 0xBA, 0x32, 0xBA]


@pytest.mark.parametrize("dtype", PUBLISHED)
def test_products_are_exact_in_the_order_of_the_model(dtype: str) -> None:
    weights = random_weights(dtype, 256, 32, columns=32)
    x = np.random.default_rng(1).normal(size=(5, 256)).astype(np.float16)
    decoded = x.astype(np.float32) @ weights.decode()
    for split in (1, 2):
        config = Config(warp_spatial=(1, 2), warp_repeat=(1, 2, 2), split_k=split)
        arrays = product_arrays(x, weights, np.float16)
        run(tilus.matmul_program(dtype, 5, 32, 256, config=config), arrays, seed=split)
        np.testing.assert_array_equal(arrays["out"], model_product(x, weights, split).astype(np.float16))
        assert np.abs(arrays["out"] - decoded).max() < 1e-2 * np.abs(decoded).max()


def test_direct_and_bfloat16_and_tall_tiles() -> None:
    weights = random_weights("i6", 128, 64, columns=64)
    config = Config(warp_spatial=(2, 1), warp_repeat=(1, 4, 1))
    x = np.random.default_rng(1).normal(size=(40, 128))
    for make in (tilus.direct_program, tilus.matmul_program):
        for kind, tolerance in (("f16", 5e-3), ("bf16", 4e-2)):
            dtype = tile_type(kind).dtype
            arrays = product_arrays(x.astype(dtype), weights, dtype.type)
            run(make("i6", 40, 64, 128, config=config, activations=kind), arrays)
            want = x.astype(np.float32) @ weights.decode()
            assert np.abs(arrays["out"].astype(np.float32) - want).max() < tolerance * np.abs(want).max()


@pytest.mark.parametrize("tokens", [1, 3])
def test_matvec(tokens: int) -> None:
    weights = random_weights("u3", 128, 32, columns=32)
    x = np.random.default_rng(1).normal(size=(tokens, 128)).astype(np.float32)
    arrays = product_arrays(x, weights, np.float32)
    run(tilus.matvec_program("u3", tokens, 32, 128, config=Config(cpu_tiles=2)), arrays)
    np.testing.assert_allclose(arrays["out"], x @ weights.decode(), atol=1e-5)


@pytest.mark.parametrize("dtype", ["i4", "i2", "f6e3m2", "f8e4m3", "f7e5m1", "f2e1m0"])
def test_quantized_weights_use_the_whole_range(dtype: str) -> None:
    w = np.random.default_rng(0).normal(size=(200, 24)).astype(np.float32)
    made = tilus.encode(w, dtype)
    assert made.shape == (200, 24)
    assert made.padded == (256, 128)
    decoded = made.decode()
    top = np.abs(w[:128]).max(axis=0)
    # the largest of a group is hit to within the scale's rounding
    hit = np.abs(decoded[:128]).max(axis=0) / top
    assert (hit > 0.9 if dtype != "i2" else hit > 0.5).all()
    error = np.abs(decoded - w).max()
    assert error < {"i4": 0.3, "i2": 3.5, "f6e3m2": 0.4, "f8e4m3": 0.2, "f7e5m1": 0.9, "f2e1m0": 2.5}[dtype]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: tilus.encode(np.ones((16,)), "i4"), "matrix"),
        (lambda: tilus.encode(np.full((16, 16), np.nan), "i4"), "NaN"),
        (lambda: tilus.encode(-np.ones((16, 16)), "u4"), "take i4"),
        (lambda: tilus.encode(np.full((16, 16), 1e30), "i4"), "beyond float16"),
        (lambda: tilus.encode(np.ones((16, 16)), "f16"), "1 to 8 bits"),
        (lambda: tilus.prepare(np.full((128, 16), 9, np.uint8), np.ones((1, 16)), "u3"), "do not fit u3"),
        (lambda: tilus.prepare(np.zeros((128, 16), np.uint8), np.ones((2, 16)), "u3"), "scales"),
        (lambda: tilus.pack_weights(np.zeros((20, 16), np.uint8), "u3"), "no multiple"),
        (lambda: tilus.tile_layout((8, 8)), "weight tile"),
        (lambda: tilus.matmul_program("i4", 1, 100, 256), "does not divide"),
        (lambda: tilus.matmul_program("i4", 1, 128, 256, config=Config(warp_repeat=(1, 1, 1))), "weight tile"),
        (lambda: tilus.matvec_program("i4", 17, 128, 256), "1 to 16 tokens"),
        (lambda: plan_shared(tilus.matmul_program("i4", 1, 128, 4096, config=Config(num_stages=40))), "shared memory"),
    ],
)
def test_refused(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        make()

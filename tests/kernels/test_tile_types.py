"""Narrow types: every code, storage across byte borders, nearest encoding."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.formats.levels import minifloat
from memwall.kernels.tile_types import PUBLISHED, pack, slice_bytes, tile_type, unpack

FLOATS = [name for name in PUBLISHED if name.startswith("f")]
PEERS = {
    "f8e4m3": ml_dtypes.float8_e4m3fn,
    "f8e5m2": ml_dtypes.float8_e5m2,
    "f4e2m1": ml_dtypes.float4_e2m1fn,
    "f6e2m3": ml_dtypes.float6_e2m3fn,
    "f6e3m2": ml_dtypes.float6_e3m2fn,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_code(name: str) -> None:
    kind = tile_type(name)
    values = kind.values
    assert len(values) == 1 << kind.bits
    if kind.kind != "float":
        want = range(1 << kind.bits)
        if kind.kind == "int":
            want = [*range(1 << (kind.bits - 1)), *range(-(1 << (kind.bits - 1)), 0)]
        assert values.tolist() == list(want)
        return
    e, m = kind.exponent_bits, kind.mantissa_bits
    for code, value in enumerate(values.tolist()):
        sign, exponent, mantissa = code >> (e + m), (code >> m) & ((1 << e) - 1), code & ((1 << m) - 1)
        if e == 5 and exponent == 31:
            assert math.isnan(value) if mantissa else value == (-math.inf if sign else math.inf)
        elif (e, m) == (4, 3) and exponent == 15 and mantissa == 7:
            assert math.isnan(value)
        else:
            size = mantissa * 2.0 ** (1 - kind.bias - m)
            if exponent:
                size = (1 + mantissa * 2.0**-m) * 2.0 ** (exponent - kind.bias)
            assert value == (-size if sign else size)
    if e != 5 and (e, m) != (4, 3):
        assert kind.largest == 2.0 ** ((2**e - 1) - kind.bias) * (2 - 2.0**-m)


@pytest.mark.parametrize("name", PEERS)
def test_agrees_with_ml_dtypes(name: str) -> None:
    kind = tile_type(name)
    codes = np.arange(1 << kind.bits, dtype=np.uint8)
    np.testing.assert_array_equal(codes.view(PEERS[name]).astype(np.float32), kind.values)


@pytest.mark.parametrize("name", FLOATS)
def test_agrees_with_the_format_engine(name: str) -> None:
    kind = tile_type(name)
    if kind.exponent_bits != 5:
        x = np.random.default_rng(0).normal(scale=kind.largest, size=4000).astype(np.float32)
        x = np.append(x, (kind.values[:-1] + kind.values[1:]) / 2)
        x = x[np.isfinite(x)]
        levels = minifloat(kind.exponent_bits, kind.mantissa_bits)
        np.testing.assert_array_equal(kind.decode(kind.encode(x)), levels.decode(levels.encode(x)))


@pytest.mark.parametrize("name", PUBLISHED)
def test_codes_encode_to_themselves_and_others_to_the_nearest(name: str) -> None:
    kind = tile_type(name)
    finite = kind.values[np.isfinite(kind.values)]
    np.testing.assert_array_equal(kind.decode(kind.encode(finite)), finite)
    x = np.random.default_rng(1).uniform(finite.min(), finite.max(), 500).astype(np.float32)
    found = np.abs(kind.decode(kind.encode(x)) - x)
    np.testing.assert_allclose(found, np.abs(finite[None] - x[:, None]).min(axis=1), rtol=0, atol=1e-12)
    with pytest.raises(InputError, match="NaN"):
        kind.encode(np.float32([math.nan]))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 8), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_storage_is_one_little_endian_stream(bits: int, slots: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (3, slots), np.uint8)
    packed = pack(tile_type(f"u{bits}"), codes)
    assert packed.shape == (3, -(-slots * bits // 8))
    for row, data in zip(codes, packed, strict=True):
        whole = int.from_bytes(data.tobytes(), "little")
        assert [(whole >> (j * bits)) & ((1 << bits) - 1) for j in range(slots)] == row.tolist()
    np.testing.assert_array_equal(unpack(tile_type(f"u{bits}"), packed, slots), codes)


def test_sizes_are_whole_bytes() -> None:
    assert [slice_bytes(tile_type(f"u{bits}"), 8) for bits in range(1, 9)] == list(range(1, 9))
    assert slice_bytes(tile_type("f16"), 3) == 6
    with pytest.raises(InputError, match="no whole bytes"):
        slice_bytes(tile_type("u3"), 4)


@pytest.mark.parametrize("name", ["u9", "i0", "f6e3m3", "f8e6m1", "int4", "f64", ""])
def test_unknown_types(name: str) -> None:
    with pytest.raises(InputError, match="unknown tile type"):
        tile_type(name)

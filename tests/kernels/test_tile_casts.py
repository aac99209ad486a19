"""Vector casts are exact for every code of every type."""

from __future__ import annotations

import numpy as np
import pytest

from memwall.errors import InputError
from memwall.kernels.tile_casts import byte_recipe, cast_codes, nibble_recipes, operations, pair_recipe, run
from memwall.kernels.tile_types import PUBLISHED, tile_type

EVERY = [*PUBLISHED, "f2e1m0", "f5e4m0", "f8e1m6", "f8e2m5", "f8e3m4"]


@pytest.mark.parametrize("name", EVERY)
def test_every_code_beside_every_other(name: str) -> None:
    kind = tile_type(name)
    codes = np.arange(1 << kind.bits, dtype=np.uint32)
    low, high = (part.ravel() for part in np.meshgrid(codes, codes))
    found = run(pair_recipe(kind), low | high << np.uint32(16)).view(np.float16)
    want = np.stack([kind.values[low], kind.values[high]], axis=1).ravel()
    np.testing.assert_array_equal(found.astype(np.float32), want)
    np.testing.assert_array_equal(np.signbit(found), np.signbit(want))
    assert operations(kind) <= 9


@pytest.mark.parametrize("name", ["u4", "i4"])
def test_nibbles_of_a_word(name: str) -> None:
    kind = tile_type(name)
    words = np.random.default_rng(0).integers(0, 1 << 32, 5000, np.uint32)
    for pair, (shift, recipe) in enumerate(nibble_recipes(kind)):
        found = run(recipe, words >> np.uint32(shift)).view(np.float16).reshape(-1, 2)
        for half, position in enumerate((pair, pair + 4)):
            np.testing.assert_array_equal(found[:, half], kind.values[(words >> np.uint32(4 * position)) & 15])


@pytest.mark.parametrize("name", ["u8", "i8"])
def test_bytes_permuted_under_the_exponent(name: str) -> None:
    kind = tile_type(name)
    codes = np.arange(256, dtype=np.uint32)
    found = run(byte_recipe(kind), np.uint32(0x64006400) | codes | codes[::-1] << np.uint32(16)).view(np.float16)
    np.testing.assert_array_equal(found[0::2], kind.values)
    np.testing.assert_array_equal(found[1::2], kind.values[::-1])


def test_odd_counts_and_wrong_types() -> None:
    np.testing.assert_array_equal(cast_codes(tile_type("i3"), np.uint8([[7, 4, 3]])), [[-1, -4, 3]])
    for make in (lambda: nibble_recipes(tile_type("i3")), lambda: byte_recipe(tile_type("u4"))):
        with pytest.raises(InputError, match="integer"):
            make()
    with pytest.raises(InputError, match="narrow"):
        pair_recipe(tile_type("f16"))

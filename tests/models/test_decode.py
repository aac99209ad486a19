"""One token through recorded programs is the same to the bit as through the layers call by call."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from memwall import kv
from memwall.formats import codec
from tests.models.families import FAMILIES, make_family
from tests.models.test_decoder import DEMO_DIRECTORY, Loaded, some_tokens


def call_by_call(loaded: Loaded) -> Loaded:
    """An observer must see every product, so nothing is recorded."""
    loaded.decoder.observer = lambda name, x: None
    return loaded


@pytest.mark.parametrize("weights", ["float32", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_and_plain_steps_agree(family: str, weights: str, tmp_path: Path) -> None:
    directory = make_family(family, tmp_path)
    tokens = some_tokens(directory, 12)
    recorded, plain = Loaded(directory, weights, segment=8), call_by_call(Loaded(directory, weights, segment=8))
    for begin, end in ((0, 8), *((place, place + 1) for place in range(8, 12))):
        got = recorded.decoder.forward(tokens[begin:end], recorded.cache)
        np.testing.assert_array_equal(got, plain.decoder.forward(tokens[begin:end], plain.cache))


def test_a_replaced_matrix_is_recorded_anew() -> None:
    loaded = Loaded(DEMO_DIRECTORY, "float32", segment=8)
    tokens = some_tokens(DEMO_DIRECTORY, 2)
    before = loaded.decoder.forward(tokens[:1], loaded.cache).copy()
    name = "model.layers.0.mlp.down_proj.weight"
    shape = next(tensor.shape for tensor in loaded.config.tensors() if tensor.name == name)
    loaded.decoder.weights.replace(name, codec("float32").encode(np.zeros(shape, np.float32)))
    loaded.cache.truncate(0)
    assert not np.array_equal(loaded.decoder.forward(tokens[:1], loaded.cache), before)


def test_two_caches_in_turn_give_what_each_gives_alone() -> None:
    loaded, alone = (Loaded(DEMO_DIRECTORY, "int4", segment=8, kv_policy="float16") for _ in range(2))
    other = kv.build("float16", loaded.cache.shape, loaded.arena, 16)
    tokens = some_tokens(DEMO_DIRECTORY, 10)
    wanted = [alone.decoder.forward(tokens[i : i + 1], alone.cache).copy() for i in range(5)]
    for i in range(5):
        for cache in (loaded.cache, other):
            np.testing.assert_array_equal(loaded.decoder.forward(tokens[i : i + 1], cache), wanted[i])
    other.release()
    again = kv.build("float16", loaded.cache.shape, loaded.arena, 16)
    for i in range(5):
        np.testing.assert_array_equal(loaded.decoder.forward(tokens[i : i + 1], again), wanted[i])

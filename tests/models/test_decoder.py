"""The CPU engine against transformers, family by family, and against itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from memwall import kv
from memwall.engine.loading import cache_shape
from memwall.errors import BudgetExceeded
from memwall.memory import Arena, Ledger
from memwall.models import DEMO_DIRECTORY, Checkpoint, ModelConfig
from memwall.models.decoder import BLOCK_ROWS, Decoder, activation_bytes
from memwall.models.precision import resolve, weight_bytes
from memwall.models.weights import load_weights
from tests.models.families import FAMILIES, make_family, reference_logits


class Loaded:
    """A decoder with its cache, ledger and arena."""

    def __init__(
        self, path: Path, weights: str, *, cap_bytes: int = 1 << 40, segment: int = 512, kv_policy: str = "float32"
    ) -> None:
        self.config = ModelConfig.from_directory(path)
        self.ledger = Ledger()
        self.arena = Arena(cap_bytes, self.ledger)
        with Checkpoint(path, self.config) as checkpoint:
            self.specs = resolve(self.config, weights, checkpoint)
            loaded = load_weights(self.config, checkpoint, self.specs, self.arena)
        self.decoder = Decoder(self.config, loaded, self.arena, segment_tokens=segment, logit_rows=segment)
        self.cache = kv.build(kv_policy, cache_shape(self.config), self.arena, 2 * segment)

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        return self.decoder.forward(tokens, self.cache, all_logits=True).copy()


def some_tokens(path: Path, count: int) -> np.ndarray:
    return np.random.default_rng(7).integers(3, ModelConfig.from_directory(path).vocab_size, count)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_logits_agree_with_transformers(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = make_family(family, tmp_path_factory.getbasetemp())
    tokens = some_tokens(path, 45)
    difference = np.abs(Loaded(path, "float32").logits(tokens) - reference_logits(path, tokens)).max()
    assert difference <= 2e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_gives_what_the_whole_prompt_gives(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = make_family(family, tmp_path_factory.getbasetemp())
    tokens = some_tokens(path, 40)
    whole = Loaded(path, "float32").logits(tokens)
    stepwise = Loaded(path, "float32")
    parts = [stepwise.logits(tokens[:17]), stepwise.logits(tokens[17:30])]
    parts += [stepwise.logits(tokens[i : i + 1]) for i in range(30, 40)]
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=2e-4)


def test_demo_model_agrees_with_transformers() -> None:
    tokens = some_tokens(DEMO_DIRECTORY, BLOCK_ROWS + 60)  # more than one block of rows
    loaded = Loaded(DEMO_DIRECTORY, "float32")
    assert np.abs(loaded.logits(tokens) - reference_logits(DEMO_DIRECTORY, tokens)).max() <= 2e-4


@pytest.mark.parametrize("weights", ["float16", "int8", "int4", "mixed-5.5", "nf4-dq", "mxfp6", "binary2"])
def test_weights_weigh_what_was_predicted(weights: str) -> None:
    loaded = Loaded(DEMO_DIRECTORY, weights, segment=32)
    held = {row.owner: row.nbytes for row in loaded.ledger.rows()}
    for owner, nbytes in weight_bytes(loaded.config, loaded.specs).items():
        assert nbytes <= held[owner] < nbytes + 4096  # regions come in whole pages
    activations = activation_bytes(loaded.config, 32, 32)
    assert activations <= held["activations"] <= activations + 16 * 4096


def test_eight_bits_stay_close_and_fewer_bits_drift_further() -> None:
    tokens = some_tokens(DEMO_DIRECTORY, 64)
    reference = Loaded(DEMO_DIRECTORY, "float32").logits(tokens)
    errors = [
        np.abs(Loaded(DEMO_DIRECTORY, weights).logits(tokens) - reference).mean()
        for weights in ("int8", "int4", "int2")
    ]
    assert errors[0] < errors[1] < errors[2]
    assert errors[0] < errors[1] / 3


def test_every_level_format_runs_the_model() -> None:
    """Eight bits stay as close as int8 does; four drift as int4; what is decoded from tiles is what was encoded."""
    tokens = some_tokens(DEMO_DIRECTORY, 48)
    reference = Loaded(DEMO_DIRECTORY, "float32").logits(tokens)

    def error(weights: str) -> float:
        return float(np.abs(Loaded(DEMO_DIRECTORY, weights).logits(tokens) - reference).mean())

    int8, int4, int2 = (error(weights) for weights in ("int8", "int4", "int2"))
    for weights in ("mxint8", "bfp8", "posit8"):
        assert error(weights) < 3 * int8
    for weights in ("nf4", "nf4-dq", "fp4", "e2m1", "mxfp4", "e4m3", "mxfp8", "bfp5", "posit5es0"):
        assert error(weights) < 2 * int4
    for weights in ("binary2", "ternary"):
        assert error(weights) < 2 * int2


def test_loading_stops_before_the_cap_and_leaves_nothing() -> None:
    ledger = Ledger()
    arena = Arena(1_000_000, ledger)
    config = ModelConfig.from_directory(DEMO_DIRECTORY)
    with Checkpoint(DEMO_DIRECTORY, config) as checkpoint, pytest.raises(BudgetExceeded, match="weights/"):
        load_weights(config, checkpoint, resolve(config, "int4"), arena)
    assert arena.used_bytes == 0


def test_a_decoder_that_does_not_fit_leaves_nothing() -> None:
    config = ModelConfig.from_directory(DEMO_DIRECTORY)
    whole = Arena(1 << 40, Ledger())
    with Checkpoint(DEMO_DIRECTORY, config) as checkpoint:
        weights = load_weights(config, checkpoint, resolve(config, "int4"), whole)
    before = whole.used_bytes
    Decoder(config, weights, whole)
    for cap in (whole.used_bytes - before - 1, 4096):
        arena = Arena(cap, Ledger())
        with pytest.raises(BudgetExceeded):
            Decoder(config, weights, arena)
        assert arena.used_bytes == 0


def test_a_refused_token_leaves_the_cache_as_it_was() -> None:
    loaded = Loaded(DEMO_DIRECTORY, "int4", segment=64)
    tokens = some_tokens(DEMO_DIRECTORY, 64)
    loaded.logits(tokens)
    loaded.arena.set_cap(loaded.arena.used_bytes)

    def decode_on() -> None:
        for _ in range(64):
            loaded.decoder.forward(tokens[:1], loaded.cache)

    with pytest.raises(BudgetExceeded):
        decode_on()
    held = loaded.cache.length
    loaded.arena.set_cap(1 << 40)
    after = loaded.decoder.forward(tokens[:1], loaded.cache).copy()
    assert loaded.cache.length == held + 1

    fresh = Loaded(DEMO_DIRECTORY, "int4", segment=128)
    history = np.concatenate([tokens, np.repeat(tokens[:1], held + 1 - 64)])
    np.testing.assert_allclose(after, fresh.logits(history)[-1], atol=0.05)


def test_observer_sees_the_input_of_every_linear() -> None:
    loaded = Loaded(DEMO_DIRECTORY, "float16")
    seen: dict[str, tuple[int, ...]] = {}
    loaded.decoder.observer = lambda name, x: seen.__setitem__(name, x.shape)
    loaded.logits(some_tokens(DEMO_DIRECTORY, 10))
    linears = [tensor for tensor in loaded.config.tensors() if tensor.role == "linear"]
    assert {tensor.name for tensor in linears} <= set(seen)
    assert all(seen[tensor.name] == (10, tensor.shape[1]) for tensor in linears)

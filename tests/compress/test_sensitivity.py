"""Measured losses: those of the whole matrix, falling with every bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from memwall.compress import weight_method
from memwall.compress.base import MethodConfig, Statistics
from memwall.compress.calibration import LayerStream, PromptCache, float_packed
from memwall.compress.sensitivity import Probe, candidates, gain, relative_error
from memwall.formats import Packed, codec
from memwall.memory import Arena, Ledger
from memwall.models import Checkpoint, ModelConfig
from memwall.models.config import EMBEDDING, HEAD
from memwall.models.decoder import Decoder
from memwall.models.precision import resolve
from memwall.models.weights import load_weights
from tests.compress.tiny_model import make_model

SPECS = ("int2-g64-asym", "int3-g64-asym", "int4-g64", "int8-g64")


def test_losses_fall_with_bits_and_agree_with_the_whole_matrix() -> None:
    random = np.random.default_rng(0)
    weight = random.standard_normal((1000, 96), np.float32)
    x = random.standard_normal((500, 96), np.float32) * np.linspace(0.1, 3, 96, dtype=np.float32)
    statistics = Statistics(x.T @ x, 500)
    found = candidates(weight, statistics, SPECS, "int3-g64-asym", 0.25)
    assert [candidate.nbytes for candidate in found] == [codec(spec).nbytes((1000, 96)) for spec in SPECS]
    losses = [candidate.loss for candidate in found]
    assert losses == sorted(losses, reverse=True)
    assert losses[1] == 0.25
    errors: dict[str, float] = {}
    for spec in SPECS:
        change = codec(spec).decode(codec(spec).encode(weight)) - weight
        errors[spec] = ((change @ x.T) ** 2).sum() / ((weight @ x.T) ** 2).sum()
        assert abs(relative_error(weight, codec(spec).encode(weight), statistics) / errors[spec] - 1) < 0.1
    for spec, loss in zip(SPECS, losses, strict=True):
        assert abs(loss / (0.25 * errors[spec] / errors["int3-g64-asym"]) - 1) < 0.1


def test_nothing_in_nothing_lost() -> None:
    assert candidates(np.zeros((4, 64), np.float32), None, ["int4"], "int3", 1.0)[0].loss == 0.0
    assert gain(np.zeros((4, 64), np.float32), None, weight_method("rtn"), MethodConfig(spec="int4")) == 1.0
    assert relative_error(np.zeros((4, 64), np.float32), codec("int4").encode(np.zeros((4, 64))), None) == 0.0


def test_gain_of_a_method() -> None:
    random = np.random.default_rng(0)
    x = random.standard_normal((500, 16), np.float32) @ random.standard_normal((16, 64), np.float32)
    statistics = Statistics(x.T @ x + np.eye(64, dtype=np.float32), 500)
    weight = random.standard_normal((300, 64), np.float32)
    assert gain(weight, statistics, weight_method("rtn"), MethodConfig(spec="int3")) == 1.0
    assert gain(weight, statistics, weight_method("gptq"), MethodConfig(spec="int3")) < 0.5


def test_probe_agrees_with_whole_models(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    config = ModelConfig.from_directory(folder)
    tokens = np.random.default_rng(0).integers(0, 4096, (1, 60))
    name = "model.layers.1.mlp.down_proj.weight"

    def log_chances(checkpoint: Checkpoint, changes: dict[str, Packed]) -> np.ndarray:
        arena = Arena(1 << 28, Ledger())
        weights = load_weights(config, checkpoint, resolve(config, "float32"), arena)
        for changed, packed in changes.items():
            weights.replace(changed, packed)
        decoder = Decoder(config, weights, arena, segment_tokens=60, logit_rows=60, exact=True)
        logits = decoder.forward(tokens[0], PromptCache(config), all_logits=True).astype(np.float64)
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    with Checkpoint(folder, config) as checkpoint:
        stream = LayerStream(config, checkpoint, tokens, Arena(1 << 28, Ledger()))
        embedding = float_packed(checkpoint, EMBEDDING)
        probe = Probe(stream, embedding, embedding)
        stream.embed()
        stream.advance(0)
        layer_form = codec("int2").encode(checkpoint.tensor(name))
        embedding_form = codec("int4").encode(checkpoint.tensor(EMBEDDING))
        found = [
            probe.layer_nats(1, stream.hidden[0], {name: layer_form})[name],
            probe.embedding_nats(embedding_form, tied=True),
        ]
        expected = log_chances(checkpoint, {})
        for nats, changes in zip(
            found, ({name: layer_form}, {EMBEDDING: embedding_form, HEAD: embedding_form}), strict=True
        ):
            difference = expected - log_chances(checkpoint, changes)
            np.testing.assert_allclose(nats, (np.exp(expected) * difference).sum(axis=1).mean(), rtol=1e-3)
        assert 0 < probe.head_nats(embedding_form) < found[1]

"""Equivalent transforms: logits stay what they were, for every family, site and map."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.compress.calibration import PromptCache, float_packed
from memwall.compress.transforms import (
    Map,
    Permute,
    Rotate,
    Scale,
    Site,
    Transform,
    Transformed,
    hadamard,
    residual,
    sites,
)
from memwall.errors import InputError
from memwall.kernels import matrix
from memwall.memory import Arena, Ledger
from memwall.models import Checkpoint
from memwall.models.decoder import Decoder
from memwall.models.precision import resolve
from memwall.models.weights import Weights
from tests.models.families import make_family


def logits(checkpoint: Checkpoint) -> np.ndarray:
    config = checkpoint.config
    tensors = config.tensors()
    weights = Weights(
        matrices={t.name: matrix(float_packed(checkpoint, t.name)) for t in tensors if len(t.shape) == 2},
        vectors={t.name: checkpoint.alone(t.name).astype(np.float32) for t in tensors if len(t.shape) == 1},
        specs=resolve(config, "float32"),
    )
    if config.tie_word_embeddings:
        weights.matrices["lm_head.weight"] = weights.matrices["model.embed_tokens.weight"]
    decoder = Decoder(config, weights, Arena(1 << 30, Ledger()), segment_tokens=12, logit_rows=12, exact=True)
    return decoder.forward(np.arange(2, 14), PromptCache(config), all_logits=True).copy()


def random_map(site: Site, kind: str, random: np.random.Generator) -> Map:
    if kind == "scale":
        return Scale(np.exp(random.standard_normal(site.width)).astype(np.float32))
    size = site.width // site.heads
    if kind == "permute":
        within = [random.permutation(size) + size * head for head in range(site.heads)]
        return Permute(np.concatenate(within))
    return Rotate(hadamard(size & -size), site.width // (size & -size))


KINDS = {
    "attention": ("scale",),
    "values": ("scale", "permute", "rotate"),
    "mlp": ("scale",),
    "inner": ("scale", "permute"),
}


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "mixtral", "falcon-tied", "falcon-groups", "falcon-sequential"]
)
def test_logits_stay_what_they_were(family: str, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    with Checkpoint(make_family(family, tmp_path)) as checkpoint:
        before = logits(checkpoint)
        every = Transform()
        for layer in range(checkpoint.config.num_layers):
            for site in sites(checkpoint.config, layer):
                for kind in KINDS[site.kind] if site.scales else KINDS[site.kind][1:]:
                    each = random_map(site, kind, random)
                    every.put(site, each)
                    if layer == 1:
                        alone = Transform()
                        alone.put(site, each)
                        changed = Transformed(checkpoint, alone)
                        assert any(alone.changes(name) for name in checkpoint.names())
                        np.testing.assert_allclose(logits(changed), before, atol=2e-4, err_msg=f"{site.kind} {kind}")
        stream = residual(checkpoint.config)
        alone = Transform()
        alone.put(stream, random_map(stream, "permute", random))
        np.testing.assert_allclose(logits(Transformed(checkpoint, alone)), before, atol=2e-4, err_msg="residual")
        every.put(stream, random_map(stream, "permute", random))
        changed = Transformed(checkpoint, every)
        np.testing.assert_allclose(logits(changed), before, atol=5e-4)
        name = "model.layers.1.self_attn.o_proj.weight"
        assert np.abs(changed.alone(name) - checkpoint.alone(name)).max() > 0.01
        assert changed.source_dtype(name) == "float32"
        assert changed.stored_bytes(name) == changed.alone(name).nbytes


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.sampled_from(["scale", "permute", "rotate"]), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
def test_a_map_and_its_inverse_cancel(kind: str, heads: int, repeats: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    site = Site(kind="values", layer=0, width=4 * heads, producers=("v",), readers=("o",), heads=heads, repeats=repeats)
    each = random_map(site, kind, random)
    v = random.standard_normal((4 * heads, 5)).astype(np.float32)
    o = random.standard_normal((3, 4 * heads * repeats)).astype(np.float32)
    transform = Transform()
    transform.put(site, each)

    def product(v: np.ndarray, o: np.ndarray) -> np.ndarray:
        return o @ np.repeat(v.reshape(heads, 4, 5), repeats, axis=0).reshape(-1, 5)

    np.testing.assert_allclose(product(transform.apply("v", v), transform.apply("o", o)), product(v, o), atol=1e-4)
    assert not transform.changes("other")


def test_maps_that_have_no_place() -> None:
    norm = Site(kind="attention", layer=0, width=8, producers=("n",), readers=("q",))
    values = Site(kind="values", layer=0, width=8, producers=("v",), readers=("o",), heads=2)
    transform = Transform()
    for site, each, match in (
        (norm, Permute(np.arange(8)), "no place at the attention"),
        (norm, Rotate(hadamard(8), 1), "no place"),
        (norm, Scale(np.ones(4)), "does not fit"),
        (values, Permute(np.arange(8)[::-1]), "inside each head"),
        (values, Rotate(hadamard(8), 1), "inside each head"),
    ):
        with pytest.raises(InputError, match=match):
            transform.put(site, each)
    for make, match in (
        (lambda: Scale(np.float32([1, 0])), "positive"),
        (lambda: Permute(np.array([0, 0])), "each channel once"),
        (lambda: Rotate(np.ones((2, 2), np.float32), 1), "orthogonal"),
        (lambda: hadamard(12), "power of two"),
    ):
        with pytest.raises(InputError, match=match):
            make()
    np.testing.assert_allclose(hadamard(16) @ hadamard(16).T, np.eye(16), atol=1e-6)

"""Models with outliers planted by an equivalent transform, and the logits of models as they are stored."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from memwall.compress.calibration import PromptCache
from memwall.compress.transforms import Scale, Transform, Transformed, sites
from memwall.memory import Arena, Ledger
from memwall.models import Checkpoint, ModelConfig
from memwall.models.decoder import Decoder
from memwall.models.precision import resolve
from memwall.models.weights import load_weights


def plant_outliers(source: Path, folder: Path, times: float, share: float = 0.05) -> Path:
    """The model of `source` with some channels of every layer's inputs `times` larger, and its outputs the same."""
    shutil.copytree(source, folder)
    random = np.random.default_rng(0)
    with Checkpoint(source) as checkpoint:
        transform = Transform()
        for layer in range(checkpoint.config.num_layers):
            for site in sites(checkpoint.config, layer):
                large = random.random(site.width) < share
                if site.kind in ("attention", "mlp"):
                    transform.put(site, Scale(np.where(large, 1 / times, 1).astype(np.float32)))
        seen = Transformed(checkpoint, transform)
        tensors = {name: np.array(seen.alone(name)) for name in checkpoint.names()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def logits_of(folder: Path, *, exact: bool = True) -> np.ndarray:
    """Logits [tokens, vocabulary] of a stored model; exact: without rounding activations."""
    config = ModelConfig.from_directory(folder)
    with Checkpoint(folder, config) as checkpoint:
        choice = "float32" if checkpoint.manifest is None else "saved"
        arena = Arena(1 << 30, Ledger())
        weights = load_weights(config, checkpoint, resolve(config, choice, checkpoint), arena)
        decoder = Decoder(config, weights, arena, segment_tokens=48, logit_rows=48, exact=exact)
        tokens = np.random.default_rng(1).integers(3, config.vocab_size, 48)
        return decoder.forward(tokens, PromptCache(config), all_logits=True).copy()

"""CSKV's factors: where they start (SVD of the weights, of scaled weights, of the outputs) and how they are trained.

The calibration text runs through the model layer by layer; one layer's inputs are held at a time, in float16, and its
factors are trained against that layer's own keys and values: every layer sees clean inputs, so that layers do not
depend on one another (the paper trains all at once with the same loss, to the same effect). The loss is

    MSE(rotated keys, rotated rebuilt keys) + MSE(values, rebuilt values)

and with codes of few bits the features are rounded as the cache will round them, gradients passing straight through.
Shapes: X [sequences, tokens, d]; W [d, h]; A [d, r], B [r, h].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memwall import kernels
from memwall.compress.calibration import BUNDLED_TEXT, CalibrationSettings, LayerStream, read_text, token_sequences
from memwall.errors import MissingDependency
from memwall.kv.base import CacheShape
from memwall.kv.cskv import ClippedForm, CskvSettings
from memwall.kv.latent import projection_names
from memwall.kv.latent_rows import LatentForm
from memwall.memory import Arena, Ledger
from memwall.models import Checkpoint, ModelConfig
from memwall.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

Progress = Callable[[str, int, int], None]
Pair = tuple[np.ndarray, np.ndarray]

CALIBRATION = CalibrationSettings(max_tokens=24_576, sequence_tokens=512)
STEPS, BATCH_SEQUENCES = 300, 1
LEARNING_SHARE = 0.05
"""First learning rate, as a share of a factor's root mean square (the paper's 5e-5 is absolute, for one size)."""


def fit_factors(
    settings: CskvSettings, directory: Path, text: str | None, threads: int | None, progress: Progress | None
) -> dict[str, np.ndarray]:
    """Factors of all layers in float16, as the cache multiplies with them: A and B transposed."""
    if threads is not None:
        kernels.set_num_threads(threads)
    config = ModelConfig.from_directory(directory)
    shape = CacheShape(
        num_layers=config.num_layers, num_heads=config.num_heads, num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim, hidden_size=config.hidden_size,
    )  # fmt: skip
    words = read_text(BUNDLED_TEXT) if text is None else text
    tokenizer = Tokenizer.from_directory(directory)
    tokens = token_sequences(words, tokenizer, config, CALIBRATION, "given" if text is not None else "bundled")
    found: dict[str, np.ndarray] = {}
    with Checkpoint(directory, config) as checkpoint:
        stream = LayerStream(config, checkpoint, tokens, Arena(1 << 62, Ledger()))
        stream.embed()
        for layer in range(config.num_layers):
            if progress is not None:
                progress("layers", layer, config.num_layers)
            one = LayerData(config, checkpoint, layer, layer_inputs(stream, layer))
            found |= {f"{layer}.{name}": array for name, array in fit_layer(one, settings, shape, threads).items()}
    if progress is not None:
        progress("layers", config.num_layers, config.num_layers)
    return found


def layer_inputs(stream: LayerStream, layer: int) -> np.ndarray:
    """X of all calibration tokens, float16 [sequences, tokens, d]; the stream moves on by a layer."""
    inputs = np.empty(stream.hidden.shape, np.float16)
    flat, filled, name = inputs.reshape(-1, stream.config.hidden_size), 0, projection_names(layer)[0]

    def take(linear: str, x: np.ndarray) -> None:
        nonlocal filled
        if linear == name:
            flat[filled : filled + len(x)] = x
            filled += len(x)

    stream.observe(layer, take)
    assert filled == len(flat)
    return inputs


class LayerData:
    """What one layer's factors are found from: its inputs, and what its keys and values are made with."""

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint, layer: int, inputs: np.ndarray) -> None:
        prefix = f"model.layers.{layer}.self_attn."
        names = {tensor.name for tensor in config.tensors()}

        def vector(name: str) -> np.ndarray | None:
            return checkpoint.tensor(prefix + name).astype(np.float32) if prefix + name in names else None

        self.config, self.inputs = config, inputs
        weights = [checkpoint.tensor(name).astype(np.float32).T for name in projection_names(layer)]
        self.weights: Pair = (weights[0], weights[1])
        self.key_bias = vector("k_proj.bias")
        self.key_norm = vector("k_norm.weight")


def start(data: LayerData, which: int, rank: int, init: str) -> Pair:
    """A [d, r] and B [r, h] for keys (0) or values (1), before training."""
    weight = data.weights[which].astype(np.float64)
    if init == "pca":
        # the outputs' principal directions: the best projection of X W there is, and with it of rotated keys
        flat = data.inputs.reshape(-1, len(weight))
        gram = np.zeros((weight.shape[1], weight.shape[1]))
        for begin in range(0, len(flat), 4096):
            outputs = flat[begin : begin + 4096].astype(np.float32) @ data.weights[which]
            gram += outputs.T @ outputs
        basis = np.linalg.eigh(gram)[1][:, : -rank - 1 : -1]
        return (weight @ basis).astype(np.float32), np.ascontiguousarray(basis.T, np.float32)
    scale = np.ones(len(weight))
    if init == "asvd":
        # G = diag((a + 1e-6)^0.5), a the sum over sequences of the mean |x| of each input channel
        means = sum(np.abs(sequence.astype(np.float32)).mean(0) for sequence in data.inputs)
        scale = np.sqrt(np.asarray(means, np.float64) + 1e-6)
    left, singular, right = np.linalg.svd(scale[:, None] * weight, full_matrices=False)
    root = np.sqrt(singular[:rank])
    first = left[:, :rank] * root / scale[:, None]
    return first.astype(np.float32), (root[:, None] * right[:rank]).astype(np.float32)


def fit_layer(data: LayerData, settings: CskvSettings, shape: CacheShape, threads: int | None) -> dict[str, np.ndarray]:
    """One layer's four matrices, float16."""
    pairs = [start(data, which, rank, settings.init) for which, rank in enumerate(settings.ranks(shape))]
    if settings.train:
        pairs = train(data, pairs, settings.forms(shape), threads)
    found = {}
    for name, (first, second) in zip("kv", pairs):
        found[f"{name}.in"], found[f"{name}.out"] = (np.ascontiguousarray(m.T, np.float16) for m in (first, second))
    return found


def train(
    data: LayerData, pairs: list[Pair], forms: tuple[LatentForm, LatentForm], threads: int | None, steps: int = STEPS
) -> list[Pair]:
    """AdamW over random sequences, its rate falling to zero along a cosine."""
    torch = _torch()
    if threads is not None:
        torch.set_num_threads(threads)
    factors = [torch.nn.Parameter(torch.from_numpy(m.copy())) for pair in pairs for m in pair]
    groups = [{"params": [f], "lr": LEARNING_SHARE * float(f.detach().square().mean().sqrt())} for f in factors]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps))
    target = Target(data)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        picked = rng.choice(len(data.inputs), min(BATCH_SEQUENCES, len(data.inputs)), replace=False)
        optimizer.zero_grad()
        loss = target.loss(data.inputs[np.sort(picked)], factors, forms)
        loss.backward()
        optimizer.step()
        schedule.step()
    done = [factor.detach().numpy() for factor in factors]
    return [(done[0], done[1]), (done[2], done[3])]


class Target:
    """A layer's true keys and values, and how far those from features are from them."""

    def __init__(self, data: LayerData) -> None:
        torch = _torch()
        self.data = data

        def to(array: np.ndarray | None) -> Any:
            return None if array is None else torch.from_numpy(np.ascontiguousarray(array))

        self.weights = [to(weight) for weight in data.weights]
        self.bias = to(data.key_bias)
        self.norm = to(data.key_norm)

    def loss(
        self, inputs: np.ndarray, factors: list[torch.Tensor], forms: tuple[LatentForm, LatentForm]
    ) -> torch.Tensor:
        """MSE of rotated keys plus MSE of values over X [sequences, tokens, d]; tokens that fill no group are left.

        Biases fall out of a difference, unless heads are normed, and a rotation keeps its length: it is left out.
        """
        losses = self.losses(inputs, factors, forms)
        return losses[0] + losses[1]

    def losses(
        self, inputs: np.ndarray, factors: list[torch.Tensor], forms: tuple[LatentForm, LatentForm]
    ) -> list[torch.Tensor]:
        torch = _torch()
        length = inputs.shape[1] - inputs.shape[1] % forms[0].cycle
        x = torch.from_numpy(inputs[:, :length].astype(np.float32))
        found = []
        for which, form in enumerate(forms):
            features = rounded(x @ factors[2 * which], form)
            exact, rebuilt = x @ self.weights[which], features @ factors[2 * which + 1]
            if which == 0 and self.norm is not None:
                bias = 0.0 if self.bias is None else self.bias
                exact, rebuilt = self._normed(exact + bias), self._normed(rebuilt + bias)
            found.append(torch.nn.functional.mse_loss(rebuilt, exact))
        return found

    def _normed(self, keys: torch.Tensor) -> torch.Tensor:
        config = self.data.config
        heads = keys.reshape(*keys.shape[:2], config.num_kv_heads, config.head_dim)
        scale = _torch().rsqrt(heads.square().mean(-1, keepdim=True) + config.rms_norm_eps)
        return heads * scale * self.norm


def rounded(features: torch.Tensor, form: LatentForm) -> torch.Tensor:
    """Features [sequences, tokens, r] as the cache will read them back; gradients pass as if they were not rounded,
    and not at all where a code was clipped.
    """
    if not form.coded:
        return features
    torch = _torch()
    sequences, length, width = features.shape
    if form.along_tokens:
        groups, axis = features.reshape(sequences, length // form.group, form.group, width), 2
    else:
        spare = -width % form.group
        padded = torch.cat([features, features[..., -1:].expand(-1, -1, spare)], -1) if spare else features
        groups, axis = padded.reshape(sequences, length, -1, form.group), 3
    levels = 2**form.bits - 1
    with torch.no_grad():
        low, high = groups.amin(axis, keepdim=True), groups.amax(axis, keepdim=True)
        if not isinstance(form, ClippedForm):
            low, high = low.clamp(max=0), high.clamp(min=0)
        scale = ((high - low) / levels).half().float()
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        zero = torch.round(-low / scale).clamp(0, levels)
        codes = torch.round(groups / scale) + zero
        clipped = codes.clamp(0, levels)
        value = (clipped - zero) * scale
        passes = (codes == clipped).float()
    through = groups * passes
    return (through + (value - through).detach()).reshape(sequences, length, -1)[..., :width]


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise MissingDependency("torch", "torch") from error
    return torch

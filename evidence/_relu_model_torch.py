"""A small language model with a ReLU feed-forward, trained here and kept in the user's cache.

The demo model is relufied, as published models of this kind were: its SwiGLU becomes a ReLU's (`hidden_act: relu`) with
a bias for each gate, and its feed-forward three times as wide; new neurons add nothing to begin with. Biases begin
where a share DENSITY of a text's tokens wakes each neuron, and all of the model is then trained on docstrings of the
standard library and of NumPy (`studies.library_text`), with a penalty on the number of active neurons that is turned
up while more than DENSITY of them are active and down while fewer are. So its sparsity is sought, as in ProSparse and
FATReLU; hundreds of thousands of tokens, which is minutes, would not bring it about by themselves. Text that is judged
on shares no stretch with it.

    python evidence/_relu_model_torch.py      trains it, some minutes; a second run reads it

Needs torch. Products are in bfloat16 where the processor multiplies it, weights and moments in float32.
"""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from memwall.hardware.system import cache_directory, multiplies_bfloat16
from memwall.models import DEMO_DIRECTORY, ModelConfig
from memwall.models.checkpoint import Checkpoint
from memwall.models.rope import inverse_frequencies
from memwall.models.tokenizer import Tokenizer
from memwall.models.torch_decoder import TorchDecoder
from memwall.studies.library_text import library_text

PACKAGES = ("numpy",)
DENSITY = 0.08
WARM_UP = 0.04
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """layers: how many of the demo model's, evenly spaced. Windows of `sequence` tokens, `batch` of them a step."""

    name: str
    layers: int
    neurons: int
    steps: int
    batch: int = 4
    sequence: int = 256
    rate: float = 1.5e-3


FULL = Recipe(name="relu-15m", layers=8, neurons=2112, steps=160)
QUICK = Recipe(name="relu-5m", layers=8, neurons=704, steps=16, batch=2)


def config_of(recipe: Recipe) -> dict[str, object]:
    """`config.json`."""
    demo = json.loads((DEMO_DIRECTORY / "config.json").read_text())
    changes = {
        "hidden_act": "relu", "mlp_bias": True, "intermediate_size": recipe.neurons, "num_hidden_layers": recipe.layers
    }  # fmt: skip
    return {**demo, **changes}


def begun(config: ModelConfig) -> TorchDecoder:
    """The model before training: the demo's weights, new neurons that add nothing, biases at zero."""
    random = torch.Generator().manual_seed(0)
    decoder = TorchDecoder(config)
    demo = Checkpoint(DEMO_DIRECTORY)
    chosen = np.linspace(0, demo.config.num_layers - 1, config.num_layers).round().astype(int)
    with torch.no_grad():
        for spec in config.tensors():
            weight = decoder.get_parameter(spec.name)
            if spec.role == "bias":
                weight.zero_()
                continue
            name = spec.name
            if spec.layer is not None:
                name = name.replace(f"layers.{spec.layer}.", f"layers.{chosen[spec.layer]}.")
            old = torch.from_numpy(demo.tensor(name).astype(np.float32))
            if "down_proj" in name:
                weight.zero_()
            elif "mlp" in name:
                nn.init.normal_(weight, std=float(old.std()), generator=random)
            weight[tuple(slice(0, size) for size in old.shape)] = old
    decoder.lm_head.weight = decoder.model.embed_tokens.weight
    frequencies = torch.from_numpy(inverse_frequencies(config.rope, config.head_dim).copy())
    decoder.register_buffer("inv_freq", frequencies, persistent=False)
    return decoder


@torch.no_grad()
def set_biases(decoder: TorchDecoder, text: Tensor) -> None:
    """Layer by layer, so that each neuron is active for a share DENSITY of the tokens [B, T]."""
    for layer in decoder.model.layers:
        seen: list[Tensor] = []
        hook = layer.mlp.gate_proj.register_forward_hook(lambda module, inputs, out, seen=seen: seen.append(out))
        decoder.hidden(text)
        hook.remove()
        layer.mlp.gate_proj.bias.copy_(-torch.quantile(seen[0].flatten(0, 1).float(), 1 - DENSITY, dim=0))


def tokens(folder: Path, tokenizer: Tokenizer) -> np.ndarray:
    """All text there is, [tokens] int64, kept in the folder."""
    kept = folder / "text.npy"
    if not kept.is_file():
        found = [library_text()]
        for package in PACKAGES:
            spec = importlib.util.find_spec(package)
            if spec is not None and spec.origin is not None:
                found.append(library_text(root=Path(spec.origin).parent))
        ids = [tokenizer.encode(text, add_bos=False) for text in found]
        np.save(kept, np.concatenate([np.array(each, np.int32) for each in ids]))
    return np.load(kept).astype(np.int64)


class Watch:
    """Collects what the penalty needs of each feed-forward's activations."""

    def __init__(self, decoder: TorchDecoder) -> None:
        self.penalty: list[Tensor] = []
        self.density: list[Tensor] = []
        for layer in decoder.model.layers:
            layer.mlp.gate_proj.register_forward_hook(self._see)

    def _see(self, module: nn.Module, inputs: tuple[Tensor, ...], gate: Tensor) -> None:
        # the sum over the root of the sum of squares: near the root of how many are active, whatever their size
        h = functional.relu(gate.float())
        self.penalty.append((h.sum(-1) / (h.square().sum(-1) + 1e-6).sqrt()).mean() / h.shape[-1] ** 0.5)
        self.density.append((h > 0).float().mean().detach())

    def take(self) -> tuple[Tensor, float]:
        penalty, density = torch.stack(self.penalty).mean(), float(torch.stack(self.density).mean())
        self.penalty.clear()
        self.density.clear()
        return penalty, density


def train(recipe: Recipe, folder: Path, progress: Progress | None = None) -> dict[str, float]:
    """Trains and writes the folder; gives the last loss and density."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(recipe), indent=1))
    for item in DEMO_DIRECTORY.iterdir():
        if "token" in item.name:
            shutil.copyfile(item, folder / item.name)
    config = ModelConfig.from_directory(folder)
    text = tokens(folder.parent, Tokenizer.from_directory(folder))
    decoder = begun(config)
    set_biases(decoder, torch.from_numpy(text[: 8 * recipe.sequence].reshape(8, -1)))
    decoder.requires_grad_(True).train()
    watch = Watch(decoder)
    matrices = [p for p in decoder.parameters() if p.dim() == 2]
    vectors = [p for p in decoder.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.95), fused=True)
    weight, loss_mean, density_mean, began = 0.1, math.nan, DENSITY, time.monotonic()
    bfloat16 = multiplies_bfloat16()
    for step in range(recipe.steps):
        draw = torch.Generator().manual_seed(step)
        starts = torch.randint(len(text) - recipe.sequence - 1, (recipe.batch,), generator=draw).tolist()
        rows = torch.from_numpy(np.stack([text[start : start + recipe.sequence + 1] for start in starts]))
        rising = (step + 1) / (WARM_UP * recipe.steps)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * min(rising, max(0.02, 0.5 + 0.5 * math.cos(math.pi * step / recipe.steps)))
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            logits = decoder(rows[:, :-1])
        loss = functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        penalty, density = watch.take()
        (loss + weight * penalty).backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        density_mean = 0.9 * density_mean + 0.1 * density
        weight = min(max(weight * (1.04 if density_mean > DENSITY else 0.96), 1e-2), 20.0)
        loss_mean = float(loss.detach()) if math.isnan(loss_mean) else 0.9 * loss_mean + 0.1 * float(loss.detach())
        if progress is not None and step % 10 == 0:
            seen = f"{loss_mean:.3f} nats, {density_mean:.1%} active, penalty {weight:.2f}"
            progress(step, recipe.steps, f"training {recipe.name}: {seen}, {time.monotonic() - began:.0f} s")
    held = {spec.name: decoder.get_parameter(spec.name).detach().half() for spec in config.tensors()}
    partial = folder / "model.partial"
    save_file(held, partial)
    partial.rename(folder / "model.safetensors")
    return {"loss": loss_mean, "density": density_mean, "tokens": recipe.steps * recipe.batch * recipe.sequence}


def model(recipe: Recipe, progress: Progress | None = None) -> Path:
    """The trained model's folder."""
    folder = cache_directory() / "evidence" / "llm-in-a-flash" / recipe.name
    if not (folder / "model.safetensors").is_file():
        train(recipe, folder, progress)
    return folder


def training_windows(folder: Path, count: int, length: int) -> np.ndarray:
    """Some `count` tokens of the text that the model was trained on, in windows [W, T] spread over it."""
    text = tokens(folder.parent, Tokenizer.from_directory(folder))
    whole = len(text) // length
    chosen = np.linspace(0, whole - 1, min(max(count // length, 1), whole)).astype(int)
    return text[: whole * length].reshape(whole, length)[chosen]


def training_words(folder: Path, count: int) -> str:
    """The same as words."""
    tokenizer = Tokenizer.from_directory(folder)
    return "\n\n".join(tokenizer.decode(window.tolist()) for window in training_windows(folder, count, 512))


if __name__ == "__main__":

    def tell(done: int, whole: int, what: str) -> None:
        if done % 10 == 0:
            sys.stderr.write(f"{done}/{whole} {what}\n")

    for each in (QUICK, FULL) if "quick" in sys.argv[1:] else (FULL,):
        print(model(each, tell))

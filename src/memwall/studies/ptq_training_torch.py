"""Small models of a family from nothing, for the format study: a folder with `config.json` gets trained weights.

The study's answers differ by family and size, and models of a size that a processor can judge are not to be had in all
families. So they are trained here, in torch, on one text: AdamW over windows at places that the step alone decides, a
warm-up and a cosine. Where the processor multiplies bfloat16 itself, products are in bfloat16 (weights, gradients and
moments stay float32); elsewhere all is float32, several times slower.

What was reached is kept beside the weights every few minutes, so training that was stopped goes on from there, with the
windows that it would have had.

Units: losses in nats per token; text [tokens] int64. Needs torch.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from memwall.errors import InputError
from memwall.hardware.system import multiplies_bfloat16
from memwall.models import ModelConfig
from memwall.models.checkpoint import stored_tensors
from memwall.models.fused import joined
from memwall.models.rope import inverse_frequencies
from memwall.models.torch_decoder import TorchDecoder

Progress = Callable[[int, int, str], None]

WARM_UP, LEAST = 0.04, 0.02
"""Share of the steps in which the rate rises; share of the rate that is left at the end."""
KEPT_EVERY_S = 300
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """steps of `batch` windows of `sequence` tokens each; rate: the largest."""

    steps: int
    rate: float
    batch: int = 4
    sequence: int = 512

    def rate_at(self, step: int) -> float:
        """Rises linearly, then falls along a cosine."""
        rising = (step + 1) / max(1, WARM_UP * self.steps)
        return self.rate * min(rising, max(LEAST, 0.5 + 0.5 * math.cos(math.pi * step / self.steps)))


def fresh(config: ModelConfig) -> TorchDecoder:
    """A model with random weights, the same ones every time, all of which can be trained.

    A matrix keeps the size of what it multiplies; those that end in the residual stream add up over all layers to that
    size.
    """
    random = torch.Generator().manual_seed(0)
    decoder = TorchDecoder(config)
    for tensor in config.tensors():
        if len(tensor.shape) == 2:
            ends = tensor.name.endswith(("o_proj.weight", "down_proj.weight"))
            spread = (tensor.shape[1] * (2 * config.num_layers if ends else 1)) ** -0.5
            nn.init.normal_(decoder.get_parameter(tensor.name), std=spread, generator=random)
    if config.tie_word_embeddings:
        decoder.lm_head.weight = decoder.model.embed_tokens.weight
    frequencies = torch.from_numpy(inverse_frequencies(config.rope, config.head_dim).copy())
    decoder.register_buffer("inv_freq", frequencies, persistent=False)
    return decoder.requires_grad_(True).train()


class Training:
    """A model on its way. state: the file that keeps what was reached."""

    def __init__(self, config: ModelConfig, schedule: Schedule, text: Tensor, state: Path) -> None:
        if len(text) <= schedule.sequence + 1:
            raise InputError(f"the text has {len(text):,} tokens; windows of {schedule.sequence} need more")
        self.config, self.schedule, self.text, self.state = config, schedule, text, state
        self.decoder, self.step = fresh(config), 0
        self.weights = {tensor.name: self.decoder.get_parameter(tensor.name) for tensor in config.tensors()}
        groups = [{"params": [p for p in self.weights.values() if (p.dim() == 2) == matrices],
                   "weight_decay": 0.1 * matrices} for matrices in (True, False)]  # fmt: skip
        self.optimizer = torch.optim.AdamW(groups, lr=schedule.rate, betas=(0.9, 0.95), fused=True)
        self.in_bfloat16 = multiplies_bfloat16()
        if state.is_file():
            self._resume()

    def advance(self) -> float:
        """One step; the loss before it."""
        schedule = self.schedule
        random = torch.Generator().manual_seed(self.step)
        starts = torch.randint(len(self.text) - schedule.sequence, (schedule.batch,), generator=random)
        rows = torch.stack([self.text[start : start + schedule.sequence + 1] for start in starts.tolist()])
        for group in self.optimizer.param_groups:
            group["lr"] = schedule.rate_at(self.step)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.in_bfloat16):
            logits = self.decoder(rows[:, :-1])
        loss = functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return float(loss.detach())

    def keep(self) -> None:
        """Writes what was reached, whole or not at all."""
        held = {"step": torch.tensor(self.step)}
        for name, weight in self.weights.items():
            held[f"weight/{name}"] = weight.detach()
            held |= {f"{moment}/{name}": self.optimizer.state[weight][moment] for moment in MOMENTS}
        _write(held, self.state)

    def _resume(self) -> None:
        held = load_file(self.state)
        self.step = int(held["step"])
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(held[f"weight/{name}"])
                self.optimizer.state[weight] = {moment: held[f"{moment}/{name}"] for moment in MOMENTS}

    def save(self, file: Path) -> None:
        """The weights in Hugging Face's form, float32."""
        ours = {name: weight.detach().numpy() for name, weight in self.weights.items()}
        whole = {one.name: joined(one, {name: ours[name] for name in one.parts}) for one in stored_tensors(self.config)}
        _write({name: torch.from_numpy(array) for name, array in whole.items()}, file)


def _write(tensors: dict[str, Tensor], file: Path) -> None:
    partial = file.with_suffix(f".{os.getpid()}.partial")
    save_file(tensors, partial)
    os.replace(partial, file)


def train(directory: Path, schedule: Schedule, text: Tensor, weights: Path, progress: Progress | None) -> None:
    """Trains the model of `directory`'s configuration on `text` and writes `weights`; what a stopped run reached lies
    beside them meanwhile. progress(step, steps, what).
    """
    state = weights.with_suffix(".state")
    weights.parent.mkdir(parents=True, exist_ok=True)
    config = ModelConfig.from_directory(directory)
    training, kept, mean = Training(config, schedule, text, state), time.monotonic(), math.nan
    while training.step < schedule.steps:
        loss = training.advance()
        mean = loss if math.isnan(mean) else 0.95 * mean + 0.05 * loss
        if progress is not None and training.step % 10 == 0:
            told = f"training {config.family} of {config.num_parameters / 1e6:.1f} million: {mean:.2f} nats"
            progress(training.step, schedule.steps, told)
        if time.monotonic() - kept > KEPT_EVERY_S:
            training.keep()
            kept = time.monotonic()
    training.save(weights)
    state.unlink(missing_ok=True)

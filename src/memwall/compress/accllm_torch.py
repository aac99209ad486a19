"""Training of a model that is pruned to two of every four weights: the mask stays, what is kept learns.

First in floats, then rounded as `formats.sparse` stores it, with gradients passed straight through the rounding. Loss:
divergence from the float model over the calibration text, as `xr_npe_torch.trained_decoder` has it. All tensors are
trained, those that stay floats too. Deterministic for a seed. The file imports torch; nothing else of AccLLM does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from memwall.compress.accllm import RANGES
from memwall.compress.base import Subject
from memwall.compress.xr_npe_torch import Trained, distil, loaded, samples_of, unrounded
from memwall.formats import codec
from memwall.formats.sparse import SparseCodec
from memwall.models.checkpoint import Checkpoint
from memwall.models.config import HEAD


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, weight: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class Masked(nn.Module):
    """Parametrization of a weight [rows, cols]: pruned weights are zero; where `rounding`, kept ones as stored."""

    def __init__(self, mask: Tensor, form: SparseCodec) -> None:
        super().__init__()
        self.mask, self.form, self.rounding = mask, form, False

    def forward(self, weight: Tensor) -> Tensor:
        kept = weight * self.mask
        if not self.rounding:
            return kept
        result: Tensor = _Straight.apply(kept, rounded(kept.detach(), self.form))
        return result * self.mask


def rounded(weight: Tensor, form: SparseCodec) -> Tensor:
    """A pruned weight [rows, cols] as `accllm.rounded_ranges` stores it."""
    rows, columns = weight.shape
    groups = nn.functional.pad(weight, (0, -columns % form.group)).view(rows, -1, form.group)
    low, high = groups.amin(-1, keepdim=True).clamp_max(0), groups.amax(-1, keepdim=True).clamp_min(0)
    values = torch.zeros_like(groups)
    best = torch.full_like(low, torch.inf)
    for share in RANGES:
        found = _in_range(groups, low * share, high * share, form)
        error = (found - groups).square().sum(-1, keepdim=True)
        values, best = torch.where(error < best, found, values), torch.minimum(best, error)
    return values.reshape(rows, -1)[:, :columns]


def _in_range(groups: Tensor, low: Tensor, high: Tensor, form: SparseCodec) -> Tensor:
    if form.symmetric:
        scale = (torch.where(high > -low, high, low) / -form.zero_code).half().float()
        zero = torch.full_like(scale, form.zero_code)
    else:
        scale = ((high - low) / form.top).half().float()
        zero = (-low / torch.where(scale == 0, 1.0, scale)).round().clamp(0, form.top)
    codes = ((groups / torch.where(scale == 0, 1.0, scale)).round() + zero).clamp(0, form.top)
    return torch.where(scale == 0, 0.0, scale * (codes - zero))


def tuned_model(
    subject: Subject,
    pruned: Mapping[str, np.ndarray],
    specs: Mapping[str, str],
    *,
    steps: int,
    aware_steps: int,
    rate: float,
    seed: int = 0,
) -> Checkpoint:
    """The model with `pruned` matrices (float32, zeros where pruned), trained; zeros stay where they are."""
    samples = samples_of(subject.tokens, subject.tokens.size)
    source = subject.checkpoint  # which may be seen through a transform
    others = {t.name: source.alone(t.name) for t in source.config.tensors() if t.name not in pruned}
    begun = replace(subject, checkpoint=Trained(source, {**others, **pruned}))
    with loaded(subject) as teacher, loaded(begun) as student:
        tensors = [tensor.name for tensor in subject.checkpoint.config.tensors() if tensor.name != HEAD]
        if not subject.checkpoint.config.tie_word_embeddings:
            tensors.append(HEAD)
        student.requires_grad_(True)
        masks = []
        for name, weight in pruned.items():
            form = codec(specs[name])
            assert isinstance(form, SparseCodec)
            owner, _, field = name.rpartition(".")
            masks.append(Masked(torch.from_numpy(weight != 0).float(), form))
            parametrize.register_parametrization(student.get_submodule(owner), field, masks[-1])
        for count, rounding, done in ((steps, False, 0), (aware_steps, True, steps)):
            for each in masks:
                each.rounding = rounding
            if count:
                progress = partial(_progress, subject, done, steps + aware_steps)
                distil(student, teacher, samples, count, rate, seed, progress)
        found = {name: unrounded(student, name).detach().numpy().copy() for name in tensors}
    for name, weight in pruned.items():
        found[name] *= weight != 0
    return Trained(subject.checkpoint, found)


def _progress(subject: Subject, before: int, whole: int, done: int, _: int) -> None:
    subject.progress(before + done, whole)

"""AdamW: the steps of torch's own, whether its moments are in memory or in a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from memwall.compress.adamw import AdamSettings, AdamW, HeldMoments, PagedMoments, moment_bytes
from memwall.memory import Arena, Ledger

SHAPES = ((3, 5), (70_000,), (1,))


@pytest.mark.parametrize("paged", [False, True])
def test_steps_are_those_of_torch(tmp_path: Path, paged: bool) -> None:
    random = np.random.default_rng(0)
    arena = Arena(1 << 30, Ledger())
    sizes = [int(np.prod(shape)) for shape in SHAPES]
    moments = PagedMoments(sizes, tmp_path / "m", arena) if paged else HeldMoments(sizes, arena)
    chosen = AdamSettings(learning_rate=0.01, weight_decay=0.1, beta2=0.99)
    ours = [random.standard_normal(shape).astype(np.float32) for shape in SHAPES]
    theirs = [torch.from_numpy(each.copy()).requires_grad_() for each in ours]
    reference = torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.1, betas=(0.9, 0.99), foreach=False)
    optimizer = AdamW(chosen, moments)
    for _ in range(4):
        slopes = [random.standard_normal(shape).astype(np.float32) for shape in SHAPES]
        for tensor, slope in zip(theirs, slopes, strict=True):
            tensor.grad = torch.from_numpy(0.5 * slope)
        optimizer.step(ours, slopes, 0.5)
        reference.step()
    for value, tensor in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(value, tensor.detach().numpy(), rtol=2e-5, atol=2e-6)
    assert arena.used_bytes >= moment_bytes(sizes, paged=paged)
    assert moment_bytes(sizes, paged=True) < moment_bytes(sizes, paged=False)

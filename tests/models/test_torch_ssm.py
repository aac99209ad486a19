"""Mamba-2's scan in chunks against the recurrence, and that a model of it learns."""

from __future__ import annotations

from pathlib import Path

import pytest

from memwall.models.config import ModelConfig
from tests.models.ssm_models import MAMBA2

torch = pytest.importorskip("torch")

from memwall.models.torch_ssm import TorchSsm, chunked_scan  # noqa: E402


@pytest.mark.parametrize(("tokens", "chunk"), [(1, 4), (12, 4), (13, 5), (7, 64)])
def test_chunks_do_not_show(tokens: int, chunk: int) -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, tokens, 4, 3, generator=random, dtype=torch.float64)
    b, c = (torch.randn(2, tokens, 2, 5, generator=random, dtype=torch.float64) for _ in range(2))
    dt = torch.rand(2, tokens, 4, generator=random, dtype=torch.float64)
    decay = -1 - torch.arange(4, dtype=torch.float64)
    state, want = torch.zeros(2, 4, 3, 5, dtype=torch.float64), []
    for t in range(tokens):
        own_b, own_c = (part[:, t].repeat_interleave(2, 1) for part in (b, c))
        drive = (dt[:, t, :, None] * x[:, t])[..., None] * own_b[:, :, None]
        state = state * (dt[:, t] * decay).exp()[..., None, None] + drive
        want.append((state * own_c[:, :, None]).sum(-1))
    torch.testing.assert_close(chunked_scan(x, dt, decay, b, c, chunk), torch.stack(want, 1))


def test_a_model_learns_a_pattern(tmp_path: Path) -> None:
    model = TorchSsm(ModelConfig.from_dict(MAMBA2)).start(seed=1)
    tokens = torch.arange(24).repeat(4, 2)[:, :40] % 7
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        logits = model(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]

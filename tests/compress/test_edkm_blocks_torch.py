"""Clustering of many pieces at once: each as it is by itself, there and back, and the gradient that of differences."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from memwall.compress import edkm_blocks_torch  # noqa: E402
from memwall.compress.edkm_blocks_torch import clustered_pieces  # noqa: E402
from memwall.compress.edkm_torch import Softness, clustered  # noqa: E402


@pytest.mark.parametrize("run_values", [1 << 21, 100])
def test_each_piece_as_it_is_alone(run_values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edkm_blocks_torch, "RUN_VALUES", run_values)
    torch.manual_seed(0)
    weights = torch.randn(5, 30).double().requires_grad_(True)
    palettes = torch.randn(5, 4).double().sort(1).values
    tau = torch.tensor([0.05, 0.1, 0.5, 2.0, 0.2]).double()
    soft, found = clustered_pieces(weights, palettes, tau, torch.zeros(5).double())
    upstream = torch.linspace(-1, 1, 150).double().view(5, 30)
    (gradient,) = torch.autograd.grad(soft, weights, upstream)
    for piece in range(5):
        alone = weights.detach()[piece].clone().requires_grad_(True)
        one, palette = clustered(alone, palettes[piece], Softness(tau=float(tau[piece])))
        torch.testing.assert_close(soft[piece], one)
        torch.testing.assert_close(found[piece], palette)
        torch.testing.assert_close(gradient[piece], torch.autograd.grad(one, alone, upstream[piece])[0])


def test_the_gradient_is_that_of_differences() -> None:
    torch.manual_seed(1)
    weights = torch.randn(3, 8).double().requires_grad_(True)
    palettes = torch.tensor([[-1.0, 0.0, 1.0]]).double().repeat(3, 1)
    tau, still = torch.full((3,), 0.7).double(), torch.zeros(3).double()
    assert torch.autograd.gradcheck(lambda w: clustered_pieces(w, palettes, tau, still)[0], (weights,), atol=1e-6)


def test_rounding_to_half_precision_first() -> None:
    weights = torch.randn(2, 16).requires_grad_(True)
    palettes, tau = torch.tensor([[-1.0, 1.0]]).repeat(2, 1), torch.full((2,), 0.1)
    soft, _ = clustered_pieces(weights, palettes, tau, torch.zeros(2), half=torch.bfloat16)
    same, _ = clustered_pieces(weights.detach().bfloat16().float(), palettes, tau, torch.zeros(2))
    torch.testing.assert_close(soft, same)
    soft.sum().backward()
    assert weights.grad is not None
    assert weights.grad.dtype == torch.float32

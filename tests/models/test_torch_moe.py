"""Experts: a token's output is its chosen experts', loads and drops are counted, balance is 1 when loads are even."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from memwall.errors import InputError  # noqa: E402
from memwall.models.torch_moe import Dense, ExpertFeed, Experts  # noqa: E402


def feed(**more: float) -> ExpertFeed:
    torch.manual_seed(0)
    return Experts(**{"count": 4, "top": 2, "size": 6, **more}).build(8)  # type: ignore[arg-type]


def slow(module: ExpertFeed, x: torch.Tensor) -> torch.Tensor:
    """Token by token, nothing dropped."""
    out = torch.zeros_like(x)
    for number, row in enumerate(x):
        weights, experts = module.router(row).softmax(-1).topk(module.spec.top)
        for weight, expert in zip(weights / weights.sum(), experts, strict=True):
            gate, up = (module.gate_up[expert] @ row).chunk(2)
            out[number] += weight * (module.down[expert] @ (torch.nn.functional.silu(gate) * up))
    return out


def test_output_is_that_of_the_chosen_experts() -> None:
    module, x = feed().eval(), torch.randn(3, 7, 8)
    with torch.no_grad():
        assert torch.allclose(module(x).flatten(0, 1), slow(module, x.flatten(0, 1)), atol=1e-5)
    assert int(module.load.sum()) == 3 * 7 * 2
    assert int(module.dropped) == 0


def test_one_expert_is_a_dense_feed() -> None:
    module, dense = Experts(count=1, top=1, size=6).build(8).eval(), Dense(size=6).build(8)
    with torch.no_grad():
        dense.gate_up.weight.copy_(module.gate_up[0])
        dense.down.weight.copy_(module.down[0])
        x = torch.randn(2, 5, 8)
        assert torch.allclose(module(x), dense(x), atol=1e-6)


def test_what_is_over_the_capacity_is_dropped_and_counted() -> None:
    module = feed(top=1, capacity=1.0).train()
    with torch.no_grad():
        module.router.weight.zero_()
        module.router.weight[2, 0] = 50.0
        x = torch.ones(1, 20, 8)
        out = module(x)
    assert module.load.tolist() == [0, 0, 20, 0]
    assert int(module.dropped) == 15  # a fair share is 5
    assert int((out.abs().sum(-1) > 0).sum()) == 5
    module.eval()
    module.reset()
    with torch.no_grad():
        assert int((module(x).abs().sum(-1) > 0).sum()) == 20
    assert int(module.dropped) == 0


def test_first_choices_come_before_second_ones() -> None:
    """Two experts, both chosen by all: with room for all first choices alone, no token is left without an expert."""
    module = feed(count=2, capacity=0.5).train()
    with torch.no_grad():
        out = module(torch.randn(1, 16, 8))
    assert int(module.dropped) == 16
    firsts = (out.abs().sum(-1) > 0).sum()
    assert int(firsts) >= 8


def test_balance_is_one_when_even_and_the_number_of_experts_when_all_go_to_one() -> None:
    module = feed(top=1)
    with torch.no_grad():
        module.router.weight.zero_()
        module.router.weight[1, 0] = 100.0
        module(torch.ones(1, 12, 8))
        assert float(module.balance) == pytest.approx(4, rel=1e-3)
        module.router.weight.copy_(torch.eye(4, 8) * 0.01)
        module(torch.eye(4, 8)[None])
        assert float(module.balance) == pytest.approx(1, rel=1e-3)


def test_the_balance_loss_evens_the_load() -> None:
    module = feed(count=4, top=1, capacity=4.0).train()
    x = torch.randn(1, 256, 8, generator=torch.Generator().manual_seed(1)) + torch.tensor([1.0, *[0.0] * 7])
    with torch.no_grad():
        module.router.weight[0, 0] += 2.0
        module(x)
    before = int(module.load.max())
    optimizer = torch.optim.Adam([module.router.weight], lr=0.05)
    for _ in range(60):
        module(x)
        optimizer.zero_grad()
        module.balance.backward()
        optimizer.step()
    module.reset()
    with torch.no_grad():
        module(x)
    assert int(module.load.max()) < before
    assert int(module.load.max()) < 0.5 * 256


@pytest.mark.parametrize("wrong", [{"top": 0}, {"top": 5}, {"capacity": 0.0}])
def test_what_cannot_be_built_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError):
        feed(**wrong)

"""Clustering over distinct values: the unrolled graph's numbers, finite differences, limits, duplicates."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.errors import InputError

torch = pytest.importorskip("torch")

from memwall.compress.edkm_torch import (  # noqa: E402
    Softness,
    clustered,
    distinct,
    nearest,
    split_duplicates,
    unrolled,
)

START = torch.linspace(-1.5, 1.5, 4)


def drawn(count: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(count).astype(np.float32))


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("tau", [0.05, 5.0])
def test_gradients_are_finite_differences(tau: float, rounds: int) -> None:
    """At a large tau every weight feels every centroid, and each round those before it."""
    weights = drawn(24).double().requires_grad_(True)
    softness = Softness(tau=tau, rounds=rounds)
    assert torch.autograd.gradcheck(lambda w: clustered(w, START.double(), softness)[0], (weights,))


def test_a_hard_assignment_with_gradients_passed_through_would_not_do() -> None:
    """What is called DKM without being it: its gradient is another one."""
    weights = drawn(24).double().requires_grad_(True)

    def passed_through(w: torch.Tensor) -> torch.Tensor:
        return w + (START.double()[nearest(w, START.double())] - w).detach()

    assert not torch.autograd.gradcheck(passed_through, (weights,), raise_exception=False)


@pytest.mark.parametrize("tau", [0.01, 0.05, 0.5])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_it_is_the_unrolled_graph(tau: float, half: torch.dtype) -> None:
    """Equal weights, each with a gradient of its own, float32 against float32."""
    weights = drawn(6000)
    given_ours, given_plain = weights.clone().requires_grad_(True), weights.to(half).float().requires_grad_(True)
    softness, upstream = Softness(tau=tau), drawn(6000, 1)
    ours, palette = clustered(given_ours, START, softness, half=half)
    plain, plain_palette = unrolled(given_plain, START, softness)
    torch.testing.assert_close(palette, plain_palette, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(ours, given_ours, upstream)
    (wanted,) = torch.autograd.grad(plain, given_plain, upstream)
    torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=2e-4 * float(wanted.abs().max()))
    assert gradient.dtype == torch.float32


def test_only_the_weights_themselves_are_kept() -> None:
    kept = []
    weights = drawn(100_000).requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        soft, _ = clustered(weights, START, Softness(tau=0.05), half=torch.bfloat16)
    assert sum(kept) <= 2 * 100_000 + 4 * 4 * 4
    soft.sum().backward()
    assert weights.grad is not None


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3000), st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
def test_distinct_values_and_their_places(seed: int, count: int, dtype: torch.dtype) -> None:
    weights = drawn(count, seed).to(dtype)
    values, counts, index = distinct(weights)
    assert len(values) <= 1 << 16
    assert torch.equal(values[index], weights.to(values.dtype))
    assert float(counts.sum()) == count
    assert torch.equal(torch.bincount(index, minlength=len(values)).to(counts.dtype), counts)


def test_every_bit_pattern_has_a_place() -> None:
    """All 65,536 of them, signs of zero apart; values that are no numbers too."""
    weights = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16)
    values, counts, index = distinct(weights)
    assert len(values) == 1 << 16
    assert bool((counts == 1).all())
    again = values[index].to(torch.bfloat16)
    finite = weights.isfinite()
    assert torch.equal(again[finite].view(torch.int16), weights[finite].view(torch.int16))


def test_a_small_tau_is_hard_and_a_large_one_gives_the_mean() -> None:
    weights = drawn(2000).bfloat16()
    hard, palette = clustered(weights, START, Softness(tau=1e-6, rounds=30))
    order = palette.sort().values
    torch.testing.assert_close(hard, order[nearest(weights, order)], atol=2e-2, rtol=0)
    soft, _ = clustered(weights, START, Softness(tau=1e6))
    torch.testing.assert_close(soft, weights.float().mean().expand(2000), atol=1e-3, rtol=0)


def test_rounds_end_when_nothing_moves() -> None:
    weights = drawn(500).bfloat16()
    palette = START
    for _ in range(60):
        _, palette = clustered(weights, palette, Softness(tau=0.05, rounds=5))
    _, once = clustered(weights, palette, Softness(tau=0.05, rounds=1))
    _, ended = clustered(weights, palette, Softness(tau=0.05, rounds=50, epsilon=1e-3))
    assert torch.equal(once, ended)


def test_clusters_that_nothing_is_near_stay_finite() -> None:
    weights = drawn(300).bfloat16().requires_grad_(True)
    soft, palette = clustered(weights, torch.tensor([-900.0, 0.0, 1.0, 1e4]), Softness(tau=1e-3))
    soft.sum().backward()
    assert bool(palette.isfinite().all())
    assert bool(weights.grad.isfinite().all())


def test_duplicates_part_halfway_to_a_neighbour() -> None:
    found = split_duplicates(torch.tensor([2.0, 0.0, 0.0, 1.0, 2.0]), 1e-3)
    torch.testing.assert_close(found, torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0]))
    same = torch.full((4,), 3.0)
    assert torch.equal(split_duplicates(same, 1e-3), same)
    apart = torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(split_duplicates(apart, 1e-3), apart)


def test_softness_that_makes_no_sense_is_refused() -> None:
    for wrong in ({"tau": 0.0}, {"tau": 1.0, "rounds": 0}, {"tau": 1.0, "epsilon": -1.0}, {"tau": 1.0, "least": 1.0}):
        with pytest.raises(InputError, match="tau must be"):
            Softness(**wrong)

"""Places stand for chains of views, and histories for copies of kept tensors."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from memwall.compress.saved_views_torch import Place, history, memory_order  # noqa: E402


def viewed(tensor: torch.Tensor, steps: list[int]) -> torch.Tensor:
    for step in steps:
        if step == 0:
            tensor = tensor.transpose(0, -1)
        elif step == 1:
            tensor = tensor[: max(1, len(tensor) // 2)]
        elif step == 2:
            tensor = tensor[::2]
        elif step == 3:
            tensor = tensor.unsqueeze(0)
        else:
            tensor = tensor.permute(*range(1, tensor.dim()), 0)
    return tensor


@settings(max_examples=120, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=3), st.lists(st.integers(0, 4), max_size=5))
def test_any_chain_of_views_is_found_in_what_is_kept_of_the_first(shape: list[int], steps: list[int]) -> None:
    first = torch.arange(int(torch.tensor(shape).prod())).reshape(shape)
    view = viewed(first, steps)
    flat, place = memory_order(first, Place.of(first))
    assert place.is_dense
    assert place.covers(Place.of(view))
    assert torch.equal(Place.of(view).within(flat, place), view)
    own, kept = memory_order(view, Place.of(view))
    assert torch.equal(Place.of(view).within(own, kept), view)


def test_a_part_does_not_cover_the_whole_and_gaps_cover_nothing_else() -> None:
    whole = torch.arange(24).reshape(4, 6)
    assert not Place.of(whole[1:]).covers(Place.of(whole))
    assert not Place.of(whole[:, ::2]).covers(Place.of(whole[:, 0]))
    assert not Place.of(torch.ones(1).expand(5)).is_dense


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.clone(),
        lambda x: x.t().contiguous(),
        lambda x: x.transpose(0, -1).contiguous().view(-1),
        lambda x: x.permute(1, 0).reshape(3, 4),
        lambda x: x.clamp(min=-0.1),
        lambda x: x.clamp(-0.1, 0.2).t().clone(),
    ],
)
def test_what_was_done_is_done_again(change: object) -> None:
    given_first = torch.randn(2, 6, requires_grad=True)
    source = given_first * 2
    made = change(source)  # type: ignore[operator]
    origins = [origin for origin in history(made, 4) if origin.node is source.grad_fn]
    assert len(origins) == 1
    again = source.detach()
    for step in origins[0].replay:
        again = step(again)
    assert torch.equal(again, made)


def test_arithmetic_ends_a_history() -> None:
    given_first = torch.randn(4, requires_grad=True)
    assert not list(history((given_first * 2).exp().clone() + 1, 4))
    assert len(list(history((given_first * 2).clone().clone().clone(), 2))) == 2

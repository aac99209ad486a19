"""The search against full enumeration on small spaces, and its promises: never over a cap, never worse with more
room.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.errors import DoesNotFit, InputError
from memwall.plan.base import Choice, Quality
from memwall.plan.search import (
    Goal,
    Space,
    _largest,
    fits,
    grid,
    largest_context,
    mixed,
    most_weights,
    proxy_loss,
    search,
    smallest,
)

CACHE_BITS = {"float16": 16.0, "kivi(bits=4)": 4.5, "kivi(bits=2)": 2.5}
UNIFORM_BITS = {"int8": 8.25, "int4": 4.25, "int3": 3.5, "int2": 2.5}


class ToySpace(Space):
    """A model of `num_weights` numbers, cached width `width`: every term by hand."""

    def __init__(
        self, num_weights: int = 10_000, width: int = 64, runtime: int = 5_000, max_context: int = 2048
    ) -> None:
        self.num_weights, self.width, self.runtime = num_weights, width, runtime
        self.max_context = max_context
        self.ceiling, self.ceiling_bits, self.lowest_bits = "float16", 16.0, 2.5
        self.uniform = tuple(UNIFORM_BITS)
        self.policies = tuple(CACHE_BITS)

    def weight_bits(self, weights: str) -> float:
        if weights.startswith("mixed-"):
            return float(weights.removeprefix("mixed-"))
        return UNIFORM_BITS.get(weights, 16.0)

    def cache_bits(self, choice: Choice) -> float:
        return CACHE_BITS[choice.kv]

    def stored_bits(self, policy: str) -> float:
        return CACHE_BITS[policy]

    def peak_bytes(self, choice: Choice) -> dict[str, int]:
        weights = int(self.num_weights * self.weight_bits(choice.weights) / 8)
        cache = int(choice.batch * choice.context * self.width * self.cache_bits(choice) / 8)
        on = "gpu" if choice.device == "gpu" else "ram"
        rows = {"ram": self.runtime}
        rows[on] = rows.get(on, 0) + weights + cache
        return rows


spaces = st.builds(
    ToySpace,
    num_weights=st.integers(1_000, 100_000),
    width=st.integers(1, 128),
    runtime=st.integers(0, 20_000),
)


def everything(space: ToySpace, context: int) -> list[Choice]:
    low, high = grid(space)
    weights = [mixed(space, k) for k in range(low, high + 1)] + [*space.uniform, space.ceiling]
    return [Choice(weights=w, kv=kv, context=context) for w, kv in itertools.product(weights, space.policies)]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(space=spaces, budget=st.integers(5_000, 250_000), context=st.integers(1, 2048))
def test_equals_enumeration(space: ToySpace, budget: int, context: int) -> None:
    cap = {"ram": budget}
    possible = [c for c in everything(space, context) if fits(space, c, cap)]
    goal = Goal(budget=cap, context=context)
    if not possible:
        with pytest.raises(DoesNotFit):
            search(space, goal)
        return
    best = search(space, goal)[0]
    most_bits = max(space.weight_bits(c.weights) for c in possible if c.kv == best.choice.kv)
    assert best.bits_per_weight == pytest.approx(most_bits)
    losses = [4.0 ** -space.weight_bits(c.weights) + 0.2 * 4.0 ** -space.cache_bits(c) for c in possible]
    assert proxy_loss(best) == pytest.approx(min(losses))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    space=spaces,
    ram=st.integers(4_000, 250_000),
    gpu=st.integers(1_000, 250_000),
    context=st.one_of(st.none(), st.integers(1, 2048)),
)
def test_never_over_any_cap(space: ToySpace, ram: int, gpu: int, context: int | None) -> None:
    for device in ("cpu", "gpu"):
        goal = Goal(budget={"ram": ram, "gpu": gpu}, context=context, batch=None, device=device)
        try:
            candidates = search(space, goal)
        except DoesNotFit:
            continue
        for one in candidates:
            assert one.peak_bytes["ram"] <= ram
            assert one.peak_bytes.get("gpu", 0) <= gpu
            assert one.peak_bytes == space.peak_bytes(one.choice)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(space=spaces, budget=st.integers(5_000, 200_000), more=st.integers(0, 50_000), context=st.integers(1, 2048))
def test_more_room_is_never_worse(space: ToySpace, budget: int, more: int, context: int) -> None:
    try:
        small = search(space, Goal(budget={"ram": budget}, context=context))[0]
    except DoesNotFit:
        return
    large = search(space, Goal(budget={"ram": budget + more}, context=context))[0]
    assert proxy_loss(large) <= proxy_loss(small)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(space=spaces, context=st.integers(1, 2048))
def test_smallest_budget_is_tight(space: ToySpace, context: int) -> None:
    goal = Goal(budget={"ram": 1}, context=context)
    _, peak = smallest(space, goal)
    works = search(space, replace(goal, budget={"ram": peak["ram"]}))
    assert works[0].peak_bytes["ram"] <= peak["ram"]
    with pytest.raises(DoesNotFit, match=str(peak["ram"])):
        search(space, replace(goal, budget={"ram": peak["ram"] - 1}))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(space=spaces, budget=st.integers(10_000, 60_000))
def test_largest_context_is_tight(space: ToySpace, budget: int) -> None:
    goal = Goal(budget={"ram": budget})
    longest = largest_context(space, goal)
    if longest is None:
        with pytest.raises(DoesNotFit):
            search(space, replace(goal, context=1))
        return
    search(space, replace(goal, context=longest))
    if longest < space.max_context:
        with pytest.raises(DoesNotFit, match=f"--context {longest}"):
            search(space, replace(goal, context=longest + 1))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(space=spaces, budget=st.integers(5_000, 250_000))
def test_uses_the_budget_where_bits_help(space: ToySpace, budget: int) -> None:
    choice = Choice(weights="auto", kv="float16", context=16)
    weights = most_weights(space, choice, {"ram": budget})
    if weights is None or weights == space.ceiling:
        return
    left = budget - space.peak_bytes(replace(choice, weights=weights))["ram"]
    assert left <= space.num_weights * 0.011 / 8 + 1


def test_ceiling_is_the_dtype_of_the_source() -> None:
    best = search(ToySpace(), Goal(budget={"ram": 10**9}, context=16))[0]
    assert (best.choice.weights, best.choice.kv) == ("float16", "float16")


def test_equal_bits_prefer_a_uniform_format() -> None:
    space = ToySpace(num_weights=80_000, width=8, runtime=0)
    choice = Choice(weights="int4", kv="float16", context=8)
    exactly = space.peak_bytes(choice)
    assert most_weights(space, choice, exactly) == "int4"


def test_context_is_shortened_until_the_weights_keep_four_bits() -> None:
    space = ToySpace(num_weights=8_000, width=64, runtime=0)
    roomy = search(space, Goal(budget={"ram": 10**9}))[0]
    assert roomy.choice.context == space.max_context
    tight = search(space, Goal(budget={"ram": 30_000}))[0]
    assert tight.choice.context < roomy.choice.context
    assert tight.bits_per_weight >= 4


def test_exact_settings_are_kept() -> None:
    only = search(ToySpace(), Goal(budget={"ram": 10**6}, weights="int3", kv="kivi(bits=2)", context=100, batch=2))
    assert [one.choice for one in only] == [
        Choice(weights="int3", kv="kivi(bits=2)", context=100, batch=2, segment_tokens=100)
    ]
    with pytest.raises(DoesNotFit, match="int3"):
        search(ToySpace(), Goal(budget={"ram": 6_000}, weights="int3", kv="kivi(bits=2)", context=100))


def test_spare_room_goes_to_the_batch_when_left_open() -> None:
    space = ToySpace()
    best = search(space, Goal(budget={"ram": 200_000}, weights="int4", kv="float16", context=64, batch=None))[0]
    assert best.choice.batch > 1
    wider = replace(best.choice, batch=best.choice.batch * 2)
    assert not fits(space, wider, {"ram": 200_000})


def quality(kl: float) -> Quality:
    return Quality(kl_nats=kl, perplexity=10 + kl, top1_agreement=1.0, measured_on="toy", tokens=10)


def test_measured_loss_decides_over_bits() -> None:
    def measure(choice: Choice) -> Quality:
        return quality({"float16": 0.5, "kivi(bits=4)": 0.1, "kivi(bits=2)": 0.9}[choice.kv])

    ranked = search(ToySpace(), Goal(budget={"ram": 20_000}, context=64), measure=measure)
    assert [one.choice.kv for one in ranked] == ["kivi(bits=4)", "float16", "kivi(bits=2)"]


def test_bound_on_loss() -> None:
    def measure(choice: Choice) -> Quality:
        return quality(4.0 ** -ToySpace().weight_bits(choice.weights))

    goal = Goal(budget={"ram": 12_000}, context=16)
    assert search(ToySpace(), replace(goal, max_kl=0.02), measure=measure)
    with pytest.raises(DoesNotFit, match=r"int8 loses .* needs ram="):
        search(ToySpace(), replace(goal, max_kl=1e-4), measure=measure)
    with pytest.raises(DoesNotFit, match="only float16"):
        search(ToySpace(), replace(goal, max_kl=1e-9), measure=measure)
    with pytest.raises(InputError, match="measur"):
        search(ToySpace(), replace(goal, max_kl=0.1))


@pytest.mark.parametrize(("field", "value"), [("context", 0), ("context", 2049), ("batch", 0), ("max_kl", 0.0)])
def test_impossible_settings_are_named(field: str, value: float) -> None:
    with pytest.raises(InputError, match=str(value)):
        search(ToySpace(), replace(Goal(budget={"ram": 10**6}), **{field: value}))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(low=st.integers(-5, 50), width=st.integers(0, 300), data=st.data())
def test_largest_from_any_guess(low: int, width: int, data: st.DataObject) -> None:
    high = low + width
    answer, guess = data.draw(st.integers(low, high)), data.draw(st.integers(low, high))
    asked: list[int] = []

    def holds(number: int) -> bool:
        asked.append(number)
        assert low <= number <= high
        return number <= answer

    assert _largest(holds, low, high, guess) == answer
    assert len(asked) <= 4 + 2 * (abs(answer - guess) + 1).bit_length() + 2

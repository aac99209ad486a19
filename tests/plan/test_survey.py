"""Which caches a search measures: never one that cannot win, and the best of all is found without measuring all."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.engine.loading import cache_shape
from memwall.errors import DoesNotFit, InputError
from memwall.kv import CacheShape, fitted
from memwall.models import ModelConfig, model_directory
from memwall.plan import Choice, Goal, Planner, Quality
from memwall.plan.search import Candidate
from memwall.plan.survey import CACHES, caches_for, survey
from tests.plan.test_choose import RUNTIME, between

DEMO = model_directory("demo")


def quality(kl: float) -> Quality:
    return Quality(kl_nats=kl, perplexity=10 + kl, top1_agreement=1.0, measured_on="toy", tokens=10)


def candidate(kv: str, weight_bits: float, cache_bits: float) -> Candidate:
    choice = Choice(weights=f"mixed-{weight_bits:.2f}", kv=kv, context=64)
    return Candidate(
        choice=choice, peak_bytes={}, bits_per_weight=weight_bits, cache_bits=cache_bits, stored_bits=cache_bits
    )


def weights_loss(choice: Choice) -> float:
    return 4.0 ** -float(choice.weights.removeprefix("mixed-"))


SPENT = {"float16": 16.0, "kivi(4bit)": 5.0, "kivi(2bit)": 3.0, "snapkv(0.5)": 8.0, "snapkv(0.5)+kivi(4bit)": 3.5,
         "snapkv(0.25)+think(0.4)+kivi(2bit)": 1.5}  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    losses=st.lists(st.floats(0, 0.3), min_size=len(SPENT) - 1, max_size=len(SPENT) - 1),
    bits=st.lists(st.floats(2, 6), min_size=len(SPENT), max_size=len(SPENT)),
)
def test_the_best_is_found_when_caches_only_add_loss(losses: list[float], bits: list[float]) -> None:
    """A harsher form of a cache loses at least as much as the milder one: what sparing measurements rests on."""
    added = dict(zip(SPENT, (0.0, *losses)))
    for harsher, milder in itertools.permutations(SPENT, 2):
        if set(milder.replace("(", "+").split("+")) & set(harsher.replace("(", "+").split("+")):
            added[harsher] = max(added[harsher], added[milder] if SPENT[harsher] < SPENT[milder] else 0)
    candidates = [candidate(kv, spent, SPENT[kv]) for kv, spent in zip(SPENT, bits)]
    asked: list[str] = []

    def measure(choice: Choice) -> Quality:
        asked.append(choice.kv)
        return quality(weights_loss(choice) + added[choice.kv])

    found = survey(candidates, measure, lambda choice: quality(weights_loss(choice)))
    assert {one.choice.kv for one in found} == set(SPENT)
    assert [one for one in found if (one.quality is None) == (not one.note)] == []
    measured = min(one.quality.kl_nats for one in found if one.quality is not None)
    whole = min(weights_loss(one.choice) + added[one.choice.kv] for one in candidates)
    # so few bits apart, the milder cache is taken to be as good
    assert measured <= whole + 4.0**-2 * (4.0**0.021 - 1)
    assert len(asked) == len(set(asked))


def test_with_room_for_the_weights_only_the_exact_cache_is_measured() -> None:
    candidates = [candidate(kv, 16.0, spent) for kv, spent in SPENT.items()]
    asked: list[str] = []

    def measure(choice: Choice) -> Quality:
        asked.append(choice.kv)
        return quality(0)

    found = survey(candidates, measure, lambda choice: quality(0))
    assert asked == ["float16"]
    assert all("no more bits" in one.note for one in found if one.choice.kv != "float16")


def test_those_whose_weights_alone_lose_more_wait_in_vain() -> None:
    candidates = [candidate("kivi(2bit)", 5.0, 3.0), candidate("float16", 2.0, 16.0)]
    ticks: list[tuple[int, int]] = []
    found = survey(
        candidates,
        lambda choice: quality(0.001 + weights_loss(choice)),
        lambda choice: quality(weights_loss(choice)),
        tick=lambda done, whole: ticks.append((done, whole)),
    )
    assert "weights alone" in next(one.note for one in found if one.choice.kv == "float16")
    assert ticks == [(0, 2), (1, 2)]


def test_caches_that_a_model_cannot_have_are_left_out() -> None:
    shape = cache_shape(ModelConfig.from_directory(DEMO))
    assert caches_for(shape, "nobody's", 512) == CACHES
    fitted.save("somebody's", "cskv k=0.5", {"k": np.zeros(1, np.float32)}, "cskv(0.5,init=svd,train=0)")
    fitted.save("somebody's", "cachegen", {"k": np.zeros(1, np.float32)}, "cachegen")
    assert caches_for(shape, "somebody's", 512) == (*CACHES, "cskv(0.5,init=svd,train=0)")
    windows = CacheShape(num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32, windows=(64,) * 4, hidden_size=128)
    left = caches_for(windows, "nobody's", 512)
    assert "float16" in left
    assert not any(policy.startswith(("snapkv", "epicache")) for policy in left)


def test_a_plan_searches_measures_and_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    class Stub:
        def __init__(self, *arguments: object, **settings: object) -> None:
            pass

        def score(self, weights: str, kv: str | None, progress: object = None) -> object:
            asked.append((weights, kv))
            bits = float(weights.removeprefix("mixed-")) if weights.startswith("mixed-") else 6.0

            class Figures:
                kl_nats = 4.0**-bits + (0.0 if kv in (None, "float16") else 0.2 if "kivi" in kv else 1e-4)
                perplexity, top1_agreement, tokens = 20.0, 0.9, 100

            return Figures()

    monkeypatch.setattr("memwall.engine.quality.Evaluator", Stub)
    planner = Planner(DEMO, runtime_bytes=RUNTIME, profile=False, search_kv=True)
    goal = Goal(budget={"ram": between(0.2, context=1024)}, context=1024, prompt_tokens=900, threads=1)
    plan = planner.plan(goal)
    assert plan.fits
    assert plan.choice.kv not in ("float16", "kivi(2bit)")
    assert "caches that fit" in plan.explanation
    others = {option.choice.kv: option for option in plan.runners_up}
    assert "snapkv(0.25)+think(0.4)+kivi(2bit)" in others
    assert any(option.note.startswith("not measured") and option.quality is None for option in plan.runners_up)
    count = len(asked)
    assert planner.plan(goal).choice == plan.choice
    assert len(asked) == count, "figures are kept"
    for bad in (Goal(budget={}, kv="kivi", context=64), Goal(budget={}, weights="int4", kv="float16", context=64)):
        with pytest.raises(InputError, match="auto"):
            planner.plan(bad)
    with pytest.raises(InputError, match="measur"):
        planner.plan(goal, measure=False)
    with pytest.raises(DoesNotFit):
        planner.plan(Goal(budget={"ram": 1000}, context=64))

"""Real keys and values handed over between sides that are cut differently: every token stays the same."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from memwall.engine.batch import ModelExecutor
from memwall.engine.executor import Entry
from memwall.engine.hand_over import HandOver, pulls_of
from memwall.engine.loading import cache_shape
from memwall.engine.ranked import RankedCache, layout_of, rank_pools
from memwall.engine.sampling import Sampling
from memwall.engine.sequence import Request, Sequence
from memwall.engine.serving import Serving, ServingSettings, load_engine
from memwall.models import DEMO_DIRECTORY

PAGE_TOKENS, MADE = 16, 24


@pytest.fixture(scope="module")
def serving() -> Iterator[Serving]:
    made = load_engine(DEMO_DIRECTORY, ServingSettings(weights="int8", context_tokens=256, threads=1))
    yield made
    made.release()


def sequences(count: int = 3) -> list[Sequence]:
    draw, found = random.Random(3), []
    for number in range(count):
        prompt = tuple(draw.randrange(3, 4000) for _ in range(draw.randint(20, 90)))
        sampling = Sampling(temperature=0.8 * (number % 2), seed=number, max_new_tokens=MADE, ignore_eos=True)
        one = Sequence(id=number, request=Request(prompt=prompt, sampling=sampling), arrival=0.0, eos=())
        one.pages = list(range(number * 8, number * 8 + 8))
        found.append(one)
    return found


def step(executor: ModelExecutor, some: list[Sequence]) -> None:
    batch = [Entry(one, one.computed, len(one.tokens) - one.computed, True) for one in some]
    for entry, output in zip(batch, executor.run(batch), strict=True):
        assert output is not None
        entry.sequence.computed = len(entry.sequence.tokens)
        entry.sequence.tokens.append(output.token)


def tokens(serving: Serving, source: tuple[int, int], target: tuple[int, int]) -> list[list[int]]:
    """Prompts on one side, the rest on the other; pages have other numbers there."""
    executor = serving.engine.executor
    assert isinstance(executor, ModelExecutor)
    shape, whole = cache_shape(serving.config), executor.cache
    layout = layout_of(shape, PAGE_TOKENS)
    sides = [rank_pools(layout, degrees, 32, serving.arena, "test") for degrees in (source, target)]
    some = sequences()
    executor.cache = RankedCache(shape, sides[0], PAGE_TOKENS, source)
    step(executor, some)
    pages = [page for one in some for page in one.pages]
    moved = random.Random(9).sample(range(32), len(pages))
    HandOver(layout=layout, source=source, target=target).copy(sides[0], sides[1], pulls_of(pages, moved))
    for one in some:
        one.pages = moved[:8]
        del moved[:8]
    for pool in sides[0]:
        pool.release()
    executor.cache = RankedCache(shape, sides[1], PAGE_TOKENS, target)
    for _ in range(MADE - 1):
        step(executor, some)
    for pool in sides[1]:
        pool.release()
    executor.cache = whole
    for one in some:
        executor.forget(one)
    return [list(one.made) for one in some]


def test_tokens_are_the_same_whatever_the_degrees(serving: Serving) -> None:
    expected = [serving.engine.submit(one.request) for one in sequences()]
    while serving.engine.busy:
        serving.engine.step()
    found = [list(one.made) for one in expected]
    shape = cache_shape(serving.config)
    wide, deep = shape.num_kv_heads, shape.num_layers
    pairs = [((1, 1), (1, 1)), ((2, 1), (1, 1)), ((1, 1), (2, 1)), ((1, 2), (2, 1)), ((2, 2), (wide, deep))]
    for source, target in pairs:
        assert tokens(serving, source, target) == found, (source, target)


def test_a_head_that_is_missing_shows(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = cache_shape(serving.config)
    if shape.num_kv_heads < 2:
        pytest.skip("the model has one head")
    good = tokens(serving, (2, 1), (1, 1))
    whole = HandOver.pieces.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(HandOver, "pieces", property(lambda self: whole(self)[:1]))
    assert tokens(serving, (2, 1), (1, 1)) != good

"""Real keys and values handed over between sides that are cut differently: every token stays the same."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from memwall.engine.batch import ModelExecutor
from memwall.engine.hand_over import HandOver
from memwall.engine.loading import cache_shape
from memwall.engine.ranked import serve_across
from memwall.engine.sampling import Sampling
from memwall.engine.sequence import Request, Sequence
from memwall.engine.serving import Serving, ServingSettings, load_engine
from memwall.models import DEMO_DIRECTORY


@pytest.fixture(scope="module")
def serving() -> Iterator[Serving]:
    made = load_engine(DEMO_DIRECTORY, ServingSettings(weights="int8", context_tokens=256, threads=1))
    yield made
    made.release()


def sequences(count: int = 3) -> list[Sequence]:
    draw, found = random.Random(3), []
    for number in range(count):
        prompt = tuple(draw.randrange(3, 4000) for _ in range(draw.randint(20, 90)))
        sampling = Sampling(temperature=0.8 * (number % 2), seed=number, max_new_tokens=24, ignore_eos=True)
        found.append(Sequence(id=number, request=Request(prompt=prompt, sampling=sampling), arrival=0.0, eos=()))
    return found


def tokens(serving: Serving, source: tuple[int, int], target: tuple[int, int]) -> list[list[int]]:
    executor, some = serving.engine.executor, sequences()
    assert isinstance(executor, ModelExecutor)
    serve_across(executor, cache_shape(serving.config), some, source, target, serving.arena)
    return [list(one.made) for one in some]


def test_tokens_are_the_same_whatever_the_degrees(serving: Serving) -> None:
    alone = [serving.engine.submit(one.request) for one in sequences()]
    while serving.engine.busy:
        serving.engine.step()
    expected = [list(one.made) for one in alone]
    held = serving.arena.used_bytes
    shape = cache_shape(serving.config)
    wide, deep = shape.num_kv_heads, shape.num_layers
    pairs = [((1, 1), (1, 1)), ((2, 1), (1, 1)), ((1, 1), (2, 1)), ((1, 2), (2, 1)), ((2, 2), (wide, deep))]
    for source, target in pairs:
        assert tokens(serving, source, target) == expected, (source, target)
    assert serving.arena.used_bytes == held


def test_a_head_that_is_missing_shows(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    good = tokens(serving, (2, 1), (1, 1))
    whole = HandOver.pieces.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(HandOver, "pieces", property(lambda self: whole(self)[:1]))
    assert tokens(serving, (2, 1), (1, 1)) != good

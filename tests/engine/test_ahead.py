"""One batch ahead: the same tokens as step by step, in any mix of ends, cancellations and preemptions."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from memwall.engine import Sampling
from memwall.engine.ahead import AheadEngine
from memwall.engine.fcfs import FirstComeFirstServed
from memwall.engine.nanoflow import NanoFlow
from memwall.engine.sequence import Event, Request
from memwall.engine.serving import LoraSettings, Serving, ServingSettings, load_engine
from memwall.engine.simulated import replay, simulated_engine
from memwall.errors import InputError
from memwall.models import DEMO_DIRECTORY
from tests.engine.test_nanoflow import LIMITS, load

PROMPTS = [tuple(range(10 + n, 10 + n + 5 + 9 * n)) for n in range(8)]


def serving(**changes: Any) -> Serving:
    told = {"weights": "int8", "context_tokens": 256, "max_sequences": 6, "token_budget": 24, "swap_bytes": 1 << 22}
    return load_engine(DEMO_DIRECTORY, ServingSettings(**{**told, **changes}), scheduler=NanoFlow())


def run(held: Serving, wanted: list[Request], *, num_pages: int | None = None) -> list[list[int]]:
    held.engine.wanted_pages = num_pages or held.engine.wanted_pages
    held.engine.fit_limit()
    made = [held.engine.submit(request) for request in wanted]
    events: list[Event] = []
    while held.engine.busy:
        events += held.engine.step()
    events += held.engine.drain()
    for one in made:
        mine = [event for event in events if event.id == one.id]
        assert [event.token for event in mine if event.token is not None] == list(one.made)
        assert [event.finish for event in mine if event.finish] == [one.finish]
    assert held.pool.used_pages == 0 or held.settings.keep_prefixes
    return [list(one.made) for one in made]


def requests(eos: bool = False, tokens: int = 24) -> list[Request]:
    return [
        Request(prompt=prompt, sampling=Sampling(temperature=0.0, max_new_tokens=tokens + n, ignore_eos=not eos))
        for n, prompt in enumerate(PROMPTS)
    ]


def step_by_step(wanted: list[Request], **changes: Any) -> list[list[int]]:
    held = serving(**changes)
    try:
        return run(held, wanted)
    finally:
        held.release()


def test_the_same_tokens_as_step_by_step_and_gaps_are_counted() -> None:
    held = serving(ahead=True)
    assert run(held, requests()) == step_by_step(requests())
    assert isinstance(held.engine, AheadEngine)
    counts = held.engine.counts
    assert counts.gaps > 0.8 * held.engine.totals.steps
    assert counts.wasted == 0
    held.release()


def test_an_end_of_text_costs_one_token_more_and_tells_the_same() -> None:
    plain = step_by_step(requests())
    stop = plain[3][10]  # a token that ends texts from now on
    held, other = serving(ahead=True), serving()
    for one in (held, other):
        one.engine.eos = (stop,)
    texts = run(held, requests(eos=True))
    assert texts == run(other, requests(eos=True))
    assert any(len(text) < len(whole) for text, whole in zip(texts, plain))
    assert isinstance(held.engine, AheadEngine)
    ended = held.engine.totals.finished["stop"]
    assert 0 < held.engine.counts.wasted <= ended
    assert all(stop not in text for text in texts)
    held.release(), other.release()


def test_requests_that_were_set_aside_make_the_same() -> None:
    held = serving(ahead=True)
    held.engine.scheduler = NanoFlow(mean_output=1)
    assert run(held, requests(), num_pages=16) == step_by_step(requests())
    assert held.engine.totals.preempted["swap"] > 0
    held.release()


def test_cancelled_requests_end_with_their_batch_and_free_their_pages() -> None:
    held = serving(ahead=True, keep_prefixes=False)
    made = [held.engine.submit(request) for request in requests()]
    for _ in range(4):
        held.engine.step()
    assert held.engine.in_flight
    assert held.engine.cancel(made[0].id) is None
    waiting = next(iter(held.engine.waiting), None)
    if waiting is not None:
        event = held.engine.cancel(waiting)
        assert event is not None
    events: list[Event] = []
    while held.engine.busy:
        events += held.engine.step()
    assert [event.finish for event in events if event.id == made[0].id][-1] == "cancelled"
    assert held.pool.used_pages == 0
    held.release()


def test_a_batch_that_fails_raises_and_the_engine_goes_on() -> None:
    held = serving(ahead=True, keep_prefixes=False)
    assert isinstance(held.engine, AheadEngine)
    whole = held.engine.runner.executor.run  # type: ignore[attr-defined]

    def failing(batch: Any) -> Any:
        raise RuntimeError("a fault")

    held.engine.submit(requests()[0])
    held.engine.executor.run = failing  # type: ignore[method-assign]
    held.engine.step()
    with pytest.raises(RuntimeError, match="a fault"):
        held.engine.step()
    held.engine.executor.run = whole  # type: ignore[method-assign]
    assert [event.finish for event in held.engine.abandon()] == ["error"]
    assert run(held, requests()) == step_by_step(requests())
    held.release()


def test_a_fault_beside_a_batch_waits_for_it_before_its_pages_are_free() -> None:
    held = serving(ahead=True, keep_prefixes=False)
    assert isinstance(held.engine, AheadEngine)
    whole, begun, go_on = held.engine.executor.run, threading.Event(), threading.Event()
    over: list[bool] = []

    def slow(batch: Any) -> Any:
        begun.set()
        assert go_on.wait(60)
        over.append(True)
        return whole(batch)

    for request in requests()[:2]:
        held.engine.submit(request)
    held.engine.executor.run = slow  # type: ignore[method-assign]
    held.engine.step()
    assert begun.wait(60)
    release = held.engine.pages.release

    def watched(pages: Any) -> None:
        over.append(False)
        release(pages)

    held.engine.pages.release = watched  # type: ignore[method-assign]
    threading.Timer(0.05, go_on.set).start()
    assert [event.finish for event in held.engine.abandon()] == ["error", "error"]  # as after a scheduler's fault
    assert over[0]
    assert False in over
    held.engine.executor.run, held.engine.pages.release = whole, release  # type: ignore[method-assign]
    assert not held.engine.in_flight
    assert run(held, requests()) == step_by_step(requests())  # no batch is taken for one of those before
    held.release()


def test_the_simulator_forms_the_same_batches_on_a_virtual_clock() -> None:
    plain = simulated_engine(NanoFlow(), num_pages=100, limits=LIMITS, swap_pages=100)
    ahead = simulated_engine(NanoFlow(), num_pages=100, limits=LIMITS, swap_pages=100, ahead=True)
    for engine in (plain, ahead):
        replay(engine, engine.clock, load(40))  # type: ignore[arg-type]
    assert plain.totals.finished == ahead.totals.finished
    assert plain.totals.computed_tokens == ahead.totals.computed_tokens
    assert ahead.pages.pool.used_pages == 0 or ahead.pages.keep_prefixes


def test_what_it_cannot_serve_is_refused() -> None:
    with pytest.raises(InputError, match="without adapters"):
        ServingSettings(ahead=True, lora=LoraSettings())
    held = simulated_engine(FirstComeFirstServed(), num_pages=10, ahead=True)
    with pytest.raises(InputError, match="shared prefixes"):
        held.submit(Request(prompt=(1, 2), members=2))

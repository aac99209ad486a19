"""Vectors of texts are pooled from the states that a pass over the whole text gives, however the engine cuts it."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from memwall.engine import Sampling, Settings, load
from memwall.engine.base import Preempt
from memwall.engine.phase_loading import PhaseSettings
from memwall.engine.sequence import Pooling, Request
from memwall.engine.workers import ForkedWorkers
from memwall.models import DEMO_DIRECTORY
from tests.engine.phased_loads import HALVES
from tests.engine.test_batching import PROMPTS, TOKENIZER, requests, serving

ONE_MEMORY = PhaseSettings(shares=HALVES, fresh=False)


def whole(prompt: tuple[int, ...], pooling: Pooling) -> np.ndarray:
    session = load(DEMO_DIRECTORY, Settings(weights="float32", kv="float32", threads=1), tokenizer=TOKENIZER)
    hidden = session.decoder.hidden(np.array(prompt), session.cache).astype(np.float64)
    session.release()
    pooled = hidden[-1] if pooling == "last" else hidden.mean(axis=0)
    return pooled / np.linalg.norm(pooled)


def asked(pooling: Pooling) -> list[Request]:
    return [
        Request(prompt=prompt, sampling=Sampling(max_new_tokens=1), pooling=pooling, salt=bytes([number]))
        for number, prompt in enumerate(PROMPTS)
    ]


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("by", [None, "recompute", "swap"])
@pytest.mark.parametrize(("kv", "near"), [("float32", 2e-6), ("int4", 0.06)])
def test_vectors_are_those_of_a_whole_pass(
    pooling: Pooling, by: Literal["recompute", "swap"] | None, kv: str, near: float
) -> None:
    held = serving(kv=kv, token_budget=16, max_sequences=4, swap_bytes=1 << 24)
    engine = held.engine
    talk = [engine.submit(replace(request, priority=-1)) for request in requests()[1:3]]
    texts = [engine.submit(request) for request in asked(pooling)]
    found = {}
    while engine.busy:
        for event in engine.step():
            if event.vector is not None:
                assert event.token is None
                found[event.id] = event.vector
        for one in texts if by else []:  # each once, half done
            if one.id in engine.running and one.computed < one.num_prompt and not one.preemptions:
                engine._set_aside(engine.running.pop(one.id), Preempt(id=one.id, by=by))
    for number, one in enumerate(texts):
        assert (one.finish, one.num_made) == ("stop", 0)
        assert np.isclose(np.linalg.norm(found[one.id]), 1.0)
        np.testing.assert_allclose(found[one.id], whole(PROMPTS[number], pooling), atol=near)
    assert [one.num_made for one in talk] == [23, 22]
    assert engine.totals.made_tokens == 45
    assert set(engine.totals.preempted) == ({by} if by else set())
    held.release()


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_batch_formed_ahead_gives_the_same_vectors(pooling: Pooling) -> None:
    held = serving(kv="float32", token_budget=16, max_sequences=4, ahead=True)
    engine = held.engine
    talk = [engine.submit(replace(request, priority=-1)) for request in requests()[1:3]]
    texts = [engine.submit(request) for request in asked(pooling)]
    found = {}
    while engine.busy:
        found |= {event.id: event for event in engine.step() if event.vector is not None}
    for number, one in enumerate(texts):
        assert (found[one.id].token, found[one.id].finish, one.num_made) == (None, "stop", 0)
        np.testing.assert_allclose(found[one.id].vector, whole(PROMPTS[number], pooling), atol=2e-6)
    assert [one.num_made for one in talk] == [23, 22]
    assert engine.totals.made_tokens == 45
    held.release()


def test_a_beginning_that_is_there_changes_nothing() -> None:
    held = serving(kv="float32")
    prompt = PROMPTS[1]
    vectors = []
    for _ in range(2):
        one = held.engine.submit(Request(prompt=prompt, sampling=Sampling(max_new_tokens=1), pooling="last"))
        while held.engine.busy:
            vectors += [event.vector for event in held.engine.step() if event.vector is not None]
    assert one.cached == 32
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-6)
    held.release()


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("phases", [ONE_MEMORY, PhaseSettings.apart(2)], ids=["one memory", "two memories"])
def test_two_processes_give_the_same_vectors_though_one_is_killed_halfway(
    pooling: Pooling, phases: PhaseSettings
) -> None:
    held = serving(kv="float32", token_budget=16, max_sequences=4, phases=phases)
    engine, workers = held.engine, held.workers
    assert isinstance(workers, ForkedWorkers)
    talk = [engine.submit(replace(request, priority=-1)) for request in requests()[1:3]]
    texts = [engine.submit(request) for request in asked(pooling)]
    found, killed = {}, False
    while engine.busy:
        found |= {event.id: event for event in engine.step() if event.vector is not None}
        if not killed and any(0 < one.computed < one.num_prompt for one in texts):
            os.kill(workers._process["prefill"].pid, signal.SIGKILL)
            killed = True
    for number, one in enumerate(texts):
        assert (found[one.id].token, found[one.id].finish, one.num_made) == (None, "stop", 0)
        assert found[one.id].vector.dtype == np.float32
        np.testing.assert_allclose(found[one.id].vector, whole(PROMPTS[number], pooling), atol=2e-6)
    assert [one.num_made for one in talk] == [23, 22]
    assert workers.lost == 1
    assert len(workers.draws) == 0
    held.release()

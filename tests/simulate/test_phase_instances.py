"""Instances on a virtual clock: nothing is lost, memory holds, and times are what queueing theory says."""

from __future__ import annotations

import random
from functools import partial
from statistics import mean
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.errors import DoesNotFit
from memwall.simulate.phase_instances import (
    BLOCK_TOKENS,
    Batch,
    ColocatedInstance,
    DecodeInstance,
    Events,
    Job,
    PrefillInstance,
    blocks_of,
)
from memwall.simulate.phase_latency import (
    OPT_13B,
    PhaseLatency,
    pipeline_first_token,
    tensor_first_token,
    waiting_first_token,
)

FLAT = PhaseLatency(prefill=(0.01, 1e-4, 0.0), decode=(0.01, 0.0, 1e-4), kv_tokens=40 * BLOCK_TOKENS)
JOBS = st.lists(
    st.tuples(st.floats(0, 2), st.integers(1, 150), st.integers(1, 120)), min_size=1, max_size=40
)  # fmt: skip


def made(rows: list[tuple[float, int, int]]) -> list[Job]:
    return [Job(at, prompt, output) for at, prompt, output in sorted(rows)]


def split(jobs: list[Job], stages: int, move: float = 0.0) -> tuple[PrefillInstance, DecodeInstance]:
    events = Events()
    decode = DecodeInstance(events, FLAT, stages=stages, move_seconds=lambda tokens: move)
    prefill = PrefillInstance(events, FLAT, stages=stages, finished=decode.offer)
    for job in jobs:
        events.at(job.at, partial(prefill.submit, job))
    events.run()
    return prefill, decode


@given(JOBS, st.integers(1, 3), st.floats(0, 0.2))
@settings(deadline=None)
def test_every_request_ends_and_memory_is_given_back(rows: Any, stages: int, move: float) -> None:
    jobs = made(rows)
    prefill, decode = split(jobs, stages, move)
    for job in jobs:
        assert job.first is not None
        assert job.last is not None
        assert job.at < job.first <= job.last
        assert job.made == job.output_tokens
        if job.output_tokens > 1:
            assert job.last - job.first >= move
    for one in (prefill, decode):
        assert one.blocks.used == 0
        assert one.blocks.peak <= one.blocks.most
        assert one.load == 0


@given(JOBS, st.integers(1, 3))
@settings(deadline=None)
def test_both_phases_in_one_place(rows: Any, stages: int) -> None:
    jobs, events = made(rows), Events()
    both = ColocatedInstance(events, FLAT, stages=stages)
    for job in jobs:
        events.at(job.at, partial(both.submit, job))
    events.run()
    assert all(job.last is not None and job.made == job.output_tokens for job in jobs)
    assert both.blocks.used == both.load == 0
    assert both.blocks.peak <= both.blocks.most


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30), st.integers(0, 25)), min_size=1, max_size=20), st.data()
)
@settings(deadline=None)
def test_a_batch_counts_as_one_that_visits_every_job(rows: list[tuple[int, int, int]], data: st.DataObject) -> None:
    batch, plain, waiting = Batch(), dict[Job, int](), [(when, Job(0.0, p, o + 1, made=1)) for p, o, when in rows]
    for step in range(70):
        for when, job in waiting:
            if when == step:
                batch.add(job)
                plain[job] = 1
        if len(batch) > 1 and data.draw(st.booleans()) and step % 7 == 3:
            left = batch.pop_last()
            assert left is next(reversed(plain))
            assert left.made == plain.pop(left)
        contexts = [job.prompt_tokens + count for job, count in plain.items()]
        assert len(batch) == len(plain)
        assert batch.context == sum(contexts)
        assert batch.growing == sum(blocks_of(context + 1) - blocks_of(context) for context in contexts)
        ended = batch.advance()
        plain = {job: count + 1 for job, count in plain.items()}
        assert set(ended) == {job for job, count in plain.items() if count >= job.output_tokens}
        for job in ended:
            assert job.made == plain.pop(job) == job.output_tokens


def test_a_request_that_could_never_run_is_refused() -> None:
    with pytest.raises(DoesNotFit, match="room for 640"):
        split([Job(0.0, 600, 100)], 1)


def test_the_decode_side_pulls_only_what_it_has_room_for() -> None:
    jobs = [Job(0.0, 100, 50) for _ in range(60)]
    prefill, decode = split(jobs, 1)
    assert decode.blocks.peak <= decode.blocks.most
    assert prefill.blocks.peak <= prefill.blocks.most
    assert all(job.last is not None for job in jobs)
    assert max(job.first_token_seconds for job in jobs) > 0.2  # back pressure: prompts wait before they are computed


def first_tokens(rate: float, stages: int, latency: PhaseLatency, count: int = 30_000) -> tuple[float, float]:
    """Mean time to the first token over one-at-a-time prompts of one length, and the service time."""
    draw, events, at, jobs = random.Random(3), Events(), 0.0, []
    one = PrefillInstance(
        events, latency, stages=stages, kv_tokens=1 << 40, saturating_tokens=1, finished=lambda job, release: release()
    )
    for _ in range(count):
        at += draw.expovariate(rate)
        jobs.append(Job(at, 512, 1))
        events.at(at, partial(one.submit, jobs[-1]))
    events.run()
    return mean(job.first_token_seconds for job in jobs), one.prefill_seconds(jobs[:1])


@pytest.mark.parametrize("load", [0.2, 0.5, 0.8])
def test_waiting_is_what_queueing_theory_says(load: float) -> None:
    seconds = first_tokens(1.0, 1, OPT_13B[1], 1)[1]
    found = first_tokens(load / seconds, 1, OPT_13B[1])[0]
    assert found == pytest.approx(waiting_first_token(load / seconds, seconds), rel=0.03)
    deep, service = first_tokens(load / seconds, 2, OPT_13B[1])
    assert deep == pytest.approx(pipeline_first_token(load / seconds, service), rel=0.03)


def test_tensor_wins_at_low_rates_and_pipeline_at_high_ones() -> None:
    seconds, speedup = 0.1, 1.6
    better = [tensor_first_token(rate, seconds, speedup) < pipeline_first_token(rate, seconds) for rate in range(1, 16)]
    assert better[0] is True
    assert better[-1] is False
    assert better == sorted(better, reverse=True)

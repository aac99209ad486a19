"""BatchLLM's scheduler: decisions on states written out by hand, and whole batches on a virtual clock."""

from __future__ import annotations

import random

import numpy as np
import pytest

from memwall.engine.base import Limits, Preempt, RequestView, State, Step, Work
from memwall.engine.batchllm import BatchLLM, Forecast, Room, plan_batch
from memwall.engine.core import Engine
from memwall.engine.offline import OfflineRun
from memwall.engine.prefix_tree import Prompts
from memwall.engine.sampling import Sampling
from memwall.engine.sequence import Request
from memwall.engine.simulated import simulated_engine
from memwall.errors import InputError

LIMITS = Limits(token_budget=32, max_sequences=2, page_tokens=16)


def view(number: int, prompt: int, computed: int = 0, made: int = 0, **changes: object) -> RequestView:
    base = int(changes.get("base", 0))  # type: ignore[call-overload]
    pages = -(-(computed - base) // 16)
    values: dict[str, object] = {
        "id": number, "arrival": 0.0, "prompt": prompt, "known": prompt + made, "computed": computed,
        "most_tokens": prompt + 50, "pages": pages, "freeable": pages, **changes,
    }  # fmt: skip
    return RequestView(**values)  # type: ignore[arg-type]


def plan(**state: object) -> Step:
    return BatchLLM().plan_step(
        State(**{"free_pages": 100, "total_pages": 100, "limits": LIMITS, **state}),  # type: ignore[arg-type]
        0.0,
    )


def test_decoding_enters_first_then_ready_members_then_later_prefixes() -> None:
    step = plan(
        running=(view(1, 100, 16), view(2, 40, 40, 1, base=32)),
        held=(view(0, 32, 32, shares=3),),
        waiting=(view(5, 60, shares=2), view(3, 40, 32, base=32, prefix=0)),
    )
    assert step.work == (Work(id=2, tokens=1), Work(id=1, tokens=31))
    step = plan(
        running=(view(2, 40, 40, 1, base=32),),
        held=(view(0, 32, 32, shares=3),),
        waiting=(view(5, 60, shares=2), view(3, 40, 32, base=32, prefix=0)),
    )
    assert step.work == (Work(id=2, tokens=1), Work(id=3, tokens=8), Work(id=5, tokens=23))
    assert step.admit == (3, 5)


def test_memory_bounds_the_batch_and_no_count_does() -> None:
    short = [view(i, 1, most_tokens=17) for i in range(30)]
    assert len(plan(waiting=tuple(short)).admit) == 30
    # 2 pages each at their end; 9 tenths of 20 pages
    assert len(plan(waiting=tuple(short), free_pages=20, total_pages=20).admit) == 9


def test_kept_beginnings_are_neither_computed_nor_paid_for() -> None:
    step = plan(waiting=(view(1, 100, hit=96),), free_pages=1)
    assert step.work == (Work(id=1, tokens=4),)
    assert plan(waiting=(view(1, 100, hit=96, hit_idle=1),), free_pages=1).admit == ()


def test_it_serves_with_kept_prefixes_too() -> None:
    engine = simulated_engine(BatchLLM(), num_pages=30, limits=LIMITS, context_tokens=256)
    for number in range(20):
        prompt = (*range(number % 3, number % 3 + 40), number)
        engine.submit(Request(prompt=prompt, sampling=Sampling(max_new_tokens=20, ignore_eos=True)))
    steps = 0
    while engine.busy:
        engine.step()
        steps += 1
        assert steps < 5000
    assert engine.totals.finished == {"length": 20}
    assert engine.totals.prefix_hits > 0


def test_a_prefix_is_counted_once_and_needs_room_for_its_largest_member() -> None:
    prefix = view(0, 160, shares=4, most_tokens=160 + 32)
    assert plan(running=(view(9, 1, 1, 1),), waiting=(prefix,), free_pages=16, total_pages=17).admit == (0,)
    assert plan(running=(view(9, 1, 1, 1),), waiting=(prefix,), free_pages=15, total_pages=16).admit == ()
    members = tuple(view(i, 164, 160, base=160, prefix=0, most_tokens=174) for i in range(1, 6))
    held = view(0, 160, 160, shares=5)
    step = plan(held=(held,), waiting=members, free_pages=6, total_pages=16)
    assert step.admit == (1, 2, 3, 4)  # 10 pages and one for each, within 14.4


def test_the_first_goes_on_where_nobody_runs_whatever_is_predicted() -> None:
    assert plan(waiting=(view(1, 30, most_tokens=1000),), free_pages=10, total_pages=10).admit == (1,)
    assert plan(waiting=(view(1, 300),), free_pages=10, total_pages=10).admit == ()


def test_the_youngest_gives_way_and_is_computed_again() -> None:
    running = (view(1, 16, 16, 1), view(2, 16, 16, 1), view(3, 20, 20, 1))
    step = plan(running=running, free_pages=0)
    assert step.preempt == (Preempt(id=3, by="recompute"),)
    assert step.work == (Work(id=1, tokens=1), Work(id=2, tokens=1))


def test_members_give_way_before_their_prefix_and_the_youngest_waits() -> None:
    held, member = view(2, 32, 32, shares=2), view(3, 40, 40, 1, base=32, prefix=2)
    step = plan(running=(view(1, 48, 48, 1), member), held=(held,), free_pages=-2)
    assert [one.id for one in step.preempt] == [3, 2]
    step = plan(running=(view(1, 16, 16, 1), view(2, 16, 16, 1)), free_pages=1)
    assert (step.preempt, step.work) == ((), (Work(id=1, tokens=1),))


def test_where_all_wait_for_room_the_youngest_gives_its_own() -> None:
    step = plan(running=(view(3, 16, 16, 1),), held=(view(0, 32, 32, shares=1),), free_pages=0, total_pages=3)
    assert step.preempt == (Preempt(id=3, by="recompute"),)


@pytest.mark.parametrize("seed", range(5))
def test_the_forecast_is_what_a_walk_through_time_finds(seed: int) -> None:
    draw = random.Random(seed)
    forecast, requests, fixed = Forecast(1e9, 16), [], draw.randint(0, 5)
    forecast.keep(fixed)
    for _ in range(12):
        tokens, rest = draw.randint(1, 90), draw.randint(0, 60)
        requests.append((tokens, rest))
        forecast.add(tokens, rest)
        peak = max(sum(-(-(t + at) // 16) for t, r in requests if r >= at) for at in range(61))
        assert forecast.peak == fixed + peak
        limited = Forecast(fixed + peak, 16)
        limited.keep(fixed)
        for one in requests[:-1]:
            limited.add(*one)
        assert limited.takes(tokens, rest)
        limited.limit -= 1
        assert limited.takes(tokens, rest) == (forecast_peak(requests[:-1], tokens, rest) <= peak - 1)


def forecast_peak(requests: list[tuple[int, int]], tokens: int, rest: int) -> int:
    everyone = [*requests, (tokens, rest)]
    return max(sum(-(-(t + at) // 16) for t, r in everyone if r >= at) for at in range(61))


def batch(seed: int) -> tuple[list[list[int]], list[int]]:
    draw = random.Random(seed)
    texts = [[draw.randrange(50) for _ in range(draw.randint(20, 120))] for _ in range(5)]
    prompts = [
        [1, 2, 3, *draw.choice(texts), *(draw.randrange(50) for _ in range(draw.randint(0, 20)))] for _ in range(60)
    ]
    return prompts, [draw.choice([1, 3, 40]) for _ in prompts]


def run_batch(
    seed: int, num_pages: int, *, told: float = 1.0, cancel: bool = False
) -> tuple[Engine, OfflineRun, dict[int, int]]:
    """told: how much of an answer's length is expected."""
    prompts, outputs = batch(seed)
    engine = simulated_engine(BatchLLM(), num_pages=num_pages, limits=LIMITS, context_tokens=256)
    engine.pages.keep_prefixes = False
    rows = Prompts.of(prompts)
    room = Room(page_tokens=16, pages=16, outputs=outputs)
    draw, made = random.Random(seed), dict.fromkeys(range(len(prompts)), 0)
    run = OfflineRun(
        engine,
        plan_batch(rows, outputs, room=room),
        rows.lengths.tolist(),
        lambda i: Request(
            prompt=tuple(prompts[i]), sampling=Sampling(max_new_tokens=outputs[i], ignore_eos=True), priority=i % 3
        ),
        lambda i: max(int(told * outputs[i]), 1),
    )
    steps, ended = 0, set()
    while not run.done:
        for prompt, event in run.step():
            assert prompt not in ended
            made[prompt] += event.token is not None
            if event.finish is not None:
                ended.add(prompt)
        follow(engine, run)
        if cancel and draw.random() < 0.2 and run.numbers:
            prompt = draw.choice(list(run.numbers))
            run.end(prompt)
            ended.add(prompt)
        steps += 1
        assert steps < 50000, "requests starve"
    assert ended == set(range(len(prompts)))
    return engine, run, made


def follow(engine: Engine, run: OfflineRun) -> None:
    """A prefix is held exactly as long as a member of it is not over; pages are neither lost nor counted twice."""
    pool = engine.pages.pool
    held = [page for one in engine.running.values() for page in one.pages]
    held += [page for one in engine.shared.held.values() for page in one.pages]
    assert len(held) == len(set(held)) == pool.used_pages <= pool.limit_pages
    for one in engine.shared.held.values():
        assert one.left > 0
        assert pool.usage()["shared prefix"] > 0
    for one in engine.running.values():
        assert len(one.pages) * 16 >= one.computed - one.base
        assert one.parent is None or one.parent.status == "held"


@pytest.mark.parametrize("num_pages", [16, 24, 60, 500])
@pytest.mark.parametrize("seed", range(3))
def test_prompt_tokens_computed_are_those_of_the_plan_whatever_the_memory(seed: int, num_pages: int) -> None:
    engine, run, made = run_batch(seed, num_pages)
    assert made == dict(enumerate(batch(seed)[1]))
    if not engine.totals.preempted:
        assert engine.totals.computed_prompt_tokens == run.plan.sharing.physical
    assert num_pages < 24 or not engine.totals.preempted  # a sound prediction needs nobody to give way
    assert engine.pages.pool.used_pages == 0
    assert run.statistics.peak_prefix_bytes <= num_pages


@pytest.mark.parametrize("seed", range(3))
def test_answers_longer_than_expected_cost_work_and_nothing_else(seed: int) -> None:
    engine, run, made = run_batch(seed, 30, told=0.05)
    assert made == dict(enumerate(batch(seed)[1]))
    assert engine.totals.preempted["recompute"] > 0
    assert engine.totals.computed_prompt_tokens > run.plan.sharing.physical
    assert engine.pages.pool.used_pages == 0


@pytest.mark.parametrize("seed", range(3))
def test_answers_that_are_ended_free_their_prefix_too(seed: int) -> None:
    engine, _, _ = run_batch(seed, 60, cancel=True)
    assert engine.pages.pool.used_pages == 0
    assert not engine.shared.held


def test_a_budget_that_moves_while_a_batch_runs() -> None:
    prompts, outputs = batch(7)
    engine = simulated_engine(BatchLLM(), num_pages=60, limits=LIMITS, context_tokens=256)
    engine.pages.keep_prefixes = False
    rows = Prompts.of(prompts)
    run = OfflineRun(
        engine,
        plan_batch(rows, outputs, room=Room(page_tokens=16, pages=16, outputs=outputs)),
        rows.lengths.tolist(),
        lambda i: Request(prompt=tuple(prompts[i]), sampling=Sampling(max_new_tokens=outputs[i], ignore_eos=True)),
        lambda i: outputs[i],
    )
    draw, steps = random.Random(1), 0
    while not run.done:
        if draw.random() < 0.05:
            engine.wanted_pages = draw.choice([16, 25, 60])
        run.step()
        follow(engine, run)
        steps += 1
        assert steps < 50000
    assert engine.totals.finished == {"length": len(prompts)}


def test_many_small_requests_run_together() -> None:
    _, run, _ = run_batch(0, 500)
    assert run.statistics.peak_requests > LIMITS.max_sequences
    assert run.statistics.percentile(1.0) <= LIMITS.token_budget


def test_a_prefix_that_ends_early_leaves_its_members_on_their_own() -> None:
    engine = simulated_engine(BatchLLM(), num_pages=100, limits=LIMITS, context_tokens=256)
    prefix = engine.submit(Request(prompt=(1,) * 40, members=2))
    member = engine.submit(Request(prompt=(1,) * 45, prefix=prefix.id, base=40, sampling=Sampling(max_new_tokens=3)))
    engine.step()
    engine.cancel(prefix.id)
    while engine.busy:
        engine.step()
    assert len(member.made) == 3
    assert engine.totals.computed_prompt_tokens == 32 + 45
    assert engine.pages.pool.used_pages == engine.pages.idle_pages


def test_after_a_fault_nothing_is_held() -> None:
    engine = simulated_engine(BatchLLM(), num_pages=100, limits=LIMITS, context_tokens=256)
    prefix = engine.submit(Request(prompt=(1,) * 40, members=3))
    engine.submit(Request(prompt=(1,) * 45, prefix=prefix.id, base=40))
    for _ in range(4):
        engine.step()
    assert engine.shared.held_pages == 3
    assert [event.finish for event in engine.abandon()] == ["error"]
    assert engine.pages.pool.used_pages == engine.shared.held_pages == 0


@pytest.mark.parametrize(("prefix", "base"), [(5, 3), (0, 0), (0, 41), (0, 45)])
def test_what_a_request_cannot_go_on_from_is_refused(prefix: int, base: int) -> None:
    engine = simulated_engine(BatchLLM(), num_pages=100, limits=LIMITS)
    engine.submit(Request(prompt=(1,) * 40, members=1))
    with pytest.raises(InputError, match="prefix"):
        engine.submit(Request(prompt=(1,) * 45, prefix=prefix, base=base))


def test_statistics_count_steps_and_keep_a_bounded_curve() -> None:
    _, run, _ = run_batch(1, 24)
    found = run.statistics
    assert found.steps == run.engine.totals.steps
    assert found.mean_tokens == pytest.approx(run.engine.totals.computed_tokens / found.steps)
    assert found.percentile(0.05) <= found.percentile(0.5) <= found.percentile(1.0)
    assert 0 < len(found.curve) <= 257
    assert np.all(np.diff([at for at, _ in found.curve]) >= 0)
    assert max(held for _, held in found.curve) <= found.peak_prefix_bytes

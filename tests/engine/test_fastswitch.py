"""FastSwitch's decisions on states written out by hand: who runs, what is waited for, and who goes first."""

from __future__ import annotations

import pytest

from memwall.engine.base import Costs, Limits, Preempt, RequestView, State, Step, Work
from memwall.engine.fastswitch import FastSwitch
from memwall.engine.priorities import LeastServed, PriorityTrace, Ranking, make_priorities
from memwall.engine.sequence import Request, Sequence
from memwall.errors import InputError

LIMITS = Limits(token_budget=32, max_sequences=4, page_tokens=16)
COSTS = Costs(seconds_per_token=1.0, seconds_per_page=0.01, seconds_per_step=0.1)


def view(number: int, prompt: int, computed: int = 0, made: int = 0, **changes: object) -> RequestView:
    pages = -(-computed // 16)
    values: dict[str, object] = {
        "id": number, "arrival": float(number), "prompt": prompt, "known": prompt + made, "computed": computed,
        "most_tokens": prompt + 50, "pages": pages, "freeable": pages, **changes,
    }  # fmt: skip
    return RequestView(**values)  # type: ignore[arg-type]


def plan(scheduler: FastSwitch | None = None, **state: object) -> Step:
    values = {"free_pages": 100, "total_pages": 100, "swap_free_pages": 100, "limits": LIMITS, "costs": COSTS, **state}
    return (scheduler or FastSwitch()).plan_step(State(**values), 0.0)  # type: ignore[arg-type]


def decoding(number: int, tokens: int = 32, **changes: object) -> RequestView:
    """One more token than its pages hold: it needs another."""
    return view(number, tokens, tokens, 1, **changes)


def test_a_request_of_higher_priority_takes_the_pages_of_a_lower_one() -> None:
    running = (decoding(1, level=5), decoding(2, level=0))
    step = plan(running=running, waiting=(view(3, 40, level=1),), free_pages=4)
    assert step.preempt == (Preempt(id=1, by="swap", wait=False),)
    assert step.admit == (3,)
    assert {work.id: work.tokens for work in step.work} == {2: 1, 3: 31}


def test_lower_ones_go_on_until_their_room_is_taken() -> None:
    """The first without room ends admission, and runs before anyone below it is let in."""
    running = (decoding(1, level=5),)
    step = plan(running=running, waiting=(view(3, 400, level=1), view(4, 5, level=6)), free_pages=10)
    assert step.preempt == ()
    assert step.admit == ()
    assert step.work == (Work(id=1, tokens=1),)


def test_equal_priorities_set_nobody_aside() -> None:
    step = plan(running=(decoding(1), decoding(2)), waiting=(view(3, 40),), free_pages=2)
    assert step.preempt == ()
    assert step.admit == ()


@pytest.mark.parametrize(("room", "seconds", "by"), [(9, 0.01, "swap"), (1, 0.01, "recompute"), (9, 99.0, "recompute")])
def test_room_and_cost_choose_how(room: int, seconds: float, by: str) -> None:
    costs = Costs(seconds_per_token=1.0, seconds_per_page=seconds)
    step = plan(running=(decoding(1), decoding(2, level=1)), free_pages=1, swap_free_pages=room, costs=costs)
    assert step.preempt == (Preempt(id=2, by=by, wait=False),)


def test_pages_that_are_out_already_make_a_swap_cheaper() -> None:
    costs = Costs(seconds_per_token=1.0, seconds_per_page=10.0)
    for clean, by in ((0, "recompute"), (1, "swap")):
        running = (decoding(1), decoding(2, level=1, clean=clean))
        assert plan(running=running, free_pages=1, costs=costs).preempt[0].by == by


def test_pages_come_in_beside_a_step_that_is_busy() -> None:
    back = decoding(3, 480, level=0)
    step = plan(running=(decoding(1, level=1), decoding(2, level=1)), swapped=(back,))
    assert (step.fetch, step.resume) == ((3,), ())
    assert {work.id for work in step.work} == {1, 2}


def test_a_short_swap_or_one_that_leaves_too_small_a_step_is_waited_for() -> None:
    running = (decoding(1, level=1), decoding(2, level=1))
    short = plan(running=running, swapped=(view(3, 8, 8, 1),))
    assert (short.fetch, short.resume) == ((), (3,))
    assert {work.id for work in short.work} == {1, 2, 3}
    lonely = plan(running=running[:1], swapped=(decoding(3, 480), decoding(4, 480)))
    assert lonely.resume == (3, 4)
    alone = plan(swapped=(decoding(3, 480),))
    assert alone.resume == (3,)
    assert alone.work == (Work(id=3, tokens=1),)


def test_those_under_way_are_waited_for_only_when_nobody_else_computes() -> None:
    arriving = (decoding(3, 480),)
    busy = plan(running=(decoding(1), decoding(2)), arriving=arriving)
    assert (busy.resume, busy.fetch) == ((), ())
    assert {work.id for work in busy.work} == {1, 2}
    idle = plan(arriving=arriving)
    assert idle.resume == (3,)
    assert idle.work == (Work(id=3, tokens=1),)


def test_without_overlap_every_copy_is_waited_for() -> None:
    step = plan(
        FastSwitch(overlap=False), running=(decoding(1, level=5), decoding(2)), swapped=(decoding(3, 480, level=1),),
        free_pages=32,
    )  # fmt: skip
    assert step.preempt == (Preempt(id=1, by="swap", wait=True),)
    assert step.resume == (3,)


def test_a_kept_turn_is_read_where_that_is_cheaper_than_computing() -> None:
    waiting = view(3, 330, restorable=320)
    for seconds, restored in ((0.01, True), (99.0, False)):
        costs = Costs(seconds_per_token=1.0, seconds_per_page=seconds, seconds_per_step=1e-3)
        step = plan(running=(decoding(1), decoding(2)), waiting=(waiting,), costs=costs)
        assert (step.fetch, step.admit) == (((3,), ()) if restored else ((), (3,)))


def test_a_shrunken_budget_leaves_the_first_with_what_there_is() -> None:
    step = plan(running=(view(1, 100, 32, level=0), decoding(2, level=1)), free_pages=-1, total_pages=3)
    assert [one.id for one in step.preempt] == [2]
    assert step.work == (Work(id=1, tokens=16),)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(InputError, match="busy must be 0 to 1"):
        FastSwitch(busy=2.0)
    for bad in ({"frequency": 0.0}, {"frequency": 1.5}, {"levels": 1}, {"keep": 2.0}):
        with pytest.raises(InputError):
            PriorityTrace("random", **bad)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="fair, random, markov and fixed"):
        make_priorities("vip")
    assert make_priorities("fixed") is None


def sequence(number: int, **request: object) -> Sequence:
    return Sequence(id=number, request=Request(prompt=(1,), **request), arrival=0.0, eos=())  # type: ignore[arg-type]


@pytest.mark.parametrize("pattern", ["random", "markov"])
def test_traces_are_the_same_whoever_asks_and_levels_are_equally_likely(pattern: str) -> None:
    first, other = (PriorityTrace(pattern, levels=4, seed=7) for _ in range(2))  # type: ignore[arg-type]
    levels = [first.level(f"c{number}", update) for number in range(40) for update in range(50)]
    assert [other.level(f"c{number}", update) for number in range(40) for update in range(49, -1, -1)] == [
        level for number in range(40) for level in levels[number * 50 : number * 50 + 50][::-1]
    ]
    shares = [levels.count(level) / len(levels) for level in range(4)]
    if pattern == "random":
        assert all(abs(share - 0.25) < 0.05 for share in shares)
    else:
        assert shares[0] > shares[3]  # the first keep theirs longest


def test_markov_priorities_stay_longer_where_they_are_high() -> None:
    def stayed(pattern: str, level: int) -> float:
        trace = PriorityTrace(pattern, levels=4)  # type: ignore[arg-type]
        pairs = [
            (trace.level(f"c{number}", update), trace.level(f"c{number}", update + 1))
            for number in range(100)
            for update in range(30)
        ]
        kept = [later == level for earlier, later in pairs if earlier == level]
        return sum(kept) / len(kept)

    assert stayed("markov", 0) > 0.85
    assert 0.4 < stayed("markov", 3) < 0.7
    assert stayed("random", 0) < 0.4


def test_whoever_had_least_goes_first_and_who_comes_late_is_lifted() -> None:
    fair, ones = LeastServed(), [sequence(1, user="a"), sequence(2, user="b"), sequence(3, user="a")]
    fair.assign(0, ones)
    assert [one.level for one in ones] == [0, 0, 0]
    fair.served(ones[0], 10, 0)
    fair.served(ones[1], 0, 4)
    late = sequence(4, user="c")
    fair.assign(1, [*ones, late])
    assert [one.level for one in [*ones, late]] == [1, 0, 1, 0]
    assert fair.tokens == {"a": 10, "b": 8, "c": 8}


def test_levels_change_with_the_frequency_and_for_newcomers() -> None:
    ranking, ones = Ranking(PriorityTrace("random", frequency=0.1)), [sequence(1)]
    told = [ranking.update(step, ones) for step in range(21)]
    assert [step for step, new in enumerate(told) if new] == [0, 10, 20]
    ranking.newcomers = True
    assert ranking.update(21, ones)
    assert not Ranking(None).update(0, ones)

"""Conversations over caches of their own: a turn goes on from the last one's cache, until somebody needs its room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from memwall.engine import Sampling, Settings, load
from memwall.engine.kept_caches import OwnPages, goes_on
from memwall.engine.own_caches import longest_chunk
from memwall.engine.sequence import Request, Sequence
from memwall.engine.serving import Serving
from memwall.hardware.units import MB
from memwall.memory import Budget, resident_bytes
from memwall.models import DEMO_DIRECTORY
from tests.engine.test_own_caches import CONTEXT, TEXT, check, serving

TURNS = ((0, 150), (150, 200), (200, 207), (207, 300))
MADE = 12


def kept_of(held: Serving) -> OwnPages:
    assert isinstance(held.engine.pages, OwnPages)
    return held.engine.pages


def answer(held: Serving, prompt: list[int], **more: Any) -> Sequence:
    sampling = Sampling(max_new_tokens=MADE, ignore_eos=True)
    one = held.engine.submit(Request(prompt=tuple(prompt), sampling=sampling, **more))
    while held.engine.busy:
        held.engine.step()
        check(held)
    return one


def conversation(held: Serving, **more: Any) -> list[Sequence]:
    """Turns of which each begins with all that was said before."""
    said, found = [0], []
    for begin, end in TURNS:
        said += TEXT[begin:end]
        found.append(answer(held, said, **more))
        said = list(found[-1].tokens)
    return found


def chat(held: Serving, folder: Path = DEMO_DIRECTORY) -> list[list[int]]:
    """The same in one session, which goes on from its own cache."""
    how = held.settings
    settings = Settings(
        weights=how.weights, context_tokens=CONTEXT, threads=1, kv=how.kv, exact=True, segment_tokens=longest_chunk(how)
    )
    session, answers = load(folder, settings), []
    for begin, end in TURNS:
        opening = [0] if begin == 0 else []
        list(session.generate(opening + TEXT[begin:end], Sampling(max_new_tokens=MADE, ignore_eos=True)))
        answers.append(list(session.last.tokens))
    session.release()
    return answers


@pytest.mark.parametrize(
    "policy", ["bfloat16", "kivi(2bit)", "kv4(page=32)", "xquant(4bit)", "lambda(sinks=4,window=96)"]
)
def test_a_conversation_is_that_of_one_session(policy: str) -> None:
    held = serving(policy, keep_prefixes=True)
    held.engine.wanted_pages = 4 * held.pool.limit_pages
    turns = conversation(held)
    assert [list(one.made) for one in turns] == chat(held)
    # all that was there before the turn but the last token made, which nothing was computed of yet
    assert [one.cached for one in turns] == [0, *(len(one.tokens) - 1 for one in turns[:-1])]
    assert len(kept_of(held).kept) == 1, "one conversation, one cache"
    assert held.engine.totals.prefix_hits == sum(one.cached for one in turns)
    held.release()


def test_an_answer_that_is_taken_back_is_cut_off() -> None:
    """Another question after the same beginning: the cache goes back to what both share."""
    held = serving("bfloat16", keep_prefixes=True)
    first = answer(held, [0, *TEXT[:150]])
    other = answer(held, [0, *TEXT[:150], *TEXT[300:320]])
    assert other.cached == 151
    fresh = serving("bfloat16")
    assert list(other.made) == list(answer(fresh, [0, *TEXT[:150], *TEXT[300:320]]).made)
    assert first.cached == 0
    held.release()
    fresh.release()


@pytest.mark.parametrize(
    ("prompt", "salt"),
    [([0, *TEXT[:60], *TEXT[200:300]], b""), ([0, *TEXT[:160]], b"somebody else"), ([0, *TEXT[:8]], b"")],
)
def test_who_shares_little_or_is_somebody_else_reads_it_all(prompt: list[int], salt: bytes) -> None:
    held = serving("kivi(4bit)", keep_prefixes=True)
    held.engine.wanted_pages = 4 * held.pool.limit_pages
    answer(held, [0, *TEXT[:150]])
    assert answer(held, prompt, salt=salt).cached == 0
    assert len(kept_of(held).kept) == 2
    held.release()


def test_kept_caches_give_way() -> None:
    """Nobody waits for memory that only a kept cache has; the longest unused one goes first."""
    held = serving("kivi(4bit)", keep_prefixes=True)
    held.engine.wanted_pages = 2 * held.pool.limit_pages
    kept = kept_of(held)
    begins = [[at, *TEXT[at : at + 150]] for at in range(1, 7)]
    numbers = [answer(held, begin).id for begin in begins]
    assert list(kept.kept) == numbers[-len(kept.kept) :]
    assert 1 < len(kept.kept) < 6
    assert kept.available_pages == held.pool.limit_pages, "all of it can be had"
    again = answer(held, [*begins[-1], *TEXT[:9]])
    assert again.cached == 151
    wanted = [Request(prompt=tuple(TEXT[at : at + 200]), sampling=Sampling(max_new_tokens=20, ignore_eos=True))
              for at in range(40, 48)]  # fmt: skip
    sequences = [held.engine.submit(request) for request in wanted]
    while held.engine.busy:
        held.engine.step()
        check(held)
    assert [one.num_made for one in sequences] == [20] * 8
    assert held.engine.totals.preempted["recompute"] == 0
    held.engine.wanted_pages = 1
    held.engine.fit_limit()
    assert not kept.kept
    assert not held.pool.told()["held_bytes"]
    held.release()


def test_a_budget_that_shrinks_takes_them() -> None:
    held = serving(
        "kivi(4bit)", keep_prefixes=True, headroom_bytes=MB,
        budget=Budget(tiers={"ram": resident_bytes(exact=True) + 60 * MB}),
    )  # fmt: skip
    held.govern()
    for at in range(5):
        answer(held, [at, *TEXT[at : at + 150]])
    before = len(kept_of(held).kept)
    held.set_budget(held.least_budget_bytes() + MB // 4)
    held.govern()
    held.engine.step()
    assert len(kept_of(held).kept) < before
    check(held)
    held.release()


def test_cancelled_requests_and_pruned_prompts_are_not_kept() -> None:
    held = serving("kivi(4bit)", keep_prefixes=True)
    one = held.engine.submit(Request(prompt=tuple(TEXT[:100]), sampling=Sampling(max_new_tokens=50, ignore_eos=True)))
    for _ in range(4):
        held.engine.step()
    held.engine.cancel(one.id)
    assert not kept_of(held).kept
    assert held.pool.told() == {"caches": 0, "held_bytes": 0, "taken_bytes": 0}
    held.release()
    held = serving("snapkv(0.25)", keep_prefixes=True)
    conversation(held)
    assert not kept_of(held).kept
    held.release()


@pytest.mark.parametrize(
    ("policy", "may"),
    [
        ("kivi(2bit)", True), ("lambda(window=64)+kivi(4bit)", True), ("snapkv(0.5)", False),
        ("think(0.4)+kivi(4bit)", False), ("epicache(tokens=100)", False),
    ],
)  # fmt: skip
def test_what_goes_on(policy: str, may: bool) -> None:
    assert goes_on(policy) is may

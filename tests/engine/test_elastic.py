"""A session on a stack of blocks whose budget moves, by call and by signal, between two tokens."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from memwall import engine
from memwall.engine import Sampling, Settings
from memwall.engine.elastic import fill_budget, least_budget_bytes, watch_signals
from memwall.errors import DoesNotFit
from memwall.memory import Budget, resident_bytes
from memwall.models import DEMO_DIRECTORY
from memwall.models.block_stack import BlockStack
from memwall.models.tokenizer import Tokenizer
from memwall.plan import make_plan
from tests.compress.tiny_model import make_model, make_stack

TOKENIZER = Tokenizer.from_directory(DEMO_DIRECTORY)
PROMPT = TOKENIZER.encode("The history of the city begins", add_bos=True)
GREEDY = Sampling(max_new_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("stack")
    model = make_model(place / "source", hidden_size=256, intermediate_size=512, num_hidden_layers=2)
    return make_stack(model, place / "out")


@pytest.fixture
def session(folder: Path) -> Iterator[engine.Session]:
    settings = Settings(weights="saved", context_tokens=128, segment_tokens=16)
    loaded = engine.load(folder, settings, tokenizer=TOKENIZER)
    list(loaded.generate(PROMPT, GREEDY))  # what a first run brings into the process
    loaded.reset()
    yield loaded
    loaded.release()


def stack_of(session: engine.Session) -> BlockStack:
    stack = session.decoder.weights.stack
    assert stack is not None
    return stack


def test_the_budget_moves_blocks_and_is_never_passed(session: engine.Session) -> None:
    stack, most = stack_of(session), stack_of(session).most_blocks
    whole = least_budget_bytes(session) + stack.nbytes + 2_000_000
    session.set_budget(whole)
    assert stack.num_blocks == most
    numbers = []
    for share in (0.5, 0.1, 0.8, 0.0, 1.0):
        budget = int(whole - (1 - share) * stack.nbytes_of(most) - 2_000_000 * (share < 1))
        session.set_budget(budget)
        assert resident_bytes(exact=True) <= budget
        list(session.generate(PROMPT, GREEDY))
        assert len(session.last.tokens) == 24
        assert resident_bytes(exact=True) <= budget
        session.reset()
        numbers.append(stack.num_blocks)
    assert numbers[3] < numbers[1] < numbers[0] < numbers[2] < numbers[4] == most


def test_a_session_that_moved_says_what_a_fresh_one_does(session: engine.Session, folder: Path) -> None:
    stack = stack_of(session)
    least = least_budget_bytes(session)
    session.set_budget(least + stack.nbytes // 2)
    session.set_budget(least + stack.nbytes_of(stack.most_blocks) // 3)
    list(session.generate(PROMPT, GREEDY))
    settings = Settings(weights=f"stack-{stack.num_blocks}", context_tokens=128, segment_tokens=16)
    fresh = engine.load(folder, settings, tokenizer=TOKENIZER)
    list(fresh.generate(PROMPT, GREEDY))
    assert 0 < stack.num_blocks < stack.most_blocks
    assert session.last.tokens == fresh.last.tokens
    for one in (session, fresh):
        one.reset()
    np.testing.assert_array_equal(session.prefill(PROMPT).copy(), fresh.prefill(PROMPT))
    fresh.release()


def test_a_budget_too_small_changes_nothing(session: engine.Session) -> None:
    stack, before = stack_of(session), stack_of(session).num_blocks
    with pytest.raises(DoesNotFit, match="the smallest that does is"):
        session.set_budget(1_000_000)
    assert stack.num_blocks == before
    session.ask_budget(1_000_000)  # from a signal there is nobody to tell: the least that can be kept to
    list(session.generate(PROMPT, GREEDY))
    assert stack.num_blocks == 0
    assert session.budget_bytes is not None
    assert session.budget_bytes > 1_000_000


def test_signals_move_it_between_tokens(session: engine.Session) -> None:
    stack = stack_of(session)
    session.set_budget(least_budget_bytes(session) + stack.nbytes + 2_000_000)
    first = session.budget_bytes
    before = {name: signal.getsignal(name) for name in (signal.SIGUSR1, signal.SIGUSR2)}
    watch_signals(session)
    try:
        seen = []
        for count, _ in enumerate(session.generate(PROMPT, Sampling(max_new_tokens=40, ignore_eos=True))):
            if count == 3:
                os.kill(os.getpid(), signal.SIGUSR1)
            if count == 8:
                os.kill(os.getpid(), signal.SIGUSR2)
            seen.append(stack.num_blocks)
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
    assert seen[0] == seen[-1] == stack.most_blocks
    assert min(seen) < stack.most_blocks
    assert session.budget_bytes == first


def test_a_plan_takes_as_many_blocks_as_fit(folder: Path) -> None:
    """More memory, more blocks; the plan's bytes are what loading then holds."""
    least = make_plan(folder, weights="stack-0", kv="float16", context=64, measure=False, profile=False)
    whole = make_plan(folder, weights="saved", kv="float16", context=64, measure=False, profile=False)
    low, high = least.peak_bytes["ram"], whole.peak_bytes["ram"]
    found = []
    for share in (0.02, 0.4, 0.7, 1.0):
        budget = Budget(tiers={"ram": int(low + share * (high - low)) + 4096})
        plan = make_plan(folder, budget=budget, kv="float16", context=64, measure=False, profile=False)
        assert plan.peak_bytes["ram"] <= budget.tiers["ram"]
        found.append(plan.choice.weights)
    assert found[-1] == "saved"
    numbers = [int(choice.removeprefix("stack-")) for choice in found[:-1]]
    assert numbers == sorted(set(numbers))
    with pytest.raises(DoesNotFit, match="with weights stack-0"):
        make_plan(folder, budget=Budget(tiers={"ram": low - 200_000}), context=64, measure=False, profile=False)


def test_what_the_plan_left_is_filled(folder: Path) -> None:
    settings = Settings(weights="stack-0", context_tokens=64, segment_tokens=16)
    probe = engine.load(folder, settings, tokenizer=TOKENIZER)
    room = least_budget_bytes(probe) + 300_000 + stack_of(probe).nbytes_of(10)
    probe.release()
    session = engine.load(folder, settings, budget=Budget(tiers={"ram": room + 8_000_000}), tokenizer=TOKENIZER)
    fill_budget(session)
    assert stack_of(session).num_blocks > 10
    assert resident_bytes(exact=True) <= room + 8_000_000
    session.release()

"""A session on a stack of blocks whose budget moves, by call and by signal, between two tokens."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from memwall import engine
from memwall.engine import Sampling, Settings
from memwall.engine.elastic import fill_budget, least_budget_bytes, watch_signals
from memwall.errors import DoesNotFit
from memwall.memory import Budget, resident_bytes
from memwall.models import DEMO_DIRECTORY, ModelConfig
from memwall.models.block_stack import BlockStack
from memwall.models.precision import resolve
from memwall.models.stack_index import StackIndex
from memwall.models.tokenizer import Tokenizer
from memwall.plan.predict import ModelSpace
from memwall.plan.search import Candidate, Goal, search
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
    for share in (0.4, 0.0, 0.7, 0.0, 3.0):
        # the least moves with the process; a quarter of a megabyte is for what a run adds to it
        budget = min(least_budget_bytes(session) + int(share * stack.nbytes_of(most)) + 250_000, whole)
        session.set_budget(budget)
        assert resident_bytes(exact=True) <= budget
        list(session.generate(PROMPT, GREEDY))
        assert len(session.last.tokens) == 24
        assert resident_bytes(exact=True) <= budget
        session.reset()
        numbers.append(stack.num_blocks)
    assert numbers[3] < numbers[0] < numbers[2] <= numbers[4] == most
    assert numbers[1] < numbers[0]


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
        seen, sent = [stack.num_blocks], 0
        for _ in session.generate(PROMPT, Sampling(max_new_tokens=60, ignore_eos=True)):
            seen.append(stack.num_blocks)
            for number, name in enumerate((signal.SIGUSR1, signal.SIGUSR2), 1):
                if sent == number - 1 and len(session.last.tokens) > 12 * number:
                    os.kill(os.getpid(), name)
                    sent = number
                    break
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
    assert seen[0] == stack.num_blocks == stack.most_blocks
    assert min(seen) < stack.most_blocks
    assert session.budget_bytes == first


def test_a_plan_takes_as_many_blocks_as_fit() -> None:
    """The demo model's shapes with a made-up order: each budget gets the longest first part that fits."""
    config = ModelConfig.from_directory(DEMO_DIRECTORY)
    names = [tensor.name for tensor in config.tensors() if tensor.role == "linear"]
    random = np.random.default_rng(0)
    order = [int(at) for _ in range(15) for at in random.permutation(len(names))]
    stack = StackIndex.from_info({"tensors": names, "rank": 4, "order": order})
    saved = {**resolve(config, "float16"), **stack.specs(len(order))}
    space = ModelSpace(config, saved=saved, stack=stack, runtime_bytes=50_000_000)
    goal = Goal(budget={}, kv="float16", context=64)

    def peak(weights: str) -> int:
        return space.peak_bytes(candidates(replace(goal, weights=weights))[0].choice)["ram"]

    def candidates(asked: Goal) -> list[Candidate]:
        return search(space, asked)

    for blocks in (0, 1, 100, 555, len(order) - 1):
        budget = {"ram": peak(f"stack-{blocks}")}
        best = candidates(replace(goal, budget=budget))[0]
        assert best.peak_bytes["ram"] <= budget["ram"]
        number = int(best.choice.weights.removeprefix("stack-"))
        assert number >= blocks
        assert peak(f"stack-{number + 1}" if number + 1 < len(order) else "saved") > budget["ram"]
    assert candidates(replace(goal, budget={"ram": peak("saved")}))[0].choice.weights == "saved"
    with pytest.raises(DoesNotFit, match="with weights stack-0"):
        candidates(replace(goal, budget={"ram": peak("stack-0") - 1}))


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

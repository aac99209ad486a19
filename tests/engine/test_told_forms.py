"""Answers in a form, penalties and bias where other processes draw: the tokens of one process."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from memwall.engine.base import Shares
from memwall.engine.call_grammar import form_walker
from memwall.engine.executor import Entry
from memwall.engine.guide import Guide, TokenTable
from memwall.engine.phase_loading import PhaseSettings
from memwall.engine.phase_process import entry_message, entry_of
from memwall.engine.sampling import Sampling
from memwall.engine.sequence import Request, Sequence
from memwall.engine.serving import Serving, ServingSettings, load_engine
from memwall.engine.told_forms import MOST_CURSORS, ToldForms
from memwall.engine.workers import ForkedWorkers
from memwall.errors import InputError
from memwall.memory import Budget, resident_bytes
from memwall.models import DEMO_DIRECTORY, ModelConfig
from memwall.models.tokenizer import Tokenizer
from tests.engine.phased_loads import HALVES

needs_linux = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
TOKENIZER = Tokenizer.from_directory(DEMO_DIRECTORY)
CONFIG = ModelConfig.from_directory(DEMO_DIRECTORY)
TABLE = TokenTable(TOKENIZER, CONFIG.vocab_size, CONFIG.eos_token_ids)
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "n": {"type": "integer", "minimum": 3, "maximum": 40}},
    "required": ["name", "n"],
}


def guide_of(spec: dict[str, Any]) -> Guide:
    return Guide(form_walker(spec), TABLE, json.dumps(spec))


def requests() -> list[Request]:
    guide, found = guide_of({"schema": SCHEMA}), []
    prompt = tuple(TOKENIZER.encode("The history of the city begins with a river. " * 2))
    for number in range(6):
        told: dict[str, Any] = {"max_new_tokens": 60, "temperature": 0.9 * (number % 2), "seed": number}
        if number >= 4:
            told |= {"frequency_penalty": 1.5, "presence_penalty": 0.5, "bias": ((300, 2.0),)}
        form = guide if number < 4 else None
        logprobs = 1 if number == 1 else None
        found.append(Request(prompt=prompt[number:], sampling=Sampling(**told), guide=form, logprobs=logprobs))
    return found


def made(serving: Serving, kill_at: int = 0) -> list[list[int]]:
    asked, steps = [serving.engine.submit(request) for request in requests()], 0
    while serving.engine.busy:
        serving.govern()
        serving.engine.step()
        steps += 1
        if kill_at and steps in (kill_at, 2 * kill_at):
            os.kill(serving.workers.pids[steps // kill_at], signal.SIGKILL)  # type: ignore[union-attr]
    return [list(one.made) for one in asked]


def start(phases: PhaseSettings | None) -> Serving:
    settings = ServingSettings(
        weights="int8", context_tokens=200, token_budget=64, max_sequences=4, threads=2, phases=phases
    )
    return load_engine(DEMO_DIRECTORY, settings, tokenizer=TOKENIZER)


@needs_linux
@pytest.mark.parametrize("phases", [PhaseSettings(shares=HALVES), PhaseSettings.apart(2)], ids=["one memory", "two"])
def test_tokens_are_those_of_one_process_even_where_workers_are_lost(phases: PhaseSettings) -> None:
    alone = start(None)
    expected = made(alone)
    alone.release()
    for tokens in expected[:4]:
        value = json.loads(TOKENIZER.decode(tokens))
        assert 3 <= value["n"] <= 40
    serving = start(phases)
    assert made(serving) == expected
    assert made(serving, kill_at=9) == expected
    assert serving.workers.lost == 2  # type: ignore[union-attr]
    with pytest.raises(InputError, match="told as text"):
        serving.engine.check(Request(prompt=(1,), guide=Guide(form_walker({"schema": {}}), TABLE)))
    serving.release()


def test_what_is_told_is_what_was_asked() -> None:
    request = requests()[5]
    one = Sequence(id=7, request=request, arrival=0.0, eos=())
    one.tokens = [*request.prompt, 11, 12, 13]
    first = len(one.tokens) - 1
    told = json.loads(json.dumps(entry_message(Entry(one, first, 1, True), 0.5)))
    found = entry_of(told)
    assert found.sequence.tokens[request.prompt.__len__() :] == [11, 12, 13]
    assert found.sequence.num_prompt == len(request.prompt)
    assert found.sequence.request.sampling.bias == request.sampling.bias
    assert found.sequence.request.sampling.bends
    assert "bend" not in entry_message(Entry(one, first, 1, False), None)


def test_forms_are_made_once_and_bounded() -> None:
    calls: list[int] = []

    def table() -> TokenTable:
        calls.append(1)
        return TABLE

    forms = ToldForms(table)
    spec = json.dumps({"schema": SCHEMA})
    guide = forms.guide(spec)
    assert forms.guide(spec) is guide
    assert calls == [1]
    cursor = forms.cursor(1, guide)
    assert forms.cursor(1, guide) is cursor
    for number in range(2, MOST_CURSORS + 2):
        forms.cursor(number, guide)
    assert forms.cursor(1, guide) is not cursor


@needs_linux
def test_without_room_for_more_workers_requests_come_first(caplog: pytest.LogCaptureFixture) -> None:
    settings = ServingSettings(
        weights="int8", context_tokens=200, token_budget=64, max_sequences=4, threads=1,
        phases=PhaseSettings(shares=HALVES),
    )  # fmt: skip
    room = resident_bytes() + 10**9  # the process of the tests may have grown
    serving = load_engine(DEMO_DIRECTORY, settings, budget=Budget(tiers={"ram": room}), tokenizer=TOKENIZER)
    workers = serving.workers
    assert isinstance(workers, ForkedWorkers)
    pages, before = serving.engine.wanted_pages, workers.pids
    workers.reserve_bytes = room
    serving.govern()
    assert serving.engine.wanted_pages > pages // 2
    workers.switch(Shares(prefill=30, decode=70))
    assert (workers.shares.prefill, workers.preparing, workers.pids) == (30, None, before)
    assert len(made(serving)) == 6
    serving.set_budget(3 * room)
    workers.switch(Shares(prefill=70, decode=30))
    assert workers.preparing is not None
    # where even that does not help, somebody is told
    serving.budget_bytes = 50 * 10**6
    for _ in range(2):
        serving.govern()
    assert sum("no room for a request of the whole context" in text for text in caplog.messages) == 1
    serving.release()

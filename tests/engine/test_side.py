"""One phase by itself: batches as in an engine, pages in and out as bytes, and its own budget."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from memwall.engine.executor import Entry
from memwall.engine.phase_process import entry_message, outputs_of
from memwall.engine.sampling import Sampling
from memwall.engine.sequence import Request, Sequence
from memwall.engine.side import Side, SideSettings
from memwall.errors import BudgetExceeded
from memwall.models import DEMO_DIRECTORY
from tests.engine.test_workers import start

SETTINGS = SideSettings(
    model=str(DEMO_DIRECTORY), weights="int8", context_tokens=400, token_budget=64, max_sequences=8, threads=1,
    contexts=3,
)  # fmt: skip


def test_a_prompt_on_one_side_and_its_tokens_on_another() -> None:
    prompt = tuple(random.Random(2).randrange(3, 4000) for _ in range(50))
    request = Request(prompt=prompt, sampling=Sampling(max_new_tokens=6, ignore_eos=True))
    alone = start(None)
    expected = alone.engine.submit(request)
    while alone.engine.busy:
        alone.engine.step()
    alone.release()
    first, then = Side(SETTINGS), Side(SETTINGS)
    one = Sequence(id=1, request=request, arrival=0.0, eos=())
    one.pages, data = [5, 6, 7, 8], None
    moved = [(5, 40, 4)]
    for side, pulls in [(first, []), (then, moved), *[(then, [])] * 4]:
        if pulls:
            data, one.pages = first.read([(5, 4)]), [40, 41, 42, 43]
        entry = Entry(one, one.computed, len(one.tokens) - one.computed, True)
        answer = side.run({"entries": [entry_message(entry, None)], "pulls": pulls}, data if pulls else None)
        output = outputs_of(answer)[0]
        assert output is not None
        one.computed = len(one.tokens)
        one.tokens.append(output.token)
    assert list(one.made) == list(expected.made)


def test_a_side_alone_reads_and_writes_pages_as_bytes() -> None:
    one = Side(SETTINGS)
    draw = random.Random(1)
    assert one.describe()["pages"] == 75
    for page in (3, 4, 9):
        one.pool.page(page)[...] = draw.randrange(256)
    data = one.read([(3, 2), (9, 1)])
    answer = one.run({"entries": [], "pulls": [(3, 20, 2), (9, 7, 1)]}, data)
    assert answer["outputs"] == []
    assert answer["pulled"][0] == data.nbytes == 3 * one.pool.page_bytes
    assert (one.pool.page(21) == one.pool.page(4)).all()
    assert (one.pool.page(7) == one.pool.page(9)).all()


def test_a_budget_that_holds_no_request_is_refused() -> None:
    with pytest.raises(BudgetExceeded):
        Side(replace(SETTINGS, memory_bytes=30_000_000))

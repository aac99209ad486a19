"""A planned batch on the demo model makes what each prompt gives alone, with pages of prefixes that end anywhere."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from memwall.engine import Sampling, Settings, load
from memwall.engine.batch import _Segment, group_pieces
from memwall.engine.batchllm import BatchLLM, BatchPlan, Room, plan_alone, plan_batch
from memwall.engine.fcfs import FirstComeFirstServed
from memwall.engine.offline import OfflineRun
from memwall.engine.prefix_tree import Prompts
from memwall.engine.sequence import Request
from memwall.engine.serving import Serving, ServingSettings, load_engine
from memwall.models import DEMO_DIRECTORY
from memwall.models.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_directory(DEMO_DIRECTORY)
TEXTS = [
    "The history of the city begins with a small harbour on the river, where ships from the north came to trade.",
    "In the spring the water rose and the people moved to the hills, where they built the first walls of stone.",
]
ENDS = ["", " It is said that", " The king", " The people of the town were", " They had a long road"]
PROMPTS = [TOKENIZER.encode(text + end) for end in ENDS for text in TEXTS] + [TOKENIZER.encode("A single word")] * 2
MADE = [5 + 3 * (number % 4) for number in range(len(PROMPTS))]


def serving(**changes: object) -> Serving:
    settings = {
        "weights": "float32", "context_tokens": 64, "token_budget": 32, "threads": 1, "shared_prefixes": True,
        "keep_prefixes": False, **changes,
    }  # fmt: skip
    return load_engine(DEMO_DIRECTORY, ServingSettings(**settings), tokenizer=TOKENIZER, scheduler=BatchLLM())  # type: ignore[arg-type]


def run(held: Serving, plan: BatchPlan, *num_pages: int) -> dict[int, list[int]]:
    """num_pages: the pool's limit, or several in turn."""
    limits = itertools.cycle(num_pages)
    made: dict[int, list[int]] = {number: [] for number in range(len(PROMPTS))}

    def request(number: int) -> Request:
        sampling = Sampling(max_new_tokens=MADE[number], ignore_eos=True)
        return Request(prompt=tuple(PROMPTS[number]), sampling=sampling)

    run = OfflineRun(held.engine, plan, [len(p) for p in PROMPTS], request, lambda number: MADE[number])
    for step in itertools.takewhile(lambda _: not run.done, itertools.count()):
        if step % 4 == 0:
            held.engine.wanted_pages = next(limits)
        for number, event in run.step():
            if event.token is not None:
                made[number].append(event.token)
    return made


def planned() -> BatchPlan:
    return plan_batch(Prompts.of(PROMPTS), MADE, room=Room(page_tokens=16, pages=5, outputs=MADE))


@pytest.fixture(scope="module")
def alone() -> dict[int, list[int]]:
    session = load(DEMO_DIRECTORY, Settings(weights="float32", context_tokens=64, threads=1), tokenizer=TOKENIZER)
    made = {}
    for number, prompt in enumerate(PROMPTS):
        session.reset()
        list(session.generate(prompt, Sampling(max_new_tokens=MADE[number], ignore_eos=True)))
        made[number] = list(session.last.tokens)
    session.release()
    return made


@pytest.mark.parametrize("num_pages", [5, 9, 60])
def test_a_planned_batch_makes_what_each_prompt_gives_alone(num_pages: int, alone: dict[int, list[int]]) -> None:
    held, plan = serving(), planned()
    assert {group.prefix % 16 for group in plan.groups if group.prefix} - {0}  # prefixes end inside a page
    assert run(held, plan, num_pages) == alone
    assert held.engine.totals.computed_prompt_tokens == plan.sharing.physical
    assert held.pool.peak_pages <= num_pages
    assert held.pool.used_pages == 0
    held.release()


def test_first_come_first_served_with_kept_prefixes_makes_the_same(alone: dict[int, list[int]]) -> None:
    held = serving(keep_prefixes=True)
    held.engine.scheduler = FirstComeFirstServed()
    plan = planned()
    assert run(held, plan_alone(Prompts.of(PROMPTS)), 60) == alone
    assert held.engine.totals.computed_prompt_tokens > plan.sharing.physical
    held.release()


def test_a_prefix_that_was_moved_by_a_smaller_budget_is_still_read(alone: dict[int, list[int]]) -> None:
    held = serving()
    assert run(held, planned(), 7, 30, 5) == alone
    assert held.engine.totals.preempted["recompute"] > 0
    held.release()


def test_rows_that_share_are_one_piece_of_their_prefix_unless_a_window_sees_other_parts_of_it() -> None:
    prefix, other = np.array([4, 6], np.int32), np.array([8], np.int32)
    own = [np.array([page], np.int32) for page in (10, 12, 14, 16)]
    segments = [
        _Segment(3, 1, 0, own[0], 20, prefix),  # rows before 3 belong to requests by themselves
        _Segment(4, 4, 2, own[1], 20, prefix),
        _Segment(8, 1, 5, own[2], 19, prefix),  # after one token less
        _Segment(9, 2, 0, own[3], 7, other),
    ]
    tables, mine, shared = group_pieces(segments, 3, 11, windowed=False)
    assert tables.tolist() == [10, 4, 6, 12, 14, 16, 8]
    assert mine.tolist() == [[0, 1, 0, 1, 0], [1, 4, 3, 6, 2], [5, 1, 4, 6, 5], [6, 2, 5, 2, 0]]
    assert shared.tolist() == [[0, 5, 1, 20, 20], [5, 1, 1, 19, 24], [6, 2, 6, 7, 7]]
    _, mine, shared = group_pieces(segments, 6, 11, windowed=True)
    assert mine.tolist()[0] == [0, 2, 0, 6, 4]
    assert shared.tolist() == [[0, 2, 1, 20, 24], [2, 1, 1, 19, 24], [3, 2, 5, 7, 7]]


def test_packed_weights_make_the_same_in_groups(alone: dict[int, list[int]]) -> None:
    held = serving(weights="int8")
    first = run(held, planned(), 60)
    again = run(held, planned(), 9)
    assert [len(first[number]) for number in first] == MADE
    assert sum(first[number] == again[number] for number in first) >= len(first) - 1  # sums of a prefix may tie
    held.release()

"""The two-tier area: what was written comes back in any order of use, and copies are few; turns go out early."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.engine import Sampling
from memwall.engine.nanoflow import NanoFlow
from memwall.engine.sequence import Request
from memwall.engine.serving import Serving, ServingSettings, load_engine
from memwall.engine.staged import StagedArea, _stretches
from memwall.engine.swap import SwapArea
from memwall.engine.switching import SwitchSettings
from memwall.memory import Arena, Ledger, PagePool
from memwall.models import DEMO_DIRECTORY

PAGE = 64


def area(host_pages: int, block: int = 4, capacity: int = 64) -> tuple[PagePool, StagedArea, Arena]:
    arena = Arena(1 << 24, Ledger())
    pool = PagePool("kv/pages", page_bytes=PAGE, most_pages=64, arena=arena)
    pool.take("kv", 64)
    made = StagedArea(pool, capacity, arena=arena, host_bytes=host_pages * PAGE, staging_bytes=block * PAGE)
    return pool, made, arena


def fill(pool: PagePool, page: int, value: int) -> None:
    pool.run(page, 1)[:] = value


@settings(max_examples=60, deadline=None)
@given(
    host=st.sampled_from([0, 4, 12, 64]),
    moves=st.lists(
        st.tuples(
            st.booleans(), st.lists(st.integers(0, 63), min_size=1, max_size=20, unique=True), st.integers(0, 40)
        ),
        max_size=20,
    ),
)
def test_what_was_written_last_comes_back(host: int, moves: list[tuple[bool, list[int], int]]) -> None:
    pool, made, _ = area(host)
    places = made.take(64)
    held: dict[int, int] = {}
    value = 0
    for writes, pages, first in moves:
        at = places[first : first + len(pages)]
        pages = pages[: len(at)]
        if writes:
            for page, place in zip(pages, at, strict=True):
                value = (value + 1) % 251
                fill(pool, page, value)
                held[place] = value
            made.write(pages, at).run()
        else:
            known = [(page, place) for page, place in zip(pages, at, strict=True) if place in held]
            for page, _ in known:
                fill(pool, page, 255)
            made.read([place for _, place in known], [page for page, _ in known]).run()
            assert [int(pool.run(page, 1)[5]) for page, _ in known] == [held[place] for _, place in known]
    made.release()


def test_the_tiers_by_hand() -> None:
    pool, made, arena = area(host_pages=8)  # two blocks of four in memory
    assert {row.owner for row in arena.ledger.rows()} >= {"kv/host", "kv/staging"}
    places = made.take(12)
    for page in range(12):
        fill(pool, page, 10 + page)
    made.write(range(12), places).run()
    assert made.counts.evicted_pages == 4  # the first block, which was not used longest
    order = [11, 3, 7, 1]
    made.read(places[:4], order).run()
    assert made.counts.disk_pages == 4
    made.read(places[8:12], [20, 22, 24, 26]).run()
    assert made.counts.host_pages == 4
    assert [int(pool.run(page, 1)[0]) for page in (*order, 20, 26)] == [10, 11, 12, 13, 18, 21]
    made.release()
    assert not {row.owner for row in arena.ledger.rows() if row.nbytes} & {"kv/host", "kv/staging", "kv/swap"}


def test_an_emptied_area_keeps_nothing_in_memory_that_would_make_the_file_grow() -> None:
    _, made, arena = area(host_pages=4)  # one block in memory
    places = made.take(12)
    made.write(range(4), places[8:]).run()
    made.drop(places)
    made.empty()
    made.write(range(4), made.take(4)).run()  # would have moved the old block to the end of the file
    assert made._file is not None
    assert os.fstat(made._file.fileno()).st_size == 0
    assert arena.ledger.total("disk") == 4 * PAGE
    made.release()


def test_what_was_dropped_is_not_written_to_the_file() -> None:
    pool, made, _ = area(host_pages=4)  # one block in memory
    places = made.take(12)
    for page in range(4):
        fill(pool, page, 10 + page)
    made.write(range(4), places[:4]).run()
    late = made.read(places[:1], [30])  # asked for before the drop, done after it
    made.drop([places[0], places[1], places[3]])
    made.write(range(4, 8), places[4:8]).run()
    assert made.counts.evicted_pages == 2
    made.read(places[2:3], [31]).run()
    late.run()
    assert [int(pool.run(page, 1)[0]) for page in (30, 31)] == [10, 12]
    made.drop(places[4:8])
    made.write(range(8, 12), places[8:12]).run()
    assert made.counts.evicted_pages == 2
    made.release()


def test_scattered_pages_are_one_copy_where_places_lie_in_a_line() -> None:
    pool, made, arena = area(host_pages=0, block=64)
    plain = SwapArea(pool, 64, arena=arena, merge=False)
    pages = list(np.random.default_rng(0).permutation(64)[:40])
    assert made.write(pages, made.take(40)).count == 1
    assert plain.write(pages, plain.take(40)).count == 40
    assert _stretches([1, 2, 3, 7, 9, 10]) == [(1, 4), (7, 8), (9, 11)]


def talk(held: Serving, turns: int = 3) -> tuple[list[list[int]], int]:
    text: tuple[int, ...] = tuple(range(8, 60))
    made = []
    for _ in range(turns):
        request = Request(
            prompt=text, sampling=Sampling(temperature=0.0, max_new_tokens=40, ignore_eos=True), session="one"
        )
        one = held.engine.submit(request)
        while held.engine.busy:
            held.engine.step()
        made.append(list(one.made))
        text = (*text, *one.made, 9, 10, 11)
    return made, held.engine.totals.computed_prompt_tokens


@pytest.mark.parametrize("host", [0, 1 << 20], ids=["disk", "host and disk"])
def test_turns_go_out_as_they_are_made_and_come_back(host: int) -> None:
    def serving(**switch: Any) -> Serving:
        told = {"weights": "int8", "context_tokens": 512, "max_sequences": 4, "token_budget": 32, "ahead": True}
        settings = ServingSettings(**told, keep_prefixes=False, swap_bytes=1 << 24, switch=SwitchSettings(**switch))  # type: ignore[arg-type]
        return load_engine(DEMO_DIRECTORY, settings, scheduler=NanoFlow())

    kept = serving(keep_turns=True, reuse=True, early=True, staged=True, host_bytes=host, group_pages=16)
    texts, computed = talk(kept)
    counts = kept.engine.switch.counts
    assert counts.early_pages > 0
    assert counts.restored_tokens > 0
    assert counts.steps_during > 0 or counts.out_copies > 0
    kept.release()
    plain = serving(keep_turns=True, reuse=True)  # the same pages, one copy each, once a turn is over
    assert talk(plain)[0] == texts
    assert plain.engine.switch.counts.early_pages == 0
    plain.release()
    forgetful = serving()
    assert talk(forgetful)[1] > 1.5 * computed
    forgetful.release()

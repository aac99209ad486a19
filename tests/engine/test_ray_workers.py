"""Workers as Ray actors in a local cluster of several processes: the same tokens as one process, also after a loss."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace

import pytest

from memwall.engine.apart import ApartEngine
from memwall.engine.base import Limits
from memwall.engine.distserve import DistServe
from memwall.engine.kv_pages import KVPages
from memwall.engine.ray_workers import RayWorkers
from memwall.errors import DoesNotFit, InputError
from memwall.memory import PagePool
from tests.engine.test_side import SETTINGS
from tests.engine.test_workers import requests, start, tokens_of

ray = pytest.importorskip("ray", reason="needs ray: pip install 'memwall[ray]'")
pytestmark = pytest.mark.slow
LIMITS = Limits(token_budget=64, max_sequences=8, page_tokens=16)


@pytest.fixture(scope="module")
def expected() -> list[tuple[int, ...]]:
    alone = start(None)
    found = tokens_of(alone)
    alone.release()
    return found


@pytest.fixture(scope="module")
def workers(expected: list[tuple[int, ...]]) -> Iterator[RayWorkers]:
    made = RayWorkers({"prefill": SETTINGS, "decode": SETTINGS})
    yield made
    made.release()


def engine(workers: RayWorkers) -> ApartEngine:
    pages = [
        KVPages(PagePool("kv", page_bytes=told["page_bytes"], most_pages=told["pages"]), 16, keep_prefixes=False)
        for told in (workers.told["prefill"], workers.told["decode"])
    ]
    return ApartEngine(
        DistServe(), workers, pages[1], limits=LIMITS, context_tokens=400, front_pages=pages[0], front_limits=LIMITS
    )


def served(made: ApartEngine, kill: list[tuple[int, int]] | None = None) -> list[tuple[int, ...]]:
    """kill: (step, pid)."""
    sequences, steps, left = [made.submit(request) for request in requests()], 0, list(kill or [])
    while made.busy:
        made.step()
        steps += 1
        if left and steps >= left[0][0]:
            os.kill(left.pop(0)[1], signal.SIGKILL)
    assert all(one.finish == "length" for one in sequences)
    assert made.pages.pool.used_pages == made.front.pages.pool.used_pages == 0
    return [tuple(one.made) for one in sequences]


def test_tokens_are_those_of_one_process(workers: RayWorkers, expected: list[tuple[int, ...]]) -> None:
    made = engine(workers)
    assert served(made) == expected
    assert made.moves.requests == 10
    assert made.moves.nbytes > 0
    assert len({os.getpid(), *workers.pids}) == 3
    assert not workers.draws


def test_an_actor_that_is_killed_costs_no_request(workers: RayWorkers, expected: list[tuple[int, ...]]) -> None:
    lost = workers.lost
    made = engine(workers)
    assert served(made, [(6, workers.told["prefill"]["pid"]), (16, workers.told["decode"]["pid"])]) == expected
    assert workers.lost == lost + 2
    assert made.totals.preempted["recompute"] > 0


def test_a_cluster_without_free_cores_says_so(workers: RayWorkers) -> None:
    with pytest.raises(InputError, match="0 cores free, but the workers take 2"):
        RayWorkers({"prefill": SETTINGS, "decode": SETTINGS})


def test_a_cluster_whose_actors_have_no_room_says_so(workers: RayWorkers) -> None:
    workers.release()  # their cores too
    small = replace(SETTINGS, memory_bytes=30_000_000)
    with pytest.raises(DoesNotFit, match="the prefill actor: runtime needs"):
        RayWorkers({"prefill": small, "decode": SETTINGS})

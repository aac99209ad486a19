"""A server with two workers, over real sockets: answers as with one, figures, a lost worker, and a clean end."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.serve.conftest import Running, Starter

OPTIONS = ("--memory", "220MB", "--weights", "int8", "--context", "512")
PROMPTS = [f"{'The history of the city begins with a river. ' * (1 + n % 4)} Chapter {n}" for n in range(8)]

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")


def answers(server: Running) -> list[str]:
    client, model = server.client(), server.told["model"]

    def ask(number: int) -> str:
        made = client.completions.create(
            model=model, prompt=PROMPTS[number], max_tokens=24, temperature=0.7 * (number % 2), seed=number
        )
        return made.choices[0].text

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(ask, range(len(PROMPTS))))


def lives(pid: int) -> bool:
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())  # empty for one that only waits to be reaped
    except OSError:
        return False


@pytest.fixture(scope="module")
def phased(starter: Starter) -> Running:
    return starter(*OPTIONS, "--scheduler", "semi-pd", "--slo-first", "0.2", "--slo-token", "0.01")


def test_answers_are_those_of_one_worker(phased: Running, server: Running) -> None:
    assert answers(phased) == answers(server)


def test_figures_name_the_workers(phased: Running) -> None:
    told = phased.told["shares"]
    assert (told["prefill"], told["decode"]) == (80, 100)
    memory = phased.memory()
    assert memory["phases"]["processes"][0] == told["processes"][0]
    assert memory["resident_bytes"] <= memory["budget_bytes"]
    assert any(row["owner"] == "workers" and row["bytes"] > 0 for row in memory["ledger"])
    assert 'memwall:phase_share_percent{phase="prefill"}' in phased.get("/metrics").text


def test_a_worker_that_is_killed_costs_no_request(phased: Running) -> None:
    before = phased.memory()["phases"]["lost"]
    for _ in range(2):
        os.kill(phased.memory()["phases"]["processes"][1], signal.SIGKILL)
        assert all(answers(phased))
    assert phased.memory()["phases"]["lost"] > before


@pytest.mark.parametrize("scheduler", ["nexus", "distserve"])
def test_the_budget_moves_and_nothing_is_left_behind(starter: Starter, scheduler: str) -> None:
    server = starter(*OPTIONS, "--scheduler", scheduler)
    assert server.told["shares"]["decode"] == (50 if scheduler == "nexus" else 100)  # of one thread
    before = answers(server)
    smaller = int(server.get("/v1/budget").json()["budget_bytes"] * 0.95)
    assert server.post("/v1/budget", {"memory": str(smaller)}).status_code == 200
    assert answers(server) == before
    processes = server.memory()["phases"]["processes"]
    server.end()
    deadline = time.monotonic() + 60
    while any(map(lives, processes)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(lives, processes))


@pytest.fixture(scope="module")
def apart(starter: Starter) -> Running:
    return starter(*OPTIONS, "--scheduler", "distserve")


def test_two_memories_give_the_same_answers_and_say_what_they_hold(apart: Running, server: Running) -> None:
    assert answers(apart) == answers(server)
    assert apart.told["shares"]["prefill_kv_tokens"] >= 512
    memory = apart.memory()
    told = memory["phases"]["apart"]
    assert told["moved"]["requests"] == len(PROMPTS)
    assert told["moved"]["nbytes"] > 0
    assert told["offered"] == 0
    assert 16 <= told["batch_tokens"] <= 256
    assert any(row["owner"] == "kv/prefill" and row["bytes"] > 0 for row in memory["ledger"])
    assert memory["resident_bytes"] <= memory["budget_bytes"]
    metrics = apart.get("/metrics").text
    assert "memwall:prompts_handed_over_total" in metrics
    assert "memwall:prefill_cache_usage_perc" in metrics


def test_either_process_may_be_killed_and_no_request_is_lost(apart: Running) -> None:
    for place in (1, 2):
        os.kill(apart.memory()["phases"]["processes"][place], signal.SIGKILL)
        assert all(answers(apart))
    assert apart.memory()["phases"]["lost"] == 2

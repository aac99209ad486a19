"""A server whose requests have a cache each: answers whatever runs beside them, the budget kept and moved."""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.serve.conftest import Running, Starter
from tests.serve.test_guard import peak_bytes, wait_until
from tests.serve.test_slots import asked, text_of

BUDGET = 140_000_000


@pytest.fixture(scope="module")
def pruned(starter: Starter) -> Running:
    return starter(
        "--memory", str(BUDGET), "--weights", "int8", "--context", "512", "--kv", "snapkv(0.25)+kivi(2bit)",
        "--queue", "64",
    )  # fmt: skip


def test_answers_do_not_depend_on_who_runs_beside(pruned: Running) -> None:
    alone = [text_of(pruned.post("/v1/completions", asked(number))) for number in range(16)]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda number: text_of(pruned.post("/v1/completions", asked(number))), range(16)))
    assert together == alone
    assert pruned.told["kv"] == "snapkv(0.25)+kivi(bits=2)"


def test_it_tells_of_caches(pruned: Running) -> None:
    text_of(pruned.post("/v1/completions", asked(5)))
    told = pruned.memory()["pool"]
    assert told["caches"]["caches"] == 0
    assert told["caches"]["held_bytes"] == told["committed_bytes"] == 0
    metrics = pruned.get("/metrics").text
    assert re.search(r'memwall:cache_pool\{what="caches"\} 0.0', metrics)
    assert float(re.findall(r"^memwall:memory_plan_error_ratio (\S+)", metrics, re.M)[0]) == pytest.approx(0, abs=0.03)


def test_the_budget_is_kept_and_moves(pruned: Running) -> None:
    least = pruned.get("/v1/budget").json()["least_bytes"]
    answers: list[str] = []
    body = asked(3, max_tokens=200)
    threads = [
        threading.Thread(target=lambda: answers.append(text_of(pruned.post("/v1/completions", body))))
        for _ in range(12)
    ]
    for one in threads:
        one.start()
    running = wait_until(pruned, lambda m: m["queue"]["running"] > 4)
    assert running["pool"]["caches"]["caches"] > 4
    owners = {row["owner"]: row["bytes"] for row in running["ledger"]}
    assert sum(nbytes for owner, nbytes in owners.items() if owner.startswith("kv")) > 0
    assert pruned.post("/v1/budget", {"memory": least + 1_000_000}).status_code == 200
    shrunk = wait_until(pruned, lambda m: m["pool"]["limit_pages"] < running["pool"]["limit_pages"] // 2)["pool"]
    assert shrunk["committed_bytes"] <= shrunk["limit_pages"] * shrunk["page_bytes"]
    assert pruned.post("/v1/budget", {"memory": BUDGET}).status_code == 200
    for one in threads:
        one.join()
    assert len(answers) == 12
    refused = pruned.post("/v1/budget", {"memory": 50_000_000})
    assert refused.status_code == 400
    assert peak_bytes(pruned.process.pid) <= BUDGET


def test_a_client_that_goes_away_frees_its_cache(pruned: Running) -> None:
    before = pruned.memory()["totals"]["finished"].get("cancelled", 0)
    body = asked(1, max_tokens=400, stream=True)
    with httpx.stream("POST", pruned.url + "/v1/completions", json=body, timeout=60) as answer:
        next(answer.iter_lines())
    found = wait_until(pruned, lambda m: m["totals"]["finished"].get("cancelled", 0) > before)
    assert found["pool"]["caches"]["caches"] == 0


def test_texts_are_embedded(pruned: Running) -> None:
    body = {"input": ["The river", "The history of the city " * 20]}
    found = pruned.post("/v1/embeddings", body).json()["data"]
    assert len(found) == 2
    assert all(len(one["embedding"]) == 256 for one in found)

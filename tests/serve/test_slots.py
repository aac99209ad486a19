"""A server whose requests have slots of addresses: the same answers, the budget kept and moved, what it tells."""

from __future__ import annotations

import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.serve.conftest import Running, Starter
from tests.serve.test_guard import peak_bytes, wait_until

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memfd is Linux's")
BUDGET = 120_000_000


@pytest.fixture(scope="module")
def slots(starter: Starter) -> Running:
    return starter(
        "--memory", str(BUDGET), "--weights", "int8", "--context", "512", "--kv", "vattention(page_kib=4)",
        "--queue", "64",
    )  # fmt: skip


def asked(number: int, **changes: Any) -> dict[str, Any]:
    words = " ".join(f"word{(number * 7 + i) % 97}" for i in range(10 + 3 * number))
    return {"prompt": words, "max_tokens": 40 + number, "temperature": 0, "ignore_eos": True, **changes}


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def test_answers_are_the_paged_server_s(server: Running, slots: Running) -> None:
    def ask(number: int) -> tuple[str, str]:
        body = asked(number)
        return text_of(server.post("/v1/completions", body)), text_of(slots.post("/v1/completions", body))

    with ThreadPoolExecutor(12) as pool:
        for theirs, ours in pool.map(ask, range(24)):
            assert theirs == ours
    assert slots.told["kv"] == "vattention(page_kib=4)"


def test_texts_are_embedded_alike(server: Running, slots: Running) -> None:
    body = {"input": ["The river", "The history of the city " * 20]}
    theirs, ours = (one.post("/v1/embeddings", body).json()["data"] for one in (server, slots))
    assert [one["embedding"] for one in ours] == [one["embedding"] for one in theirs]


def test_it_tells_of_slots_and_of_what_is_mapped(slots: Running) -> None:
    text_of(slots.post("/v1/completions", asked(5)))
    found = slots.memory()
    told = found["pool"]["slots"]
    assert told["slots"] == 16
    assert told["mapped_in_steps"] > 0
    assert found["pool"]["page_bytes"] == 16 * 4096
    assert sum(length for _, length in found["pool"]["cells"]) * found["pool"]["stride"] >= found["pool"]["limit_pages"]
    mapped = sum(row["bytes"] for row in found["ledger"] if row["owner"].startswith("kv/mapped"))
    assert mapped == found["pool"]["committed_bytes"]
    metrics = slots.get("/metrics").text
    assert re.search(r'memwall:slot_pool\{what="active_slots"\} 0.0', metrics)
    assert float(re.findall(r"^memwall:memory_plan_error_ratio (\S+)", metrics, re.M)[0]) == pytest.approx(0, abs=0.03)


def test_the_budget_is_kept_and_moves(slots: Running) -> None:
    least = slots.get("/v1/budget").json()["least_bytes"]
    first = slots.get("/v1/budget").json()["pages"]
    alone = text_of(slots.post("/v1/completions", asked(3, max_tokens=300)))
    answers: list[str] = []
    threads = [
        threading.Thread(
            target=lambda: answers.append(text_of(slots.post("/v1/completions", asked(3, max_tokens=300))))
        )
        for _ in range(12)
    ]
    for one in threads:
        one.start()
    wait_until(slots, lambda m: m["queue"]["running"] > 4)
    assert slots.post("/v1/budget", {"memory": least + 2_000_000}).status_code == 200
    shrunk = wait_until(slots, lambda m: m["pool"]["limit_pages"] < first // 2)["pool"]
    assert shrunk["committed_bytes"] <= shrunk["limit_pages"] * shrunk["page_bytes"]
    assert slots.post("/v1/budget", {"memory": BUDGET}).status_code == 200
    for one in threads:
        one.join()
    assert answers == [alone] * 12
    wait_until(slots, lambda m: m["pool"]["limit_pages"] > shrunk["limit_pages"])
    refused = slots.post("/v1/budget", {"memory": 50_000_000})
    assert refused.status_code == 400
    assert "the smallest that does is" in refused.json()["error"]["message"]
    assert peak_bytes(slots.process.pid) <= BUDGET
    assert slots.memory()["resident_peak_bytes"] <= BUDGET


def test_a_client_that_goes_away_frees_its_slot(slots: Running) -> None:
    body = asked(1, max_tokens=400, stream=True)
    before = slots.memory()["totals"]["finished"].get("cancelled", 0)
    with httpx.stream("POST", slots.url + "/v1/completions", json=body, timeout=60) as answer:
        next(answer.iter_lines())
    found = wait_until(slots, lambda m: m["totals"]["finished"].get("cancelled", 0) > before)
    assert found["pool"]["slots"]["active_slots"] == 0
    assert found["pool"]["tenants"].get("kv", 0) == 0

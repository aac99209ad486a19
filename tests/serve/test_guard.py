"""Who may come in, how much they may bring, and what happens when they leave."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serve.conftest import Running, Starter

ROUTES = (
    "/", "/memory", "/health", "/ping", "/metrics", "/version", "/v1/models", "/v1/models/demo", "/v1/completions",
    "/v1/chat/completions", "/v1/budget", "/tokenize", "/detokenize", "/nothing",
)  # fmt: skip
BUDGET = 120_000_000


@pytest.fixture(scope="module")
def tight(starter: Starter) -> Running:
    """Little memory and a short queue."""
    return starter(
        "--memory", str(BUDGET), "--weights", "int4", "--context", "512", "--max-sequences", "8", "--queue", "40",
        "--drain-seconds", "1",
    )  # fmt: skip


def stream_to(server: Running, body: dict[str, object]) -> socket.socket:
    """A request sent by hand, whose answer is not read."""
    raw = json.dumps(body).encode()
    made = socket.create_connection(("127.0.0.1", server.port))
    made.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(raw), raw)
    )
    return made


def wait_until(server: Running, holds: Callable[[dict[str, Any]], bool], seconds: float = 120.0) -> dict[str, Any]:
    end = time.monotonic() + seconds
    while True:
        found = server.memory()
        if holds(found):
            return found
        assert time.monotonic() < end, found["queue"]
        time.sleep(0.002)  # 480 tokens may be made within a tenth of a second


def test_a_key_guards_every_route(starter: Starter) -> None:
    server = starter("--memory", "160MB", "--weights", "int4", "--api-key", "s3cret", key="s3cret")
    for path in ROUTES:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic !!"}):
            assert server.get(path, headers=headers).status_code == 401, path
            assert server.post(path, {}, headers=headers).status_code == 401, path
    assert server.client().models.list().data[0].id == "demo"
    basic = base64.b64encode(b"any:s3cret").decode()
    assert server.get("/", headers={"authorization": f"Basic {basic}"}).status_code == 200
    server.end()


def test_foreign_names_and_foreign_pages_stay_out(tight: Running) -> None:
    assert tight.get("/memory", headers={"host": "evil.example"}).status_code == 421
    answer = httpx.post(tight.url + "/v1/budget", content=b'{"memory": "1GB"}', headers={"content-type": "text/plain"})
    assert answer.status_code == 415


def test_bodies_have_a_size(tight: Running) -> None:
    answer = tight.post("/v1/completions", {"prompt": "a" * 3_000_000})
    assert answer.status_code == 413

    def pieces() -> Iterator[bytes]:
        for _ in range(60):
            yield b"a" * 50_000

    headers = {"content-type": "application/json"}
    chunked = httpx.post(tight.url + "/v1/completions", content=pieces(), headers=headers, timeout=30)
    assert chunked.status_code == 413
    assert tight.get("/health").status_code == 200


def test_a_client_that_goes_frees_its_pages(tight: Running) -> None:
    before = tight.memory()["totals"]["finished"].get("cancelled", 0)
    for stream in (True, False):
        gone = stream_to(tight, {"prompt": "A long story", "max_tokens": 480, "stream": stream, "ignore_eos": True})
        wait_until(tight, lambda m: m["queue"]["running"] == 1)
        gone.close()
        wait_until(tight, lambda m: m["queue"]["running"] == 0)
    found = tight.memory()
    assert found["totals"]["finished"]["cancelled"] == before + 2
    assert found["pool"]["tenants"].get("kv", 0) == 0


def test_a_reader_that_does_not_read_holds_nobody_up(tight: Running) -> None:
    slow = [
        stream_to(tight, {"prompt": "Slow", "max_tokens": 400, "stream": True, "ignore_eos": True, "logprobs": 20})
        for _ in range(2)
    ]
    quick = tight.client().completions.create(model="demo", prompt="Quick", max_tokens=20, temperature=0)
    assert quick.usage is not None
    assert quick.usage.completion_tokens > 0
    wait_until(tight, lambda m: m["queue"]["running"] == 0)  # the engine ends them, read or not
    for one in slow:
        one.close()


def test_a_full_queue_says_so(tight: Running) -> None:
    ask = {"prompt": "Some words", "max_tokens": 200, "ignore_eos": True, "temperature": 0}
    with ThreadPoolExecutor(80) as pool:
        answers = list(pool.map(lambda _: tight.post("/v1/completions", ask), range(80)))
    codes = [answer.status_code for answer in answers]
    assert set(codes) == {200, 429}
    assert codes.count(200) >= 40
    assert all(answer.headers["retry-after"] for answer in answers if answer.status_code == 429)
    texts = {answer.json()["choices"][0]["text"] for answer in answers if answer.status_code == 200}
    assert len(texts) == 1


def peak_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no peak")


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the peak is read from /proc")
def test_the_budget_is_never_crossed_under_a_burst(tight: Running) -> None:
    def ask(number: int) -> int:
        words = " ".join(f"word{(number * 7 + i) % 97}" for i in range(20 + number % 60))
        body = {
            "prompt": words,
            "max_tokens": 60 + number,
            "ignore_eos": True,
            "stream": number % 2 == 0,
            "logprobs": 3,
        }
        return tight.post("/v1/completions", body).status_code

    with ThreadPoolExecutor(48) as pool:
        codes = list(pool.map(ask, range(96)))
    assert codes.count(200) >= 40
    assert set(codes) <= {200, 429}
    found = tight.memory()
    assert found["totals"]["preempted"] or found["pool"]["peak_pages"] > 60
    assert peak_bytes(tight.process.pid) <= BUDGET
    assert "torch" not in Path(f"/proc/{tight.process.pid}/maps").read_text()
    assert found["resident_peak_bytes"] <= BUDGET


def test_the_budget_moves_while_requests_run_and_none_fails(tight: Running) -> None:
    least = tight.get("/v1/budget").json()["least_bytes"]
    first = tight.get("/v1/budget").json()["pages"]
    ask = {"max_tokens": 300, "ignore_eos": True, "temperature": 0}
    alone = tight.post("/v1/completions", {"prompt": "The river", **ask}).json()["choices"][0]["text"]
    answers: list[httpx.Response] = []
    threads = [
        threading.Thread(target=lambda: answers.append(tight.post("/v1/completions", {"prompt": "The river", **ask})))
        for _ in range(12)
    ]
    for one in threads:
        one.start()
    wait_until(tight, lambda m: m["queue"]["running"] > 4)
    told = tight.post("/v1/budget", {"memory": least + 2_000_000})
    assert told.status_code == 200
    shrunk = wait_until(tight, lambda m: m["pool"]["limit_pages"] < first // 2)["pool"]["limit_pages"]
    os.kill(tight.process.pid, signal.SIGUSR1)  # already near the least: stays there
    wait_until(tight, lambda m: m["budget_bytes"] <= least + 2_000_000)
    assert tight.post("/v1/budget", {"memory": BUDGET}).status_code == 200
    for one in threads:
        one.join()
    assert [answer.status_code for answer in answers] == [200] * 12
    assert {answer.json()["choices"][0]["text"] for answer in answers} == {alone}
    # less than at first where the heap has grown meanwhile, which the budget counts too
    wait_until(tight, lambda m: m["pool"]["limit_pages"] > shrunk)
    os.kill(tight.process.pid, signal.SIGUSR1)
    wait_until(tight, lambda m: m["budget_bytes"] < BUDGET)
    for _ in range(3):
        os.kill(tight.process.pid, signal.SIGUSR2)
        time.sleep(0.1)
    wait_until(tight, lambda m: m["budget_bytes"] == BUDGET)
    for wrong in ({"memory": "2g"}, {"memory": 1}, {}, {"memory": [1]}):
        assert tight.post("/v1/budget", wrong).status_code == 400


def test_the_end_lets_requests_finish_or_hands_back_what_there_is(starter: Starter) -> None:
    server = starter("--memory", "160MB", "--weights", "int4", "--context", "1024", "--drain-seconds", "2")
    answers: dict[str, httpx.Response] = {}

    def ask(name: str, tokens: int, copies: int) -> None:
        body = {"prompt": ["The river"] * copies, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
        answers[name] = server.post("/v1/completions", body)

    threads = [
        threading.Thread(target=ask, args=("short", 8, 1)),
        threading.Thread(target=ask, args=("long", 1000, 16)),
    ]
    threads[0].start()
    wait_until(server, lambda m: m["queue"]["running"] >= 1 or m["totals"]["finished"])
    threads[1].start()
    wait_until(server, lambda m: m["queue"]["running"] + m["queue"]["waiting"] >= 16)
    server.process.send_signal(signal.SIGTERM)
    for one in threads:
        one.join()
    assert {name: answer.status_code for name, answer in answers.items()} == {"short": 200, "long": 200}
    assert answers["short"].json()["usage"]["completion_tokens"] == 8
    assert 0 < answers["long"].json()["usage"]["completion_tokens"] <= 16000
    assert server.process.wait(30) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url + "/health")


def test_an_address_that_cannot_be_had_is_bad_input(tight: Running) -> None:
    command = [sys.executable, "-m", "memwall", "serve", "demo", "--weights", "int4", "--port", str(tight.port)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    taken = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert taken.returncode == 2
    assert taken.stderr.strip().splitlines()[-1].startswith(f"memwall: cannot listen on 127.0.0.1:{tight.port}: ")
    assert "--port" in taken.stderr
    assert "Traceback" not in taken.stderr


def test_a_thousand_connections_leave_the_others_alone(tight: Running) -> None:
    """More than it takes are told so or wait; those that send nothing hold nobody up, and all can come again."""
    with httpx.Client(base_url=tight.url, timeout=60) as first:
        assert first.get("/health").status_code == 200
        open_ones = []
        try:
            for _ in range(1000):
                made = socket.create_connection(("127.0.0.1", tight.port), timeout=30)
                made.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n")  # and never ends its head
                open_ones.append(made)
            assert first.get("/v1/models").status_code in (200, 503)
        finally:
            for made in open_ones:
                made.close()
    wait_until(tight, lambda m: m["queue"]["running"] == 0)
    assert tight.post("/v1/completions", {"prompt": "The river", "max_tokens": 4}).status_code == 200


@pytest.mark.parametrize(
    "raw", [b'{"prompt": "\xff\xfe"}', b'{"prompt": "a"', b"[" * 5000, b"\x00", b'{"prompt": NaN}']
)
def test_bodies_that_are_no_json_are_bad_input(tight: Running, raw: bytes) -> None:
    answer = httpx.post(tight.url + "/v1/completions", content=raw, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("the body ")

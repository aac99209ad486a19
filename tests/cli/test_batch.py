"""`memwall batch`: answers in order, bad lines, runs that are killed and go on, exit statuses."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORDS = ["the", "of", "city", "king", "water", "hills", "stone", "people", "trade", "ships", "north", "spring", "road"]
OPTIONS = ("--weights", "int8", "--context", "512", "--threads", "1")
Memwall = Callable[..., Any]


def request(number: int, text: str, **body: Any) -> dict[str, Any]:
    chat = number % 2
    asked = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    return {
        "custom_id": f"r{number}", "method": "POST", "url": "/v1/chat/completions" if chat else "/v1/completions",
        "body": {"model": "demo", "max_tokens": 6, "temperature": 0, **asked, **body},
    }  # fmt: skip


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def batch(count: int, seed: int = 0, **body: Any) -> list[Any]:
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(WORDS, k=60)) for _ in range(4)]
    return [request(i, f"{texts[i // 2 % 4]} {draw.choice(WORDS)} {i}", **body) for i in range(count)]


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def texts(path: Path) -> dict[str, Any]:
    found = {}
    for line in answers(path):
        choices = line["response"]["body"]["choices"]
        found[line["custom_id"]] = [one["message"]["content"] if "message" in one else one["text"] for one in choices]
    return found


def test_a_batch_is_answered_in_order_and_its_sharing_told(memwall: Memwall, tmp_path: Path) -> None:
    source, target = write(tmp_path / "in.jsonl", batch(24)), tmp_path / "out.jsonl"
    done = memwall("batch", "demo", source, target, *OPTIONS, "--json")
    assert done.exit_code == 0, done.stderr
    lines = answers(target)
    assert [line["custom_id"] for line in lines] == [f"r{i}" for i in range(24)]
    assert all(line["error"] is None and line["response"]["status_code"] == 200 for line in lines)
    assert {line["response"]["body"]["object"] for line in lines} == {"chat.completion", "text_completion"}
    report = json.loads(done.stdout)
    assert (report["lines"], report["answered"], report["errors"]) == (24, 24, 0)
    assert report["computed_prompt_tokens"] == report["planned_prompt_tokens"] < report["prompt_tokens"] / 2
    assert report["prompt_tokens"] == sum(line["response"]["body"]["usage"]["prompt_tokens"] for line in lines)
    assert report["sharing"]["groups"] == 8  # 4 texts in 2 forms
    assert report["steps"]["tokens_5th_percentile"] <= report["steps"]["mean_tokens"]
    assert report["prefix_bytes"]["peak"] == max(held for _, held in report["prefix_bytes"]["curve"]) > 0
    assert any(row["owner"] == "batch/prompts" for row in report["ledger"])


def test_both_schedulers_give_the_same_answers(memwall: Memwall, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", batch(12, n=2))
    for scheduler in ("batchllm", "fcfs"):
        done = memwall(
            "batch", "demo", source, tmp_path / f"{scheduler}.jsonl", "--weights", "float32", *OPTIONS[2:],
            "--scheduler", scheduler, "--quiet",
        )  # fmt: skip
        assert done.exit_code == 0, done.stderr
    first = texts(tmp_path / "batchllm.jsonl")
    assert first == texts(tmp_path / "fcfs.jsonl")
    assert all(len(choices) == 2 for choices in first.values())


BAD: list[tuple[Any, str]] = [
    ("{broken", "not JSON"),
    ({**request(90, "x"), "custom_id": "r0"}, "is that of line 1 already"),
    ({**request(91, "x"), "url": "/v1/images"}, "a batch knows"),
    (request(92, "x", stream=True), "stream is for servers"),
    (request(93, "x", tools=[{}]), "tool 0 must be"),
    (request(94, "word " * 3000), "context"),
    (request(95, "x", model="other"), "is not here"),
    (request(96, "x", temprature=1), "did you mean temperature"),
]


def test_bad_lines_become_error_lines_and_the_rest_is_answered(memwall: Memwall, tmp_path: Path) -> None:
    good = batch(3)
    source = write(tmp_path / "in.jsonl", [*good[:2], *(line for line, _ in BAD), good[2]])
    target = tmp_path / "out.jsonl"
    for attempt in range(2):  # the second time all good ones are there already
        done = memwall("batch", "demo", source, target, *OPTIONS, "--json")
        assert done.exit_code == 1, done.stderr
        report = json.loads(done.stdout)
        assert (report["answered"], report["kept"], report["errors"]) == ((3, 0, len(BAD)), (0, 3, len(BAD)))[attempt]
        lines = answers(target)
        assert [line["error"] is None for line in lines] == [True, True, *[False] * len(BAD), True]
        for number, (line, (_, message)) in enumerate(zip(lines[2:-1], BAD), 3):
            assert line["error"]["message"].startswith(f"line {number}: ")
            assert message in line["error"]["message"]
            assert line["response"] is None
        assert [line["custom_id"] for line in lines[2:5]] == [None, "r0", "r91"]


def test_what_ends_at_once(memwall: Memwall, tmp_path: Path) -> None:
    source, target = write(tmp_path / "in.jsonl", batch(1)), tmp_path / "out.jsonl"
    other = write(tmp_path / "other.jsonl", ["my notes"])
    empty = write(tmp_path / "empty.jsonl", ["", ""])
    for arguments, status, message in [
        ((tmp_path / "none", target), 2, "there is no such file"),
        ((source, source), 2, "cannot be one file"),
        ((source, other), 2, "no answer of a batch"),
        ((empty, target), 2, "no requests in it"),
        ((write(tmp_path / "bad.jsonl", ["{"]), tmp_path / "bad-out.jsonl"), 2, "the first error: line 1: "),
        ((tmp_path, target), 2, "is a folder"),
        ((source, target, "--memory", "30MB"), 1, "do not fit|does not fit|needs|fits"),
        ((source, target, "--scheduler", "lifo"), 2, ""),
    ]:
        done = memwall("batch", "demo", *arguments)
        assert done.exit_code == status, (arguments, done.stderr)
        assert not target.exists(), "a file was made for nothing"
        assert message.split("|")[0] in done.stderr or any(part in done.stderr for part in message.split("|"))
    assert other.read_text() == "my notes\n"
    assert answers(tmp_path / "bad-out.jsonl")[0]["error"]


def test_stop_texts_end_an_answer(memwall: Memwall, tmp_path: Path) -> None:
    lines = batch(2, max_tokens=40)
    memwall("batch", "demo", write(tmp_path / "a.jsonl", lines), tmp_path / "whole.jsonl", *OPTIONS, "--quiet")
    whole = texts(tmp_path / "whole.jsonl")["r0"][0]
    stop = whole[5:8]
    source = write(tmp_path / "b.jsonl", batch(2, max_tokens=40, stop=[stop]))
    done = memwall("batch", "demo", source, tmp_path / "cut.jsonl", *OPTIONS, "--json")
    assert done.exit_code == 0
    cut = answers(tmp_path / "cut.jsonl")[0]["response"]["body"]["choices"][0]
    assert cut["text"] == whole[: whole.index(stop)]
    assert cut["finish_reason"] == "stop"


def spawn(source: Path, target: Path, *more: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "memwall", "batch", "demo", str(source), str(target), *OPTIONS, *more]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("how", "status"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_run_that_was_ended_goes_on_where_it_was(memwall: Memwall, tmp_path: Path, how: int, status: int) -> None:
    source, target = write(tmp_path / "in.jsonl", batch(160, max_tokens=60)), tmp_path / "out.jsonl"
    process = spawn(source, target, "--step-tokens", "16")
    deadline = time.monotonic() + 120
    while (not target.exists() or target.read_bytes().count(b"\n") < 5) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(how)
    _, told = process.communicate(timeout=60)
    assert process.returncode == status, told
    left = target.read_bytes()
    assert 5 <= left.count(b"\n") < 160
    before = {line["custom_id"]: line for line in map(json.loads, left.splitlines()[: left.count(b"\n")])}
    with target.open("ab") as file:  # what a kill in the middle of a write leaves
        file.write(b'{"id": "batch_req_12", "custom_id": "r1')
    done = memwall("batch", "demo", source, target, *OPTIONS, "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["kept"] == len(before)
    assert report["answered"] == 160 - len(before)
    lines = answers(target)
    assert [line["custom_id"] for line in lines] == [f"r{i}" for i in range(160)]
    assert all(before.get(line["custom_id"], line) == line for line in lines)


def test_memory_stays_inside_the_budget(tmp_path: Path) -> None:
    source, target = write(tmp_path / "in.jsonl", batch(200, max_tokens=40)), tmp_path / "out.jsonl"
    process = spawn(source, target, "--memory", "110MB", "--json")
    told, wrong = process.communicate(timeout=300)
    assert process.returncode == 0, wrong
    report = json.loads(told)
    assert report["peak_resident_bytes"] <= report["budget_bytes"] == 110_000_000
    assert report["computed_prompt_tokens"] == report["planned_prompt_tokens"] or report["preempted"]

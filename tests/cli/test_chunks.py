"""`memwall run --chunks`: kept chunks serve the next run, answers agree with a plain prompt, refusals are in words."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

NAMES = ("Maria", "Oscar", "falcon")
NUMBERS = ("48213", "70412", "31764")
FILLERS = (
    "The harbour of the old town was built by merchants who came from the north with ships full of timber and salt. ",
    "Rain fell on the mountains for many days, and the river rose until it reached the first houses of the valley. ",
    "A new theatre was opened in the spring; its first play told of a king who had lost his way in the forest. ",
)
ASK = "What is the secret number of {0}? The secret number of {0} is"
SHORT = ("--max-new-tokens", "6", "--weights", "float16")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for index, (name, number) in enumerate(zip(NAMES, NUMBERS)):
        text = f"{FILLERS[index] * 2}\nThe secret number of {name} is {number}.\n{FILLERS[index]}"
        (folder / f"{index}.txt").write_text(text)
    (folder / "picture.png").write_bytes(b"\x89PNG")
    return folder


def ask(memwall: Any, texts: Path, *more: str | Path, name: str = "Maria") -> dict[str, Any]:
    store = texts.parent / "store"
    result = memwall(
        "run", "demo", ASK.format(name), "--chunks", texts, "--chunk-store", store, *SHORT, "--json", *more
    )
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_the_next_run_computes_the_question_alone(memwall: Any, texts: Path) -> None:
    first, again = ask(memwall, texts), ask(memwall, texts)
    assert NUMBERS[0] in first["text"]
    assert again["text"] == first["text"]
    (before,), (after,) = first["answers"], again["answers"]
    assert before["computed_share"] == 1
    assert after["computed_share"] < 0.2
    assert [chunk["kept"] for chunk in before["chunks"]] == [False] * 3
    assert [(chunk["kept"], chunk["repaired"]) for chunk in after["chunks"]] == [(True, 0)] * 3
    assert [Path(chunk["source"]).name for chunk in after["chunks"]] == ["0.txt", "1.txt", "2.txt"]
    assert again["loaded_tokens"] + again["prompt_tokens"] == first["prompt_tokens"]
    assert after["loaded_bytes"] > 0


def test_the_best_chunks_in_another_order_are_repaired(memwall: Any, texts: Path) -> None:
    ask(memwall, texts)
    found = ask(memwall, texts, "--chunk-top", "2", "--chunk-policy", "cache-craft(alpha=0.5,stop=0)", name="falcon")
    assert NUMBERS[2] in found["text"]
    assert found["alpha"] == 0.5
    (answer,) = found["answers"]
    assert Path(answer["chunks"][0]["source"]).name == "2.txt"
    assert len(answer["chunks"]) == 2
    assert all(chunk["kept"] for chunk in answer["chunks"])
    assert 0 < answer["chunks"][0]["repaired"] < answer["chunks"][0]["tokens"]
    assert 0 < answer["computed_share"] < 0.9


def test_each_line_is_a_question_and_memory_keeps_chunks_between_them(memwall: Any, texts: Path) -> None:
    arguments = ("run", "demo", "--chunks", texts, "--chunk-store", texts.parent / "store", *SHORT)
    questions = "\n".join(ASK.format(name) for name in (*NAMES[:2], NAMES[0]))
    result = memwall(*arguments, "--budget", "ram=4GB,disk=50MB,disk_rate=100MB/s", input=questions)
    assert result.exit_code == 0, result.stderr
    for number in NUMBERS[:2]:
        assert number in result.stdout
    assert "emulated" in result.stderr
    assert "3 of 3 chunks were kept, 0 of their tokens repaired" in result.stderr
    assert "chunks/ram" in result.stderr


def test_a_coded_cache_takes_them(memwall: Any, texts: Path) -> None:
    for _ in range(2):
        found = ask(memwall, texts, "--kv", "kivi(4bit)")
        assert NUMBERS[0] in found["text"]
    assert found["answers"][0]["computed_share"] < 0.2


def test_the_budget_holds(spawn: Any, texts: Path) -> None:
    arguments = (
        "run",
        "demo",
        ASK.format("Maria"),
        "--chunks",
        texts,
        "--chunk-store",
        texts.parent / "store",
        "--json",
    )
    for _ in range(2):
        done = spawn(*arguments, "--memory", "110MB", "--max-new-tokens", "4")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["peak_resident_bytes"] <= 110e6
    refused = spawn(*arguments, "--memory", "60MB")
    assert refused.returncode == 1


def test_a_disk_bound_is_kept_and_said(memwall: Any, texts: Path) -> None:
    store = texts.parent / "store"
    found = ask(memwall, texts, "--budget", "disk=1MB")
    assert NUMBERS[0] in found["text"]
    assert sum(path.stat().st_size for path in store.glob("*.chunk")) <= 1e6


def test_a_full_disk_does_not_cost_the_answer(memwall: Any, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    result = memwall(
        "run", "demo", ASK.format("Maria"), "--chunks", texts, "--chunk-store", texts.parent / "store", *SHORT
    )
    assert result.exit_code == 0
    assert NUMBERS[0] in result.stdout
    assert "not kept" in result.stderr


def test_refusals_are_in_words(memwall: Any, texts: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "file").write_text("no folder")
    chunks, kept = ("--chunks", texts), ("--chunk-store", store)
    for arguments, says in (
        (chunks, "--chunk-store DIR"),
        (kept, "--chunks PATH"),
        (("--chunk-top", "2"), "--chunks PATH"),
        (("--chunk-policy", "cache-craft(alpha=1)"), "--chunks PATH"),
        ((*chunks, *kept, "--chunk-policy", "cache-craft(gamma=1)"), "gamma"),
        ((*chunks, *kept, "--chunk-policy", "kivi"), "cache-craft"),
        ((*chunks, *kept, "--kv", "snapkv(0.5)"), "--kv snapkv(0.5)"),
        ((*chunks, *kept, "--chat"), "--chat"),
        ((*chunks, *kept, "--save-cache", tmp_path / "c"), "--save-cache"),
        ((*chunks, *kept, "--context", "50"), "fewer chunks"),
        (("--chunks", tmp_path / "none", *kept), "none: cannot be read"),
        (("--chunks", tmp_path / "empty", *kept), "no text files"),
        (("--chunks", tmp_path / "binary.txt", *kept), "binary.txt: is not text"),
        ((*chunks, "--chunk-store", tmp_path / "file"), "file: must be a folder"),
        ((*chunks, *chunks, *chunks, *kept), "--chunk-top"),
    ):
        result = memwall("run", "demo", "Why?", *SHORT, *arguments)
        assert result.exit_code == 2, (arguments, result.stderr)
        assert says in result.stderr, (arguments, result.stderr)
        assert "Traceback" not in result.stderr


def test_a_damaged_or_foreign_chunk_is_named(memwall: Any, texts: Path, model: Path) -> None:
    ask(memwall, texts)
    store = texts.parent / "store"
    path = sorted(store.glob("*.chunk"))[0]
    data = path.read_bytes()
    run = ("run", "demo", ASK.format("Maria"), "--chunks", texts, "--chunk-store", store, *SHORT)
    for changed in (
        data[:-8],
        data[:50],
        b"junk" * 99,
        data[: len(data) // 2] + bytes(64) + data[len(data) // 2 + 64 :],
    ):
        path.write_bytes(changed)
        result = memwall(*run)
        assert result.exit_code == 2
        assert path.name in result.stderr
    path.write_bytes(data)
    other = memwall(*run[:-1], "int8")
    assert other.exit_code == 2
    assert "made with 'float16' weights" in other.stderr
    assert memwall(*run[:-2]).exit_code == 0  # left to memwall, they are taken from the store
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-6}))
    foreign = memwall("run", model, *run[2:])
    assert foreign.exit_code == 2
    assert "another model" in foreign.stderr
    assert memwall(*run).exit_code == 0

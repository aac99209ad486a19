"""`memwall run`: what is the model and what the prompt, the JSON object, streams, budgets, turns."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from memwall.cli.run import parse_budget, parse_context, split_positionals
from memwall.errors import InputError
from memwall.kv.saved import num_shared

SHORT = ("--weights", "int4", "--kv", "float16", "--max-new-tokens", "6", "--ignore-eos")


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (None, None, ("demo", None)),
        ("demo", None, ("demo", None)),
        ("demo", "hello", ("demo", "hello")),
        ("somewhere", "hello", ("somewhere", "hello")),
        ("Once upon a time", None, ("demo", "Once upon a time")),
        ("hello", None, ("demo", "hello")),
        ("./nowhere", None, ("./nowhere", None)),
        ("~/model", None, ("~/model", None)),
        ("org/name-1b", None, ("org/name-1b", None)),
        ("and/or", None, ("demo", "and/or")),
        ("/ is a path and this is none", None, ("demo", "/ is a path and this is none")),
    ],
)
def test_model_or_prompt(first: str | None, second: str | None, expected: tuple[str, str | None]) -> None:
    assert split_positionals(first, second) == expected


def test_an_existing_folder_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert split_positionals("model", None) == ("demo", "model")
    (tmp_path / "model").mkdir()
    assert split_positionals("model", None) == ("model", None)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert split_positionals("org/name", None) == ("demo", "org/name")
    (tmp_path / "models--org--name" / "snapshots" / "a1").mkdir(parents=True)
    assert split_positionals("org/name", None) == ("org/name", None)


def test_budgets_and_contexts() -> None:
    assert parse_budget(None, None) is None
    assert parse_budget("200MB", None).ram == 200_000_000  # type: ignore[union-attr]
    assert parse_budget(None, "ram=1GiB,disk=1GB").ram == 1024**3  # type: ignore[union-attr]
    with pytest.raises(InputError, match="--budget"):
        parse_budget("1GB", "ram=1GB")
    assert parse_context(None) is None
    assert parse_context("32k") == 32 * 1024
    with pytest.raises(InputError, match="at least 1"):
        parse_context("0")


def test_text_alone_goes_to_standard_output(memwall: Any) -> None:
    result = memwall("run", "demo", "The history of the city", *SHORT)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip()
    assert "tokens/s" not in result.stdout
    for word in ("tokens/s", "weights/int4", "runtime", "peak resident"):
        assert word in result.stderr
    quiet = memwall("run", "demo", "The history of the city", *SHORT, "--quiet")
    assert quiet.stdout == result.stdout
    assert not quiet.stderr


def test_prompt_from_standard_input_and_no_model(memwall: Any) -> None:
    given = memwall("run", "demo", "The city", *SHORT, "--quiet").stdout
    assert memwall("run", "demo", *SHORT, "--quiet", input="The city").stdout == given
    assert memwall("run", *SHORT, "--quiet", input="The city").stdout == given
    assert memwall("run", "The city", *SHORT, "--quiet").stdout == given


def test_the_json_object(memwall: Any) -> None:
    result = memwall("run", "demo", "The history of the city", *SHORT, "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert {"text", "tokens", "prompt_tokens", "timings", "ledger", "peak_resident_bytes", "plan"} <= document.keys()
    assert document["tokens"] == 6
    assert document["prompt_tokens"] > 3
    assert {"load_seconds", "prefill_seconds", "decode_seconds", "tokens_per_s"} <= document["timings"].keys()
    assert all({"owner", "tier", "bytes", "predicted_bytes"} <= row.keys() for row in document["ledger"])
    assert {"version", "choice", "rows"} <= document["plan"].keys()
    assert document["plan"]["choice"]["weights"].startswith("int4")
    weights = [row for row in document["ledger"] if row["owner"].startswith("weights/")]
    assert weights
    assert all(row["bytes"] == row["predicted_bytes"] for row in weights)


def test_seeds_and_stop_texts(memwall: Any) -> None:
    drawn = ("run", "demo", "The city", *SHORT[:4], "--max-new-tokens", "12", "--temperature", "1", "--quiet")
    first, again, other = (memwall(*drawn, "--seed", seed).stdout for seed in ("1", "1", "2"))
    assert first == again != other
    text = memwall("run", "demo", "The city", *SHORT, "--quiet").stdout
    stop = text.strip()[2:4]
    stopped = memwall("run", "demo", "The city", *SHORT, "--quiet", "--stop", stop).stdout
    assert stopped.strip() == text[: text.index(stop)].strip()


def test_budget_is_kept_and_reported(spawn: Any) -> None:
    result = spawn("run", "demo", "The city", "--memory", "200MB", "--max-new-tokens", "4", "--json")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["peak_resident_bytes"] <= 200_000_000
    assert document["plan"]["budget"]["ram"] == 200_000_000


@pytest.mark.parametrize("weights", ["nf4-dq", "e4m3", "binary2"])
def test_level_formats_keep_a_tight_budget(weights: str, spawn: Any) -> None:
    asked = ("run", "demo", "The city", "--max-new-tokens", "20", "--ignore-eos", "--weights", weights, "--json")
    smallest = re.search(r"try --memory (\d+)", spawn(*asked, "--memory", "5MB").stderr)
    assert smallest
    result = spawn(*asked, "--memory", smallest[1])
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["peak_resident_bytes"] <= int(smallest[1])


@pytest.mark.parametrize("filters", [(), ("--top-k", "40"), ("--top-p", "0.9")])
def test_drawing_tokens_keeps_a_tight_budget(filters: tuple[str, ...], spawn: Any) -> None:
    asked = ("run", "demo", "The city", "--max-new-tokens", "150", "--ignore-eos", "--temperature", "0.8", "--json")
    refused = spawn(*asked, *filters, "--memory", "5MB")
    smallest = re.search(r"try --memory (\d+)", refused.stderr)
    assert smallest, refused.stderr
    result = spawn(*asked, *filters, "--memory", smallest[1])
    document = json.loads(result.stdout)
    assert document["stop_reason"] == "length", result.stderr
    assert document["peak_resident_bytes"] <= int(smallest[1])


def test_a_conversation_keeps_a_tight_budget(spawn: Any) -> None:
    asked = ("run", "demo", "--chat", "--max-new-tokens", "40", "--ignore-eos", "--context", "400")
    smallest = re.search(r"try --memory (\d+)", spawn(*asked, "--memory", "5MB", input="Hello\n").stderr)
    assert smallest
    enough = int(smallest[1]) + (512 << 10)  # the template library may take a page more than the last time
    result = spawn(*asked, "--memory", str(enough), input="Hello there.\nAnd then?\nWhat else?\n/reset\nHello.\n")
    assert result.returncode == 0, result.stderr
    peak = re.search(r"peak resident .* allowed \((\d+)%\)", result.stderr)
    assert peak
    assert int(peak[1]) <= 100


@pytest.mark.skipif(sys.platform != "linux", reason="needs an exact figure of what is resident")
def test_a_process_larger_than_foreseen_is_planned_for(
    spawn: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = ("run", "demo", "hello", "--context", "400", "--max-new-tokens", "380", "--ignore-eos")
    assert spawn(*asked[:3], "--max-new-tokens", "1", "--memory", "200MB").returncode == 0  # the figure is kept
    kept = tmp_path / "memwall" / "runtime.json"
    figures = json.loads(kept.read_text())
    less = {name: value - 3_000_000 if isinstance(value, int) else value for name, value in figures.items()}
    assert less != figures
    kept.write_text(json.dumps(less))
    smallest = re.search(r"try --memory (\d+)", spawn(*asked, "--memory", "5MB").stderr)
    assert smallest
    result = spawn(*asked, "--memory", str(int(smallest[1]) + 2_000_000))
    assert result.returncode == 0, result.stderr


def test_a_text_that_outgrows_the_budget_is_kept(spawn: Any) -> None:
    settings = ("--weights", "float16", "--kv", "float32", "--max-new-tokens", "1000", "--ignore-eos", "--json")
    result = None
    for megabytes in range(66, 90, 2):
        result = spawn("run", "demo", "hello", "--memory", f"{megabytes}MB", *settings)
        if result.stdout and json.loads(result.stdout)["text"]:  # a tighter one stops before the first token
            break
    assert result is not None
    document = json.loads(result.stdout)
    assert result.returncode == 1
    assert document["stop_reason"] == "budget"
    assert document["text"]
    assert "--memory" in result.stderr
    assert document["peak_resident_bytes"] <= megabytes * 1_000_000


def test_the_end_of_the_context_is_no_error(memwall: Any) -> None:
    result = memwall("run", "demo", "hello", *SHORT[:4], "--max-new-tokens", "1200", "--ignore-eos", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["stop_reason"] == "context"


def test_turns_share_the_cache(memwall: Any) -> None:
    result = memwall(
        "run", "demo", "--chat", *SHORT, input="Hello there.\n\nAnd then?\n/reset\nHello there.\n/bye\nnever\n"
    )
    assert result.exit_code == 0, result.stderr
    answers = result.stdout.splitlines()
    assert len(answers) >= 3
    assert "tokens/s" in result.stderr


def test_a_full_context_drops_the_oldest_turns(memwall: Any) -> None:
    asked = ("run", "demo", "--chat", *SHORT[:2], "--context", "100", "--max-new-tokens", "30", "--ignore-eos")
    turns = "\n".join(["Hello there.", "And then?", "What else?", "word " * 120, "And now?", ""])
    result = memwall(*asked, input=turns)
    assert result.exit_code == 0, result.stderr
    assert "the oldest turn left out: the context is 100 tokens" in result.stderr
    assert "it was not taken" in result.stderr
    assert result.stderr.index("it was not taken") < result.stderr.index("tokens/s")


def test_a_chat_without_a_turn_tells_no_speed(memwall: Any) -> None:
    result = memwall("run", "demo", "--chat", *SHORT, input="")
    assert result.exit_code == 0, result.stderr
    assert "tokens/s" not in result.stderr
    assert "peak resident" in result.stderr


def test_interrupting_an_answer_keeps_the_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    from memwall.cli import chat
    from memwall.engine import Sampling, Settings, load
    from memwall.models import model_directory
    from memwall.models.chat import ChatTemplate
    from memwall.models.tokenizer import Tokenizer

    path = model_directory("demo")
    tokenizer, template = Tokenizer.from_directory(path), ChatTemplate.from_directory(path)
    session = load(path, Settings(weights="int8", context_tokens=200), tokenizer=tokenizer)
    talk = chat.Conversation(session, tokenizer, template, Sampling(max_new_tokens=12))
    whole = chat.stream

    def interrupted(session: Any, prompt: list[int], sampling: Sampling) -> None:
        pieces = session.generate(prompt, sampling)
        next(pieces)
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "stream", interrupted)
    talk.say("Hello there.")
    monkeypatch.setattr(chat, "stream", whole)
    talk.say("And then?")
    assert session.last.stop_reason
    assert [one["role"] for one in talk._messages] == ["user", "assistant"] * 2
    before = list(talk._messages)
    talk.say("word " * 300)  # longer than the context: nothing is given up for it
    assert talk._messages == before


def test_shared_beginnings() -> None:
    assert num_shared([], [1]) == 0
    assert num_shared([1, 2, 3], [1, 2]) == 2
    assert num_shared([1, 2, 3], [1, 5, 3]) == 1
    assert num_shared([1, 2], [1, 2, 3]) == 2

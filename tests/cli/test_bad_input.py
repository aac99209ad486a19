"""Bad input ends with status 2 (1 where it merely does not fit) and one paragraph that names it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RUN = ("run", "{model}", "hello", "--max-new-tokens", "2", "--quiet")
EVAL = ("eval", "{model}", "{folder}/text.txt", "--limit", "16")
COMPRESS = ("compress", "{model}", "{folder}/out", "--method", "rtn")


def without(name: str) -> Callable[[Path], None]:
    return lambda model: (model / name).unlink()


def emptied(model: Path) -> None:
    for path in model.iterdir():
        path.unlink()


def configured(**settings: Any) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))

    return change


def written(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda model: (model / name).write_bytes(content) and None


def truncated(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def spoilt(*names: str) -> Callable[[Path], None]:
    """Tensors that are NaN here and there, as a damaged file's may be."""

    def change(model: Path) -> None:
        path = model / "model.safetensors"
        content = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        for name in names:
            begin, end = header[name]["data_offsets"]
            for place in range(start + begin, start + end, 256):
                content[place : place + 2] = b"\xff\xff"
        path.write_bytes(content)

    return change


def untouched(model: Path) -> None:
    """Nothing is wrong with the model."""


MODELS = {
    "empty directory": (emptied, "config.json"),
    "no configuration": (without("config.json"), "config.json"),
    "no tokenizer": (without("tokenizer.json"), "tokenizer"),
    "no weights": (without("model.safetensors"), "safetensors"),
    "unknown architecture": (configured(model_type="bert", architectures=["BertModel"]), "Llama"),
    "absurd width": (configured(hidden_size=1 << 60), "hidden_size"),
    "heads that do not divide": (configured(num_key_value_heads=3), "num_key_value_heads"),
    "configuration that is not JSON": (written("config.json", b"{"), "config.json"),
    "deep configuration": (written("config.json", b"[" * 100_000), "config.json"),
    "truncated weights": (truncated, "model.safetensors"),
    "header longer than the file": (written("model.safetensors", b"\xff" * 7 + b"\x00{}"), "model.safetensors"),
    "weights that are text": (written("model.safetensors", b"these are no weights"), "model.safetensors"),
    "tokenizer that is text": (written("tokenizer.json", b"words"), "tokenizer.json"),
}

COMMANDS = {
    "missing directory": (("run", "{folder}/nowhere", "hello"), 2, "nowhere"),
    "a lone path is a model, not a prompt": (("run", "{folder}/nowhere"), 2, "nowhere"),
    "a file for a model": (("run", "{folder}/text.txt", "hello"), 2, "text.txt"),
    "unknown format of weights": ((*RUN, "--weights", "int9"), 2, "int9"),
    "unknown cache": ((*RUN, "--kv", "zip"), 2, "zip"),
    "bad setting of a cache": ((*RUN, "--kv", "kivi(9bit)"), 2, "9"),
    "budget that is not one": ((*RUN, "--memory", "lots"), 2, "lots"),
    "budget with two readings": ((*RUN, "--memory", "2g"), 2, "GiB"),
    "budget of nothing": ((*RUN, "--memory", "0"), 2, "zero"),
    "unknown tier": ((*RUN, "--budget", "tape=2GB"), 2, "tape"),
    "two budgets": ((*RUN, "--memory", "1GB", "--budget", "ram=1GB"), 2, "--budget"),
    "context that is no count": ((*RUN, "--context", "long"), 2, "long"),
    "context of nothing": ((*RUN, "--context", "0"), 2, "context"),
    "prompt longer than the context": (("run", "{model}", "word " * 50, "--context", "8"), 2, "context"),
    "context longer than the model's": ((*RUN, "--context", "64k"), 2, "1,?024"),
    "empty prompt": (("run", "{model}", ""), 2, "prompt"),
    "negative temperature": ((*RUN, "--temperature", "-1"), 2, "temperature"),
    "no probability": ((*RUN, "--top-p", "0"), 2, "top-p"),
    "negative count": ((*RUN, "--top-k", "-3"), 2, "top-k"),
    "no tokens": (("run", "{model}", "hello", "--max-new-tokens", "0"), 2, "max-new-tokens"),
    "empty stop text": ((*RUN, "--stop", ""), 2, "stop"),
    "no threads": ((*RUN, "--threads", "0"), 2, "threads"),
    "absurdly many threads": ((*RUN, "--threads", "100000"), 2, "threads"),
    "negative seed": ((*RUN, "--seed", "-1"), 2, "seed"),
    "deadline of nothing that comes": ((*RUN, "--deadline", "3"), 2, "--load-cache tcp://"),
    "deadline of a file": ((*RUN, "--deadline", "3", "--load-cache", "{folder}/text.txt"), 2, "--load-cache tcp://"),
    "conversation as JSON": (("run", "{model}", "--chat", "--json"), 2, "--chat"),
    "plan for an unknown machine": (("plan", "{model}", "--machine", "abacus", "--no-measure"), 2, "abacus"),
    "divergence that is no number": (("plan", "{model}", "--max-kl", "nan"), 2, "max-kl"),
    "report into a missing folder": (("plan", "{model}", "--no-measure", "--html", "{folder}/no/report.html"), 2, "no"),
    "text that is missing": (("eval", "{model}", "{folder}/no.txt"), 2, "no.txt"),
    "text that is empty": (("eval", "{model}", "{folder}/empty.txt"), 2, "empty.txt"),
    "text that is binary": (("eval", "{model}", "{folder}/binary.txt"), 2, "binary.txt"),
    "eval of an unknown format": ((*EVAL, "--weights", "int1"), 2, "int1"),
    "calibration text that is missing": ((*COMPRESS, "--calibration", "{folder}/no.txt"), 2, "no.txt"),
    "calibration text that is empty": ((*COMPRESS, "--calibration", "{folder}/empty.txt"), 2, "empty.txt"),
    "calibration text that is binary": ((*COMPRESS, "--calibration", "{folder}/binary.txt"), 2, "binary.txt"),
    "too many bits": ((*COMPRESS, "--bits", "77"), 2, "77"),
    "too few bits": ((*COMPRESS, "--bits", "0.5"), 2, "0.5"),
    "bits that are a word": ((*COMPRESS, "--bits", "few"), 2, "few"),
    "unknown method": (("compress", "{model}", "{folder}/out", "--method", "magic"), 2, "gptq"),
    "output that exists": (("compress", "{model}", "{folder}/taken", "--method", "rtn"), 2, "taken"),
    "unknown system": (("evidence", "kivy"), 2, "kivi"),
    "system without evidence": (("evidence", "zeppelin"), 2, "zeppelin"),
    "unknown family": (("systems", "--family", "magic"), 2, "codec"),
    "unknown verb": (("sing",), 2, "sing"),
    "unknown option": (("systems", "--loud"), 2, "--loud"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("The city lies on a river. " * 20)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 8)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious").write_text("keep me")
    return tmp_path


def check_refusal(result: Any, status: int, word: str) -> None:
    assert result.exit_code == status, (result.exit_code, result.stdout, result.stderr, result.exception)
    assert re.search(word, result.stderr), result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr) < 1500
    assert not result.stdout.strip()


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("command", [RUN, ("plan", "{model}", "--no-measure"), COMPRESS], ids=lambda c: c[0])
def test_damaged_models(case: str, command: tuple[str, ...], memwall: Any, model: Path, folder: Path) -> None:
    damage, word = MODELS[case]
    if command[0] == "plan" and "tokenizer" in case:
        pytest.skip("a plan without measuring reads no tokenizer")
    if command[0] == "plan" and case == "no weights":
        pytest.skip("a plan without measuring needs config.json alone")
    damage(model)
    result = memwall(*(argument.format(model=model, folder=folder) for argument in command))
    check_refusal(result, 2, word)
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (spoilt("model.norm.weight"), "model.norm.weight holds NaN"),
        (spoilt("model.layers.1.mlp.up_proj.weight"), "NaN"),
        (spoilt("model.embed_tokens.weight"), "NaN"),
    ],
)
def test_weights_that_are_no_numbers(
    damage: Callable[[Path], None], word: str, memwall: Any, model: Path, folder: Path
) -> None:
    """Nothing but NaN would come of them: neither a text nor a perplexity that no JSON can hold."""
    damage(model)
    commands = [RUN, (*RUN, "--weights", "int4"), (*RUN, "--temperature", "1"), (*EVAL, "--json")]
    for command in [*commands, (*COMPRESS, "--bits", "int4")]:
        result = memwall(*(argument.format(model=model, folder=folder) for argument in command))
        check_refusal(result, 2, word)
        assert not (folder / "out").exists()


@pytest.mark.parametrize("case", COMMANDS)
def test_bad_commands(case: str, memwall: Any, model: Path, folder: Path) -> None:
    arguments, status, word = COMMANDS[case]
    result = memwall(*(argument.format(model=model, folder=folder) for argument in arguments))
    check_refusal(result, status, word)
    assert [path.name for path in (folder / "taken").iterdir()] == ["precious"]
    assert not (folder / "out").exists()


def test_budget_too_small_says_what_would_work(spawn: Any) -> None:
    result = spawn("run", "demo", "hello", "--memory", "20MB")
    assert result.returncode == 1
    assert "MB" in result.stderr
    assert "Traceback" not in result.stderr


def test_debug_shows_where_it_came_from(memwall: Any, folder: Path) -> None:
    result = memwall("run", folder / "nowhere", "hello", "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr

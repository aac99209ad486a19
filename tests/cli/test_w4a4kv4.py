"""`--weights W4A4KV4`: one name for a model that comet made and its cache, in run, eval and plan; what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memwall.compress.calibration import CalibrationSettings
from memwall.compress.job_plan import Tuning
from memwall.compress.model import compress_model
from memwall.errors import InputError
from memwall.models import ModelConfig, model_directory
from memwall.models.precision import resolve


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("w4a4kv4") / "out"
    tuning = Tuning(calibration=CalibrationSettings(max_tokens=512, sequence_tokens=256))
    compress_model(model_directory("demo"), out, method="comet", options={"weights": "rtn"}, tuning=tuning)
    return out


def test_run_shows_what_is_resident(memwall: Any, made: Path) -> None:
    options = ("--max-new-tokens", "72", "--ignore-eos", "--json", "--quiet")
    ran = json.loads(memwall("run", made, "The history of", "--weights", "W4A4KV4", *options).stdout)
    owners = {row["owner"]: row for row in ran["ledger"]}
    assert owners["weights/comet-g128"]["bytes"] < 5_900_000 * 0.6
    assert "kv/coded" in owners
    same = json.loads(memwall("run", made, "The history of", "--weights", "saved", "--kv", "w4a4kv4", *options).stdout)
    assert same["text"] == ran["text"]


def test_eval_and_plan(memwall: Any, made: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A city lies on a river, and the river comes down from the hills. " * 20)
    found = json.loads(memwall("eval", made, text, "--limit", "200", "--weights", "w4a4kv4", "--json").stdout)
    assert found["kv_bits_per_value"] < 16
    planned = json.loads(
        memwall("plan", made, "--weights", "W4A4KV4", "--context", "512", "--no-measure", "--json").stdout
    )
    assert (planned["choice"]["weights"], planned["choice"]["kv"]) == ("saved", "kv4")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "demo", "text", "--weights", "W4A4KV4"), "--method comet"),
        (("plan", "demo", "--weights", "W4A4KV4"), "--method comet"),
        (("run", "demo", "text", "--weights", "comet"), "--method comet"),
        (("run", "demo", "text", "--weights", "W4A4KV4", "--kv", "kivi"), "leave --kv"),
        (("serve", "demo", "--weights", "W4A4KV4"), "give saved here"),
        (("run", "demo", "text", "--kv", "kv4(page=48)"), "16, 32, 64, 128"),
    ],
)
def test_refusals(memwall: Any, arguments: tuple[str, ...], message: str) -> None:
    done = memwall(*arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())


def test_elsewhere_it_says_what_to_give() -> None:
    with pytest.raises(InputError, match="give saved here"):
        resolve(ModelConfig.from_directory(model_directory("demo")), "W4A4KV4")

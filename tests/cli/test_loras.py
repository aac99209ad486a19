"""`memwall run --lora`: an adapter for one run, and what does not go with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memwall.models import DEMO_DIRECTORY, ModelConfig
from tests.models.loras import make_lora

CONFIG = ModelConfig.from_directory(DEMO_DIRECTORY)
OPTIONS = ("run", "demo", "--max-new-tokens", "12", "--json", "--quiet", "--weights", "int8")


def test_run_with_an_adapter(memwall: Callable[..., Any], tmp_path: Path) -> None:
    folder = make_lora(tmp_path / "one", CONFIG, rank=16, strength=1.0)
    plain = json.loads(memwall(*OPTIONS, "The city").stdout)
    worn = memwall(*OPTIONS, "--lora", folder, "The city")
    assert worn.exit_code == 0, worn.output
    found = json.loads(worn.stdout)
    assert found["text"] != plain["text"]
    assert "adapters/pages" in worn.stdout


def test_what_does_not_go_with_an_adapter(memwall: Callable[..., Any], tmp_path: Path) -> None:
    folder = make_lora(tmp_path / "one", CONFIG)
    for options, words in (
        (("--lora", tmp_path / "none"), "there is no such folder"),
        (("--lora", folder, "--save-cache", tmp_path / "cache"), "belong to the model without it"),
        (("--lora", folder, "--kv", "xquant"), "without the adapter"),
    ):
        done = memwall(*OPTIONS, *options, "The city")
        assert done.exit_code == 2, done.output
        assert words in " ".join(done.output.split())

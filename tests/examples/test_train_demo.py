"""The recipe of the demo model runs from text to a Hugging Face directory, and goes on from a checkpoint."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

RECIPE = Path(__file__).resolve().parents[2] / "examples" / "train_demo.py"


def load_recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_demo", RECIPE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_demo"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_smoke_run_and_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe()
    monkeypatch.setattr(recipe.torch.cuda, "is_available", lambda: False)
    for steps, started in (("6", "step 0"), ("12", "step 6")):
        options = ["--smoke", "--steps", steps, "--tries", "1", "--files", "12"]
        monkeypatch.setattr(sys, "argv", ["train_demo.py", str(tmp_path), *options])
        recipe.main()
        assert f"starting at {started}" in capsys.readouterr().out
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "figures.json"} <= names
    figures = json.loads((tmp_path / "figures.json").read_text())
    # drawing blindly from 512 tokens would have a perplexity of 512
    assert figures["held_out_perplexity"] < 500
    assert all(0 <= share <= 1 for share in figures["recall"].values())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["vocab_size"] == 512

"""The recipe of the demo model runs from text to a Hugging Face directory, and goes on from a checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = Path(__file__).resolve().parents[2] / "examples" / "train_demo.py"


def train(out: Path, *options: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(RECIPE), str(out), "--smoke", *options],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_smoke_run_and_resume(tmp_path: Path) -> None:
    assert "starting at step 0" in train(tmp_path, "--steps", "10", "--tries", "1")
    assert "starting at step 10" in train(tmp_path, "--steps", "20", "--tries", "1")
    assert {"config.json", "model.safetensors", "tokenizer.json", "figures.json"} <= {
        f.name for f in tmp_path.iterdir()
    }
    figures = json.loads((tmp_path / "figures.json").read_text())
    # 512 tokens drawn blindly would have a perplexity of 512
    assert figures["held_out_perplexity"] < 480
    assert all(0 <= share <= 1 for share in figures["recall"].values())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["vocab_size"] == 512

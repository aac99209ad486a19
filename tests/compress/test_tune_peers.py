"""Adapters that `memwall tune` wrote, in PEFT itself: the same logits as the CPU engine's.

PEFT runs in a process of its own, where `MEMWALL_PEER_PYTHON` names an interpreter that has it.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from memwall.compress.tune import tune_model
from memwall.engine import Settings, load
from memwall.engine.lone_lora import wear
from memwall.models.config import ModelConfig
from memwall.models.lora import LoraWeights
from tests.compress.tiny_model import make_model

METHODS = ("lora", "lora-plus", "rslora", "dora", "pissa")
TOKENS = np.arange(5, 60)
PEER = """
import sys
import numpy as np, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model, *adapters = sys.argv[1:]
for adapter in adapters:
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    worn = PeftModel.from_pretrained(base, adapter).eval()
    with torch.no_grad():
        logits = worn(torch.arange(5, 60)[None]).logits[0].numpy()
    np.save(adapter + ".npy", logits)
"""


@pytest.mark.skipif("MEMWALL_PEER_PYTHON" not in os.environ, reason="MEMWALL_PEER_PYTHON names no Python with peft")
def test_peft_reads_what_was_written(tmp_path: Path) -> None:
    model, text = make_model(tmp_path / "model", model_type="llama"), tmp_path / "text.txt"
    text.write_text("A city lies on a river, and the river comes down from the hills. " * 60)
    options = {"rank": "4", "alpha": "8", "context": "64", "batch": "4", "steps": "6", "learning_rate": "0.01"}
    for method in METHODS:
        tune_model(model, text, tmp_path / method, method=method, options=options)
    folders = [str(tmp_path / method) for method in METHODS]
    done = subprocess.run(
        [os.environ["MEMWALL_PEER_PYTHON"], "-c", PEER, str(model), *folders],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    config = ModelConfig.from_directory(model)
    plain = logits_of(model, None)
    for method in METHODS:
        theirs = np.load(tmp_path / f"{method}.npy")
        ours = logits_of(model, LoraWeights.read(tmp_path / method, config))
        moved, off = np.abs(theirs - plain).max(), np.abs(ours - theirs).max()
        assert off < 2e-3 * np.abs(theirs).max(), (method, off)
        assert moved > 50 * off, (method, moved, off)


def logits_of(model: Path, adapter: LoraWeights | None) -> np.ndarray:
    session = load(model, Settings(weights="float32", kv="float32", context_tokens=64, exact=True, logit_rows=64))
    if adapter is not None:
        wear(session, adapter)
    logits = session.decoder.forward(TOKENS, session.cache, all_logits=True).copy()
    session.release()
    return logits

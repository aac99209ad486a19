"""A random Llama of some hundred thousand weights with the demo model's tokenizer, for tests of whole runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from memwall.compress.calibration import CalibrationSettings
from memwall.compress.job_plan import Tuning
from memwall.compress.model import compress_model
from memwall.models import DEMO_DIRECTORY, ModelConfig

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "dtype": "float32",
}
QUICK = Tuning(calibration=CalibrationSettings(max_tokens=512, sequence_tokens=128))


def make_model(folder: Path, **changes: Any) -> Path:
    """Write the model; `changes` go into its config.json."""
    folder.mkdir()
    values = {**CONFIG, **changes}
    random = np.random.default_rng(0)
    tensors = {}
    for spec in ModelConfig.from_dict(values).tensors():
        weight = random.standard_normal(spec.shape, np.float32)
        tensors[spec.name] = weight * np.float32(spec.shape[-1] ** -0.5) if weight.ndim == 2 else np.abs(weight)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(values))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_DIRECTORY / name, folder / name)
    return folder


def make_stack(source: Path, out: Path, *, blocks: int = 6, rank: int = 2) -> Path:
    """The model as a BitStack folder."""
    options = {"rank": str(rank), "blocks": str(blocks), "sort_tokens": "128"}
    compress_model(source, out, method="bitstack", options=options, tuning=QUICK)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}

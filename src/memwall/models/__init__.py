"""Decoder families read from Hugging Face directories: configuration, weights by name, tokenizer, chat template, and
two forms of the decoder over them (the CPU engine, and the torch form, imported only where torch is wanted). The demo
model lies in `demo/`.
"""

from __future__ import annotations

from pathlib import Path

from memwall.models.checkpoint import Checkpoint as Checkpoint
from memwall.models.config import ModelConfig as ModelConfig
from memwall.models.config import RopeConfig as RopeConfig
from memwall.models.config import TensorSpec as TensorSpec
from memwall.models.hub import cached, snapshot

DEMO_DIRECTORY = Path(__file__).parent / "demo"


def model_directory(model: str | Path) -> Path:
    """Folder of a model as a user names it: a path, `demo` for the bundled model, or ORG/NAME where the cache of the
    Hugging Face Hub has it. A folder of that cache stands for its snapshot.
    """
    if str(model) == "demo":
        return DEMO_DIRECTORY
    path = Path(model).expanduser()
    if path.is_dir():
        return (None if (path / "config.json").exists() else snapshot(path)) or path
    return cached(str(model)) or path

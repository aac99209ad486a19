"""Decoder families read from Hugging Face directories: configuration, weights by name, tokenizer, chat template, and
two forms of the
decoder over them (the CPU engine, and the torch form, imported only where torch is wanted). The demo model lies in
`demo/`.
"""

from __future__ import annotations

from pathlib import Path

from memwall.models.checkpoint import Checkpoint as Checkpoint
from memwall.models.config import ModelConfig as ModelConfig
from memwall.models.config import RopeConfig as RopeConfig
from memwall.models.config import TensorSpec as TensorSpec

DEMO_DIRECTORY = Path(__file__).parent / "demo"


def model_directory(model: str | Path) -> Path:
    """Folder of a model as a user names it: a path, or `demo` for the bundled model."""
    return DEMO_DIRECTORY if str(model) == "demo" else Path(model)

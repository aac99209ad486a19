"""Inputs that calibration may meet: fewer tokens than columns, channels that never fire, tensors of several types."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from memwall.compress.calibration import CalibrationSettings
from memwall.compress.job_plan import Tuning
from memwall.compress.model import CompressReport, compress_model
from memwall.errors import InputError
from memwall.formats import codec
from memwall.models.checkpoint import Checkpoint
from tests.compress.tiny_model import make_model

TYPES = (np.float16, ml_dtypes.bfloat16, np.float32)
SHORT = Tuning(calibration=CalibrationSettings(max_tokens=128, sequence_tokens=128))
# method -> bits, settings
METHODS: dict[str, tuple[str | None, dict[str, str]]] = {
    "gptq": (None, {}), "rtn": ("int4", {}), "awq": (None, {}), "smoothquant": (None, {}), "spqr": (None, {}),
    "vptq": ("vptq-v4-k16-ordered", {"iterations": "10"}), "billm": (None, {}), "pb-llm": (None, {}),
    "quip": (None, {}), "sparsegpt": (None, {}), "comet": (None, {}),
    "bitstack": (None, {"rank": "2", "blocks": "2", "sort_tokens": "128"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def hard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with inputs of q, k, v, of gate and up, of o and of down that are always zero, in three types."""
    folder = make_model(tmp_path_factory.mktemp("hard") / "model", num_hidden_layers=2)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):
        for name, place in (
            ("input_layernorm", 5), ("post_attention_layernorm", 7), ("mlp.up_proj", 3), ("self_attn.v_proj", 4)
        ):  # fmt: skip
            tensors[f"model.layers.{layer}.{name}.weight"][place] = 0
    typed = {name: values.astype(TYPES[at % 3]) for at, (name, values) in enumerate(sorted(tensors.items()))}
    save_file(typed, folder / "model.safetensors")
    return folder


def compress(source: Path, out: Path, method: str) -> CompressReport:
    """Over 128 tokens that say the same thing again and again: H of 256 inputs is as singular as it gets."""
    text = out.with_suffix(".txt")
    text.write_text("The river runs past the town, and the road follows it. " * 14)
    bits, options = METHODS[method]
    return compress_model(source, out, bits=bits, method=method, options=options, tuning=SHORT, calibration_text=text)


@pytest.mark.parametrize("method", METHODS)
def test_a_singular_hessian_dead_channels_and_mixed_types(hard: Path, tmp_path: Path, method: str) -> None:
    report = compress(hard, tmp_path / "out", method)
    assert all(0 <= lost < 0.5 for lost in report.errors.values()), report.errors
    with Checkpoint(tmp_path / "out") as saved:
        for tensor in saved.config.tensors():
            packed = saved.packed(tensor.name) if len(tensor.shape) == 2 else None
            if packed is not None:
                values = np.asarray(codec(packed.spec).decode(packed), np.float32)
                assert values.shape == tensor.shape
                assert np.isfinite(values).all(), tensor.name


def test_text_shorter_than_a_sequence_is_one_shorter_sequence(hard: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("A short text is read whole. " * 30)
    longer = Tuning(calibration=CalibrationSettings(max_tokens=2048, sequence_tokens=2048))
    report = compress_model(hard, tmp_path / "out", bits="int4", calibration_text=text, tuning=longer)
    assert 128 < report.num_calibration_tokens < 256
    text.write_text("Too short.")
    with pytest.raises(InputError, match=r"calibration text .* has \d+ tokens; at least 128 are needed"):
        compress_model(hard, tmp_path / "again", bits="int4", calibration_text=text, tuning=longer)


@pytest.mark.parametrize(
    ("method", "bits", "match"),
    [
        ("gptq", "nf4", "gptq makes integer formats such as int4-g64"),
        ("rtn", "int9", "bits must be 2 to 8"),
        ("spqr", "9", "spqr"),
        ("vptq", "int4", "vptq makes its own formats"),
        ("edkm", "12", "edkm makes palettes"),
        ("billm", "4", "billm"),
        ("smoothquant", "int4-g7", "group"),
    ],
)
def test_bits_that_a_method_does_not_make(hard: Path, tmp_path: Path, method: str, bits: str, match: str) -> None:
    with pytest.raises(InputError, match=match):
        compress_model(hard, tmp_path / "out", bits=bits, method=method, tuning=SHORT)
    assert not list(tmp_path.iterdir())

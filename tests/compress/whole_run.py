"""What every method with a form of its own must do with a whole model: stop, go on, save, load and run compressed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memwall.compress.calibration import PromptCache
from memwall.compress.model import CompressReport, compress_model
from memwall.errors import InputError
from memwall.formats import codec
from memwall.memory import Arena, Ledger
from memwall.models import Checkpoint, ModelConfig
from memwall.models.decoder import Decoder
from memwall.models.precision import is_matrix, resolve, weight_bytes
from memwall.models.weights import load_weights
from tests.compress.tiny_model import QUICK, contents


class Stop(Exception):
    pass


def check_whole_run(source: Path, folder: Path, method: str, label: str, **options: Any) -> CompressReport:
    """The method's default bits (or `options`) over a tiny model; label: the ledger's row of its linear layers."""
    settings = {"method": method, "tuning": QUICK, **options}

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "compress" and done > 0.8 * total:
            raise Stop

    with pytest.raises(Stop):
        compress_model(source, folder / "out", progress=stop, **settings)
    report = compress_model(source, folder / "out", **settings)
    assert report.num_resumed_parts > 1
    compress_model(source, folder / "straight", **settings)
    assert contents(folder / "out") == contents(folder / "straight")
    model = ModelConfig.from_directory(folder / "out")
    with Checkpoint(folder / "out", model) as checkpoint:
        checkpoint.verify(digests=True)
        specs = resolve(model, "saved", checkpoint)
        assert specs == {t.name: report.specs[t.name] if is_matrix(t) else "float32" for t in model.tensors()}
        linear = [t for t in model.tensors() if t.role == "linear"]
        assert {codec(specs[t.name]).label for t in linear} == {label}
        assert specs["model.embed_tokens.weight"] == "int4-g64"
        arena = Arena(1 << 30, Ledger())
        weights = load_weights(model, checkpoint, specs, arena)
        held, stored = weight_bytes(model, specs), sum(checkpoint.stored_bytes(t.name) for t in linear)
        # what is resident is what is stored: nothing dense beside it
        assert set(held) == {f"weights/{label}", "weights/int4-g64", "weights/float32"}
        assert held[f"weights/{label}"] == pytest.approx(stored, rel=0.05)
        assert sum(weights.matrices[t.name].nbytes for t in linear) == stored
        agrees_with_floats(model, checkpoint, arena)
        weights.release()
    return report


def agrees_with_floats(model: ModelConfig, checkpoint: Checkpoint, arena: Arena) -> None:
    """Logits of the compressed model are those of its decoded weights: exact, rounded, whole and token by token."""
    tokens = np.arange(1, 24) * 37 % 4096
    specs = resolve(model, "saved", checkpoint)
    logits = {}
    for name, exact in (("decoded", True), ("stored", True), ("rounded", False)):
        weights = load_weights(model, checkpoint, specs, arena)
        if name == "decoded":
            for tensor in model.tensors():
                if tensor.role == "linear":
                    packed = checkpoint.packed(tensor.name)
                    assert packed is not None
                    weights.replace(tensor.name, codec("float32").encode(codec(packed.spec).decode(packed)))
        decoder = Decoder(model, weights, arena, segment_tokens=32, logit_rows=32, exact=exact)
        logits[name] = decoder.forward(tokens, PromptCache(model), all_logits=True).copy()
        decoder.release()
        weights.release()
    scale = np.abs(logits["decoded"]).max()
    assert np.abs(logits["stored"] - logits["decoded"]).max() < 1e-4 * scale
    assert np.abs(logits["rounded"] - logits["decoded"]).max() < 0.1 * scale


def check_refused(source: Path, folder: Path, method: str, bits: float | str, match: str) -> None:
    """Bits or a format that a method does not make leave nothing behind."""
    with pytest.raises(InputError, match=match):
        compress_model(source, folder / "refused", method=method, bits=bits, tuning=QUICK)
    assert not (folder / "refused").exists()

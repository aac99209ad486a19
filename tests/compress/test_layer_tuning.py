"""Fine-tuning by layers: look-ups equal the decoded matrix, gradients reach all, outputs come nearer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from memwall.compress.calibration import LayerStream
from memwall.compress.layer_tuning import LookedUp, Schedule, tuned
from memwall.compress.model import compress_model
from memwall.formats import Packed, codec
from memwall.memory import Arena, Ledger
from memwall.models import Checkpoint, ModelConfig
from tests.compress.tiny_model import QUICK, make_model
from tests.kernels.codebooks import random_codebooks

SPECS = ["vptq-v4-k16", "vptq-v3-k16-r8-g2-o100v5k4-ordered-norm"]


@pytest.mark.parametrize("spec", SPECS)
def test_looked_up_is_decoded_and_packs_again(spec: str) -> None:
    packed = random_codebooks(spec, (37, 41))
    matrix = LookedUp(packed)
    np.testing.assert_array_equal(matrix().detach().numpy(), codec(spec).decode(packed))
    again = matrix.packed()
    assert all(np.array_equal(again.buffers[name], each) for name, each in packed.buffers.items())
    matrix().square().sum().backward()
    for name, parameter in matrix._learning.items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("source") / "tiny", num_hidden_layers=2)


def test_a_layer_comes_nearer_to_the_float_layer(source: Path) -> None:
    config = ModelConfig.from_directory(source)
    with Checkpoint(source, config) as checkpoint:
        tokens = np.random.default_rng(0).integers(3, 4000, (4, 64))
        stream = LayerStream(config, checkpoint, tokens, Arena(1 << 30, Ledger()))
        stream.embed()
        made: dict[str, Packed] = {}
        for tensor in (t for t in config.tensors() if t.layer == 0):
            spec = "vptq-v4-k16" if tensor.role == "linear" else "float32"
            made[tensor.name] = codec(spec).encode(checkpoint.alone(tensor.name))

        def output(forms: dict[str, Packed]) -> np.ndarray:
            hidden = stream.hidden.copy()
            stream.take_vectors(forms)
            stream.run_layer(0, hidden, {name: form for name, form in forms.items() if len(form.shape) == 2})
            stream.use(checkpoint)
            return hidden

        wanted = stream.hidden.copy()
        stream.run_layer(0, wanted)
        found = tuned(stream, 0, made, Schedule(steps=20, rate=1e-3))
        errors = [float(np.square(output(forms) - wanted).mean()) for forms in (made, found)]
        assert errors[1] < 0.97 * errors[0]
        changed = {name for name in made if not all(
            np.array_equal(found[name].buffers[b], each) for b, each in made[name].buffers.items())}  # fmt: skip
        assert changed == set(made)
        for name in made:  # indices stay
            for buffer in ("indices", "order"):
                if buffer in made[name].buffers:
                    np.testing.assert_array_equal(found[name].buffers[buffer], made[name].buffers[buffer])


def test_whole_runs_and_tuning_that_gains_nothing(source: Path, tmp_path: Path) -> None:
    options = {"iterations": "5", "refine": "0", "tune": "4", "tune_rate": "1e-3"}
    report = compress_model(source, tmp_path / "a", method="vptq", bits=2.5, tuning=QUICK, options=options)
    again = compress_model(source, tmp_path / "b", method="vptq", bits=2.5, tuning=QUICK, options=options)
    assert report.specs == again.specs
    plain = compress_model(
        source, tmp_path / "c", method="vptq", bits=2.5, tuning=QUICK, options={**options, "tune": "0"}
    )
    assert plain.file_bytes == pytest.approx(report.file_bytes, rel=0.01)
    name = "model.layers.0.self_attn.q_proj.weight"
    forms = []
    for folder in ("a", "b", "c"):
        config = ModelConfig.from_directory(tmp_path / folder)
        with Checkpoint(tmp_path / folder, config) as checkpoint:
            packed = checkpoint.packed(name)
            assert packed is not None
            forms.append({key: value.copy() for key, value in packed.buffers.items()})
    np.testing.assert_array_equal(forms[0]["indices"], forms[2]["indices"])
    assert (forms[0]["centroids"] != forms[2]["centroids"]).any()
    np.testing.assert_allclose(forms[0]["centroids"], forms[1]["centroids"], atol=1e-2)

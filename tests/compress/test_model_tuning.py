"""Fine-tuning of whole models: the text is said better, files are written again, what gains nothing changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memwall.compress.layer_tuning import Schedule
from memwall.compress.model import compress_model
from memwall.compress.model_tuning import tuned_model
from memwall.compress.saved import Part, WorkDirectory
from memwall.engine.quality import log_softmax
from memwall.formats import Packed, codec
from memwall.memory import Arena, Ledger
from memwall.models import Checkpoint, ModelConfig
from memwall.models.decoder import Decoder
from memwall.models.precision import resolve
from memwall.models.weights import load_weights
from tests.compress.tiny_model import QUICK, make_model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("source") / "tiny", num_hidden_layers=1)


def test_the_text_is_said_better(source: Path) -> None:
    config = ModelConfig.from_directory(source)
    tokens = np.tile(np.random.default_rng(0).integers(3, 200, 24), (8, 1))
    with Checkpoint(source, config) as checkpoint:
        made: dict[str, Packed] = {}
        for tensor in config.tensors():
            spec = "vptq-v4-k16-ordered" if tensor.role == "linear" else "float32"
            made[tensor.name] = codec(spec).encode(checkpoint.alone(tensor.name))
        changed = tuned_model(checkpoint, tokens, made, Schedule(steps=20, rate=3e-3))
        assert "model.norm.weight" in changed
        assert "model.embed_tokens.weight" not in changed
        for name, form in changed.items():
            assert form.shape == made[name].shape
            if "indices" in form.buffers:
                np.testing.assert_array_equal(form.buffers["indices"], made[name].buffers["indices"])

        def loss(forms: dict[str, Packed]) -> float:
            arena = Arena(1 << 30, Ledger())
            weights = load_weights(config, checkpoint, resolve(config, "float32"), arena)
            for name, form in forms.items():
                if len(form.shape) == 2 and name in weights.matrices:
                    weights.replace(name, form)
                elif len(form.shape) == 1:
                    np.copyto(weights.vectors[name], codec(form.spec).decode(form))
            from memwall.compress.calibration import PromptCache

            decoder = Decoder(config, weights, arena, segment_tokens=24, logit_rows=24, exact=True)
            logits = decoder.forward(tokens[0, :-1], PromptCache(config), all_logits=True)
            return -float(log_softmax(logits)[np.arange(23), tokens[0, 1:]].mean())

        assert loss({**made, **changed}) < loss(made) - 0.1
        assert tuned_model(checkpoint, tokens, made, Schedule(steps=1, rate=0.9)) == {}


def test_whole_runs_write_their_files_again(source: Path, tmp_path: Path) -> None:
    options = {"iterations": "3", "refine": "0", "tune_rate": "1e-3"}
    plain = compress_model(source, tmp_path / "a", method="vptq", bits=2.5, tuning=QUICK, options=options)
    options["tune_model"] = "6"
    report = compress_model(source, tmp_path / "b", method="vptq", bits=2.5, tuning=QUICK, options=options)
    assert report.specs == plain.specs
    name = "model.layers.0.mlp.up_proj.weight"
    forms = []
    for folder in ("a", "b"):
        config = ModelConfig.from_directory(tmp_path / folder)
        with Checkpoint(tmp_path / folder, config) as checkpoint:
            checkpoint.verify(digests=True)
            packed = checkpoint.packed(name)
            assert packed is not None
            forms.append({key: value.copy() for key, value in packed.buffers.items()})
    np.testing.assert_array_equal(forms[0]["indices"], forms[1]["indices"])
    assert (forms[0]["centroids"] != forms[1]["centroids"]).any()


def test_a_run_cut_off_while_files_are_written_again_holds_what_was_trained(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"iterations": "3", "refine": "0", "tune_rate": "1e-3", "tune_model": "6"}
    add, rewritten, trained = WorkDirectory.add, [], dict[str, Packed]()

    def run() -> None:
        compress_model(source, tmp_path / "out", method="vptq", bits=2.5, tuning=QUICK, options=options)

    def kept(*given: Any) -> dict[str, Packed]:
        trained.update(tuned_model(*given))
        return trained

    def stop_at_the_second(work: WorkDirectory, part: Part) -> None:
        if any(part.file == each.file for each in work.parts):
            rewritten.append(part.file)
            if len(rewritten) == 2:
                raise KeyboardInterrupt
        add(work, part)

    with monkeypatch.context() as patch:
        patch.setattr(WorkDirectory, "add", stop_at_the_second)
        patch.setattr("memwall.compress.vptq.tuned_model", kept)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert len(rewritten) == 2
    monkeypatch.setattr("memwall.compress.vptq.tuned_model", lambda *_: pytest.fail("trained again"))
    run()
    with Checkpoint(tmp_path / "out") as checkpoint:
        checkpoint.verify(digests=True)
        coded = 0
        for name, form in trained.items():
            found = checkpoint.packed(name)
            if found is None:
                np.testing.assert_array_equal(checkpoint.tensor(name), codec(form.spec).decode(form))
                continue
            coded += 1
            assert found.spec == form.spec
            for buffer, array in form.buffers.items():
                np.testing.assert_array_equal(found.buffers[buffer], array, err_msg=f"{name} {buffer}")
    assert coded == 7

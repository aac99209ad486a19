"""AccLLM's weights: the mask holds through every step, rounding is as trained with, and whole runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.compress import weight_method
from memwall.compress.accllm import AccLlm, mask_of
from memwall.compress.base import MethodConfig, Statistics, Subject
from memwall.compress.model import compress_model
from memwall.engine import Settings, load
from memwall.errors import InputError
from memwall.formats import codec
from memwall.formats.sparse import largest_pairs
from memwall.memory import Arena, Ledger
from memwall.models.checkpoint import Checkpoint
from tests.compress.test_spqr import layer
from tests.compress.tiny_model import QUICK, make_model
from tests.compress.whole_run import check_refused, check_whole_run

SPEC = "sparse2-g128-asym"
STEPS = {"tune_steps": "2", "aware_steps": "2", "shrinks": "4"}


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 1 << 30))
def test_a_pruned_weight_tells_its_mask(rows: int, columns: int, seed: int) -> None:
    weight = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    mask = largest_pairs(np.abs(weight))
    found = mask_of(weight * mask)
    assert found is not None
    np.testing.assert_array_equal(found.T, mask)
    dense = mask_of(np.ones((rows, max(columns, 3)), np.float32))
    assert dense is None


@pytest.mark.parametrize("aware", [0, 1])
def test_a_pruned_weight_keeps_its_mask(aware: int) -> None:
    weight, statistics = layer(40, 256)
    weight = weight * largest_pairs(np.abs(weight))
    method = AccLlm(tune_steps=1, aware_steps=aware, shrinks=20)
    back = codec(SPEC).decode(method.compress(weight, statistics, MethodConfig(spec=SPEC)))
    assert not back[weight == 0].any()
    assert (back != 0).mean() > 0.1
    if aware:
        full_range = codec(SPEC).decode(codec(SPEC).encode(weight))
        assert np.square(back - weight).sum() < np.square(full_range - weight).sum()


def test_compensation_and_ranges_beat_rounding_alone() -> None:
    weight, statistics = layer(64, 256)

    def loss(**changes: object) -> float:
        method = AccLlm(tune_steps=0, aware_steps=0, **changes)  # type: ignore[arg-type]
        back = codec(SPEC).decode(method.compress(weight, statistics, MethodConfig(spec=SPEC)))
        return statistics.error(back - weight) / statistics.error(weight)

    assert loss() < loss(score="wanda") < loss(score="wanda", compensate=False)
    assert loss(score="wanda", compensate=False) < loss(score="magnitude", compensate=False, shrinks=1)


def test_pruning_a_model_leaves_two_of_four(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source")
    with Checkpoint(source) as checkpoint:
        names = [tensor.name for tensor in checkpoint.config.tensors() if tensor.role == "linear"]
        tokens = np.random.default_rng(0).integers(0, checkpoint.config.vocab_size, (4, 32))
        subject = Subject(
            checkpoint=checkpoint, tokens=tokens, arena=Arena(1 << 40, Ledger()), progress=lambda *_: None
        )
        for score in ("hessian", "wanda"):
            found = AccLlm(score=score).pruned_weights(subject, dict.fromkeys(names, SPEC))
            assert set(found) == set(names)
            for name, weight in found.items():
                assert mask_of(weight) is not None
                assert (weight != 0).mean() == pytest.approx(0.5, abs=0.02)
                assert not np.array_equal(weight[weight != 0], checkpoint.alone(name)[weight != 0])  # made up for


def test_smoothing_changes_no_teacher_and_no_start(tmp_path: Path) -> None:
    """Large channels go into norms; with no rounding and the mask of all weights the model would be the same."""
    source = make_model(tmp_path / "source")
    reports = [
        compress_model(
            source, tmp_path / smooth, method="accllm", bits=8, tuning=QUICK,
            options={"tune_steps": "0", "aware_steps": "0", "shrinks": "1", "smooth": smooth},
        )
        for smooth in ("0", "0.5")
    ]  # fmt: skip
    assert reports[0].specs == reports[1].specs
    norms = []
    for smooth in ("0", "0.5"):
        with Checkpoint(tmp_path / smooth) as checkpoint:
            norms.append(np.asarray(checkpoint.alone("model.layers.0.input_layernorm.weight")))
    assert not np.allclose(*norms)


def test_settings_and_bits_that_it_lacks() -> None:
    method = AccLlm()
    assert method.form(2) == SPEC
    assert method.form("sparse4-g64") == "sparse4-g64"
    for bits in (1, 2.5, 9):
        with pytest.raises(InputError, match="2 to 8"):
            method.form(bits)
    for options, says in (
        ({"score": "random"}, "hessian, wanda, magnitude"),
        ({"shrinks": "0"}, "from 1 to 1000"),
        ({"tune_steps": "-1"}, "tune_steps"),
        ({"aware_steps": "x"}, "number"),
        ({"rate": "1"}, "between 0 and 1"),
        ({"smooth": "2"}, "smooth is 2"),
    ):
        with pytest.raises(InputError, match=says):
            weight_method("accllm", options)
    assert method.keeps_budgets is False
    assert AccLlm(tune_steps=0, aware_steps=0).keeps_budgets


def test_statistics_of_another_layer_are_refused() -> None:
    weight, _ = layer(8, 128)
    with pytest.raises(InputError, match="do not fit"):
        AccLlm().compress(weight, Statistics.identity(64), MethodConfig(spec=SPEC))


def test_whole_runs(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source")
    check_whole_run(source, tmp_path, "accllm", SPEC, options={**STEPS, "tune_steps": "0", "aware_steps": "0"})
    check_refused(source, tmp_path, "accllm", "int4", "accllm makes formats such as sparse2-g128-asym")


def test_a_tuned_model_is_saved_loaded_and_run_as_it_is_stored(tmp_path: Path) -> None:
    # with biases, which no form changes
    biased = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    source, out = make_model(tmp_path / "source", **biased), tmp_path / "out"
    compress_model(source, out, method="accllm", bits=2, options={**STEPS, "smooth": "0.5"}, tuning=QUICK)
    session = load(out, Settings(weights="saved", kv="lambda(sinks=2,window=24)", context_tokens=64))
    assert {spec for name, spec in session.decoder.weights.specs.items() if name.endswith("proj.weight")} == {SPEC}
    held = {row.owner: row.nbytes for row in session.ledger.rows()}
    linear = sum(t.size for t in session.config.tensors() if t.role == "linear")
    assert held[f"weights/{SPEC}"] < 0.6 * linear  # 2.2 bits a weight, and padding of a small model's tiles
    logits = session.decoder.forward(np.arange(40) % session.config.vocab_size, session.cache)
    assert np.isfinite(logits).all()
    session.release()

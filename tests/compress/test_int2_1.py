"""INT2.1: the divergence and its scale against a slow reference, the teacher's file, and a correction that corrects."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.compress.int2_1 import Distillation, ErrorCorrection, MemoryFrugal
from memwall.compress.teacher import Teacher
from memwall.compress.tune import tune_model
from memwall.compress.tuning import Share, tune_method
from memwall.errors import InputError
from memwall.memory import Arena, Ledger
from memwall.models.config import ModelConfig
from memwall.models.torch_decoder import TorchDecoder
from tests.compress.test_tune import QUICK, TEXT
from tests.compress.tiny_model import make_model

VOCAB, POSITIONS = 12, 5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "model")


def written(path: Path, top: int, logits: np.ndarray) -> Teacher:
    """A teacher whose answers are `logits` [windows * positions, V]."""
    teacher = Teacher(path, VOCAB, POSITIONS, top)
    path.write_bytes(teacher._form(logits))
    return teacher


def slow_divergence(theirs: np.ndarray, ours: np.ndarray) -> float:
    """KL(theirs || ours) of rows of logits in float64, summed."""
    p, q = (np.exp(each - each.max(1, keepdims=True)).astype(np.float64) for each in (theirs, ours))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    return float((p * (np.log(p) - np.log(q))).sum())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1 << 20), spread=st.floats(0.1, 4), top=st.integers(0, VOCAB))
def test_divergence(tmp_path_factory: pytest.TempPathFactory, seed: int, spread: float, top: int) -> None:
    random = np.random.default_rng(seed)
    theirs, ours = (spread * random.standard_normal((2 * POSITIONS, VOCAB)).astype(np.float32) for _ in range(2))
    teacher = written(tmp_path_factory.mktemp("t") / "t.bin", top, theirs)
    found = Distillation(teacher, 1.0, 0.0).divergence(torch.from_numpy(ours[6:9]), 1, 1).item()
    whole = slow_divergence(theirs[6:9], ours[6:9])
    assert found >= -1e-4
    if top in (0, VOCAB):
        assert found == pytest.approx(whole, rel=2e-2, abs=2e-3)  # answers are float16 where all are kept
    else:
        assert found <= whole + 1e-3


def test_scale_of_the_loss(tmp_path: Path) -> None:
    """Divergence is summed over positions and divided by windows; cross-entropy is a mean over tokens, 200 times."""
    random = np.random.default_rng(0)
    theirs, ours = (random.standard_normal((POSITIONS, VOCAB)).astype(np.float32) for _ in range(2))
    teacher = written(tmp_path / "t.bin", 0, theirs)
    targets = torch.arange(POSITIONS)
    share = Share(tokens=4 * POSITIONS, sequences=4)
    found = Distillation(teacher, 1.0, 200.0).loss(torch.from_numpy(ours), targets, 0, 0, share).item()
    entropy = torch.nn.functional.cross_entropy(torch.from_numpy(ours), targets, reduction="sum").item()
    assert found == pytest.approx(slow_divergence(theirs, ours) / 4 + 200 * entropy / (4 * POSITIONS), rel=1e-3)


def test_teacher_is_the_float_model_and_goes_on(model: Path, tmp_path: Path) -> None:
    config = ModelConfig.from_directory(model)
    tokens = np.random.default_rng(0).integers(3, config.vocab_size, (3, 20))
    teacher = Teacher(tmp_path / "t.bin", config.vocab_size, 19, 0)
    teacher.fill(model, tokens, Arena(1 << 40, Ledger()))
    whole = teacher.path.read_bytes()
    teacher.path.write_bytes(whole[: len(whole) // 2])
    teacher.fill(model, tokens, Arena(1 << 40, Ledger()))
    assert teacher.path.read_bytes() == whole
    expected = torch.log_softmax(TorchDecoder.from_directory(model)(torch.from_numpy(tokens[1, :-1])), -1)
    found = torch.log_softmax(torch.from_numpy(teacher.rows(1, 0, 19).astype(np.float32)), -1)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)


def test_correction_brings_a_two_bit_model_nearer_to_its_teacher(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    options = {**QUICK, "steps": "16", "save_every": "8", "rank": "8", "ce_weight": "0", "learning_rate": "0.003"}
    report = tune_model(model, path, tmp_path / "out", method="int2-1", options=options, teacher=model)
    losses = [each["held_out"] for each in report.history]
    assert losses[-1] < 0.9 * losses[0]
    assert report.best_step == 16
    assert report.base == "int2-g64-asym"
    assert report.effective_bits > report.base_bits == 2.5
    # and then on for a task, with the same adapter
    more = {**QUICK, "rank": "8", "alpha": "128", "targets": "all", "steps": "2"}
    again = tune_model(model, path, tmp_path / "task", method="int2-1", options=more, lora=tmp_path / "out")
    plain = tune_model(model, path, tmp_path / "plain", method="int2-1", options=more)
    assert again.history[0]["held_out"] != plain.history[0]["held_out"]


def test_published_settings_and_refusals(model: Path, tmp_path: Path) -> None:
    task, correction = tune_method("int2-1"), tune_method("int2-1", teacher=True)
    assert (type(task), type(correction)) == (MemoryFrugal, ErrorCorrection)
    assert (task.rank, task.alpha, task.targets, task.batch, task.micro_batch, task.epochs) == (
        8, 16.0, "q_proj,v_proj", 144, 1, 3,
    )  # fmt: skip
    assert (correction.rank, correction.alpha, correction.batch, correction.targets) == (32, 128.0, 4, "all")
    with pytest.raises(InputError, match="nor both zero"):
        tune_method("int2-1", {"kl_weight": "0", "ce_weight": "0"}, teacher=True)
    with pytest.raises(InputError, match="--teacher"):
        dataclasses.replace(correction).objective(None)
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    other = make_model(tmp_path / "other", vocab_size=4160)
    with pytest.raises(InputError, match="share a tokenizer"):
        tune_model(model, path, tmp_path / "out", method="int2-1", options={**QUICK}, teacher=other)

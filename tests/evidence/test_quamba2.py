"""What Quamba2's verdicts hang on: models that are equal and one that is not, losses, and training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from memwall.cli.evidence import load_experiment
from memwall.models import ModelConfig
from memwall.systems import find_system

SMALL = {"hidden_size": 64, "num_heads": 4, "head_dim": 32, "num_hidden_layers": 2, "state_size": 16}


@pytest.fixture(scope="module")
def quamba2() -> ModuleType:
    return load_experiment(find_system("quamba2"))


@pytest.fixture(scope="module")
def model(quamba2: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "model"
    return Path(quamba2.random_folder(folder, quamba2.model_config(quamba2.QUICK, 2, **SMALL)))


def test_equal_models_are_equal_and_the_other_is_not(quamba2: ModuleType, model: Path, tmp_path: Path) -> None:
    for kind in ("fused", "inside", "across"):
        quamba2.equal_model(model, tmp_path / kind, kind)
    assert quamba2.difference(model, tmp_path / "fused") < 1e-4
    assert quamba2.difference(model, tmp_path / "inside") < 1e-4
    assert quamba2.difference(model, tmp_path / "across") > 1e-3


def test_losses_are_those_of_all_tokens(quamba2: ModuleType, model: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 4096, 600)
    session = quamba2.open_model(model, "float32")
    nats = quamba2.losses(session, tokens)
    session.release()
    assert nats.shape == (599,)
    assert nats.mean() == pytest.approx(np.log(4096), rel=0.2)
    session = quamba2.open_model(model, "float32")
    session.decoder.forward(tokens[:300], session.cache)
    logits = session.decoder.forward(tokens[300:301], session.cache).astype(np.float64)
    assert nats[300] == pytest.approx(np.log(np.exp(logits).sum()) - logits[tokens[301]], rel=1e-4)


def test_ranks(quamba2: ModuleType) -> None:
    assert quamba2.ranks(np.array([3.0, 1.0, 2.0])).tolist() == [2, 0, 1]


def test_training_writes_a_model_that_learned(quamba2: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    sizes = replace(quamba2.QUICK, layers=1, hidden=64, steps=6, batch=2, sequence=32)
    folder = quamba2.prepared_folder(tmp_path / "trained", quamba2.model_config(sizes))
    told: list[str] = []
    quamba2.train(folder, sizes, "the cat sat on the mat and looked at the rat. " * 100, lambda *at: told.append(at[2]))
    assert told
    assert ModelConfig.from_directory(folder).ssm is not None
    session = quamba2.open_model(folder, "float32")
    assert np.isfinite(quamba2.losses(session, np.arange(40))).all()

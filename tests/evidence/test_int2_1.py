"""What INT2.1's verdicts hang on: gradients, the untrained rival, and contenders that hold what they are said to."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from memwall.cli.evidence import load_experiment
from memwall.compress.model import compress_model
from memwall.formats import codec
from memwall.models.checkpoint import Checkpoint
from memwall.models.lora import LoraWeights
from memwall.systems import find_system


@pytest.fixture(scope="module")
def experiment() -> ModuleType:
    return load_experiment(find_system("int2-1"))


def test_gradients_pass(experiment: ModuleType) -> None:
    assert all(claim.passed for claim in experiment.gradients())


def test_the_untrained_rival_makes_the_error_smaller(experiment: ModuleType, tmp_path: Path) -> None:
    study = experiment.Study(tmp_path, None, True)
    base = tmp_path / "rtn2"
    compress_model(experiment.DEMO, base, bits="int2-g64-asym", method="rtn")
    lora = experiment.decomposed(study, base)
    with Checkpoint(experiment.DEMO) as whole, Checkpoint(base) as coded:
        name = "model.layers.3.self_attn.q_proj.weight"
        packed = coded.packed(name)
        assert packed is not None
        error = whole.alone(name).astype(np.float32) - codec(packed.spec).decode(packed)
        factors = LoraWeights.read(lora, whole.config).factors(3, "q_proj")
        assert factors is not None
        left = np.linalg.norm(error - factors[1] @ factors[0])
        values = np.linalg.svd(error, compute_uv=False)
    assert left == pytest.approx(np.linalg.norm(values[experiment.RANK :]), rel=1e-3)


@pytest.mark.parametrize("name", ["packed", "bfloat16", "decoded per call"])
def test_contenders_hold_their_weights(experiment: ModuleType, name: str) -> None:
    held = experiment.step(name, 64, 128, 1)
    values = 4 * 64 * 64 + 3 * 64 * 128
    assert held["weights"] == (2 * values if name == "bfloat16" else values * 2.5 / 8)

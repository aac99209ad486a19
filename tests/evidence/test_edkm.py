"""What eDKM's verdicts hang on: modes that do what they are called, fair baselines, real learners, exact bytes."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from memwall.cli.evidence import load_experiment
from memwall.formats import codec
from memwall.systems import find_system

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def edkm() -> ModuleType:
    return load_experiment(find_system("edkm"))


def test_modes(edkm: ModuleType) -> None:
    weights = edkm.drawn(128, 128)
    kept = {mode: edkm.kept_by(mode, weights)["kept"] for mode in edkm.MODES}
    assert kept["each"] > kept["M"] > kept["M+S"]
    assert kept["M"] > kept["M+U"] > kept["M+U+S"]
    # what is offered is more than what is kept by itself only by tensors that are parameters or too small
    assert edkm.kept_by("each", weights)["offered"] == kept["each"]


def test_the_map_is_one_map(edkm: ModuleType) -> None:
    saved = edkm.saver("each")
    half = edkm.drawn(64, 64).bfloat16().reshape(-1)
    with saved.hooks():
        result = (half[:, None] * 8).expand(-1, 8).contiguous().exp()
    assert saved.traffic.offered == result.nbytes == 64 * 64 * 8 * 2


def test_one_scale_a_matrix_is_rounding_to_even_levels(edkm: ModuleType) -> None:
    weight = np.random.default_rng(0).standard_normal((32, 64)).astype(np.float32)
    packed = edkm.whole_scale(weight, 3)
    levels = np.unique(codec(packed.spec).decode(packed))
    assert len(levels) == 8
    np.testing.assert_allclose(np.diff(levels), np.diff(levels)[0], rtol=5e-3)
    lost = np.square(codec(packed.spec).decode(packed) - weight).mean()
    assert 0.034 < lost < 0.042  # 0.0374 is the least that 8 even levels lose of a normal variable


def test_exactness_holds_and_learners_agree(edkm: ModuleType) -> None:
    claims = [*edkm.exactness(), *edkm.learners((2,)), *edkm.file_bytes()]
    assert [claim.passed for claim in claims] == [True] * 4, claims

"""What Tilus's verdicts hang on: brute-force composition, random layouts, and the hand-over of memwall's weights."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from memwall.cli.evidence import load_experiment
from memwall.errors import InputError
from memwall.kernels.tile_layout import local, spatial
from memwall.systems import find_system


@pytest.fixture(scope="module")
def tilus() -> ModuleType:
    return load_experiment(find_system("tilus"))


def test_brute_force_composition_by_hand(tilus: ModuleType) -> None:
    """Two threads with one element each, each element a row of three that one thread holds."""
    table = tilus.replaced(spatial(2, 1), local(1, 3))
    assert table.tolist() == [[[0, 0], [0, 1], [0, 2]], [[1, 0], [1, 1], [1, 2]]]


def test_random_layouts_are_of_many_kinds(tilus: ModuleType) -> None:
    random = np.random.default_rng(0)
    found = [tilus.random_layout(random) for _ in range(200)]
    assert len({layout.canonical() for layout in found}) > 100
    assert any(layout.replicas > 1 for layout in found)


@pytest.mark.parametrize("name", ["layouts", "types", "views_and_splits"])
def test_claims_that_need_nothing_else_pass(tilus: ModuleType, name: str) -> None:
    claims = list(tilus.layouts(50) if name == "layouts" else getattr(tilus, name)())
    assert claims
    assert all(claim.passed for claim in claims)


def test_a_wrong_algebra_would_be_noticed(tilus: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tilus, "replaced", lambda f, g: f.table())
    assert not next(tilus.layouts(20)).passed


def test_memwalls_own_weights_are_handed_over_exactly(tilus: ModuleType, tmp_path: Path) -> None:
    try:
        tilus.find_compiler()
    except tilus.NoCompiler as error:
        pytest.skip(str(error))
    matrix = tmp_path / "w.npy"
    np.save(matrix, np.random.default_rng(0).normal(size=(40, 256)).astype(np.float32))
    assert all(claim.passed for claim in tilus.hand_written(matrix))
    for bad, says in ((np.zeros((4, 100)), "multiple of 128"), (np.zeros(128), "matrix")):
        np.save(matrix, bad)
        with pytest.raises(InputError, match=says):
            list(tilus.hand_written(matrix))
    with pytest.raises(InputError, match=r"\.npy"):
        list(tilus.hand_written(tmp_path / "w.txt"))

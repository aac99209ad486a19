"""What the verdicts on SPANN hang on: exact neighbours, equal bytes, and claims that fail where nothing is gained."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from memwall.cli.evidence import load_experiment
from memwall.errors import InputError
from memwall.retrieve.closure import ClosureSettings
from memwall.retrieve.head_tree import HeadSettings
from memwall.retrieve.spann import SpannSettings
from memwall.studies.list_reads import Ranked
from memwall.systems import find_system
from tests.retrieve.test_head_tree import drawn, squared


@pytest.fixture(scope="module")
def experiment() -> ModuleType:
    return load_experiment(find_system("spann"))


def test_the_truth_is_exact(experiment: ModuleType) -> None:
    subject = experiment.split("x", "l2", drawn(1200), 50)
    assert (len(subject.vectors), len(subject.queries)) == (1150, 50)
    exact = squared(subject.queries, subject.vectors)
    np.testing.assert_allclose(np.take_along_axis(exact, subject.truth, axis=1), np.sort(exact, axis=1)[:, :10])


def test_variants_have_equal_bytes(experiment: ModuleType) -> None:
    subject = experiment.split("x", "l2", drawn(3000), 40)
    settings = SpannSettings(heads=HeadSettings(share=0.1), closure=ClosureSettings(candidates=32))
    variants = experiment.Variants(subject, settings)
    lists = variants.lists("tree")
    near = experiment.equal_bytes(variants, lists, 3.0)
    assert len(near.members) == pytest.approx(len(lists.members), rel=0.01)
    one = variants.ranked("tree", lists)
    assert one.rank.min() >= 0
    assert (one.rank == 0).any()
    assert np.diff(one.pages).max() <= 12


def test_pruning_of_equal_distances_gains_nothing(experiment: ModuleType) -> None:
    draw = np.random.default_rng(0)
    apart = np.tile(np.linspace(1, 2, 60, dtype=np.float32), (100, 1))
    one = Ranked.of(apart, np.ones((100, 60), int), draw.integers(0, 60, (100, 10)))
    assert not experiment.pruning_claim("x", one).passed
    subject = experiment.split("x", "l2", drawn(300), 10)
    assert [claim.passed for claim in experiment.ivf_claims(subject, "faiss: not here", one)] == [None, None]
    same = one, one, np.ones(60)  # of an inverted file that reads as much
    assert [claim.passed for claim in experiment.ivf_claims(subject, same, one)] == [False, False]


def test_bad_data(experiment: ModuleType, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((10, 4), np.float32))
    with pytest.raises(InputError, match="5000 vectors"):
        experiment.texts(experiment.QUICK, tmp_path / "x.npy")

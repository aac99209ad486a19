"""What the verdicts on embedding storage hang on: gaps and their errors, texts, and a wrong order that would show."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from memwall.cli.evidence import load_experiment
from memwall.errors import InputError
from memwall.retrieve.embedding_storage import Point
from memwall.retrieve.ranking import Judged, Measured
from memwall.studies.passages import text_folder
from memwall.systems import find_system
from tests.retrieve.test_embedding_storage import vectors


@pytest.fixture(scope="module")
def experiment() -> ModuleType:
    return load_experiment(find_system("embedding-storage"))


def row(**found: list[float]) -> dict[str, Measured]:
    return {
        name: Measured(point=Point(form=name, vector_bytes=4, quality=float(np.mean(each))), ndcg=np.array(each))
        for name, each in found.items()
    }


def test_gaps_are_paired(experiment: ModuleType) -> None:
    same = [row(a=[0.0, 1.0, 0.5, 0.7], b=[0.0, 0.9, 0.4, 0.6])] * 2
    loss, error = experiment.gap(same, "a", "b")
    assert loss == pytest.approx(0.075 / 0.55)
    assert error == pytest.approx(0.05 / 2 / 2**0.5 / 0.55)  # of means of four, over two subjects
    assert experiment.certain(same, "a", "b", 2)
    assert not experiment.certain(same, "b", "a", -2)
    assert not experiment.certain([row(a=[1.0, 0.0], b=[0.0, 0.9])], "a", "b", 2)  # better by chance


def test_claims_can_fail(experiment: ModuleType) -> None:
    """Types that lose alike, and a choice among forms none of which is small."""
    names = {name: [0.5, 0.6, 0.7] for name in (*experiment.TYPES, "pca:0.5+e4m3", "pca:0.5+e2m1-dimension")}
    assert [one.passed for one in experiment.type_claims([row(**names)], "x", 2.0)][:3] == [False] * 3
    judged = Judged(vectors=vectors(5), queries=vectors(1), relevant=[{0}])
    subject = experiment.Subject(name="x", d=32, judged=judged, fitted=vectors(5))
    one = row(float32=[0.5, 0.6])
    one["float32"] = Measured(point=Point(form="float32", vector_bytes=1, quality=0.5), ndcg=one["float32"].ndcg)
    assert not experiment.choice_claim([one], [subject]).passed


def test_casts_and_files(experiment: ModuleType) -> None:
    assert experiment.cast_claim().passed
    assert experiment.file_claim(vectors(2100, d=64)).passed


def test_texts_come_from_a_folder(experiment: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no wikitext2-valid\.txt"):
        text_folder(tmp_path, Path(experiment.__file__))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "wikitext2-valid.txt").write_text("")
    assert text_folder(tmp_path, Path(experiment.__file__)) == tmp_path / "text"


def test_what_is_judged_is_not_what_was_learned_from(experiment: ModuleType) -> None:
    from memwall.studies.passages import docstrings

    assert not set(experiment.OTHERS) & {*experiment.NUMERICAL, *experiment.LIBRARY}
    judged, others = (docstrings("x", names, 300) for names in (experiment.NUMERICAL, experiment.OTHERS))
    assert len(judged) > 50
    assert len(others) > 50
    assert not set(judged.passages) & set(others.passages)

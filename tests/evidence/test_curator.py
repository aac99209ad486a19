"""What the verdicts on Curator hang on: answers by brute force, paired ratios, one recall, and claims that can fail."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from memwall.cli.evidence import load_experiment
from memwall.errors import InputError
from memwall.retrieve.base import unit
from memwall.studies.passages import text_folder
from memwall.systems import find_system
from tests.retrieve.test_embedding_storage import vectors


@pytest.fixture(scope="module")
def experiment() -> ModuleType:
    return load_experiment(find_system("curator"))


@pytest.fixture(scope="module")
def held(experiment: ModuleType) -> Any:
    x = unit(vectors(3200, seed=1))
    tags = [["all", *(["odd"] if place % 2 else []), f"t{place % 200}"] for place in range(3200)]
    return experiment.Corpus(
        x=x[:3000], fresh=x[3000:3050], queries=x[3050:3150], tags=tags[:3000], asks=tags[3050:3150]
    )


def table(experiment: ModuleType, held: Any, **factors: tuple[float, float]) -> Any:
    """Indexes that look at, and take, so many times what Curator does."""
    may = experiment.by_tags(held)
    base = np.random.default_rng(0).uniform(50, 150, len(held.queries))
    contenders, looked, seconds = {}, {}, {}
    for name, (more, longer) in {"curator": (1.0, 1.0), **factors}.items():
        one = experiment.Contender(
            name=name, efforts=[1], search=lambda query, effort: may.exact[query], looked=lambda query, effort: (0, 0),
            nbytes=1_000_000 * (10 if "private" in name else 1), effort=1, recall=0.95,
        )  # fmt: skip
        contenders[name], seconds[name] = one, base * longer / 1e6
        looked[name] = np.stack([base * more, base * more], axis=1)
    return experiment.Table(may=may, n=3000, d=32, contenders=contenders, looked=looked, seconds=seconds)


GOOD = {"shared IVF": (50, 20), "shared HNSW": (30, 10), "private IVF": (1, 1), "private copies": (5, 2)}


def test_answers_are_those_of_brute_force(experiment: ModuleType, held: Any) -> None:
    may = experiment.by_tags(held)
    assert sorted(map(len, may.who))[-2:] == [1500, 3000]
    for query in (0, 7, 41):
        mine = may.who[may.asker[query]]
        scores = held.x[mine] @ held.queries[query]
        assert set(may.exact[query].tolist()) == set(mine[np.argsort(-scores)[:10]].tolist())
    lots = experiment.by_lot(held, dataclasses.replace(experiment.QUICK, lots=5))
    assert [len(each) for each in lots.who] == [10, 10, 30, 95, 300]
    assert lots.shares(3000).max() <= 0.1


def test_curator_reaches_the_recall_that_is_asked_for(experiment: ModuleType, held: Any) -> None:
    may = experiment.by_tags(held)
    one, index = experiment.curator(held, may)
    experiment.tune(one, may)
    assert one.recall >= experiment.RECALL
    assert one.effort in experiment.SCANS
    distances, computed = one.looked(3, one.effort)
    assert distances == computed > 0
    assert index.count == 3000
    bad = dataclasses.replace(one, efforts=[1, 2], search=lambda query, effort: np.full(10, -1))
    experiment.tune(bad, may)
    assert (bad.effort, bad.recall) == (2, 0)
    failed = table(experiment, held)
    failed.contenders["curator"].recall = 0.9
    assert not experiment.recall_claim([failed]).passed


def test_ratios_are_paired(experiment: ModuleType, held: Any) -> None:
    made = table(experiment, held, **GOOD)
    every = np.ones(len(held.queries), bool)
    ratio, error = made.ratio({name: each[:, 0] for name, each in made.looked.items()}, "shared IVF", every)
    assert ratio == pytest.approx(50)
    assert error == pytest.approx(0, abs=1e-9)  # each query by as much


def test_claims_can_fail(experiment: ModuleType, held: Any) -> None:
    good = table(experiment, held, **GOOD)
    claims = [*experiment.looked_claims(good), *experiment.latency_claims(good)]
    assert [one.passed for one in claims] == [True] * 4
    bad = table(experiment, held, **{**GOOD, "shared IVF": (9, 0.9), "private IVF": (0.3, 0.4)})
    claims = [*experiment.looked_claims(bad), *experiment.latency_claims(bad)]
    assert [one.passed for one in claims] == [False] * 4
    (memory,) = experiment.memory_claims(good)
    assert memory.passed
    good.contenders["curator"].nbytes = 2_000_000
    assert not next(iter(experiment.memory_claims(good))).passed
    slow = dataclasses.replace(good, seconds={"curator": good.may.shares(3000)})
    assert not experiment.flat_claim(slow).passed


def test_changes_and_filters(experiment: ModuleType, held: Any) -> None:
    sizes = dataclasses.replace(experiment.QUICK, changes=400)
    assert experiment.mix_claim(held, sizes).passed
    assert "never made anew" in experiment.rebuild_claim(held, experiment.by_tags(held)).measured
    may = experiment.by_tags(held)
    index = experiment.built_curator(held, may)
    assert experiment.file_claim(held, may, index).passed
    assert experiment.growth_claim(held, may, index).claim


def test_texts_come_from_a_folder(experiment: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"holds no wikitext2-valid\.txt"):
        text_folder(tmp_path, Path(experiment.__file__))
    (tmp_path / "wikitext2-valid.txt").write_text("")
    assert text_folder(tmp_path, Path(experiment.__file__)) == tmp_path
    monkeypatch.setattr(experiment, "PACKAGES", ("rich", "numpy"))
    stretches = [chain for _, chain in experiment.source_stretches(20)]
    assert {"rich", "numpy"} <= {chain[0] for chain in stretches}
    assert all(len(chain) <= 4 for chain in stretches)

"""Ranks, scores and fronts by hand, and as properties of any records."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.studies.efficiency_rank import METRICS, parse_weights, ranked
from tests.studies.efficiency_runs import make_record

RUNS = [
    make_record("mha", losses=[1.0, 2.0], memory=400, step_s=4.0),
    make_record("mqa", losses=[1.2, 2.1], memory=100, step_s=1.0),
    make_record("nsa", losses=[1.3, 2.3], memory=400, step_s=2.0),
]


def test_ranks_raw_values_score_and_front_by_hand() -> None:
    mha, mqa, nsa = ranked(RUNS)
    assert [row.ranks["quality"] for row in (mha, mqa, nsa)] == [1, 2, 3]
    assert [row.ranks["amu"] for row in (mha, mqa, nsa)] == [2, 1, 2]  # equal values share a rank
    assert [row.ranks["al"] for row in (mha, mqa, nsa)] == [3, 1, 2]
    assert [row.ranks["throughput"] for row in (mha, mqa, nsa)] == [3, 1, 2]
    assert mha.values["quality"] == pytest.approx(1.5)
    assert mqa.values["amu"] == pytest.approx(100)
    assert mha.score == pytest.approx((1 + 0 + 0) / 3)
    assert mqa.score == pytest.approx((0.5 + 1 + 1) / 3)
    assert nsa.score == pytest.approx((0 + 0 + 2 / 3) / 3)
    assert [row.front for row in (mha, mqa, nsa)] == [True, True, False]
    assert "mcr" not in mha.ranks


def test_gaps_are_paired_with_the_baseline() -> None:
    mha, mqa, _ = ranked(RUNS)
    assert mha.gap is None
    assert mqa.gap is not None
    assert mqa.gap.mean == pytest.approx(0.15)
    assert mqa.gap.error == pytest.approx(0.05)


def test_seeds_are_one_row_with_an_error() -> None:
    runs = [make_record("mha", losses=[1.0 + seed], memory=10, step_s=1.0, seed=seed) for seed in range(3)]
    (row,) = ranked(runs)
    assert row.values["quality"] == pytest.approx(2)
    assert row.errors["quality"] == pytest.approx(1 / 3**0.5)
    assert row.front
    assert row.score == pytest.approx(1)


def test_groups_and_stages_do_not_mix() -> None:
    other = make_record("mqa", losses=[1.0], memory=1, step_s=1.0, stage="pretraining")
    rows = ranked([*RUNS, other])
    assert {row.key for row in rows} == {("attention", "1M", "inference"), ("attention", "1M", "pretraining")}
    assert rows[-1].ranks["amu"] == 1
    assert next(row for row in rows if row.technique == "mqa").ranks["amu"] == 1


def test_weights_decide_score_and_front() -> None:
    mha, mqa, nsa = ranked(RUNS, parse_weights("quality=3,amu=1"))
    assert mha.score == pytest.approx(3 / 4)
    assert mqa.score == pytest.approx((1.5 + 1) / 4)
    assert [row.front for row in (mha, mqa, nsa)] == [True, True, False]
    assert [row.front for row in ranked(RUNS, {"al": 1.0})] == [False, True, False]


def test_larger_is_better_where_it_is() -> None:
    runs = [make_record(name, losses=[1.0], memory=10, step_s=1.0, mcr=mcr) for name, mcr in (("a", 3.5), ("b", 1.0))]
    first, second = ranked(runs)
    assert (first.ranks["mcr"], second.ranks["mcr"]) == (1, 2)


@pytest.mark.parametrize(
    ("text", "says"),
    [("speed=1", "none of quality, amu"), ("amu", "from 0"), ("amu=-1", "from 0"), ("amu=nan", "from 0"),
     ("amu=0", "above 0"), ("", "none of")],
)  # fmt: skip
def test_bad_weights_are_refused(text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        parse_weights(text)


@given(st.lists(st.tuples(st.floats(0.1, 9), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=8))
def test_any_ranking_is_consistent(runs: list[tuple[float, int, int]]) -> None:
    rows = ranked(
        [
            make_record(f"t{number}", losses=[loss], memory=memory, step_s=step)
            for number, (loss, memory, step) in enumerate(runs)
        ]
    )
    assert any(row.front for row in rows)
    for metric in METRICS:
        found = [(row.values[metric.name], row.ranks[metric.name]) for row in rows if metric.name in row.ranks]
        assert not found or min(rank for _, rank in found) == 1
        for value, rank in found:
            better = sum(other < value if metric.smaller else other > value for other, _ in found)
            assert rank == better + 1
    for row in rows:
        assert row.score is not None
        assert 0 <= row.score <= 1 + 1e-9
    best = max(rows, key=lambda row: row.score or 0)
    assert best.front  # with all weights above zero no row that is beaten has the highest score alone

"""Schedules of unequal tiles: nothing lost, bounds kept, figures by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.kernels.tile_schedule import (
    Schedule,
    Tile,
    balanced,
    equal_count,
    longest_first,
    lower_bound,
    relabelled,
    striped,
    with_barrier,
)

COSTS = st.lists(st.sampled_from((1.0, 2.0, 3.5, 7.0)), min_size=1, max_size=80)


def tiles_of(costs: list[float]) -> list[Tile]:
    return [Tile(cost=cost, work=(0, i, 0, 4), parts=4) for i, cost in enumerate(costs)]


def by_hand() -> list[Tile]:
    return tiles_of([2, 2, 2, 2, 1, 1, 1, 1])


def test_figures_by_hand() -> None:
    tiles = by_hand()
    assert lower_bound(tiles, 2) == 6
    assert equal_count(tiles, 2).loads == [8, 4]
    assert striped(tiles, 2).loads == [6, 6]
    assert longest_first(tiles, 2).makespan == 6
    # the second is free at 4 and takes the first one's last tile, which would have begun at 6
    assert equal_count(tiles, 2).makespan_with_stealing() == 6
    assert with_barrier(tiles, 3, [1, 1, 1, 1, 0, 0, 0, 0]) == 2 + 4


def test_graham_s_bound_is_met_by_its_worst_case() -> None:
    """Two workers, 3 3 2 2 2: longest first ends at 7, the best at 6; a cut tile of the tail repairs it."""
    tiles = tiles_of([3, 3, 2, 2, 2])
    assert longest_first(tiles, 2).makespan == 7
    assert balanced(tiles, 2).makespan == pytest.approx(6, rel=0.05)


@settings(max_examples=60, deadline=None)
@given(COSTS, st.integers(1, 9))
def test_every_tile_is_worked_once(costs: list[float], workers: int) -> None:
    tiles = tiles_of(costs)
    for make in (equal_count, striped, longest_first):
        schedule = make(tiles, workers)
        assert sorted(t.work for w in schedule.workers for t in w) == [t.work for t in tiles]
        assert len(schedule.workers) == workers
        assert lower_bound(tiles, workers) <= schedule.makespan + 1e-9
        assert lower_bound(tiles, workers) <= schedule.makespan_with_stealing() + 1e-9
    longest = longest_first(tiles, workers).makespan
    assert longest <= math.fsum(costs) / workers + (1 - 1 / workers) * max(costs) + 1e-9  # of any list rule (Graham)
    cut = balanced(tiles, workers)
    assert cut.makespan <= longest
    assert math.fsum(cut.loads) == pytest.approx(math.fsum(costs))
    covered = sorted(t.work for w in cut.workers for t in w)
    for index in range(len(costs)):
        parts = [work[-2:] for work in covered if work[1] == index]
        assert [first for first, _ in parts] == [0, *(last for _, last in parts[:-1])]
        assert parts[-1][1] == 4


def test_slices() -> None:
    tile = Tile(cost=5, work=(1, 2, 3, 8), parts=5)
    assert [part.work for part in tile.split(2)] == [(1, 2, 3, 5), (1, 2, 5, 8)]
    assert [part.cost for part in tile.split(2)] == [2, 3]
    assert len(tile.split(9)) == 5
    assert [each.work for each in relabelled(tile.split(1), 7)] == [(7, 2, 3, 8)]


def test_nothing_to_do() -> None:
    for make in (equal_count, striped, longest_first, balanced):
        assert make([], 3).makespan == 0
    assert Schedule(()).makespan_with_stealing() == 0


def test_bad_input() -> None:
    with pytest.raises(InputError, match="one at least"):
        longest_first([], 0)
    with pytest.raises(InputError, match="costs are at least 0"):
        Tile(cost=-1)
    with pytest.raises(InputError, match="parts"):
        Tile(cost=1, work=(0, 0, 0, 3), parts=2).split(2)

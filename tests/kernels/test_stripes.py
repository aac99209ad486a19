"""Stripes: each tile once, groups whole, few reductions, nobody with more than a group above the mean."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.kernels.stripes import Part, Stripes, whole_slices


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(1, 12), st.integers(1, 40), st.integers(1, 150), st.integers(1, 4))
def test_stripes(groups: int, slices: int, workers: int, group_tiles: int) -> None:
    stripes = Stripes(k_tiles=groups * group_tiles, slices=slices, workers=workers, group_tiles=group_tiles)
    parts = [part for worker in range(workers) for part in stripes.parts(worker)]
    # each tile once, in the one row
    tiles = [(part.slice, k) for part in parts for k in range(part.first, part.stop)]
    assert tiles == [(slice_index, k) for slice_index in range(slices) for k in range(groups * group_tiles)]
    assert all(part.first % group_tiles == 0 == part.stop % group_tiles for part in parts)
    # what is summed up, and in which order
    by_slice = [stripes.reduction(index) for index in range(slices)]
    assert sorted((p.worker, p.slice) for each in by_slice for p in each) == [(p.worker, p.slice) for p in parts]
    for index, order in enumerate(by_slice):
        assert [part.slice for part in order] == [index] * len(order)
        assert order[0].stop == stripes.k_tiles
        assert order[-1].first == 0
        assert all(after.stop == before.first for before, after in pairwise(order))
    assert stripes.reductions == sum(len(order) - 1 for order in by_slice) <= min(workers - 1, slices + workers)
    # loads
    loads = [stripes.load(worker) for worker in range(workers)]
    assert loads == [sum(p.stop - p.first for p in stripes.parts(worker)) for worker in range(workers)]
    assert max(loads) - stripes.num_tiles / workers < group_tiles
    assert stripes.utilisation == pytest.approx(stripes.num_tiles / (workers * max(loads)))


def test_the_paper_s_example() -> None:
    """3 by 3 tiles on 5 processors."""
    stripes = Stripes(k_tiles=3, slices=3, workers=5)
    assert stripes.stripe_tiles == 2
    owners = [[0] * 3 for _ in range(3)]
    for worker in range(5):
        for part in stripes.parts(worker):
            for k in range(part.first, part.stop):
                owners[part.slice][k] = worker
    assert owners == [[0, 0, 1], [1, 2, 2], [3, 3, 4]]
    assert stripes.reduction(1) == [
        Part(worker=2, slice=1, first=1, stop=3),
        Part(worker=1, slice=1, first=0, stop=1),
    ]


def test_narrow_matrices_keep_all_processors_busy() -> None:
    """N of 4096 in tiles of 256 on 108 processors: 16 slices alone use 16 of them."""
    assert whole_slices(64, 16, 108) == pytest.approx(16 / 108)
    assert Stripes(k_tiles=64, slices=16, workers=108).utilisation > 0.94


@pytest.mark.parametrize(
    "sizes", [{"k_tiles": 0}, {"slices": 0}, {"workers": 0}, {"group_tiles": 0}, {"group_tiles": 2}]
)
def test_sizes_that_make_no_stripes(sizes: dict[str, int]) -> None:
    with pytest.raises(InputError, match="stripes: "):
        Stripes(**{"k_tiles": 3, "slices": 2, "workers": 4, **sizes})

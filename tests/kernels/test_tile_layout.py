"""Register layouts against brute force, the worked examples, and the matrix instruction's fragments."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.kernels import tile_layout as tl
from memwall.kernels.tile_layout import Layout, column_local, column_spatial, local, replicated, spatial

MAKERS: tuple[Callable[..., Layout], ...] = (local, spatial, column_local, column_spatial)


@st.composite
def layouts(draw: st.DrawFn, rank: int = 2, depth: int = 3) -> Layout:
    found = local(*[1] * rank)
    for _ in range(draw(st.integers(1, depth))):
        if draw(st.integers(0, 5)) == 0:
            found = found.compose(replicated(draw(st.integers(2, 3)), rank))
        else:
            shape = [draw(st.sampled_from([1, 2, 3, 4])) for _ in range(rank)]
            found = found.compose(draw(st.sampled_from(MAKERS))(*shape))
    return found


def slow_index(layout: Layout, thread: int, slot: int) -> tuple[int, ...]:
    """The unified form's definition, digit by digit."""
    digits = {}
    for mode in reversed(layout.spatial_modes):
        size = -mode if mode < 0 else layout.mode_shape[mode]
        thread, digit = divmod(thread, size)
        if mode >= 0:
            digits[mode] = digit
    for mode in reversed(layout.local_modes):
        slot, digits[mode] = divmod(slot, layout.mode_shape[mode])
    index, at = [], 0
    for size in layout.shape:
        value, product = 0, 1
        while product < size:
            value = value * layout.mode_shape[at] + digits[at]
            product *= layout.mode_shape[at]
            at += 1
        index.append(value)
    return tuple(index)


@settings(max_examples=400, deadline=None)
@given(layouts())
def test_tables_follow_the_definition(layout: Layout) -> None:
    table = layout.table()
    assert table.shape == (layout.num_threads, layout.num_slots, 2)
    for t, i in itertools.islice(itertools.product(range(layout.num_threads), range(layout.num_slots)), 0, None, 7):
        assert tuple(table[t, i]) == slow_index(layout, t, i)
    counts = np.bincount(layout.flat_table().ravel(), minlength=math.prod(layout.shape))
    assert (counts == layout.replicas).all()


@settings(max_examples=600, deadline=None)
@given(layouts(), layouts())
def test_composition_replaces_elements_by_tiles(f: Layout, g: Layout) -> None:
    h = f.compose(g)
    assert (h.num_threads, h.num_slots) == (f.num_threads * g.num_threads, f.num_slots * g.num_slots)
    t, i = np.arange(h.num_threads)[:, None], np.arange(h.num_slots)[None, :]
    outer, inner = f.table(), g.table()
    tiles = outer[t // g.num_threads, i // g.num_slots] * np.asarray(g.shape)
    assert np.array_equal(h.table(), tiles + inner[t % g.num_threads, i % g.num_slots])


@settings(max_examples=300, deadline=None)
@given(layouts(depth=2), layouts(depth=2), layouts(depth=2))
def test_composition_is_associative(f: Layout, g: Layout, h: Layout) -> None:
    assert f.compose(g).compose(h).same_as(f.compose(g.compose(h)))


@settings(max_examples=600, deadline=None)
@given(layouts(), layouts())
def test_division_undoes_composition(f: Layout, g: Layout) -> None:
    assert f.compose(g).divide(g).same_as(f)


@settings(max_examples=600, deadline=None)
@given(layouts(depth=2), layouts(depth=2))
def test_equal_means_that_they_map_alike(f: Layout, g: Layout) -> None:
    alike = f.shape == g.shape and f.num_threads == g.num_threads and np.array_equal(f.table(), g.table())
    assert f.same_as(g) == alike
    assert np.array_equal(f.canonical().table(), f.table())


@settings(max_examples=300, deadline=None)
@given(layouts(), layouts(rank=1))
def test_concat(f: Layout, g: Layout) -> None:
    h = f.concat(g)
    t, i = np.arange(h.num_threads)[:, None], np.arange(h.num_slots)[None, :]
    assert np.array_equal(h.table()[..., :2], f.table()[t // g.num_threads, i // g.num_slots])
    assert np.array_equal(h.table()[..., 2:], g.table()[t % g.num_threads, i % g.num_slots])


@settings(max_examples=300, deadline=None)
@given(layouts(rank=3), st.permutations([0, 1, 2]))
def test_permute_flatten_and_sizes_of_one(f: Layout, order: list[int]) -> None:
    assert np.array_equal(f.permute(order).table(), f.table()[..., order])
    assert np.array_equal(f.flatten().table()[..., 0], f.flat_table())
    wide = f.unsqueeze(1)
    assert wide.shape == (f.shape[0], 1, *f.shape[1:])
    assert wide.squeeze(1).same_as(f)


@settings(max_examples=300, deadline=None)
@given(layouts(rank=3), st.sets(st.integers(0, 2)))
def test_reduction_keeps_threads_and_drops_slots(f: Layout, gone: set[int]) -> None:
    reduced = f.reduce(sorted(gone))
    assert reduced.num_threads == f.num_threads
    kept = f.table().copy()
    kept[..., sorted(gone)] = 0
    for t in range(f.num_threads):
        want = list(dict.fromkeys(map(tuple, kept[t])))
        assert list(map(tuple, reduced.table()[t])) == want


@settings(max_examples=300, deadline=None)
@given(layouts(rank=2), st.data())
def test_reshape_keeps_the_row_major_order(f: Layout, data: st.DataObject) -> None:
    total = math.prod(f.shape)
    first = data.draw(st.sampled_from([n for n in range(1, total + 1) if total % n == 0]))
    try:
        other = f.reshape((first, total // first))
    except InputError:  # a mode would be cut unevenly
        return
    assert np.array_equal(other.flat_table(), f.flat_table())


def test_the_worked_examples() -> None:
    layout = Layout((4, 6), (2, 2, 3, 2), (0, 2), (3, 1))
    for i, j in itertools.product(range(4), range(6)):
        assert tuple(layout.table()[(i // 2) * 3 + j // 2, (j % 2) * 2 + i % 2]) == (i, j)
    assert local(2, 1).compose(spatial(8, 4)).compose(local(1, 2)).shape == (16, 8)
    assert not local(2).compose(spatial(2)).same_as(spatial(2).compose(local(2)))  # not commutative


def test_the_fragments_of_the_matrix_instruction() -> None:
    """The rules of the PTX manual for mma.m16n8k16: group = lane div 4, of it = lane mod 4."""
    for lane in range(32):
        group, of = divmod(lane, 4)
        a = [(group + 8 * (i in (2, 3, 6, 7)), of * 2 + (i & 1) + 8 * (i >= 4)) for i in range(8)]
        b = [(of * 2 + (i & 1) + 8 * (i >= 2), group) for i in range(4)]
        c = [(group + 8 * (i >= 2), of * 2 + (i & 1)) for i in range(4)]
        for layout, rule in ((tl.MMA_A, a), (tl.MMA_B, b), (tl.MMA_C, c)):
            assert list(map(tuple, layout.table()[lane])) == rule


def test_places_are_the_inverse() -> None:
    layout = replicated(2, 2).compose(tl.MMA_A)
    threads, slots = layout.places()
    flat = layout.flat_table()
    for element in range(256):
        assert [flat[t, slots[element]] for t in threads[element]] == [element] * 2


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Layout((4, 6), (2, 2, 3, 2), (0, 2), (3,)), "spatial or local"),
        (lambda: Layout((4, 6), (2, 2, 3), (0, 2), (1,)), "multiply"),
        (lambda: Layout((4,), (1, 4), (0,), (1,)), "at least 2"),
        (lambda: Layout((4,), (4,), (-1,), (0,)), "replication"),
        (lambda: local(2, 2).compose(local(2)), "compose"),
        (lambda: spatial(4, 4).divide(local(2, 2)), "inside its tile"),
        (lambda: column_spatial(4, 4).divide(spatial(2, 2)), "end in"),
        (lambda: spatial(4, 4).divide(local(3, 2)), "no multiple"),
        (lambda: local(4, 4).reshape((3, 5)), "elements"),
        (lambda: local(2, 3).reshape((3, 2)), "split"),
        (lambda: local(4, 4).permute((0, 0)), "no order"),
        (lambda: local(4, 4).reduce((2,)), "dimensions"),
        (lambda: local(4, 4).squeeze(0), "not 1"),
    ],
)
def test_bad_layouts_are_refused(make: Callable[[], Layout], says: str) -> None:
    with pytest.raises(InputError, match=says):
        make()

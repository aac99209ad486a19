"""Units side by side: order, waits and double buffering by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.simulate.event_engine import UNITS, Timeline


def pipeline(tiles: int, load: float, compute: float, buffers: int) -> Timeline:
    line, computes = Timeline(), []
    for tile in range(tiles):
        freed = (computes[tile - buffers],) if tile >= buffers else ()
        computes.append(line.put("compute", compute, (line.put("load", load, freed),)))
    return line


def test_double_buffering_by_hand() -> None:
    assert pipeline(4, 1.0, 1.0, 1).end == 8  # one buffer: load and compute take turns
    assert pipeline(4, 1.0, 1.0, 2).end == 5  # two: they overlap
    assert pipeline(4, 3.0, 1.0, 2).end == 13  # the slower one sets the pace
    line = pipeline(4, 1.0, 3.0, 2)
    assert line.end == 13
    assert line.busy["compute"] == 12
    assert line.waited["compute"] == 1  # for its first tile
    assert line.waited["load"] == 4  # the third tile for the first compute (2 to 4), the fourth for the second (5 to 7)
    assert line.share("compute") == pytest.approx(12 / 13)


def test_an_instruction_waits_for_all_it_names_and_for_its_unit() -> None:
    line = Timeline()
    first, second = line.put("load", 2.0), line.put("special", 5.0)
    third = line.put("compute", 1.0, (first, second))
    assert line.ends(third) == 6
    assert line.ends(line.put("compute", 1.0)) == 7


@given(st.lists(st.tuples(st.sampled_from(UNITS), st.floats(0, 3), st.sets(st.integers(0, 30))), max_size=30))
def test_time_is_at_least_each_units_work_and_at_most_all_of_it(program: list[tuple[str, float, set[int]]]) -> None:
    line = Timeline()
    for number, (unit, seconds, after) in enumerate(program):
        line.put(unit, seconds, [each for each in after if each < number])
    assert max(line.busy.values()) <= line.end + 1e-9
    assert line.end <= sum(line.busy.values()) + 1e-9


def test_deadlocks_and_strangers_are_refused() -> None:
    line = Timeline()
    with pytest.raises(InputError, match="deadlock"):
        line.put("load", 1.0, (0,))
    with pytest.raises(InputError, match="no unit"):
        line.put("fetch", 1.0)
    with pytest.raises(InputError, match="negative"):
        line.put("load", -1.0)
    assert Timeline().share("load") == 0

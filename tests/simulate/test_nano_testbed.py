"""The testbed: ways of a batch give the same bits, tables from pairs, and two halves of a model agree."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from memwall.engine.nano_wire import Link
from memwall.errors import InputError
from memwall.models import DEMO_DIRECTORY
from memwall.simulate.nano_testbed import (
    OWN_CORES,
    Asked,
    Bench,
    Pair,
    TwoHalves,
    interference_of,
    own_core_speeds,
    paired,
    pairwise_speeds,
    predicted_seconds,
    undominated,
)
from memwall.simulate.parts import cut_model


def pair(compute: float, memory: float) -> Pair:
    return Pair(compute_threads=1, memory_threads=1, compute=compute, memory=memory, spread=0.0)


def test_dominated_quotas_are_dropped_and_the_rest_is_a_rising_table() -> None:
    pairs = [pair(0.8, 0.3), pair(0.7, 0.2), pair(0.4, 0.9), pair(0.5, 0.5)]
    assert undominated(pairs) == [pairs[0], pairs[2], pairs[3]]
    table = interference_of(pairs)
    assert table.speed("memory", 0.2) == pytest.approx(0.3)
    assert table.speed("memory", 0.6) == pytest.approx(0.9)
    assert table.speed("memory", 0.4) == pytest.approx(0.3 + (0.5 - 0.3) * 2 / 3)


def test_ways_of_a_batch_give_the_same_bits_and_figures_for_each_class() -> None:
    bench = Bench(DEMO_DIRECTORY, rows=6, most_context=256)
    bench.set_context(100)
    bench.way("whole")
    plain = bench.step().copy()
    for way in ("parts", "overlap"):
        bench.way(way, OWN_CORES)  # type: ignore[arg-type]
        assert np.array_equal(plain, bench.step())
    assert 0 <= bench.overlapped() <= 1
    bench.set_context(50)
    assert not np.array_equal(plain, bench.step())
    bench.way("whole", OWN_CORES)
    classes = bench.by_class()
    assert set(classes) == {"compute", "memory"}
    ways = {"whole": lambda: bench.way("whole"), "parts": lambda: bench.way("parts")}
    assert set(paired(ways, bench, rounds=1)) == {"whole", "parts"}
    speeds = own_core_speeds(bench, 100, seconds=0.02)
    assert all(speed > 0 for speed in speeds)
    assert predicted_seconds(bench, *speeds) > 0
    measured = pairwise_speeds(bench, 100, seconds=0.02, rounds=1)
    assert len(measured) == 4 if bench.threads == 2 else measured
    bench.release()


def test_two_halves_agree_over_a_slow_link(tmp_path: Path) -> None:
    halves = tuple(cut_model(DEMO_DIRECTORY, tmp_path / str(rank), "tensor", rank) for rank in range(2))
    with TwoHalves((halves[0], halves[1]), rows=4) as two:
        slow = Link(delay_seconds=2e-4)
        plain, waited, hidden = two.ask(Asked(way="whole", link=Link(), context=20, rounds=1))
        assert plain > 0
        for way in ("parts", "overlap"):
            _, waited, again = two.ask(Asked(way=way, link=slow, context=20, rounds=1))  # type: ignore[arg-type]
            assert np.array_equal(hidden, again)
            assert waited >= 2 * 2 * two.bench.serving.config.num_layers * 2e-4 / 2


def test_the_other_half_ends_with_this_one(tmp_path: Path) -> None:
    half = cut_model(DEMO_DIRECTORY, tmp_path / "1", "tensor", 1)
    with pytest.raises(InputError, match="there is no such folder"):
        TwoHalves((tmp_path / "none", half), rows=4)
    two = TwoHalves((cut_model(DEMO_DIRECTORY, tmp_path / "0", "tensor", 0), half), rows=4)
    two._pipe.close()  # as when this process is killed
    two._process.join(60)
    assert two._process.exitcode == 0
    two.bench.release()
    assert not multiprocessing.active_children()

"""What the verdicts on attention's traffic hang on: slopes, refusals, and schedules that nobody planned."""

from __future__ import annotations

import random
from types import ModuleType

import numpy as np
import pytest

from memwall.cli.evidence import load_experiment
from memwall.simulate.attention_io_complexity import Tile, count_words, make_plan, words_needed
from memwall.simulate.attention_schedules import execute, reference
from memwall.simulate.attention_shape import Attention
from memwall.systems import find_system


@pytest.fixture(scope="module")
def experiment() -> ModuleType:
    return load_experiment(find_system("attention-io-complexity"))


def test_slopes_are_those_of_the_counts(experiment: ModuleType) -> None:
    shape = Attention(tokens=4096, head_size=32)
    two = [count_words(shape, make_plan(shape, m, "kv-outer")) for m in (2048, 8192)]
    ends = np.log2(two[1] / two[0]) / 2
    assert experiment.slope(shape, "kv-outer", 2048, 8192) == pytest.approx(ends, abs=0.03)
    assert experiment.told([0.5, 0.504]) == "0.50"
    assert experiment.told([2, 1]) == "1.00 to 2.00"


def test_a_word_less_is_refused_and_a_word_more_is_not(experiment: ModuleType) -> None:
    shape = Attention(tokens=12, head_size=4)
    plan = make_plan(shape, 64, "three-phase")
    inputs, needed = experiment.drawn(shape, 0), words_needed(shape, plan)
    assert experiment.is_refused(shape, inputs, plan, needed - 1)
    assert not experiment.is_refused(shape, inputs, plan, needed)


def test_schedules_that_nobody_planned_compute_attention(experiment: ModuleType) -> None:
    shape = Attention(tokens=17, head_size=5)
    inputs = experiment.drawn(shape, 2)
    tiles = (Tile(rows=4, columns=3, depth=2), Tile(rows=1, columns=1, depth=6))
    out, memory = execute(shape, *inputs, 1000, experiment.any_order(random.Random(0), tiles))
    assert np.abs(out - reference(shape, *inputs)).max() < 1e-5
    assert memory.moved > 17 * 17 * 2

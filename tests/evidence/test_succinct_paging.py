"""What the verdicts on succinct paging hang on: sequences, errors, and a form that must break the bound."""

from __future__ import annotations

import random
from pathlib import Path
from types import ModuleType

import pytest

from memwall.cli.evidence import load_experiment
from memwall.errors import InputError
from memwall.memory.cache_policy import Lru, count_faults, least_faults
from memwall.memory.succinct_paging import discard_bits, wrong_bits
from memwall.systems import find_system


@pytest.fixture(scope="module")
def experiment() -> ModuleType:
    return load_experiment(find_system("succinct-paging"))


def test_sequences_are_what_they_are_called(experiment: ModuleType) -> None:
    loop = experiment.adversary(10, 200)
    assert count_faults(Lru(10), loop) == 200
    assert least_faults(loop, 10) < 40
    (turning,) = experiment.turning()
    assert len(turning.keys) == sum(2**power for power in range(3, 11))
    chats = experiment.conversations(3000, 3)
    assert len(chats) == 3000
    assert len(set(chats)) < 1500  # turns ask for what came before


def test_a_mean_above_a_limit_is_told_in_errors(experiment: ModuleType) -> None:
    assert experiment.above([1, 2, 3], 2.0) == -float("inf")
    assert experiment.above([1, 2, 3], 1.0) == pytest.approx(3**0.5)
    assert experiment.above([2, 2], 1.0) == float("inf")


def test_evicting_the_newest_breaks_the_bound_that_flush_keeps(experiment: ModuleType) -> None:
    draw, broken = random.Random(1), 0
    for _ in range(1200):
        keys, slots = experiment.random_sequence(draw)
        bits = experiment.told_wrong(draw, discard_bits(keys, slots))
        zeros, ones = wrong_bits("discard", keys, slots, bits)
        limit = least_faults(keys, slots) + (slots - 1) * zeros + ones
        broken += count_faults(experiment.SpareOrNewest(slots), keys, bits) > limit
    assert broken


def test_lists_come_from_a_folder_or_a_file(experiment: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no list"):
        experiment.traces_of(tmp_path, experiment.QUICK)
    path = tmp_path / "a.txt"
    path.write_text("x\ny\nx\n")
    for given in (tmp_path, path):
        traces, what = experiment.traces_of(given, experiment.QUICK)
        assert (traces[0].name, traces[0].keys) == ("a", ["x", "y", "x"])
        assert what.startswith("1 lists")

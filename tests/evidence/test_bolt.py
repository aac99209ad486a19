"""What the verdicts on BOLT hang on: sequences, features, and classifiers that find what is there."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from memwall.cli.evidence import load_experiment
from memwall.errors import InputError
from memwall.systems import find_system

pytest.importorskip("cryptography", reason="maps are sealed with the extra `oblivious`")


@pytest.fixture(scope="module")
def experiment() -> ModuleType:
    return load_experiment(find_system("bolt"))


def test_sequences_are_what_they_are_called(experiment: ModuleType) -> None:
    held = experiment.SEEN.capacity
    assert set(experiment.keys_of("one key", 100)) == {7}
    assert experiment.keys_of("in order", held + 2)[-3:].tolist() == [held - 1, 0, 1]
    zipf = experiment.keys_of("Zipf", 20_000)
    counts = np.sort(np.bincount(zipf, minlength=held))[::-1]
    assert counts[0] > 20 * counts[100] > 0
    assert zipf.max() < held <= experiment.keys_of("absent", 100).min()


def test_features_hold_pages_their_number_and_repeats(experiment: ModuleType) -> None:
    rows = experiment.windows_of([np.array([3, 1, 3]), np.array([1, 2]), np.array([3])], 5)
    assert rows[:, :5].tolist() == [[0, 1, 0, 2, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 0]]
    assert rows[:, 5].tolist() == [3, 2, 1]
    assert rows[:, 6:8].tolist() == [[0, 0], [1, 0], [0, 1]]
    assert rows[0, 22:25].tolist() == [3, 1, 3]


def test_classifiers_guess_where_there_is_nothing_and_find_what_there_is(experiment: ModuleType) -> None:
    pytest.importorskip("sklearn")
    draw = np.random.default_rng(0)
    one, other = draw.poisson(1, (2, 1000, 8)).astype(np.float32)
    assert abs(experiment.accuracy(one, other) - 0.5) < 0.08
    other[:, 3] += draw.random(1000) < 0.5
    assert experiment.accuracy(one, other) > 0.58


def test_the_toy_shows_where_the_item_is(experiment: ModuleType) -> None:
    """One key goes to bins that are empty; keys in order go everywhere."""
    one, order = (experiment.toy_windows(name, 150)[:, : experiment.SEEN.num_pages].sum(axis=0)
                  for name in ("one key", "in order"))  # fmt: skip
    assert one.var() / one.mean() > 2 * order.var() / order.mean()


def test_traces_of_windows_are_those_of_the_store(experiment: ModuleType) -> None:
    rows = experiment.batch_windows("Zipf", 30)
    pages = rows[:, experiment.SEEN.num_pages]
    # 64 bins a window, a fifth of them private, a page that comes twice is read once
    assert 40 < pages.mean() < 51.5
    assert rows[:, : experiment.SEEN.num_pages].max() == 1


def test_medians_know_their_error(experiment: ModuleType) -> None:
    assert experiment.median_error([1.0, 2.0, 3.0]) == pytest.approx(1.2533 / 3**0.5)
    calls: list[str] = []
    seconds = experiment.in_turn({name: (lambda name=name: calls.append(name), 2) for name in "ab"}, 2)
    assert calls == ["b", "a", "a", "b", "b", "a"]
    assert [len(each) for each in seconds.values()] == [2, 2]


def test_data_is_not_read(experiment: ModuleType, tmp_path: object) -> None:
    with pytest.raises(InputError, match="reads none"):
        experiment.run(True, tmp_path)

"""What the verdicts on FuseMax hang on: slopes, the least buffer, the cascade without its running maximum."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from memwall.cli.evidence import load_experiment
from memwall.simulate.attention_cascades import attend, cascade
from memwall.simulate.einsum_text import parse_cascade
from memwall.simulate.fusemax_workloads import PUBLISHED, price_workload
from memwall.systems import find_system


@pytest.fixture(scope="module")
def experiment() -> ModuleType:
    return load_experiment(find_system("fusemax"))


def test_the_slope_is_that_of_long_sequences(experiment: ModuleType) -> None:
    rows = [{"length": length, "extra": 3 * length**2} for length in (4096, 8192, 16384)]
    assert experiment.slope([{"length": 1024, "extra": 7}, *rows]) == pytest.approx(2)
    assert experiment.slope([{"length": length, "extra": 0} for length in (4096, 8192)]) == pytest.approx(0)


def test_the_least_buffer_is_a_tile_of_rows_and_one_of_keys(experiment: ModuleType) -> None:
    run = price_workload("binding", PUBLISHED["BERT"], 4096)
    assert experiment.buffer_bytes(run) == 2 * 256 * (128 + 130)


def test_the_cascade_without_a_running_maximum_is_attention_too(experiment: ModuleType) -> None:
    changed = parse_cascade(experiment.without_running_maximum())
    q, k, v = experiment.drawn(9, 50, 16, large=False)
    np.testing.assert_allclose(attend(changed, q, k, v, tile=16), attend(cascade("one-pass"), q, k, v), atol=1e-5)


def test_products_of_large_scores_are_exact(experiment: ModuleType) -> None:
    q, k, _ = experiment.drawn(20, 30, 64, large=True)
    scores = q @ k.T
    assert (scores == q.astype(np.float64) @ k.T.astype(np.float64)).all()
    assert np.abs(scores).max() / 8 > 1000


def test_waiting_power_favours_the_faster_chip(experiment: ModuleType) -> None:
    assert experiment.energies(100.0)[0] < experiment.energies(10.0)[0] < experiment.energies()[0]


def test_a_method_is_measured_in_a_process_of_its_own(experiment: ModuleType) -> None:
    (row,) = experiment.measured("materialised", (1500,))
    assert row["error"] < 1e-5
    assert row["extra"] > 0.8 * 4 * 1500**2 or not row["reset"]

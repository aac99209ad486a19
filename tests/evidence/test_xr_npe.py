"""What XR-NPE's verdicts hang on: the independent reading of codes, the data, orders and shares, one small task."""

from __future__ import annotations

import dataclasses
import gzip
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from memwall.cli.evidence import load_experiment
from memwall.errors import InputError
from memwall.formats.xr_npe import FORMATS, FP4, POSIT8
from memwall.systems import find_system


@pytest.fixture(scope="module")
def xr_npe() -> ModuleType:
    return load_experiment(find_system("xr-npe"))


def test_codes_are_read_without_the_format_engine(xr_npe: ModuleType) -> None:
    assert [float(xr_npe.read_number(code, FP4)) for code in (1, 7, 15)] == [0.5, 6, -6]
    assert xr_npe.read_number(0x80, POSIT8) is None
    assert float(xr_npe.read_number(0x7F, POSIT8)) == 64
    for found in FORMATS[:3]:
        values = found.levels.values.tolist()
        assert all(xr_npe.read_number(c, found) in (None, v) for c, v in enumerate(values))
    assert xr_npe.code_claim().passed


def test_the_quick_claims_of_numbers_and_time(xr_npe: ModuleType) -> None:
    sizes = xr_npe.Sizes(dots=3)
    assert all(claim.passed for claim in xr_npe.product_claims(sizes))
    assert xr_npe.throughput_claim().passed


def test_orders(xr_npe: ModuleType) -> None:
    good = {"floats": 1.0, "posit16_1": 1.0, "posit8_0": 1.1, "mixed": 1.05, "fp4": 2.0}
    assert xr_npe.ordered(good)
    assert xr_npe.ordered({**good, "posit16_1": 0.996})  # within half a percent is equal
    assert not xr_npe.ordered({**good, "posit16_1": 0.99})
    assert not xr_npe.ordered({**good, "mixed": 2.1})


def test_orders_over_seeds(xr_npe: ModuleType) -> None:
    good = {"floats": [1.0, 2.0], "posit16_1": [1.0, 2.0], "posit8_0": [1.1, 2.2], "mixed": [1.3, 2.2],
            "fp4": [1.5, 2.6]}  # fmt: skip
    assert xr_npe.ordered_by_seeds(good, 0.0)
    assert xr_npe.gap(good, "posit8_0", "fp4") == pytest.approx((0.4, 0.0))
    assert xr_npe.ordered_by_seeds({**good, "posit16_1": [0.9, 2.05]}, 0.0)  # a step back within the seeds' differences
    assert not xr_npe.ordered_by_seeds({**good, "posit16_1": [0.9, 1.9]}, 0.0)  # every seed's
    assert xr_npe.ordered_by_seeds({**good, "posit16_1": [0.9, 1.9]}, 0.1)  # but by less than counts
    assert not xr_npe.ordered_by_seeds({**good, "mixed": [1.6, 2.7]}, 0.0)
    assert not xr_npe.ordered_by_seeds({**good, "floats": [1.0, 2.9]}, 0.0)  # too uncertain to say anything
    assert xr_npe.told([1.0, 2.0]) == "1.50000 ± 0.50000"
    assert xr_npe.told([1.0]) == "1.00000"


def test_shares_recovered(xr_npe: ModuleType) -> None:
    assert xr_npe.recovered_claim("x", 1.0, 2.0, 1.5).passed
    assert not xr_npe.recovered_claim("x", 1.0, 2.0, 1.51).passed
    assert not xr_npe.recovered_claim("x", 1.0, 1.0, 0.5).passed  # nothing was lost: nothing is shown
    assert "(0.80000) 30.0%" in xr_npe.recovered_claim("x", 1.0, 2.0, 1.5, 0.8).measured  # floats gained as well


def test_images_from_a_file(xr_npe: ModuleType, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    table = np.concatenate([random.integers(0, 17, (120, 64)), random.integers(0, 3, (120, 1))], axis=1)
    path = tmp_path / "images.csv.gz"
    with gzip.open(path, "wt") as file:
        np.savetxt(file, table, delimiter=",", fmt="%d")
    images, labels = xr_npe.read_images(path)
    assert images.shape == (120, 1, 8, 8)
    assert images.max() == 1
    assert set(labels.tolist()) == {0, 1, 2}
    (tmp_path / "bad.csv").write_text("1,2,x\n")
    (tmp_path / "small.csv").write_text("1,2,3\n")
    for name in ("bad.csv", "small.csv"):
        with pytest.raises(InputError, match=name):
            xr_npe.read_images(tmp_path / name)


def test_flights_integrate(xr_npe: ModuleType) -> None:
    readings, displacement = xr_npe.flights(50, 0)
    again, _ = xr_npe.flights(50, 0)
    np.testing.assert_array_equal(readings, again)
    assert readings.shape == (50, 6, 48)
    # at rest to first order: twice the integral of the forward acceleration is most of the way
    forward = 3 * readings[:, 0]
    guess = (np.cumsum(forward, axis=1) / 100).sum(axis=1) / 100 / 0.2
    assert np.corrcoef(guess, displacement[:, 0])[0, 1] > 0.6


def test_a_small_task_from_end_to_end(xr_npe: ModuleType) -> None:
    pytest.importorskip("torch")
    sizes = xr_npe.Sizes(seeds=1, epochs=(2, 1, 1), flights=128)
    task = xr_npe.flight_task(sizes)
    held = xr_npe.Trained(task, 0)
    assert held.bits("fp4") == 4
    assert 4 <= held.bits("mixed") <= 4.72
    assert held.errors("posit16_1", train=False) == pytest.approx(held.errors("floats", train=False), rel=0.02)
    assert np.isfinite(held.errors("mixed", train=True))
    assert xr_npe.constant_loss(task) > 0.1


def test_the_language_model_goes_on_from_texts_that_the_seed_draws(xr_npe: ModuleType) -> None:
    pytest.importorskip("torch")
    sizes = xr_npe.Sizes(model_epochs=(0, 1, 1), looked_at=1, held_out_tokens=129)
    task = dataclasses.replace(xr_npe.model_task(sizes), batch=1, drawn=1)
    tokens, targets = task.train
    assert (tokens[:, 1:] == targets[:, :-1]).all()
    held, other = xr_npe.Trained(task, 0), xr_npe.Trained(task, 1)
    assert held._order(0)[0] != other._order(0)[0]
    assert "lm_head" not in held.inner
    assert len(held.inner) == 56
    plain = held.errors("floats", train=False)
    assert plain == other.errors("floats", train=False)
    assert held.errors("fp4", train=False) > plain
    assert held.errors("fp4", train=True) != other.errors("fp4", train=True)

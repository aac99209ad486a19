"""What SpQR's verdicts hang on: the variants it is compared with, and forms of the right size for timing."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from memwall.cli.evidence import load_experiment
from memwall.compress.base import Statistics
from memwall.compress.spqr import Spqr
from memwall.formats import codec
from memwall.formats.spqr import check
from memwall.systems import find_system


@pytest.fixture(scope="module")
def spqr() -> ModuleType:
    return load_experiment(find_system("spqr"))


@pytest.fixture(scope="module")
def layer() -> tuple[np.ndarray, Statistics]:
    random = np.random.default_rng(0)
    x = random.standard_normal((400, 16)).astype(np.float32) @ random.standard_normal((16, 64)).astype(np.float32)
    x += 0.3 * random.standard_normal(x.shape).astype(np.float32)
    return random.standard_t(4, (48, 64)).astype(np.float32), Statistics(x.T @ x, 400)


def test_outliers_that_were_chosen_are_those_kept(spqr: ModuleType, layer: tuple[np.ndarray, Statistics]) -> None:
    weight, statistics = layer
    mask = np.random.default_rng(1).random(weight.shape) < 0.03
    form = spqr.with_mask(weight, statistics, mask)
    np.testing.assert_array_equal(spqr.mask_of(form), mask)
    assert 0 < spqr.lost(weight, statistics, form) < 0.1


def test_the_mask_of_the_costliest_gives_the_method_s_own_outliers(
    spqr: ModuleType, layer: tuple[np.ndarray, Statistics]
) -> None:
    own = spqr.spqr(3, Spqr(outlier_threshold=0.3))(*layer)
    again = spqr.with_mask(*layer, spqr.mask_of(own))
    np.testing.assert_array_equal(spqr.mask_of(again), spqr.mask_of(own))
    assert spqr.lost(*layer, again) < 1.2 * spqr.lost(*layer, own)


def test_statistics_rounded_afterwards_are_another_form(spqr: ModuleType, layer: tuple[np.ndarray, Statistics]) -> None:
    late = spqr.Late(3, 48, 64, None)
    late.enter_group(0, np.ascontiguousarray(layer[0].T[:16]), np.ones(16))
    scales, _ = late.exact[0]
    assert np.array_equal(late._scales, scales)
    plain = spqr.SpqrColumns(3, 48, 64, None)
    plain.enter_group(0, np.ascontiguousarray(layer[0].T[:16]), np.ones(16))
    assert not np.array_equal(plain._scales, scales)


def test_random_forms_have_the_bytes_of_real_ones(spqr: ModuleType) -> None:
    form = spqr.random_form((64, 128), 3, np.random.default_rng(0))
    check(form)
    assert form.nbytes == codec(form.spec).nbytes((64, 128))
    assert np.isfinite(codec(form.spec).decode(form)).all()


def test_groups_that_no_tile_has_are_scored_by_their_values(spqr: ModuleType) -> None:
    weight = np.random.default_rng(0).standard_normal((8, 60)).astype(np.float32)
    rows = codec("int3-g20-asym-rows").encode(weight)
    np.testing.assert_array_equal(codec("float32").decode(spqr.readable(rows)), codec(rows.spec).decode(rows))
    tiles = codec("int3-g64").encode(weight)
    assert spqr.readable(tiles) is tiles
    assert spqr.bits_of({"a": rows, "b": tiles}) == pytest.approx(8 * (rows.nbytes + tiles.nbytes) / (2 * 480))

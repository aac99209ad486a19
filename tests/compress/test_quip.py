"""QuIP: LDLQ is GPTQ, turns change nothing but what rounding loses, greedy passes only help, and whole runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from memwall.compress import sweep, weight_method
from memwall.compress.base import MethodConfig, Statistics
from memwall.compress.quip import Quip, column_factors
from memwall.compress.transforms import Turn, sites
from memwall.errors import InputError
from memwall.formats import codec
from memwall.formats.integer import IntegerCodec
from memwall.formats.quip import QuipCodec, factors
from memwall.models import ModelConfig
from tests.compress.test_spqr import layer
from tests.compress.tiny_model import CONFIG, make_model
from tests.compress.whole_run import check_refused, check_whole_run


def ldlq(weight: np.ndarray, hessian: np.ndarray, step: float, top: int) -> np.ndarray:
    """The paper's algorithm as it stands: H = L D L^T with unit L, columns last to first, integers 0 to `top`."""
    lower = np.linalg.cholesky(hessian)
    unit = lower / np.diagonal(lower)
    found = np.zeros_like(weight)
    for i in range(weight.shape[1] - 1, -1, -1):
        later = slice(i + 1, None)
        target = weight[:, i] + (weight[:, later] - found[:, later]) @ unit[later, i]
        found[:, i] = step * np.clip(np.rint(target / step), -top, top)
    return found


class Fixed(sweep.IntegerColumns):
    """Integers of one step for the whole matrix."""

    def enter_group(self, index: int, columns: np.ndarray, weights: np.ndarray) -> None:
        self._scales[index] = 0.125
        self._prepared.pop(index, None)


@pytest.mark.parametrize("seed", range(3))
def test_ldlq_with_columns_reversed_is_gptq(seed: int) -> None:
    weight, statistics = layer(20, 48, seed)
    form = codec("int3-g64")
    assert isinstance(form, IntegerCodec)
    hessian = statistics.hessian.astype(np.float64)
    hessian += 0.01 * np.diagonal(hessian).mean() * np.eye(48)
    packed = sweep.sweep(weight, sweep.Factor.of(statistics.hessian, 0.01), Fixed(form, 20, 48))
    reverse = np.arange(48)[::-1]
    wanted = ldlq(weight[:, reverse].astype(np.float64), hessian[np.ix_(reverse, reverse)], 0.125, 3)[:, reverse]
    # integers reach one further below than above
    found = codec("int3-g64").decode(packed)
    inside = np.abs(wanted).max() <= 3 * 0.125
    assert inside
    assert (found == wanted.astype(np.float32)).mean() > 0.99


@pytest.mark.parametrize("turns", ["orthogonal", "hadamard"])
def test_a_turned_sweep_loses_what_it_says_and_far_less_than_rounding(turns: str) -> None:
    weight, statistics = layer(128, 256)
    method = Quip(turns=turns)
    form = method.form(2)
    assert form is not None

    def error(packed: object) -> float:
        return statistics.error(codec(form).decode(packed) - weight)  # type: ignore[arg-type]

    swept = method.compress(weight, statistics, MethodConfig(spec=form))
    assert error(swept) < 0.5 * error(codec(form).encode(weight))
    errors = [
        error(Quip(turns=turns, greedy=n).compress(weight, statistics, MethodConfig(spec=form))) for n in (0, 1, 4)
    ]
    # passes see H without damping; each lowers the error
    assert errors[0] > errors[1] >= errors[2] * 0.999


def test_lambda_without_end_is_rounding() -> None:
    weight, statistics = layer(32, 64)
    form = codec("quip3")
    assert isinstance(form, QuipCodec)
    packed = Quip().compress(weight, statistics, MethodConfig(spec="quip3", damping=1e6))
    shrink = column_factors(weight, statistics.hessian)
    rows, cols = form.turns(weight.shape, 0)
    turned = rows.turn(cols.turn(weight / shrink.astype(np.float32)).T).T
    nearest = form.quantize(turned, form.scale_of(turned))
    assert (form.unpack(packed) == nearest).mean() > 0.999


def test_column_factors_share_the_spread() -> None:
    weight, statistics = layer(64, 32)
    shrink = column_factors(weight, statistics.hessian).astype(np.float64)
    inputs = np.diagonal(statistics.hessian) * shrink**2
    weights = np.square(weight / shrink).sum(axis=0)
    np.testing.assert_allclose(inputs / weights, (inputs / weights)[0], rtol=1e-2)
    statistics.hessian[3], statistics.hessian[:, 3] = 0, 0
    assert np.isfinite(column_factors(weight, statistics.hessian)).all()


def test_a_turn_has_no_place_between_tensors() -> None:
    turn = Turn(factors(128, "cols", 0, False))
    assert turn.width() == 128
    x = np.random.default_rng(0).standard_normal((3, 128)).astype(np.float32)
    w = np.random.default_rng(1).standard_normal((5, 128)).astype(np.float32)
    np.testing.assert_allclose(turn.read(w) @ turn.produce(x).T, w @ x.T, atol=1e-3)
    from memwall.compress.transforms import Transform

    with pytest.raises(InputError, match="no place"):
        Transform().put(sites(ModelConfig.from_dict(CONFIG), 0)[0], turn)


@pytest.mark.parametrize(
    ("options", "match"),
    [({"turns": "none"}, "orthogonal, hadamard"), ({"spread": "0"}, "positive"), ({"greedy": "-1"}, "0 or more")],
)
def test_bad_settings(options: dict[str, str], match: str) -> None:
    with pytest.raises(InputError, match=match):
        weight_method("quip", options)
    with pytest.raises(InputError, match="whole bits"):
        Quip().form(2.5)
    weight, statistics = layer(16, 32)
    with pytest.raises(InputError, match="do not fit"):
        Quip().compress(weight[:, :16], statistics, MethodConfig(spec="quip2"))
    assert Quip().compress(weight, Statistics.identity(32), MethodConfig(spec="quip2")).shape == (16, 32)


def test_whole_runs(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source")
    check_whole_run(source, tmp_path, "quip", "quip2")
    check_refused(source, tmp_path, "quip", "int2", "quip makes its own formats")

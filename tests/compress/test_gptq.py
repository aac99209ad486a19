"""GPTQ: less output error than rounding to nearest where inputs are correlated; refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from memwall.compress.base import MethodConfig, Statistics
from memwall.compress.gptq import Gptq
from memwall.errors import InputError
from memwall.formats import codec
from memwall.models import ModelConfig, model_directory
from memwall.models.precision import resolve
from tests.compress.tiny_model import make_model
from tests.compress.whole_run import check_whole_run


def correlated_statistics(num_columns: int) -> Statistics:
    random = np.random.default_rng(3)
    mixing = random.standard_normal((num_columns // 4, num_columns), np.float32)
    statistics = Statistics(np.zeros((num_columns, num_columns), np.float32))
    for _ in range(4):
        x = random.standard_normal((200, num_columns // 4), np.float32) @ mixing
        statistics.add(x + 0.3 * random.standard_normal(x.shape, np.float32))
    return statistics


@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize("spec", ["int2", "int3", "int4", "int8"])
def test_beats_round_to_nearest(spec: str, activation_order: bool) -> None:
    statistics = correlated_statistics(192)
    assert statistics.num_tokens == 800
    weight = np.random.default_rng(0).standard_normal((48, 192), np.float32)
    config = MethodConfig(spec=spec, activation_order=activation_order)
    swept = Gptq().compress(weight, statistics, config)
    errors = [statistics.error(codec(spec).decode(packed) - weight) for packed in (swept, codec(spec).encode(weight))]
    assert errors[0] < 0.6 * errors[1]
    assert swept.nbytes == codec(spec).nbytes(weight.shape)


def test_heavy_damping_is_round_to_nearest() -> None:
    weight = np.random.default_rng(0).standard_normal((8, 64), np.float32)
    statistics = correlated_statistics(64)
    swept = Gptq().compress(weight, statistics, MethodConfig(spec="int4", damping=1e6))
    codes = codec("int4").encode(weight).buffers["codes"]
    assert (swept.buffers["codes"] == codes).mean() > 0.999


def test_refusals() -> None:
    weight = np.ones((4, 64), np.float32)
    with pytest.raises(InputError, match="integer formats"):
        Gptq().compress(weight, None, MethodConfig(spec="float16"))
    with pytest.raises(InputError, match="statistics of 32"):
        Gptq().compress(weight, Statistics.identity(32), MethodConfig(spec="int4"))
    with pytest.raises(InputError, match="damping"):
        MethodConfig(spec="int4", damping=0)
    with pytest.raises(InputError, match="unknown"):
        MethodConfig(spec="int99x")


def test_without_statistics_is_round_to_nearest() -> None:
    weight = np.random.default_rng(0).standard_normal((8, 64), np.float32)
    swept = Gptq().compress(weight, None, MethodConfig(spec="int3"))
    np.testing.assert_array_equal(swept.buffers["codes"], codec("int3").encode(weight).buffers["codes"])


@pytest.mark.parametrize("spec", ["int4-g128", "int3-g64-asym"])
@pytest.mark.parametrize("activation_order", [False, True])
def test_trying_smaller_ranges_helps(spec: str, activation_order: bool) -> None:
    """MARLIN's variant: heavy tails leave the range of a group far from what errors ask for."""
    statistics = correlated_statistics(256)
    weight = np.random.default_rng(0).standard_t(3, (48, 256)).astype(np.float32)
    config = MethodConfig(spec=spec, damping=0.1, activation_order=activation_order)
    errors = [
        statistics.error(codec(spec).decode(Gptq(shrinks=n).compress(weight, statistics, config)) - weight)
        for n in (1, 76)
    ]
    assert errors[1] < 0.95 * errors[0]
    with pytest.raises(InputError, match="from 1 to 1000"):
        Gptq(shrinks=0)


@pytest.mark.parametrize("spec", ["int4-g64", "int3-g32-asym"])
def test_columns_stored_in_the_order_they_are_worked(spec: str) -> None:
    """The official code's activation order: the same as the sweep of the matrix with its columns put in order."""
    statistics = correlated_statistics(192)
    statistics.hessian *= np.outer(*[np.linspace(0.2, 3, 192, dtype=np.float32)] * 2)
    weight = np.random.default_rng(0).standard_normal((48, 192), np.float32)
    found = Gptq().compress(weight, statistics, MethodConfig(spec=f"ordered-{spec}"))
    order = np.argsort(-statistics.hessian.diagonal(), kind="stable")
    np.testing.assert_array_equal(found.buffers["order"], order)
    turned = Statistics(np.ascontiguousarray(statistics.hessian[np.ix_(order, order)]), statistics.num_tokens)
    plain = Gptq().compress(np.ascontiguousarray(weight[:, order]), turned, MethodConfig(spec=spec))
    np.testing.assert_array_equal(codec(found.spec).decode(found)[:, order], codec(spec).decode(plain))
    assert found.nbytes == codec(spec).nbytes(weight.shape) + 2 * 192
    assert statistics.error(codec(found.spec).decode(found) - weight) < 0.6 * statistics.error(
        codec(spec).decode(codec(spec).encode(weight)) - weight
    )


def test_the_setting_act_order(tmp_path: Path) -> None:
    method = Gptq.configured({"act_order": "true"})
    assert method.form("int4") == method.form("ordered-int4") == "ordered-int4-g64"
    assert Gptq().form(4.25) is None
    assert Gptq().form("int4") == "int4-g64"
    for bits in (4.25, "nf4"):
        with pytest.raises(InputError, match="give --bits int4"):
            method.form(bits)
    source = make_model(tmp_path / "source")
    report = check_whole_run(source, tmp_path, "gptq", "ordered-int4-g64", bits="int4", options={"act_order": "true"})
    assert report.specs["model.layers.0.mlp.down_proj.weight"] == "ordered-int4-g64"


def test_an_order_of_columns_needs_calibration() -> None:
    model = ModelConfig.from_directory(model_directory("demo"))
    with pytest.raises(InputError, match="--method gptq, then use OUT"):
        resolve(model, "ordered-int4")

"""GPTQ: less output error than rounding to nearest where inputs are correlated; refusals."""

from __future__ import annotations

import numpy as np
import pytest

from memwall.compress.base import MethodConfig, Statistics
from memwall.compress.gptq import Gptq
from memwall.errors import InputError
from memwall.formats import codec


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

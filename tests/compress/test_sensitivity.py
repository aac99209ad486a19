"""Measured losses: those of the whole matrix, falling with every bit."""

from __future__ import annotations

import numpy as np

from memwall.compress import weight_method
from memwall.compress.base import MethodConfig, Statistics
from memwall.compress.sensitivity import candidates, relative_error
from memwall.formats import codec

SPECS = ("int2-g64-asym", "int3-g64-asym", "int4-g64", "int8-g64")


def test_losses_fall_with_bits_and_agree_with_the_whole_matrix() -> None:
    random = np.random.default_rng(0)
    weight = random.standard_normal((1000, 96), np.float32)
    x = random.standard_normal((500, 96), np.float32) * np.linspace(0.1, 3, 96, dtype=np.float32)
    statistics = Statistics(x.T @ x, 500)
    configs = [MethodConfig(spec=spec) for spec in SPECS]
    found = candidates(weight, statistics, configs, weight_method("rtn"))
    assert [candidate.nbytes for candidate in found] == [codec(spec).nbytes((1000, 96)) for spec in SPECS]
    losses = [candidate.loss for candidate in found]
    assert losses == sorted(losses, reverse=True)
    for spec, loss in zip(SPECS, losses, strict=True):
        change = codec(spec).decode(codec(spec).encode(weight)) - weight
        assert abs(loss / (((change @ x.T) ** 2).sum() / ((weight @ x.T) ** 2).sum()) - 1) < 0.1
        assert relative_error(weight, codec(spec).encode(weight), statistics) == loss


def test_nothing_in_nothing_lost() -> None:
    config = MethodConfig(spec="int4")
    assert candidates(np.zeros((4, 64), np.float32), None, [config], weight_method("rtn"))[0].loss == 0.0
    assert relative_error(np.zeros((4, 64), np.float32), codec("int4").encode(np.zeros((4, 64))), None) == 0.0

"""Pruned and rounded at once: neutral under H = I, each part helps, and whole runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from memwall.compress import weight_method
from memwall.compress.base import MethodConfig, Statistics
from memwall.compress.sparsegpt import SparseGpt
from memwall.errors import InputError
from memwall.formats import codec
from tests.compress.test_spqr import layer
from tests.compress.tiny_model import make_model
from tests.compress.whole_run import check_refused, check_whole_run


def loss(weight: np.ndarray, statistics: Statistics, spec: str = "sparse4-g128", **settings: object) -> float:
    packed = SparseGpt(**settings).compress(weight, statistics, MethodConfig(spec=spec))  # type: ignore[arg-type]
    return statistics.error(codec(spec).decode(packed) - weight) / statistics.error(weight)


@pytest.mark.parametrize("spec", ["sparse4-g128", "sparse2-g64-asym"])
def test_identity_is_the_codec_s_own_encoding(spec: str) -> None:
    weight, _ = layer(37, 301)
    nearest = codec(spec).encode(weight)
    for statistics in (None, Statistics.identity(301)):
        packed = SparseGpt(shrinks=1).compress(weight, statistics, MethodConfig(spec=spec))
        for name, buffer in nearest.buffers.items():
            np.testing.assert_array_equal(packed.buffers[name], buffer)


def test_each_part_helps() -> None:
    weight, statistics = layer(64, 256)
    whole = loss(weight, statistics)
    assert whole < loss(weight, statistics, compensate=False)
    assert whole < loss(weight, statistics, score="wanda") < loss(weight, statistics, score="magnitude")
    # at two bits the full range is far from the best one
    assert loss(weight, statistics, "sparse2-g128") < loss(weight, statistics, "sparse2-g128", shrinks=1)


def test_settings_and_bits_that_it_lacks() -> None:
    method = SparseGpt()
    assert method.form(4) == "sparse4-g128"
    assert method.form("sparse2-g64-asym") == "sparse2-g64-asym"
    with pytest.raises(InputError, match="2 to 8"):
        method.form(3.5)
    with pytest.raises(InputError, match="hessian, wanda, magnitude"):
        weight_method("sparsegpt", {"score": "random"})
    with pytest.raises(InputError, match="from 1 to 1000"):
        weight_method("sparsegpt", {"shrinks": "0"})


def test_whole_runs(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source")
    check_whole_run(source, tmp_path, "sparsegpt", "sparse4-g128", options={"shrinks": "5"})
    check_refused(source, tmp_path, "sparsegpt", "int4", "sparsegpt makes formats such as sparse4-g128")
    check_refused(source, tmp_path, "gptq", "sparse4", "gptq makes integer formats")

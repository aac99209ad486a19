"""AWQ: scales that a search finds, clipping, and whole runs on a model with planted outliers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memwall import kernels
from memwall.compress.awq import Awq, factors
from memwall.compress.base import MethodConfig, Statistics
from memwall.compress.model import CompressReport, compress_model
from memwall.errors import InputError
from memwall.formats import codec
from memwall.memory import Arena, Ledger
from memwall.models import Checkpoint, ModelConfig
from memwall.models.precision import resolve
from tests.compress.planted import logits_of, plant_outliers
from tests.compress.test_sweep import correlated
from tests.compress.tiny_model import QUICK, contents, make_model


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose norms make some channels forty times larger."""
    folder = tmp_path_factory.mktemp("planted")
    return plant_outliers(make_model(folder / "tiny"), folder / "planted", 40.0)


def compress(source: Path, out: Path, **options: Any) -> CompressReport:
    return compress_model(source, out, **{"method": "awq", "bits": "int3-g128-asym", "tuning": QUICK, **options})


def test_planting_changes_no_logits(planted: Path) -> None:
    plain = planted.parent / "tiny"
    np.testing.assert_allclose(logits_of(planted), logits_of(plain), atol=2e-3)


@pytest.mark.parametrize("spec", ["int3-g128-asym", "int4-g128-asym", "int3-g64"])
def test_beats_rounding_where_channels_differ(planted: Path, tmp_path: Path, spec: str) -> None:
    compress(planted, tmp_path / "awq", bits=spec)
    compress(planted, tmp_path / "plain", bits=spec, method="rtn")
    expected = logits_of(planted)
    awq, plain = (float(np.square(logits_of(tmp_path / name) - expected).mean()) for name in ("awq", "plain"))
    assert awq < 0.7 * plain


def test_saved_resumed_and_loaded(planted: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "compress" and done > 0.85 * total:
            raise Stop

    with pytest.raises(Stop):
        compress(planted, tmp_path / "out", progress=stop)
    assert compress(planted, tmp_path / "out").num_resumed_parts > 0
    compress(planted, tmp_path / "straight")
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")
    config = ModelConfig.from_directory(tmp_path / "out")
    with Checkpoint(tmp_path / "out", config) as checkpoint:
        checkpoint.verify(digests=True)
        specs = resolve(config, "saved", checkpoint)
        assert specs["model.layers.0.mlp.down_proj.weight"] == "int3-g128-asym"
        assert checkpoint.manifest is not None
        assert checkpoint.manifest.info["options"] == {"clip": True}


def test_mean_bits_and_budget(planted: Path, tmp_path: Path) -> None:
    arena = Arena(24 << 20, Ledger())
    report = compress(planted, tmp_path / "out", bits=4.2, arena=arena)
    assert 4.0 < report.bits_per_weight <= 4.2
    assert arena.peak_bytes <= 24 << 20


def test_factors_multiply_to_one_between_the_extremes() -> None:
    found = factors(np.float32([1, 4, 16]), 0.5)
    np.testing.assert_allclose(found, [0.5, 1, 2], rtol=1e-6)
    np.testing.assert_allclose(factors(np.float32([3, 5, 0]), 0.0), 1)


def test_clipping_never_loses_and_leaves_queries_alone() -> None:
    random = np.random.default_rng(0)
    weight = random.standard_t(3, (24, 100)).astype(np.float32)
    x = correlated(400, 100)
    statistics = Statistics(x.T @ x, 400)
    for spec in ("int3-g64-asym", "int4-g32"):
        plain = kernels.encode(spec, weight)
        clipped = Awq().compress(weight, statistics, MethodConfig(spec=spec, tensor="mlp.up_proj.weight"))
        # each group's own outputs improve; groups are correlated, so the whole is asked for by a margin
        errors = [statistics.error(codec(spec).decode(each) - weight) for each in (clipped, plain)]
        assert errors[0] < errors[1]
        for other in (
            Awq().compress(weight, statistics, MethodConfig(spec=spec, tensor="self_attn.q_proj.weight")),
            Awq(clip=False).compress(weight, statistics, MethodConfig(spec=spec, tensor="mlp.up_proj.weight")),
            Awq().compress(weight, None, MethodConfig(spec=spec)),
        ):
            np.testing.assert_array_equal(other.buffers["codes"], plain.buffers["codes"])


def test_formats_that_it_does_not_make(planted: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="awq makes integer formats"):
        compress(planted, tmp_path / "out", bits="nf4")
    with pytest.raises(InputError, match="it has clip"):
        compress(planted, tmp_path / "out", options={"shrink": "1"})

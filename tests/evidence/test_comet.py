"""What COMET's verdicts hang on: the planting, the launches, the counted bytes."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from memwall.cli.evidence import load_experiment
from memwall.kernels.tile_schedule import balanced, equal_count, lower_bound
from memwall.models import ModelConfig, model_directory
from memwall.systems import find_system


@pytest.fixture(scope="module")
def comet() -> ModuleType:
    return load_experiment(find_system("comet"))


def test_planted_outliers_are_large_and_change_nothing(comet: ModuleType, tmp_path: Path) -> None:
    demo = model_directory("demo")
    config = ModelConfig.from_directory(demo)
    folder = comet.write_model(demo, tmp_path / "planted", comet.planted(config))
    tokens = np.random.default_rng(0).integers(3, config.vocab_size, 16)
    before, after = comet.logits(demo, tokens), comet.logits(folder, tokens)
    assert np.linalg.norm(after - before) < 1e-5 * np.linalg.norm(before)
    with comet.Checkpoint(folder) as checkpoint, comet.Checkpoint(demo) as source:
        name = "model.layers.3.input_layernorm.weight"
        times = checkpoint.alone(name) / source.alone(name).astype(np.float32)
    assert np.isclose(times, comet.TIMES, rtol=1e-3).sum() == comet.CHANNELS
    assert np.isclose(times, 1).sum() == config.hidden_size - comet.CHANNELS


def test_launches_are_unequal(comet: ModuleType) -> None:
    random = np.random.default_rng(1)
    tiles, wide = comet.launch(random)
    assert len(tiles) == len(wide)
    for tile, count in zip(tiles, wide, strict=True):
        assert tile.cost == tile.parts + count
        assert 0 <= count <= tile.parts / 2
    assert balanced(tiles, 108).makespan <= 1.05 * lower_bound(tiles, 108)
    assert equal_count(tiles, 108).makespan >= lower_bound(tiles, 108)


def test_filled_caches_are_measured(comet: ModuleType) -> None:
    shape = comet.kv.CacheShape(num_layers=2, num_heads=2, num_kv_heads=2, head_dim=64)
    held = {name: comet._held_bytes(name, shape, 1024) for name in ("kv4", "float16")}
    assert held["float16"] == 1024 * 2 * 2 * 2 * 64 * 2
    assert held["kv4"] < 0.35 * held["float16"]


def test_schedule_claims_hold(comet: ModuleType) -> None:
    claims = list(comet.schedule_claims(comet.QUICK))
    assert claims[0].passed
    assert "results right" in claims[1].measured

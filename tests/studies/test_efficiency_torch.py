"""Jobs that train and decode: equal terms, real caches, honest counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dataclasses import replace  # noqa: E402

from memwall.models.torch_small import SmallLm  # noqa: E402
from memwall.studies import efficiency_torch  # noqa: E402
from memwall.studies.efficiency_records import Record  # noqa: E402
from memwall.studies.efficiency_sizes import AXES, FULL, QUICK, TINY, TRAINED  # noqa: E402

TEXT = b"the quick brown fox jumps over the lazy dog. " * 200


def request(tmp_path: Path, **more: Any) -> dict[str, Any]:
    (tmp_path / "text").write_bytes(TEXT)
    held = {"axis": "attention", "technique": "gqa", "sizes": TINY.to_dict(), "seed": 0, "threads": 1,
            "text": str(tmp_path / "text"), "held_out": str(tmp_path / "text")}  # fmt: skip
    return held | more


def nothing(done: int, whole: int, what: str) -> None:
    pass


@pytest.mark.parametrize("sizes", [FULL, QUICK])
def test_attention_variants_have_equal_parameters_and_ordered_caches(sizes: Any) -> None:
    configs = {name: efficiency_torch.config_of("attention", name, sizes) for name in AXES["attention"]}
    counts = [efficiency_torch.parameters_of(config) for config in configs.values()]
    assert max(counts) / min(counts) < 1.005
    with torch.device("meta"):
        kept = {name: config.mixer.cached_values(4096) for name, config in configs.items()}
    assert kept["mqa"] < kept["mla"] < kept["gqa"] < kept["mha"]
    assert kept["gqa"] < kept["nsa"] < kept["mha"]
    for name in ("mamba", "rwkv"):
        assert configs[name].mixer.cached_values(64) == configs[name].mixer.cached_values(4096) < kept["mqa"]


def test_experts_have_a_dense_feeds_operations() -> None:
    dense, moe = (SmallLm(efficiency_torch.config_of("experts", name, FULL)) for name in ("dense", "moe"))
    assert moe.flop(128) == pytest.approx(dense.flop(128), rel=0.01)
    assert moe.num_active == pytest.approx(dense.num_active, rel=0.01)
    assert moe.num_parameters > 2 * dense.num_parameters


@pytest.mark.parametrize(("axis", "technique"), [(axis, name) for axis in TRAINED for name in AXES[axis]])
def test_every_variant_trains_and_decodes(tmp_path: Path, axis: str, technique: str) -> None:
    asked = request(tmp_path, axis=axis, technique=technique, weights=str(tmp_path / "w.safetensors"))
    trained = Record.from_dict(efficiency_torch.pretrain(asked, nothing))
    decoded = Record.from_dict(efficiency_torch.decode(asked | {"losses": trained.quality["losses"]}, nothing))
    assert trained.stage == "pretraining"
    assert decoded.stage == "inference"
    assert len(trained.quality["losses"]) == TINY.windows
    assert len(trained.figures["steps_s"]) == TINY.steps
    assert len(decoded.figures["steps_s"]) == TINY.decoded
    model = SmallLm(efficiency_torch.config_of(axis, technique, TINY))
    assert trained.num_parameters == model.num_parameters
    assert trained.metrics.tt == pytest.approx(
        TINY.batch * TINY.tokens * TINY.steps / model.num_parameters / sum(trained.figures["steps_s"])
    )
    assert decoded.metrics.it == pytest.approx(TINY.decoded / sum(decoded.figures["steps_s"]))
    caches = model.caches(1, 200)
    count = decoded.figures["context"] + TINY.warm_up + TINY.decoded
    for cache in caches:
        cache.fill(count)
    assert decoded.figures["kv_bytes"] == sum(cache.nbytes for cache in caches)
    assert trained.metrics.power_source in ("modelled", "rapl")
    assert trained.metrics.aec_w > 0
    if technique == "moe":
        assert sum(trained.figures["expert_load"][0]) == TINY.top * TINY.batch * TINY.tokens * (
            TINY.steps - TINY.steps // 2
        )
        assert 0 <= trained.figures["dropped"] < 1


def test_training_learns_and_seeds_repeat(tmp_path: Path) -> None:
    more = replace(TINY, steps=40).to_dict()
    first, again = (efficiency_torch.pretrain(request(tmp_path, sizes=more), nothing) for _ in range(2))
    other = efficiency_torch.pretrain(request(tmp_path, sizes=more, seed=1), nothing)
    assert first["quality"] == again["quality"] != other["quality"]
    assert Record.from_dict(first).loss < 4  # type: ignore[operator]  # chance is 5.5


@pytest.mark.parametrize(("axis", "technique"), [(axis, name) for axis in TRAINED for name in AXES[axis]])
def test_bfloat16_products_train_every_variant_about_as_float32(tmp_path: Path, axis: str, technique: str) -> None:
    """Gradients of the first step, as one vector: nearly the same direction and length, float32 on both sides."""
    tokens = torch.from_numpy(np.frombuffer(TEXT[: 2 * TINY.tokens], np.uint8).copy()).long().view(2, -1)
    found = []
    for enabled in (False, True):
        model = SmallLm(efficiency_torch.config_of(axis, technique, TINY)).train()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model.loss(tokens)
        assert loss.dtype == torch.float32
        loss.backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        assert all(each.dtype == torch.float32 for each in gradients)
        found.append(torch.cat([each.flatten() for each in gradients]))
    exact, rounded = found
    assert not torch.equal(exact, rounded)
    assert torch.linalg.norm(rounded - exact) < 0.1 * torch.linalg.norm(exact)


def test_records_say_what_products_were_in(tmp_path: Path) -> None:
    losses = {}
    for name in ("float32", "bfloat16"):
        asked = request(tmp_path, sizes=replace(TINY, steps=10, arithmetic=name).to_dict())
        told = Record.from_dict(efficiency_torch.pretrain(asked, nothing))
        assert told.figures["arithmetic"] == name
        losses[name] = told.loss
    assert losses["float32"] != losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)


def test_techniques_see_the_same_batches() -> None:
    one, other = (efficiency_torch.Batches(TEXT, TINY, seed=3) for _ in range(2))
    assert all(torch.equal(next(one), next(other)) for _ in range(3))
    assert not torch.equal(next(one), next(efficiency_torch.Batches(TEXT, TINY, seed=4)))

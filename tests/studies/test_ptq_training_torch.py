"""Models trained from nothing: their first weights, the schedule, going on after a stop, and the files they end in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from memwall.errors import InputError  # noqa: E402
from memwall.models import Checkpoint, ModelConfig  # noqa: E402
from memwall.models.torch_decoder import TorchDecoder  # noqa: E402
from memwall.studies import ptq_training_torch  # noqa: E402
from memwall.studies.ptq_training_torch import Schedule, Training, fresh, train  # noqa: E402

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "tie_word_embeddings": True,
}  # fmt: skip
FORMS: dict[str, dict[str, Any]] = {
    "falcon": {**SIZES, "architectures": ["FalconForCausalLM"], "multi_query": True, "parallel_attn": True},
    "llama": {**SIZES, "architectures": ["LlamaForCausalLM"], "num_key_value_heads": 2, "intermediate_size": 48},
}
SCHEDULE = Schedule(steps=6, rate=1e-2, batch=2, sequence=16)


def folder_of(form: str, path: Path) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(FORMS[form]))
    return path


def some_text() -> Any:
    return torch.arange(400) * 7 % 61


def test_the_rate_rises_and_falls() -> None:
    rates = [Schedule(steps=100, rate=1.0).rate_at(step) for step in range(100)]
    assert rates[:3] == [0.25, 0.5, 0.75]
    assert rates[50] == pytest.approx(0.5)
    assert max(rates) <= 1
    assert rates[-1] == 0.02


@pytest.mark.parametrize("form", FORMS)
def test_first_weights_are_the_same_and_as_large_as_width_asks(form: str) -> None:
    config = ModelConfig.from_dict(FORMS[form])
    one, other = fresh(config), fresh(config)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert one.lm_head.weight is one.model.embed_tokens.weight
    layer = one.model.layers[0]
    assert float(layer.self_attn.q_proj.weight.detach().std()) == pytest.approx(32**-0.5, rel=0.1)
    assert float(layer.self_attn.o_proj.weight.detach().std()) == pytest.approx(32**-0.5 / 2, rel=0.1)


@pytest.mark.parametrize("form", FORMS)
def test_training_lowers_the_loss_and_ends_in_a_file_that_all_read(form: str, tmp_path: Path) -> None:
    directory, text = folder_of(form, tmp_path / "model"), some_text()
    config = ModelConfig.from_directory(directory)
    told: list[tuple[int, int, str]] = []
    schedule = Schedule(steps=60, rate=1e-2, batch=2, sequence=16)
    weights = directory / "model.safetensors"
    train(directory, schedule, text, weights, lambda *each: told.append(each))
    assert [each[:2] for each in told] == [(step, 60) for step in range(10, 61, 10)]
    assert {path.name for path in directory.iterdir()} == {"config.json", "model.safetensors"}
    losses = []
    for decoder in (fresh(config), TorchDecoder.from_directory(directory)):
        with torch.no_grad():
            logits = decoder(text[:64])
        losses.append(float(torch.nn.functional.cross_entropy(logits[:-1], text[1:64])))
    assert losses[1] < 0.5 * losses[0]


@pytest.mark.parametrize("form", FORMS)
def test_training_that_was_stopped_goes_on(form: str, tmp_path: Path) -> None:
    config = ModelConfig.from_dict(FORMS[form])
    whole = Training(config, SCHEDULE, some_text(), tmp_path / "none.state")
    losses = [whole.advance() for _ in range(6)]
    begun = Training(config, SCHEDULE, some_text(), tmp_path / "kept.state")
    for _ in range(3):
        begun.advance()
    begun.keep()
    resumed = Training(config, SCHEDULE, some_text(), tmp_path / "kept.state")
    assert resumed.step == 3
    assert [resumed.advance() for _ in range(3)] == pytest.approx(losses[3:], rel=1e-5)
    for name, weight in whole.weights.items():
        np.testing.assert_allclose(resumed.weights[name].detach(), weight.detach(), rtol=1e-4, atol=1e-5)


def test_a_stop_in_train_is_picked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, weights = folder_of("falcon", tmp_path / "model"), tmp_path / "kept" / "w.safetensors"
    monkeypatch.setattr(ptq_training_torch, "KEPT_EVERY_S", -1)
    advance, steps = Training.advance, []

    def counted(self: Training) -> float:
        steps.append(self.step)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return advance(self)

    monkeypatch.setattr(Training, "advance", counted)
    with pytest.raises(KeyboardInterrupt):
        train(directory, SCHEDULE, some_text(), weights, None)
    assert not weights.exists()
    train(directory, SCHEDULE, some_text(), weights, None)
    assert steps == [0, 1, 2, 3, 3, 4, 5]
    assert [path.name for path in weights.parent.iterdir()] == ["w.safetensors"]
    (directory / "model.safetensors").write_bytes(weights.read_bytes())
    with Checkpoint(directory) as checkpoint:
        assert checkpoint.tensor("model.layers.0.self_attn.k_proj.weight").shape == (8, 32)


def test_products_are_in_float32_where_the_processor_has_no_bfloat16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for has in (False, True):
        monkeypatch.setattr(ptq_training_torch, "multiplies_bfloat16", lambda has=has: has)
        training = Training(ModelConfig.from_dict(FORMS["falcon"]), SCHEDULE, some_text(), tmp_path / "none.state")
        found[has] = training.advance()
        assert all(weight.dtype == torch.float32 for weight in training.weights.values())
    assert found[False] != found[True]
    assert found[False] == pytest.approx(found[True], rel=0.01)


def test_a_short_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has 17 tokens"):
        Training(ModelConfig.from_dict(FORMS["falcon"]), SCHEDULE, some_text()[:17], tmp_path / "none.state")

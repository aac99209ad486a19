"""A model with its layers twice: the same function at first, whole on disk, and better after it has learned."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from memwall.errors import InputError  # noqa: E402
from memwall.models import ModelConfig  # noqa: E402
from memwall.models.torch_decoder import TorchDecoder  # noqa: E402
from memwall.studies.efficiency_grown_torch import expand, grow  # noqa: E402
from tests.compress.tiny_model import make_model  # noqa: E402


def test_the_larger_model_begins_where_the_smaller_one_stands(tmp_path: Path) -> None:
    small = make_model(tmp_path / "small")
    config = expand(small, tmp_path / "large")
    assert config.num_layers == 2 * ModelConfig.from_directory(small).num_layers
    tokens = torch.arange(3, 19)[None]
    one, other = (TorchDecoder.from_directory(tmp_path / name)(tokens) for name in ("small", "large"))
    torch.testing.assert_close(one, other)
    copies = TorchDecoder.from_directory(tmp_path / "large").model.layers
    assert not copies[1].self_attn.o_proj.weight.any()
    assert copies[1].self_attn.q_proj.weight.equal(copies[0].self_attn.q_proj.weight)


def test_it_learns_and_is_written_as_it_was_judged(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 100)
    request = {"directory": str(make_model(tmp_path / "small")), "out": str(tmp_path / "large"), "text": str(text),
               "held_out": str(text), "steps": 12, "batch": 2, "tokens": 32, "learning_rate": 3e-3,
               "arithmetic": "bfloat16", "threads": 1}  # fmt: skip
    heard: list[tuple[int, int, str]] = []
    told = grow(request, lambda *each: heard.append(each))
    assert told["after"] < told["before"] - 0.2
    assert told["parameters"] == sum(t.size for t in ModelConfig.from_directory(tmp_path / "large").tensors())
    copies = TorchDecoder.from_directory(tmp_path / "large").model.layers
    assert copies[1].self_attn.o_proj.weight.any()
    assert heard
    assert all(done < whole == 12 for done, whole, _ in heard)


def test_models_whose_layers_cannot_be_doubled_are_refused(tmp_path: Path) -> None:
    mixture = make_model(tmp_path / "mixture", num_local_experts=2, num_experts_per_tok=1, model_type="mixtral",
                         architectures=["MixtralForCausalLM"])  # fmt: skip
    with pytest.raises(InputError, match="dense Llama"):
        expand(mixture, tmp_path / "out")

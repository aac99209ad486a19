"""Models with a ReLU: their configurations, and the same logits from the CPU engine and from torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from memwall import kv
from memwall.engine.loading import Settings, cache_shape, load_decoder
from memwall.errors import InputError
from memwall.formats.checked_json import Fields
from memwall.models.config import ModelConfig
from memwall.models.neurons import NeuronLayout
from tests.engine.relu_models import FALCON, FATRELU, LLAMA, MODELS, write_relu_model

TOKENS = np.array([3, 900, 17, 4, 5, 3001, 8])


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_both_engines_agree(tmp_path: Path, kind: str) -> None:
    torch = pytest.importorskip("torch")
    from memwall.models.torch_decoder import TorchDecoder

    write_relu_model(tmp_path / "model", kind, "float32")
    wanted = TorchDecoder.from_directory(tmp_path / "model")(torch.from_numpy(TOKENS)[None])[0].detach().numpy()
    made = load_decoder(tmp_path / "model", Settings(weights="float32", segment_tokens=8, logit_rows=8))
    cache = kv.build("float32", cache_shape(made.config), made.arena, 16)
    found = made.decoder.forward(TOKENS, cache, all_logits=True).copy()
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)
    cache.truncate(4)  # the same as recorded calls, token by token
    for at in range(4, len(TOKENS)):
        np.testing.assert_allclose(made.decoder.forward(TOKENS[at : at + 1], cache), wanted[at], rtol=1e-3, atol=1e-3)


def test_activations_are_read() -> None:
    assert ModelConfig.from_dict(LLAMA).feed_forward == "reglu"
    assert ModelConfig.from_dict({**LLAMA, "hidden_act": "silu"}).feed_forward == "swiglu"
    assert ModelConfig.from_dict(FATRELU).relu_threshold == 0.3
    assert ModelConfig.from_dict(FALCON).feed_forward == "relu"
    with pytest.raises(InputError, match="hidden_act"):
        ModelConfig.from_dict({**LLAMA, "hidden_act": "tanh"})


def test_layouts_count_their_bytes_and_survive_json() -> None:
    layout = NeuronLayout(
        form="float16", num_layers=2, num_neurons=96, width=100, parts=3, ranks=(4, 8), thresholds=(0.5, -1.0),
        held=((10, 20), (15, 25)),
    )  # fmt: skip
    assert layout.row_bytes == 1024
    assert layout.file_bytes == 2 * 96 * 1024
    assert layout.rows(1) == (10, 20)
    assert layout.rows(9) == (15, 25)
    told = {name: value if isinstance(value, str) else [list(v) if isinstance(v, tuple) else v for v in value]
            for name, value in layout.to_json().items()}  # fmt: skip
    assert NeuronLayout.read(Fields(told, "x"), num_layers=2, num_neurons=96, width=100, parts=3) == layout

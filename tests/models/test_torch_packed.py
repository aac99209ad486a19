from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from memwall import kernels, kv  # noqa: E402
from memwall.engine.loading import cache_shape  # noqa: E402
from memwall.kernels.triton_marlin import MarlinLinear  # noqa: E402
from memwall.memory import Arena, Ledger  # noqa: E402
from memwall.models import Checkpoint, ModelConfig  # noqa: E402
from memwall.models.decoder import Decoder  # noqa: E402
from memwall.models.precision import resolve  # noqa: E402
from memwall.models.torch_decoder import TorchDecoder  # noqa: E402
from memwall.models.torch_packed import pack_linears  # noqa: E402
from memwall.models.weights import load_weights  # noqa: E402
from tests.compress.tiny_model import make_model  # noqa: E402
from tests.models.families import make_family  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_packed_torch_form_gives_the_logits_of_the_cpu_engine(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = make_family("llama", tmp_path_factory.getbasetemp())
    config = ModelConfig.from_directory(path)
    tokens = np.random.default_rng(3).integers(3, config.vocab_size, 12)
    arena = Arena(1 << 40, Ledger())
    with Checkpoint(path, config) as checkpoint:
        weights = load_weights(config, checkpoint, resolve(config, "int4"), arena)
    decoder = Decoder(config, weights, arena, segment_tokens=16, logit_rows=16, exact=True)
    want = decoder.forward(tokens, kv.build("float32", cache_shape(config), arena, 16), all_logits=True)

    model = TorchDecoder.from_directory(path).to(DEVICE)
    with torch.no_grad():  # the table of rows is packed on the CPU engine too
        table = model.get_parameter("model.embed_tokens.weight")
        rows = np.empty(table.shape, np.float32)
        kernels.gather_rows(weights.matrices["model.embed_tokens.weight"], np.arange(len(rows)), rows)
        table.copy_(torch.from_numpy(rows))
        assert pack_linears(model, "int4", DEVICE) > 0
        got = model(torch.from_numpy(tokens).to(DEVICE)).reshape(len(tokens), -1)
    np.testing.assert_allclose(got.cpu().numpy(), want, atol=2e-4)


def test_half_float_layers_of_whole_tiles_take_the_form_of_marlin(tmp_path: Path) -> None:
    path = make_model(tmp_path / "model")  # gates of 256 by 128 and the head are whole tiles, no other layer is
    tokens = torch.arange(3, 12, device=DEVICE)
    logits, kinds = [], []
    for dtype in (torch.float32, torch.float16):
        model = TorchDecoder.from_directory(path).to(torch.float16).to(DEVICE, dtype)  # the same codes for both
        with torch.no_grad():
            pack_linears(model, "int4-g128", DEVICE)
            logits.append(model(tokens).reshape(len(tokens), -1).float().cpu())
        kinds.append(sum(isinstance(layer, MarlinLinear) for layer in model.modules()))
    assert kinds == [0, 2 * 3 + 1]
    assert (logits[1] - logits[0]).abs().max() < 0.02 * logits[0].abs().max()

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from memwall import kernels, kv  # noqa: E402
from memwall.engine.loading import cache_shape  # noqa: E402
from memwall.memory import Arena, Ledger  # noqa: E402
from memwall.models import Checkpoint, ModelConfig  # noqa: E402
from memwall.models.decoder import Decoder  # noqa: E402
from memwall.models.precision import resolve  # noqa: E402
from memwall.models.torch_decoder import TorchDecoder  # noqa: E402
from memwall.models.torch_packed import pack_linears  # noqa: E402
from memwall.models.weights import load_weights  # noqa: E402
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

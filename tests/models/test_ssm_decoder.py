"""Both forms of Mamba models against transformers, and the state between calls."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from memwall.engine import Settings, load
from memwall.engine.loading import load_decoder
from memwall.engine.session import Session
from memwall.errors import BudgetExceeded, InputError
from memwall.memory import Arena, Ledger
from memwall.models import ModelConfig
from memwall.models.decoder import Decoder
from memwall.models.ssm_decoder import CHUNK_ROWS, SsmDecoder
from memwall.models.weights import Weights
from tests.models.ssm_models import CONFIGS, MAMBA2, write_model

TOKENS = np.random.default_rng(1).integers(0, 96, 37)


def session(folder: Path, weights: str = "float32", *, exact: bool = True) -> Session:
    settings = Settings(
        weights=weights, kv="state", context_tokens=1024, segment_tokens=600, logit_rows=40, exact=exact
    )
    return load(folder, settings)


def logits(run: Session, tokens: np.ndarray) -> np.ndarray:
    return run.decoder.forward(tokens, run.cache, all_logits=True).copy()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from memwall.models.torch_ssm import TorchSsm

    folder = write_model(tmp_path / "model", CONFIGS[name])
    tokens = torch.tensor(TOKENS)[None]
    with torch.no_grad():
        want = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()(tokens).logits[0].numpy()
        np.testing.assert_allclose(TorchSsm.from_directory(folder)(tokens)[0].numpy(), want, atol=2e-4)
    run = session(folder)
    got = [logits(run, TOKENS[:20]), logits(run, TOKENS[20:31])]
    got += [logits(run, TOKENS[i : i + 1]) for i in range(31, len(TOKENS))]  # a token at a time
    np.testing.assert_allclose(np.concatenate(got), want, atol=2e-4)


def test_prefill_longer_than_a_chunk_goes_on(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", MAMBA2)
    tokens = np.random.default_rng(2).integers(0, 96, CHUNK_ROWS + 40)
    whole, parts = session(folder), session(folder)
    last = whole.decoder.forward(tokens, whole.cache).copy()
    for token in np.split(tokens, [100, 103, 290]):
        step = parts.decoder.forward(token, parts.cache)
    np.testing.assert_allclose(step, last, atol=1e-4)
    for one, other in zip(whole.cache.states, parts.cache.states, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_memory_is_the_same_for_any_length_and_is_on_the_ledger(tmp_path: Path) -> None:
    run = session(write_model(tmp_path / "model", MAMBA2))
    before = {row.owner: row.nbytes for row in run.ledger.rows() if row.owner != "runtime"}
    logits(run, TOKENS)
    assert before == {row.owner: row.nbytes for row in run.ledger.rows() if row.owner != "runtime"}
    assert before["state/scan"] + before["state/convolution"] == run.cache.nbytes
    run.release()
    assert run.arena.used_bytes == 0


def test_a_decoder_that_does_not_fit_leaves_nothing(tmp_path: Path) -> None:
    run = session(write_model(tmp_path / "model", MAMBA2))
    config, weights = run.decoder.config, run.decoder.weights
    whole = Arena(1 << 40, Ledger())
    SsmDecoder(config, weights, whole, segment_tokens=600, logit_rows=40)
    for cap in (whole.used_bytes - 1, whole.used_bytes // 2, 4096):
        arena = Arena(cap, Ledger())
        with pytest.raises(BudgetExceeded):
            SsmDecoder(config, weights, arena, segment_tokens=600, logit_rows=40)
        assert arena.used_bytes == arena.ledger.total() == 0
    run.release()


def test_a_conversation_can_only_be_forgotten_as_a_whole(tmp_path: Path) -> None:
    run = session(write_model(tmp_path / "model", MAMBA2))
    first = logits(run, TOKENS[:9])
    other = run.cache.fork()
    assert run.rewind(5) == 0
    np.testing.assert_array_equal(logits(run, TOKENS[:9]), first)
    np.testing.assert_array_equal(other.states[0], run.cache.states[0])


def test_packed_weights_run_too(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", MAMBA2, dtype="bfloat16")
    exact, coded = logits(session(folder, "bfloat16"), TOKENS), logits(session(folder, "int8", exact=False), TOKENS)
    assert 0 < np.abs(exact - coded).max() < 0.2


def test_caches_of_keys_and_adapters_are_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", MAMBA2)
    with pytest.raises(InputError, match="--kv state"):
        load(folder, Settings(weights="float32", kv="kivi(2bit)"))
    with pytest.raises(InputError, match="LoRA"):
        session(folder).decoder.adapt(object())  # type: ignore[arg-type]


def test_what_works_on_attention_refuses_these_models(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", MAMBA2)
    with pytest.raises(InputError, match="has no attention"):
        Decoder(ModelConfig.from_directory(folder), Weights({}, {}, {}), Arena(1 << 30, Ledger()))
    with pytest.raises(InputError, match="no keys and values that requests could share"):
        load_decoder(folder, Settings(weights="float32"), sequences=4, shared=True)


def test_torch_is_not_imported(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", MAMBA2)
    script = (
        "import sys, numpy as np\nfrom pathlib import Path\nfrom memwall.engine import Settings, load\n"
        "run = load(Path(sys.argv[1]), Settings(weights='float32', kv='state'))\n"
        "run.decoder.forward(np.arange(5), run.cache)\nassert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script, str(folder)], check=True)

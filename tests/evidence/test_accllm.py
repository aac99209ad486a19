"""What AccLLM's verdicts hang on: the model that is trained, its sink, the comparisons."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from memwall.cli.evidence import load_experiment
from memwall.errors import InputError
from memwall.models.tokenizer import Tokenizer
from memwall.models.torch_decoder import TorchDecoder
from memwall.systems import find_system


@pytest.fixture(scope="module")
def accllm() -> ModuleType:
    return load_experiment(find_system("accllm"))


@pytest.fixture(scope="module")
def held() -> np.ndarray:
    return np.frombuffer(b"def a_wall(bytes):\n    return memory[bytes]\n\n" * 80, np.uint8)


@pytest.fixture(scope="module")
def source(accllm: Any, held: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = replace(accllm.QUICK, steps=3, batch=2)
    return accllm.save(accllm.train(held, sizes, lambda *_: None), tmp_path_factory.mktemp("model") / "float")


def test_the_model_is_one_that_every_verb_takes(accllm: Any, source: Path, held: np.ndarray) -> None:
    tokenizer = Tokenizer.from_directory(source)
    text = "é = λ\n"
    assert tokenizer.encode(text, add_bos=False) == list(text.encode())
    model, torch = accllm.Loaded(source), pytest.importorskip("torch")
    tokens = np.concatenate([[accllm.BEGIN], held[:40]]).astype(np.int64)
    ours = model.decoder.forward(tokens, model.cache("float32", 64), all_logits=True)
    theirs = TorchDecoder.from_directory(source)(torch.from_numpy(tokens)).detach().numpy()
    np.testing.assert_allclose(ours, theirs, atol=2e-3)


def test_heads_look_at_the_begin_token_from_the_start(accllm: Any, source: Path, held: np.ndarray) -> None:
    model = accllm.Loaded(source)
    row = np.concatenate([[accllm.BEGIN], held[:255]]).astype(np.int64)
    kept, dropped = (
        model.losses(row, model.cache(policy, 256), 16)
        for policy in ("lambda(sinks=1,window=40)+float32", "lambda(sinks=0,window=41)+float32")
    )
    np.testing.assert_allclose(kept[:40], dropped[:40], atol=1e-4)
    assert np.abs(kept[60:] - dropped[60:]).max() > 0.1


def test_windows_score_the_tokens_that_streams_do(accllm: Any, source: Path, held: np.ndarray) -> None:
    """In windows of the trained length, a token's loss is that of the stream as long as both see the same."""
    model = accllm.Loaded(source)
    tokens = np.concatenate([[accllm.BEGIN], held[:256]]).astype(np.int64)
    stream = model.losses(tokens, model.cache("float32", 300), 16)[127:255]
    assert accllm.in_window(model, held, 255, 127) == pytest.approx(float(np.exp(stream.mean())), rel=1e-4)


def test_rounded_keys_are_rounded_once_a_block_is_whole(accllm: Any, source: Path) -> None:
    model, rng = accllm.Loaded(source), np.random.default_rng(0)
    shape = accllm.cache_shape(model.config)
    cache = accllm.RoundedKeys(shape, along_tokens=True)
    k = rng.standard_normal((40, shape.num_kv_heads, shape.head_dim)).astype(np.float32)
    cache.append(0, k, k, np.arange(40))
    cache.settle(0)
    held = cache.held[0, 0, :40]
    assert np.abs(held[:32] - k[:32]).max() > 0.01
    np.testing.assert_array_equal(held[32:], k[32:])
    assert all(len(np.unique(held[:32, 0, channel])) <= 16 for channel in range(shape.head_dim))


def test_claims_that_need_no_training(accllm: Any) -> None:
    claims = accllm.simulator_claims()
    assert [claim.passed for claim in claims] == [True, True]
    assert {packing.code_bits for packing in accllm.packings()} == {2, 4, 8}


def test_short_data_is_refused(accllm: Any, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("a wall " * 100)
    with pytest.raises(InputError, match="200,000"):
        accllm.run(True, short)


def test_a_table_of_triples_knows_what_it_has_seen_and_nothing_else(accllm: Any) -> None:
    noise = np.random.default_rng(0).integers(0, 256, 4000).astype(np.uint8)
    assert accllm.counted_perplexity(noise, noise[::-1].copy(), 4) > 256  # sure of what it saw once, and wrong
    period = np.tile(np.frombuffer(b"abcabd", np.uint8), 400)
    # after "ab" either letter comes: of six bytes two are a coin toss
    assert accllm.counted_perplexity(period, period, 4) == pytest.approx(2 ** (1 / 3), rel=0.05)

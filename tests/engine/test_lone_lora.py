"""One adapter in a session: the same tokens as the engine of many makes, and merged weights' numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from memwall.engine import Sampling, Settings, load
from memwall.engine.lone_lora import lone_bytes, wear
from memwall.engine.sequence import Request
from memwall.engine.serving import LoraSettings, ServingSettings, load_engine
from memwall.errors import InputError
from memwall.models import DEMO_DIRECTORY, ModelConfig
from memwall.models.lora import LoraWeights
from tests.models.loras import make_lora

CONFIG = ModelConfig.from_directory(DEMO_DIRECTORY)
PROMPT = tuple(range(5, 180, 3))


@pytest.mark.parametrize("weights", ["float16", "int4"])
def test_a_session_and_a_server_make_the_same(tmp_path: Path, weights: str) -> None:
    folder = make_lora(tmp_path / "one", CONFIG, rank=12, targets=("q_proj", "v_proj", "down_proj"))
    session = load(DEMO_DIRECTORY, Settings(weights=weights, context_tokens=128, threads=1, segment_tokens=64))
    sampling = Sampling(max_new_tokens=16, ignore_eos=True)
    list(session.generate(list(PROMPT), sampling))
    plain = session.last.tokens
    session.reset()
    adapter = LoraWeights.read(folder, CONFIG)
    before = session.arena.used_bytes
    wear(session, adapter)
    predicted = lone_bytes(adapter, CONFIG, 64)
    assert session.ledger.owned("adapters/pages") == predicted["adapters/pages"]
    assert session.arena.used_bytes - before <= sum(predicted.values()) + 2 * 4096
    list(session.generate(list(PROMPT), sampling))
    worn = session.last.tokens
    assert worn != plain
    session.release()
    held = load_engine(
        DEMO_DIRECTORY,
        ServingSettings(weights=weights, context_tokens=128, token_budget=64, threads=1, lora=LoraSettings()),
    )
    held.add_adapter("one", held.read_adapter(folder))
    one = held.engine.submit(Request(prompt=PROMPT, sampling=sampling, adapter="one"))
    while held.engine.busy:
        held.engine.step()
    assert list(one.made) == worn
    held.release()


def test_long_segments_are_worked_in_blocks(tmp_path: Path) -> None:
    adapter = LoraWeights.read(make_lora(tmp_path / "one", CONFIG, rank=4), CONFIG)
    logits = []
    for segment in (300, 20):
        session = load(DEMO_DIRECTORY, Settings(weights="float32", kv="float32", segment_tokens=segment, threads=1))
        wear(session, adapter)
        tokens = np.arange(3, 303)
        for first in range(0, 300, segment):
            out = session.decoder.forward(tokens[first : first + segment], session.cache)
        logits.append(out.copy())
        session.release()
    assert np.abs(logits[0] - logits[1]).max() < 1e-3


def test_caches_that_make_keys_again_are_refused(tmp_path: Path) -> None:
    adapter = LoraWeights.read(make_lora(tmp_path / "one", CONFIG, rank=4), CONFIG)
    session = load(DEMO_DIRECTORY, Settings(weights="float16", kv="xquant", context_tokens=256))
    with pytest.raises(InputError, match="without the adapter"):
        wear(session, adapter)
    session.release()

"""Guided draws: JSON from a model that knows none, by tokens that cut it anywhere, with the model's own chances."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from memwall.engine import Sampler, Sampling
from memwall.engine.guide import Guide, TokenTable
from memwall.engine.json_schema import walker
from memwall.engine.sampling import bend
from memwall.models import DEMO_DIRECTORY, ModelConfig
from memwall.models.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_directory(DEMO_DIRECTORY)
CONFIG = ModelConfig.from_directory(DEMO_DIRECTORY)
TABLE = TokenTable(TOKENIZER, CONFIG.vocab_size, CONFIG.eos_token_ids)
SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}, "n": {"type": "integer"}},
          "required": ["name", "n"]}  # fmt: skip


def answer(schema: Any, seed: int, most: int = 200) -> list[int]:
    """Tokens up to the end, of a model whose logits are noise."""
    rng, cursor = np.random.default_rng(seed), Guide(walker(schema), TABLE).cursor()
    sampler, made = Sampler(Sampling(temperature=1.0, seed=seed)), []
    for _ in range(most):
        token = cursor.pick(made, rng.normal(size=CONFIG.vocab_size).astype(np.float32), sampler.pick)
        if token in TABLE.eos:
            return made
        made.append(token)
    pytest.fail(f"no end: {TOKENIZER.decode(made)!r}")


@pytest.mark.parametrize("seed", range(8))
def test_noise_becomes_json_of_the_schema(seed: int) -> None:
    value = json.loads(TOKENIZER.decode(answer(SCHEMA, seed)))
    assert list(value) == ["name", "n"]
    assert len(value["name"]) <= 8
    assert isinstance(value["n"], int)


def test_allowed_tokens_keep_their_chances() -> None:
    guide = Guide(walker({"enum": [True, False]}), TABLE)
    yes, no = (TOKENIZER.token_to_id(letter) for letter in "tf")
    logits = np.full(CONFIG.vocab_size, 3.0, np.float32)
    first = guide.walker.start
    allowed = [t for t in range(len(logits)) if guide.walker.feed(first, TABLE.text(t)) and t not in TABLE.eos]
    assert {yes, no} <= set(allowed)
    logits[allowed] = -20.0
    logits[yes], logits[no] = 0.0, 1.0
    sampler = Sampler(Sampling(temperature=1.0))
    drawn = [guide.cursor().pick([], logits.copy(), sampler.pick) for _ in range(1500)]
    assert set(drawn) <= {yes, no}
    assert abs(drawn.count(no) / len(drawn) - np.e / (1 + np.e)) < 0.05


def test_a_cursor_follows_what_was_really_made() -> None:
    cursor, logits = Guide(walker({"enum": ["ab", "cd"]}), TABLE).cursor(), np.zeros(CONFIG.vocab_size, np.float32)
    quote, a, c = (TOKENIZER.token_to_id(letter) for letter in '"ac')
    pick = Sampler(Sampling()).pick
    cursor.pick([quote, a], logits.copy(), pick)
    strict = logits.copy()
    cursor.pick([quote, c], strict, pick)  # another step came in the place of the one before
    assert np.isfinite(strict[TOKENIZER.token_to_id("d")])
    assert strict[TOKENIZER.token_to_id("b")] == -np.inf


def test_after_the_end_only_the_end_comes() -> None:
    made = answer({"const": None}, 1)
    cursor = Guide(walker({"const": None}), TABLE).cursor()
    assert (
        cursor.pick([*made, min(TABLE.eos)], np.zeros(CONFIG.vocab_size, np.float32), Sampler(Sampling()).pick)
        in TABLE.eos
    )


def test_token_bytes_join_to_the_text() -> None:
    text = "naïve “quotes” 🙂 and\n\ttabs"
    assert b"".join(TOKENIZER.token_bytes(t) or b"" for t in TOKENIZER.encode(text, add_bos=False)) == text.encode()
    assert TOKENIZER.token_bytes(min(TABLE.eos)) is None
    assert TOKENIZER.token_bytes(10**6) is None


def test_penalties_and_bias() -> None:
    logits = np.zeros(6, np.float32)
    bend(logits, [1, 2, 1], Sampling(frequency_penalty=0.5, presence_penalty=1.0, bias=((5, 2.0), (1, 1.0))))
    np.testing.assert_allclose(logits, [0, -1, -1.5, 0, 0, 2])

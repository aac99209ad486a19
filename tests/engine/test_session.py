from __future__ import annotations

import json
import subprocess
import sys

import pytest

from memwall import engine
from memwall.engine import Sampling, Settings
from memwall.errors import DoesNotFit, InputError
from memwall.memory import Budget
from memwall.models import DEMO_DIRECTORY
from memwall.models.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_directory(DEMO_DIRECTORY)
PROMPT = TOKENIZER.encode("The history of the city begins", add_bos=True)


def session(**changes: object) -> engine.Session:
    settings = Settings(**{"weights": "int8", "context_tokens": 128, "segment_tokens": 16, **changes})  # type: ignore[arg-type]
    return engine.load(DEMO_DIRECTORY, settings, tokenizer=TOKENIZER)


def test_streamed_pieces_are_the_text_and_the_text_is_the_tokens() -> None:
    loaded = session()
    pieces = list(loaded.generate(PROMPT, Sampling(max_new_tokens=20)))
    result = loaded.last
    assert "".join(pieces) == result.text
    assert TOKENIZER.decode(result.tokens) == result.text
    assert len(result.tokens) == 20
    assert result.stop_reason == "length"
    assert result.prompt_tokens == len(PROMPT)


def test_a_continued_conversation_equals_one_long_prompt() -> None:
    first = session(weights="float32", kv="float32")
    list(first.generate(PROMPT, Sampling(max_new_tokens=5, ignore_eos=True)))
    said = first.last.tokens
    list(first.generate(PROMPT, Sampling(max_new_tokens=5, ignore_eos=True)))
    whole = session(weights="float32", kv="float32")
    list(whole.generate(PROMPT + said + PROMPT, Sampling(max_new_tokens=5, ignore_eos=True)))
    assert first.last.tokens == whole.last.tokens


def test_reset_forgets() -> None:
    loaded = session()
    list(loaded.generate(PROMPT, Sampling(max_new_tokens=8)))
    before = loaded.last.tokens
    loaded.reset()
    list(loaded.generate(PROMPT, Sampling(max_new_tokens=8)))
    assert loaded.last.tokens == before


def test_stop_text_ends_and_is_not_shown() -> None:
    loaded = session()
    list(loaded.generate(PROMPT, Sampling(max_new_tokens=20)))
    word = loaded.last.text.split()[1]
    loaded.reset()
    list(loaded.generate(PROMPT, Sampling(max_new_tokens=20, stop=(word,))))
    assert loaded.last.stop_reason == "stop"
    assert word not in loaded.last.text


def test_stops_at_the_context_and_keeps_the_text() -> None:
    loaded = session(context_tokens=len(PROMPT) + 6)
    list(loaded.generate(PROMPT, Sampling(max_new_tokens=50, ignore_eos=True)))
    assert loaded.last.stop_reason == "context"
    # the last token is made from a full cache, so it is one more than the cache has room for
    assert len(loaded.last.tokens) == 7
    assert loaded.last.text


def test_a_prompt_longer_than_the_context_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"--context 9"):
        list(session(context_tokens=len(PROMPT) - 1).generate(PROMPT, Sampling()))


def test_stops_at_the_budget_before_it_is_crossed_and_keeps_the_text() -> None:
    loaded = session(kv="float32", context_tokens=900)
    loaded.arena.set_cap(loaded.arena.used_bytes + 400_000)
    pieces = list(loaded.generate(PROMPT, Sampling(max_new_tokens=800, ignore_eos=True)))
    result = loaded.last
    assert result.stop_reason == "budget"
    assert "--memory" in result.message
    assert 0 < len(result.tokens) < 800
    assert "".join(pieces) == result.text
    assert loaded.arena.used_bytes <= loaded.arena.cap_bytes


def test_a_prompt_longer_than_one_block_of_rows_attends_exactly_before_kivi_codes_it() -> None:
    tokens = [0, *(3 + 7 * i % 4000 for i in range(699))]
    logits = [
        session(weights="float16", kv=policy, context_tokens=720, segment_tokens=700).prefill(tokens).copy()
        for policy in ("float16", "kivi")
    ]
    assert (logits[0] == logits[1]).all()


def test_a_budget_below_the_runtime_is_refused() -> None:
    settings = Settings(weights="int4", context_tokens=64)
    with pytest.raises(DoesNotFit, match="runtime"):
        engine.load(DEMO_DIRECTORY, settings, budget=Budget.parse("10MB"), tokenizer=TOKENIZER)


LEDGER_SCRIPT = """
import json, sys
from memwall import engine
from memwall.memory import Budget, ledger_error, peak_resident_bytes
from memwall.models import DEMO_DIRECTORY
from memwall.models.tokenizer import Tokenizer
tokenizer = Tokenizer.from_directory(DEMO_DIRECTORY)
settings = engine.Settings(weights="float32", kv="float32", context_tokens=700, segment_tokens=256)
session = engine.load(DEMO_DIRECTORY, settings, budget=Budget.parse("120MB"), tokenizer=tokenizer)
list(session.generate(tokenizer.encode("one two three " * 100), engine.Sampling(max_new_tokens=60, ignore_eos=True)))
rows = {row.owner: row.nbytes for row in session.ledger.rows()}
print(json.dumps({"error": ledger_error(session.ledger), "peak": peak_resident_bytes(), "rows": rows,
                  "torch": "torch" in sys.modules}))
"""


def test_the_ledger_agrees_with_the_operating_system() -> None:
    done = subprocess.run([sys.executable, "-c", LEDGER_SCRIPT], capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    assert abs(told["error"]) <= 0.03
    assert told["rows"]["runtime"] <= 80_000_000
    assert told["peak"] <= 120_000_000
    assert not told["torch"]

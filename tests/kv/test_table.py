"""How policies of different roles nest: in one order, each role once, with a store at the end."""

from __future__ import annotations

from typing import ClassVar

import pytest

from memwall import kv
from memwall.errors import InputError
from memwall.kv import table
from memwall.kv.base import KVCache
from memwall.memory import Arena, Ledger

SHAPE = kv.CacheShape(num_layers=1, num_heads=2, num_kv_heads=1, head_dim=32)


class Tokens(KVCache):
    role = "tokens"
    refuses: ClassVar[dict[str, str]] = {"float32": "it is too large"}


class OtherTokens(KVCache):
    role = "tokens"


class Channels(KVCache):
    role = "channels"
    needs_model = True


@pytest.fixture(autouse=True)
def more_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"drop": Tokens, "evict": OtherTokens, "thin": Channels}
    real = table.technique
    monkeypatch.setattr(table, "technique", lambda name: known.get(name) or real(name))


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("kivi", "kivi"),
        ("drop(0.5)", "drop(0.5)+float16"),
        ("kivi(2bit)+drop", "drop+kivi(bits=2)"),
        ("thin+kivi+drop", "drop+thin+kivi"),
        ("thin", "thin+float16"),
    ],
)
def test_parts_nest_by_role(text: str, canonical: str) -> None:
    assert str(kv.resolve(text)) == canonical


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("drop+evict", "drop and evict both choose the tokens that stay; name one"),
        ("kivi+float16", "kivi and float16 both store the rows"),
        ("drop+float32", "drop does not work on top of float32: it is too large"),
        ("drop+thin+float32", "too large"),
        ("drop+nothing", "unknown KV policy 'nothing'; known: float32"),
    ],
)
def test_what_does_not_go_together(text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        kv.resolve(text)


def test_policies_that_look_into_the_model_need_one() -> None:
    with pytest.raises(InputError, match="thin works with a loaded model"):
        kv.build("thin+kivi", SHAPE, Arena(1 << 20, Ledger()), 8)

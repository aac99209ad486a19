"""Every way to join the policies of the table: it works and holds what was predicted, or it says why it does not."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest

from memwall import kv
from memwall.errors import InputError
from memwall.kv import fitted
from memwall.kv.locret import LocretCache, head_inputs, heads_width
from memwall.memory import Arena, Ledger
from tests.kv.test_contract import MEASURED, MODEL, SHAPE, feed

TOKENS = ("snapkv(budget=0.3)", "locret(tokens=60,chunk=64)", "epicache(tokens=60,chunk=64)",
          "lambda(sinks=4,window=90)")  # fmt: skip
CHANNELS = ("think(0.4)",)
STORES = (
    "float32",
    "float16",
    "bfloat16",
    "kivi(2bit,group=16,residual=16)",
    "vattention(page_kib=8)",
    "xquant(4bit)",
    "instinfer(1,block_kib=16)",
    "cskv(0.5,init=svd,train=0)",
)
BLOCKWISE = {"locret", "epicache"}
CAPACITY = 230
PROMPT, LATER = 150, 41


@pytest.fixture(autouse=True, scope="module")
def fits() -> None:
    fitted.fit(STORES[-1], MODEL.model.directory, text="Some words about walls and memory. " * 60)
    width, rng = heads_width(SHAPE), np.random.default_rng(0)
    heads = {
        f"{layer}.w{i}": rng.standard_normal(size, np.float32).astype(np.float16)
        for layer in range(SHAPE.num_layers)
        for i, size in ((1, (width, head_inputs(SHAPE))), (2, (SHAPE.num_kv_heads, width)))
    }
    fitted.save(MODEL.model.fingerprint, LocretCache.fit_key(kv.parse(TOKENS[1])), heads)


def combinations() -> Iterator[str]:
    for parts in itertools.product((None, *TOKENS), (None, *CHANNELS), (None, *STORES)):
        if any(parts):
            yield "+".join(part for part in parts if part)


def built(policy: str) -> tuple[kv.KVCache, Ledger]:
    ledger = Ledger()
    return kv.build(policy, SHAPE, Arena(1 << 24, ledger), CAPACITY, MODEL.model), ledger


WORKING = {
    "snapkv": {"float32", "float16", "bfloat16", "kivi", "bfp", "vattention", "instinfer"},
    "locret": {"float32", "float16", "bfloat16"},
    "epicache": {"float32", "float16", "bfloat16"},
    "think": {"float32", "float16", "bfloat16", "kivi"},
    "lambda": {"float32", "float16", "bfloat16", "kivi"},
}
"""What stands on what; think stands on snapkv's rows too."""


def works(policy: str) -> bool:
    names = [part.name for part in kv.parse(policy).parts]
    store = names[-1] if names[-1] not in WORKING else "float16"
    upper = [name for name in names if name in WORKING]
    if len(upper) == 2 and upper[0] in {*BLOCKWISE, "lambda"}:
        return False
    return all(store in WORKING[name] for name in upper)


@pytest.mark.parametrize("policy", list(combinations()))
def test_each_works_as_predicted_or_is_refused(policy: str) -> None:
    if not works(policy):
        with pytest.raises(InputError) as refused:
            kv.predict(policy, SHAPE, PROMPT, PROMPT, CAPACITY)
        assert any(part.name in str(refused.value) for part in kv.parse(policy).parts)
        with pytest.raises(InputError):
            built(policy)
        return
    cache, ledger = built(policy)
    for size in (prompt := cache.begin_prompt(PROMPT, PROMPT)):
        feed(cache, 0, cache.length, size)
    feed(cache, 1, PROMPT, *[1] * LATER)
    assert sum(prompt) == PROMPT
    assert cache.length == PROMPT + LATER
    predicted = {o: n for o, n in kv.predict(policy, SHAPE, PROMPT + LATER, PROMPT, CAPACITY).items() if n}
    held = {row.owner: row.nbytes for row in ledger.rows() if not row.owner.startswith(MEASURED)}
    assert cache.nbytes == sum(held.values())
    if kv.parse(policy).parts[0].name in BLOCKWISE:  # these predict their highest bytes, not those of this moment
        assert all(held[owner] <= predicted[owner] for owner in held)
    else:
        predicted.pop("kv/staging", None)
        assert held == predicted
        saved = kv.savings(policy, SHAPE, PROMPT + LATER, PROMPT, CAPACITY)
        assert saved.product == pytest.approx(cache.nbytes / saved.plain_bytes)
    cache.release()
    assert ledger.total() == 0


def test_the_order_of_parts_does_not_matter() -> None:
    parts = ("snapkv(0.3)", "think(0.4)", "kivi(2bit)")
    assert len({str(kv.resolve("+".join(order))) for order in itertools.permutations(parts)}) == 1


def test_two_of_a_kind_are_refused() -> None:
    for policy, does in (("snapkv(0.5)+epicache", "tokens"), ("think+think", "channels"), ("kivi+float16", "store")):
        with pytest.raises(InputError, match=does):
            kv.resolve(policy)


@pytest.mark.parametrize("name", ["snapkv", "locret", "epicache"])
@pytest.mark.parametrize("share", ["0", "0.0", "1.01", "3"])
def test_shares_are_above_zero_and_at_most_one(name: str, share: str) -> None:
    for setting in (share, f"budget={share}"):
        with pytest.raises(InputError, match=rf"{name}.*above 0 and at most 1"):
            kv.predict(f"{name}({setting})", SHAPE, 10, 10)
    with pytest.raises(InputError, match="tokens="):
        kv.predict(f"{name}(tokens=0)", SHAPE, 10, 10)
    with pytest.raises(InputError, match=r"give one|not both"):
        kv.predict(f"{name}(0.5,tokens=64)", SHAPE, 10, 10)
    with pytest.raises(InputError, match="give one"):
        kv.predict(f"{name}(0.5,budget=0.5)", SHAPE, 10, 10)


def test_budget_is_the_long_form_of_the_bare_number() -> None:
    assert kv.resolve("snapkv(budget=0.25)+kivi(2bit)") == kv.resolve("snapkv(0.25)+kivi(2bit)")
    with pytest.raises(InputError, match="budget"):
        kv.predict("think(budget=0.25)", SHAPE, 10, 10)


def test_savings_are_factors_of_parts_outermost_first() -> None:
    saved = kv.savings("kivi(2bit,group=16,residual=16)+snapkv(0.25)+think(0.5)", SHAPE, 1 << 16, 1 << 16)
    assert [part.split("(")[0] for part in saved.factors] == ["snapkv", "think", "kivi"]
    tokens, channels, store = saved.factors.values()
    assert tokens == pytest.approx(0.25, rel=0.05)
    assert channels == pytest.approx(0.75, rel=0.05)
    assert store == pytest.approx((2 + 32 / 16) / 16, rel=0.2)
    assert saved.product == pytest.approx(math.prod((tokens, channels, store)))
    assert kv.savings("float16", SHAPE, 100).factors == {"float16": 1.0}
    assert kv.savings("float32", SHAPE, 1 << 14).product == pytest.approx(2)
    assert "=" not in str(kv.savings("kivi", SHAPE, 100))
    assert str(saved).endswith(f"= {saved.product:.3f}")


@pytest.mark.parametrize("store", [name for name in kv.POLICIES if kv.table.technique(name).role == "store"])
@pytest.mark.parametrize("outer", ["lambda", "locret", "epicache", "think", "snapkv"])
def test_every_store_is_taken_or_refused_by_both_names(outer: str, store: str) -> None:
    said = ""
    try:
        kv.predict(f"{outer}+{store}", SHAPE, 64, 64)
    except InputError as refused:
        said = str(refused)
    assert not said or (outer in said and store in said)

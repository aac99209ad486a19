"""What every policy of the table must do, in an easy and a hard setting."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest

from memwall import kv
from memwall.errors import BudgetExceeded, InputError
from memwall.kv import fitted
from memwall.kv.locret import LocretCache, head_inputs, heads_width
from memwall.memory import Arena, Ledger
from tests.kv.latent_models import loaded, project

SETTINGS = (
    "float32",
    "float16",
    "bfloat16",
    "int8",
    "int4",
    "snapkv(0.5)+int4",
    "kivi",
    "kivi(bits=3,group=16,residual=0)",
    "kivi(8bit,exact=bfloat16)",
    "kivi(4bit,group=16,key_group=64,residual=0)",
    "kv4",
    "kv4(page=32,exact=float32)",
    "bfp",
    "bfp(bits=8,values=3,block=16,axis=tokens,order=calibrated)",
    "bfp(3bit,block=16,order=sorted)",
    "bfp(6bit,order=plain,top=raise,residual=20,exact=float32)",
    "snapkv(0.5)+bfp(4bit,block=16)",
    "snapkv(0.5)+kv4(page=16)",
    "snapkv(0.25)",
    "snapkv(tokens=70,window=16,kernel=7,pool=max)+kivi(4bit,group=16,residual=16)",
    "think",
    "think(0.6,window=8,recent=5)+bfloat16",
    "think(0.3)+kivi(2bit,group=16,residual=32)",
    "snapkv(0.5)+think(0.4)+kivi(3bit,group=16,residual=16)",
    "vattention(page_kib=8)",
    "vattention(page_kib=4,bits=32,ahead=0)",
    "xquant",
    "xquant(3bit,group=64,keep=inputs)",
    "xquant(2bit,cl=1,base=1)",
    "cskv(0.5,init=svd,train=0)",
    "cskv(0.9,4bit,window=16,sliding=1,init=svd,train=0)",
    "locret(tokens=64,chunk=32,stable=8,local=4)",
    "locret(0.3,chunk=40)+bfloat16",
    "epicache(tokens=64,chunk=32)",
    "epicache(0.4,chunk=100,uniform=1)+float32",
    "instinfer(1,block_kib=16)",
    "instinfer(0.25,drives=2,block_kib=64)",
    "snapkv(0.5)+instinfer(0.5)",
    "lambda(sinks=4,window=180)",
    "lambda(sinks=3,window=190,positions=clip)+kivi(4bit,group=16,residual=16)",
)
SUMS_MOVED = {"xquant(2bit,cl=1,base=1)": 6 * 128}
"""Bytes a token that a step moves besides what is held: the sums of a layer, read twice and written once."""
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "hidden_size": 128}
MODEL = loaded("llama", **SIZES)
SHAPE = MODEL.shape


@pytest.fixture(autouse=True, scope="module")
def fits() -> None:
    """Policies that learn from a model learn from this one first; Locret's heads are as good untrained here."""
    for policy in SETTINGS:
        part = kv.parse(policy)
        if part.name == "locret":
            fitted.save(MODEL.model.fingerprint, LocretCache.fit_key(part), untrained_heads())
        elif part.name != "epicache" and kv.table.technique(part.name).fits:  # without alpha it needs nothing
            fitted.fit(policy, MODEL.model.directory, text="Some words about walls and memory. " * 60)


def untrained_heads() -> dict[str, np.ndarray]:
    rng, width = np.random.default_rng(7), heads_width(SHAPE)
    shapes = {"w1": (width, head_inputs(SHAPE)), "w2": (SHAPE.num_kv_heads, width)}
    return {
        f"{layer}.{name}": rng.standard_normal(shape).astype(np.float16) / 16
        for layer in range(SHAPE.num_layers)
        for name, shape in shapes.items()
    }


NUM_TOKENS = 230
BLOCKWISE = {"locret", "epicache"}
"""Policies that evict whenever a block is there: what is predicted for them is their peak, which they need not hold."""
DROPPING = {"snapkv", *BLOCKWISE}
"""Policies that let go of prompt tokens."""


def feed(cache: kv.KVCache, seed: int, first: int, *counts: int) -> np.ndarray:
    """Forward passes of so many tokens each; the last layer's outputs."""
    rng = np.random.default_rng(seed)
    outs = []
    for count in counts:
        q, x = (rng.standard_normal((count, *sizes)).astype(np.float32) for sizes in ((4, 32), (128,)))
        positions, out = np.arange(first, first + count), np.empty_like(q)
        for layer in range(2):
            k, v = project(MODEL, layer, x, first)
            if cache.takes_inputs:
                cache.take_inputs(layer, x, positions)
            cache.append(layer, k, v, positions)
            cache.attend(layer, q, positions, out)
            cache.settle(layer)
        outs.append(out)
        first += count
    return np.concatenate(outs)


def build(policy: str) -> tuple[kv.KVCache, Ledger]:
    ledger = Ledger()
    return kv.build(policy, SHAPE, Arena(1 << 24, ledger), NUM_TOKENS, MODEL.model), ledger


MEASURED = "runtime/"
"""Beginning of the owners whose bytes are measured, not predicted: interpreters of other processes."""


def arenas(cache: kv.KVCache) -> list[Arena]:
    """Of all tiers that the cache has bytes on."""
    return [cache.arena, *(cache.arena.beside(tier) for tier in set(kv.tiers(cache.policy).values()))]


def total(ledger: Ledger) -> int:
    return sum(row.nbytes for row in ledger.rows() if not row.owner.startswith(MEASURED))


def on_own_tier(policy: str, predicted: dict[str, int]) -> dict[str, int]:
    elsewhere = kv.tiers(policy)
    return {owner: nbytes for owner, nbytes in predicted.items() if owner not in elsewhere}


def test_settings_cover_the_table() -> None:
    assert {part.name for policy in SETTINGS for part in kv.parse(policy).parts} == set(kv.POLICIES)
    for place in kv.POLICIES.values():
        module, name = place.split(":")
        assert issubclass(getattr(import_module(module), name), kv.KVCache)


@pytest.mark.parametrize("policy", SETTINGS)
@pytest.mark.parametrize("counts", [(1, 150, 1, 1, 40), (152, 1, 40), (20, 173)])
def test_bytes_bits_and_policy(policy: str, counts: tuple[int, ...]) -> None:
    cache, ledger = build(policy)
    assert (cache.length, cache.bits_per_value) == (0, 0)
    first = feed(cache, 0, 0, *counts)
    assert cache.length == 193
    predicted = kv.predict(policy, SHAPE, 193, counts[0], NUM_TOKENS)
    predicted.pop("kv/staging", None)  # of the prompt, long gone
    rows = [row for row in ledger.rows() if not row.owner.startswith(MEASURED)]
    held = {row.owner: row.nbytes for row in rows}
    if kv.resolve(policy).name in BLOCKWISE:
        assert all(nbytes <= predicted[owner] for owner, nbytes in held.items())
    else:
        assert held == {owner: n for owner, n in predicted.items() if n}
    assert {row.owner: row.tier for row in rows if row.tier != "ram"} == kv.tiers(policy)
    assert cache.nbytes == total(ledger)
    assert cache.bits_per_value == pytest.approx(8 * cache.nbytes / (2 * 2 * 2 * 32 * 193))
    assert 0 < kv.read_bytes(policy, SHAPE, 193) <= cache.nbytes + 193 * SUMS_MOVED.get(policy, 0)
    again, _ = build(cache.policy)
    assert again.policy == cache.policy
    np.testing.assert_array_equal(feed(again, 0, 0, *counts), first)
    cache.release()
    assert ledger.total() == 0


@pytest.mark.parametrize("policy", SETTINGS)
@pytest.mark.parametrize("length", [1, 40, 128, 193])
def test_a_fork_goes_its_own_way(policy: str, length: int) -> None:
    cache, ledger = build(policy)
    alone, _ = build(policy)
    for each in (cache, alone):
        feed(each, 0, 0, length)
    other = cache.fork()
    assert other.length == length
    feed(cache, 5, length, 1, 20, 1)
    np.testing.assert_array_equal(feed(other, 9, length, 1, 20, 1), feed(alone, 9, length, 1, 20, 1))
    other.release()
    cache.release()
    assert ledger.total() == 0


@pytest.mark.parametrize("policy", SETTINGS)
def test_a_refusal_changes_nothing(policy: str) -> None:
    cache, ledger = build(policy)
    feed(cache, 0, 0, 100)
    held = total(ledger)
    for arena in arenas(cache):
        arena.set_cap(arena.used_bytes)
    with pytest.raises(BudgetExceeded, match="kv/"):
        feed(cache, 1, 100, 120)
    cache.truncate(100)
    assert cache.length == 100
    with pytest.raises(BudgetExceeded):
        cache.fork()
    assert total(ledger) == cache.nbytes == held
    for arena in arenas(cache):
        arena.set_cap(1 << 24)
    alone, _ = build(policy)
    feed(alone, 0, 0, 100)
    np.testing.assert_array_equal(feed(cache, 1, 100, 100, 1), feed(alone, 1, 100, 100, 1))


@pytest.mark.parametrize("policy", SETTINGS)
def test_the_highest_bytes_are_predicted(policy: str) -> None:
    """While a prompt is read and answered nothing is held that prediction does not name."""
    build(policy)[0].release()  # what is computed once per model, at first use, is kept for later runs
    cache, _ = build(policy)
    feed(cache, 0, 0, *cache.begin_prompt(190, 190))
    predicted = on_own_tier(policy, kv.predict(policy, SHAPE, 190, 190, NUM_TOKENS))
    assert cache.arena.peak_bytes <= sum(predicted.values())
    if kv.resolve(policy).name not in BLOCKWISE:  # where a block is folded at once, its rows are never copied
        assert cache.arena.peak_bytes >= sum(predicted.values()) - predicted.get("kv/staging", 0)
    feed(cache, 1, 190, *[1] * 40)
    assert cache.arena.peak_bytes <= sum(kv.predict(policy, SHAPE, NUM_TOKENS, 190, NUM_TOKENS).values())


@pytest.mark.parametrize("policy", [policy for policy in SETTINGS if kv.parse(policy).name in BLOCKWISE])
def test_short_segments_change_no_peak(policy: str) -> None:
    cache, _ = build(policy)
    feed(cache, 0, 0, *cache.begin_prompt(190, 20), *[1] * 40)
    assert cache.arena.peak_bytes <= sum(kv.predict(policy, SHAPE, NUM_TOKENS, 20, NUM_TOKENS).values())


@pytest.mark.parametrize("policy", SETTINGS)
def test_going_back(policy: str) -> None:
    """To where it can, and from there on as if the rest had never been."""
    cache, ledger = build(policy)
    feed(cache, 0, 0, 150)
    feed(cache, 1, 150, 1, 9)
    assert cache.rewindable(160) == 160
    assert cache.rewindable(0) == 0
    assert cache.rewindable(152) == 152
    kept = cache.rewindable(100)
    # a cache that chose tokens by the prompt's end can't undo that end
    assert kept == (0 if kv.resolve(policy).name in DROPPING else 100)
    cache.truncate(kept)
    assert cache.length == kept
    if kept == 0:
        alone, _ = build(policy)
        np.testing.assert_array_equal(feed(cache, 2, 0, 130, 1), feed(alone, 2, 0, 130, 1))
    cache.release()
    assert ledger.total() == 0


def test_shapes_are_checked() -> None:
    sizes = {"num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "head_dim": 4}
    for change, says in (
        ({"num_heads": 3}, "share"),
        ({"num_layers": 0}, "num_layers"),
        ({"windows": (4,)}, "windows"),
    ):
        with pytest.raises(InputError, match=says):
            kv.CacheShape(**{**sizes, **change})
    with pytest.raises(InputError, match="at least 1"):
        kv.build("float16", SHAPE, Arena(1 << 20, Ledger()), 0)

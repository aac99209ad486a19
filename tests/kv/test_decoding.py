"""Tokens of several caches that are taken in together: what each finds and holds is as if it were alone, to the bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from memwall import kernels, kv
from memwall.errors import BudgetExceeded, DoesNotFit
from memwall.kv.decoding import Decoding, OneByOne, PartsDecoding
from memwall.kv.lambda_decoding import LambdaDecoding
from memwall.memory import Arena, Ledger
from memwall.memory.pages import PAGE_BYTES
from tests.kv.latent_models import loaded, project
from tests.kv.test_cskv import fit

MODEL = loaded("llama", num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32, hidden_size=128)
SHAPE = MODEL.shape
WINDOWED = replace(SHAPE, windows=(None, 20))
CAPACITY = 400
PROMPTS = (0, 1, 61, 200, 64, 17, 130, 31, 0, 95, 127, 128, 129, 2, 300, 33, 70, 260)
TOGETHER = (
    "float32", "float16", "bfloat16", "int8", "kivi(2bit)", "kivi(4bit,queries=int8,residual=32)",
    "kivi(bits=3,group=16,residual=0,exact=bfloat16)", "kivi(8bit,key_group=64,residual=64)", "kv4", "kv4(page=16)",
    "bfp(order=plain)", "bfp(bits=6,values=3,order=sorted,residual=20)",
    "bfp(8bit,block=16,axis=tokens,order=plain,top=raise,exact=float32)",
)  # fmt: skip
OTHERS = (
    "int4", "snapkv(0.25)", "snapkv(tokens=20,window=8)+kivi(4bit,residual=32)",
    "think(0.4,recent=5)", "snapkv(0.5)+think(0.4)+kivi(2bit,residual=32)", "xquant", "xquant(3bit,cl=1,base=1)",
    "lambda(sinks=4,window=40)", "lambda(sinks=3,window=50,positions=clip)+kivi(4bit,group=16,residual=16)",
    "epicache(tokens=40,chunk=32)", "think(0.4)+bfloat16", "snapkv(0.5)+think(0.3,window=8,recent=9)",
    "xquant(keep=inputs)", "xquant(8bit,group=32)", "xquant(2bit,cl=1,base=1,keep=inputs)",
    "cskv(0.5,bits=4,init=svd,train=0,window=16)",
    "cskv(0.4,init=svd,train=0,sliding=1,window=20)", "cskv(1.0,init=svd,train=0,window=0,bits=2)",
)  # fmt: skip


def feed(cache: kv.KVCache, rng: np.random.Generator, count: int) -> np.ndarray:
    """One pass of so many tokens of one cache; the last layer's outputs."""
    first = cache.length
    q, x = (rng.standard_normal((count, *sizes)).astype(np.float32) for sizes in ((4, 32), (128,)))
    positions, out = np.arange(first, first + count), np.empty_like(q)
    for layer in range(SHAPE.num_layers):
        k, v = project(MODEL, layer, x, first)
        if cache.takes_inputs:
            cache.take_inputs(layer, x, positions)
        cache.append(layer, k, v, positions)
        cache.attend(layer, q, positions, out)
        cache.settle(layer)
    return out


def caches_of(policy: str, prompts: tuple[int, ...] = PROMPTS, shape: kv.CacheShape = SHAPE) -> list[kv.KVCache]:
    """Caches that have read prompts of these lengths."""
    found = []
    for seed, length in enumerate(prompts):
        cache = kv.build(policy, shape, Arena(1 << 24, Ledger()), CAPACITY, MODEL.model)
        rng = np.random.default_rng(seed)
        for size in cache.begin_prompt(length, CAPACITY) if length else ():
            feed(cache, rng, size)
        found.append(cache)
    return found


def step(together: Decoding, seed: int, *, cut: int = 0) -> list[np.ndarray]:
    """A token for each; the layers' outputs. cut: the queries come in two blocks."""
    rng, count = np.random.default_rng(seed), len(together.caches)
    takes = together.caches[0].takes_inputs
    firsts = [cache.length for cache in together.caches]
    together.begin()
    outs = []
    for layer in range(SHAPE.num_layers):
        q = rng.standard_normal((count, 4, 32)).astype(np.float32)
        x = rng.standard_normal((count, 128)).astype(np.float32)
        rows = [project(MODEL, layer, x[i : i + 1], first) for i, first in enumerate(firsts)]
        k, v = (np.concatenate(part) for part in zip(*rows))
        out = np.empty_like(q)
        blocks = [slice(0, cut), slice(cut, count)] if cut else [slice(0, count)]
        for rows_ in blocks if takes else ():
            together.take_inputs(layer, x[rows_], rows_.start)
        together.append(layer, k, v)
        for rows_ in blocks:
            together.attend(layer, q[rows_], out[rows_], rows_.start)
        together.settle(layer)
        outs.append(out)
    return outs


def check_equal(one: kv.KVCache, other: kv.KVCache) -> None:
    assert one.length == other.length
    assert one.nbytes == other.nbytes
    if one.saves:
        (arrays, facts), (wanted, wanted_facts) = one.dump(), other.dump()
        assert facts == wanted_facts
        assert {name: array.tobytes() for name, array in arrays.items()} == {
            name: array.tobytes() for name, array in wanted.items()
        }


def check_steps(caches: list[kv.KVCache], steps: int, seed: int = 0) -> Decoding:
    """Some steps of caches together, and of their twins one by one."""
    twins = OneByOne([cache.fork() for cache in caches])
    together = type(caches[0]).decode_together(caches)
    for at in range(steps):
        if not together.stands():
            together = type(caches[0]).decode_together(caches)
        cut = 5 if at % 3 == 1 and len(caches) > 5 else 0
        for mine, its in zip(step(together, seed + at, cut=cut), step(twins, seed + at)):
            np.testing.assert_array_equal(mine, its)
    for cache, twin in zip(caches, twins.caches):
        check_equal(cache, twin)
        twin.release()
    return together


@pytest.mark.parametrize("policy", TOGETHER)
def test_together_as_one_by_one(policy: str) -> None:
    """Far enough for groups of keys to fill, values to leave their window, and their rows to go back to the front."""
    caches = caches_of(policy)
    together = check_steps(caches, 40)
    assert isinstance(together, PartsDecoding)
    for cache in caches:
        cache.truncate(max(cache.length - 7, 0))
    check_steps(caches[3:9], 20, seed=100)
    check_steps(caches[5:6], 3, seed=200)
    for cache in caches:
        assert np.isfinite(feed(cache, np.random.default_rng(1), 9)).all()
        cache.release()


@pytest.mark.parametrize("policy", OTHERS)
def test_policies_of_every_kind(policy: str) -> None:
    if policy.startswith("cskv"):
        fit(MODEL, policy)
    caches = caches_of(policy, (0, 1, 130, 61, 200, 90, 33))
    check_steps(caches, 12)
    check_steps(caches[2:4], 25, seed=50)
    for cache in caches:
        cache.release()


@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("positions", ["cache", "clip"])
@pytest.mark.parametrize(
    "store", ["bfloat16", "kivi(4bit,group=16,residual=16)", "kivi(2bit,residual=32,queries=int8)"]
)
def test_rings_go_round_and_change_frames(store: str, positions: str, sinks: int) -> None:
    caches = caches_of(f"lambda(sinks={sinks},window=50,positions={positions})+{store}", (5, 49, 130, 200, 77))
    together = check_steps(caches, 110)
    assert isinstance(together, LambdaDecoding)
    assert together.stands()


@pytest.mark.parametrize("policy", ["bfloat16", "kivi(2bit,residual=32)", "xquant(8bit)", "think(0.4,recent=5)"])
def test_windows_of_layers(policy: str) -> None:
    caches = caches_of(policy, (0, 15, 130, 61), WINDOWED)
    check_steps(caches, 30)


@pytest.mark.parametrize("policy", ["float16", "kivi(4bit)", "xquant(4bit)", "think(0.4)"])
def test_threads_change_nothing(policy: str) -> None:
    before, found = kernels.num_threads(), []
    try:
        for threads in (1, 2, 3):
            kernels.set_num_threads(threads)
            caches = caches_of(policy)[:8]
            decoding = type(caches[0]).decode_together(caches)
            found.append(np.stack([step(decoding, at)[-1] for at in range(4)]))
    finally:
        kernels.set_num_threads(before)
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_pruned_caches_hand_on_to_those_inside() -> None:
    caches = caches_of("snapkv(0.25)+kivi(4bit,residual=32)", (90, 130))
    together = check_steps(caches, 3)
    assert isinstance(together._inner, PartsDecoding)  # type: ignore[attr-defined]
    assert together.stands()
    caches[0].truncate(0)
    assert not together.stands(), "a prompt would be pruned again"


def test_a_step_that_does_not_fit_changes_nothing() -> None:
    arena = Arena(1 << 17, Ledger())
    caches = [kv.build("float16", SHAPE, arena, CAPACITY) for _ in range(3)]
    together = type(caches[0]).decode_together(caches)
    while arena.free_bytes >= 3 * SHAPE.num_layers * 2 * PAGE_BYTES or caches[0].length % 32:
        step(together, 0)
    with pytest.raises(BudgetExceeded):
        step(together, 0)
    length = caches[2].length
    assert 0 < length < CAPACITY
    assert {cache.length for cache in caches} == {length}
    caches.pop().release()
    step(type(caches[0]).decode_together(caches), 0)
    assert {cache.length for cache in caches} == {length + 1}
    for policy in ("float16", "kivi(2bit)"):
        short = kv.build(policy, SHAPE, Arena(1 << 20, Ledger()), 3)
        feed(short, np.random.default_rng(0), 3)
        with pytest.raises(DoesNotFit, match="context holds 3"):
            type(short).decode_together([short]).begin()

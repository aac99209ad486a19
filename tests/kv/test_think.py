"""ThinK against dense references: which channels stay, what later tokens then see, and what is really held."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from memwall import kv
from memwall.errors import InputError
from memwall.kernels import attention, attention_reference
from memwall.kv.narrow_store import NarrowFloat, narrow_rows
from memwall.kv.think import ThinkCache, ThinkSettings
from memwall.memory import Arena, Ledger

HEADS, KV_HEADS, DIM = 4, 2, 32
SHAPE = kv.CacheShape(num_layers=2, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM)


def numbers(seed: int, num_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q, k, v of two layers, exact in half precision; channels of very unequal size, others in queries than in keys."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((2, num_tokens, heads, DIM)) for heads in (HEADS, KV_HEADS, KV_HEADS))
    q *= np.exp(rng.standard_normal((2, 1, HEADS, DIM)))
    k *= np.exp(rng.standard_normal((2, 1, KV_HEADS, DIM)))
    return tuple(x.astype(np.float16).astype(np.float32) for x in (q, k, v))


def run(cache: kv.KVCache, rows: tuple[np.ndarray, ...], begin: int, end: int) -> np.ndarray:
    out, positions = np.empty_like(rows[0][:, begin:end]), np.arange(begin, end)
    for layer in range(2):
        q, k, v = (x[layer, begin:end] for x in rows)
        cache.append(layer, k, v, positions)
        for block in range(0, end - begin, 50):
            part = slice(block, min(block + 50, end - begin))
            cache.attend(layer, q[part], positions[part], out[layer, part])
        cache.settle(layer)
    return out


def cache_of(policy: str, capacity: int = 400, ledger: Ledger | None = None) -> ThinkCache:
    cache = kv.build(policy, SHAPE, Arena(1 << 25, ledger or Ledger()), capacity)
    assert isinstance(cache, ThinkCache)
    return cache


def slow_channels(q: np.ndarray, k: np.ndarray, num_dropped: int, window: int = 32) -> np.ndarray:
    """[Hkv, n]: the norm of each channel's own share of the logits, outer product and all."""
    rep = HEADS // KV_HEADS
    kept = []
    for head in range(KV_HEADS):
        parts = [
            sum(
                np.linalg.norm(np.outer(q[-window:, head * rep + r, j], k[:, head, j]).astype(np.float64)) ** 2
                for r in range(rep)
            )
            for j in range(DIM)
        ]
        kept.append(np.sort(np.argsort(parts)[num_dropped:]))
    return np.array(kept)


def without(k: np.ndarray, channels: np.ndarray, count: int) -> np.ndarray:
    """Keys whose first `count` rows have zeros where channels were dropped."""
    k = k.copy()
    for head, own in enumerate(channels):
        k[:count, head, np.setdiff1d(np.arange(DIM), own)] = 0
    return k


def dense(q: np.ndarray, k: np.ndarray, v: np.ndarray, first: int) -> np.ndarray:
    there = (torch.from_numpy(x) for x in (q, k, v))
    return attention_reference.attend(*there, scale=DIM**-0.5, first_position=first)[0].numpy()


@pytest.mark.parametrize(("share", "recent", "window"), [(0.4, 32, 32), (0.6, 5, 8), (0.1, 1, 32)])
def test_channels_and_outputs_are_those_of_the_dense_reference(share: float, recent: int, window: int) -> None:
    rows, length = numbers(0, 160), 150
    cache = cache_of(f"think({share},recent={recent},window={window})+float32")
    np.testing.assert_allclose(run(cache, rows, 0, length)[0], dense(*(x[0, :length] for x in rows), 0), atol=2e-5)
    store = cache.store
    assert isinstance(store, NarrowFloat)
    kept = []
    for layer in range(2):
        q, k, _ = (x[layer, :length] for x in rows)
        channels = slow_channels(q, k, int(share * DIM), window)
        np.testing.assert_array_equal(cache.channels[layer], channels)
        compact = store._compact[layer].rows(0, length - recent)
        assert compact.shape == (length - recent, KV_HEADS, DIM - int(share * DIM))
        np.testing.assert_array_equal(compact, narrow_rows(k[: length - recent], channels))
        np.testing.assert_array_equal(store._keys[layer].rows(0, recent), k[length - recent :])
        kept.append(channels)
    assert len({channels.tobytes() for both in kept for channels in both}) == 4  # heads and layers choose alone
    for begin, end in [(150, 151), (151, 158), (158, 160)]:
        found = run(cache, rows, begin, end)
        for layer in range(2):
            q, k, v = (x[layer, :end] for x in rows)
            want = dense(q[begin:], without(k, kept[layer], length - recent), v, begin)
            np.testing.assert_allclose(found[layer], want, atol=3e-5)


def test_integers_meet_narrow_codes() -> None:
    rows, outs = numbers(3, 300), []
    for queries in ("", ",queries=int8"):
        cache = cache_of(f"think(0.4)+kivi(4bit,residual=32{queries})")
        outs.append(
            np.concatenate([run(cache, rows, 0, 250), *(run(cache, rows, i, i + 1) for i in range(250, 300))], 1)
        )
    error = np.linalg.norm(outs[1] - outs[0], axis=(2, 3)) / np.linalg.norm(outs[0], axis=(2, 3))
    assert not error[:, :250].any()
    assert 1e-4 < error[:, 250:].mean() < 0.1


def test_the_queries_choose() -> None:
    """The same keys met by other queries lose other channels; a large channel that no query meets goes."""
    q, k, v = numbers(1, 100)
    k[..., 3] *= 50
    q[:, -32:, :, 3] = 1e-6
    one, other = cache_of("think"), cache_of("think")
    run(one, (q, k, v), 0, 100)
    run(other, (np.roll(q, 7, axis=-1), k, v), 0, 100)
    assert 3 not in one.channels
    assert (other.channels != one.channels).any()
    early = q.copy()
    early[:, :60] *= 100  # queries before the window have no say
    third = cache_of("think")
    run(third, (early, k, v), 0, 100)
    np.testing.assert_array_equal(third.channels, one.channels)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_channels_that_are_zero_leave_logits_bit_for_bit_the_same(dtype: type) -> None:
    """Small whole numbers, whose sums no order of adding can change, and a scale that is a power of two."""
    dim, width = 64, 39
    rng = np.random.default_rng(2)
    q = rng.integers(-8, 9, (1, HEADS, dim)).astype(np.float32)
    k = rng.integers(-8, 9, (40, KV_HEADS, dim)).astype(dtype)
    channels = np.stack([np.sort(rng.choice(dim, width, replace=False)) for _ in range(KV_HEADS)])
    for head, own in enumerate(channels):
        k[:, head, np.setdiff1d(np.arange(dim), own)] = 0
    v, narrow = rng.standard_normal((40, KV_HEADS, dim)).astype(dtype), narrow_rows(k, channels)
    short = np.ascontiguousarray(q[:, np.arange(HEADS)[:, None], np.repeat(channels, HEADS // KV_HEADS, axis=0)])
    scale = dim**-0.5  # of the original width

    def logits(q: np.ndarray, k: np.ndarray) -> np.ndarray:
        found = np.empty((len(k), HEADS), np.float32)
        for place in range(len(k)):
            out, stats = np.empty((1, HEADS, dim), np.float32), np.empty((1, HEADS, 2), np.float32)
            alone = slice(place, place + 1)
            attention.attend_float(q, k[alone], v[alone], scale=scale, first_position=0, out=out, stats=stats)
            found[place] = stats[0, :, 0]
        return found

    np.testing.assert_array_equal(logits(short, narrow), logits(q, k))
    outs = [np.empty((1, HEADS, dim), np.float32) for _ in range(2)]
    attention.attend_float(short, narrow, v, scale=scale, first_position=39, out=outs[0])
    attention.attend_float(q, k, v, scale=scale, first_position=39, out=outs[1])
    np.testing.assert_array_equal(*outs)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 34, 65])
def test_short_prompts_are_kept_whole(length: int) -> None:
    rows, ledger = numbers(3, 90), Ledger()
    cache, full = cache_of("think", ledger=ledger), kv.build("float16", SHAPE, Arena(1 << 24, Ledger()), 400)
    pruned = length > 32
    for begin, end in [(0, length), (length, length + 1), (length + 1, 90)]:
        found, want = run(cache, rows, begin, end), run(full, rows, begin, end)
        if not pruned:
            np.testing.assert_array_equal(found, want)
    assert cache.store._narrow == [length - 32 if pruned else 0] * 2
    assert {row.owner: row.nbytes for row in ledger.rows()} == {
        owner: n for owner, n in kv.predict("think", SHAPE, 90, length, 400).items() if n
    }


def test_a_share_of_nothing_is_the_full_cache() -> None:
    rows, full = numbers(4, 120), kv.build("float16", SHAPE, Arena(1 << 24, Ledger()), 400)
    cache = cache_of("think(0)")
    for begin, end in [(0, 100), (100, 101), (101, 120)]:
        np.testing.assert_array_equal(run(cache, rows, begin, end), run(full, rows, begin, end))


def test_bytes_of_a_long_prompt() -> None:
    shape = kv.CacheShape(num_layers=4, num_heads=8, num_kv_heads=8, head_dim=128)
    thin, full = (sum(kv.predict(p, shape, 16384, 16384).values()) for p in ("think(0.4)", "float16"))
    assert thin / full == pytest.approx(1 - 51 / 128 / 2, abs=0.002)
    for bits in (2, 4):
        store = f"kivi({bits}bit)"
        thin, coded = (kv.predict(p, shape, 16384, 16384)["kv/coded"] for p in (f"think(0.4)+{store}", store))
        values = 16384 - 128
        keys = 16384 * 77 / 128
        # codes of 77 channels take whole words of 32 bits: as much as 80
        assert thin / coded == pytest.approx((keys + values) / (16384 + values), abs=0.01)


def round_trip(x: np.ndarray, bits: int, group: int, *, along_tokens: bool) -> np.ndarray:
    return attention_reference.kivi_round_trip(torch.from_numpy(x), bits, group, along_tokens=along_tokens).numpy()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_kivi_codes_the_channels_that_are_left(bits: int) -> None:
    """Pruned first, then coded per channel; blocks that leave the residual later keep the same channels."""
    rows, length, last = numbers(5, 150), 100, 150
    cache = cache_of(f"think(0.4)+kivi(bits={bits},group=16,residual=32)")
    run(cache, rows, 0, length)
    channels = cache.channels.copy()
    bare = cache_of(f"think(0.4)+kivi(bits={bits},group=16,residual=0)")
    run(bare, rows, 0, length)  # values are coded at once, keys wait for their group
    for begin in range(length, last):
        found, more = run(cache, rows, begin, begin + 1), run(bare, rows, begin, begin + 1)
    np.testing.assert_array_equal(cache.channels, channels)
    state = cache.store._layers[0]
    assert (state.coded_keys, state.coded_values) == (128, 149 - 31)
    for layer in range(2):
        q, k, v = (x[layer] for x in rows)
        np.testing.assert_array_equal(channels[layer], slow_channels(q[:length], k[:length], 12))
        past = without(k, channels[layer], 128)
        past[:128] = round_trip(past[:128], bits, 16, along_tokens=True)
        seen = v.copy()
        seen[:117] = round_trip(v[:117], bits, 16, along_tokens=False)
        np.testing.assert_allclose(found[layer], dense(q[149:], past, seen, 149), atol=1e-4)
        past = without(k, channels[layer], 144)
        past[:144] = round_trip(past[:144], bits, 16, along_tokens=True)
        seen = np.concatenate([round_trip(v[:149], bits, 16, along_tokens=False), v[149:]])
        np.testing.assert_allclose(more[layer], dense(q[149:], past, seen, 149), atol=1e-4)


def test_over_kivi_a_prompt_inside_the_residual_is_not_pruned() -> None:
    rows = numbers(6, 200)
    cache, plain = cache_of("think(0.4)+kivi(4bit)"), kv.build("kivi(4bit)", SHAPE, Arena(1 << 24, Ledger()), 400)
    for begin, end in [(0, 127), (127, 128), (128, 200)]:
        np.testing.assert_array_equal(run(cache, rows, begin, end), run(plain, rows, begin, end))


@pytest.mark.parametrize("store", ["float16", "kivi(8bit,group=16,residual=32)"])
def test_going_back_among_narrow_rows(store: str) -> None:
    rows = numbers(7, 200)
    for length in (0, 20, 90, 118, 119, 150):
        cache = cache_of(f"think+{store}")
        run(cache, rows, 0, 150)
        channels = cache.channels.copy()
        cache.truncate(length)
        found = run(cache, rows, length, length + 2)
        if length:
            narrow = min(118 if store == "float16" else 128, length)
            for layer in range(2):
                q, k, v = (x[layer, : length + 2] for x in rows)
                want = dense(q[length:], without(k, channels[layer], narrow), v, length)
                np.testing.assert_allclose(found[layer], want, atol=0.05)


def test_a_prompt_in_segments_is_pruned_as_a_whole() -> None:
    rows = numbers(8, 170)
    whole, pieces = cache_of("think+float32"), cache_of("think+float32")
    run(whole, rows, 0, 150)
    assert pieces.begin_prompt(150, 70) == [70, 70, 10]
    run(pieces, rows, 0, 70)
    branch = pieces.fork()
    for cache in (pieces, branch):
        run(cache, rows, 70, 140)
        run(cache, rows, 140, 150)
        np.testing.assert_array_equal(cache.channels, whole.channels)
        assert cache.nbytes == whole.nbytes
    np.testing.assert_allclose(run(pieces, rows, 150, 160), run(whole, rows, 150, 160), atol=1e-6)
    np.testing.assert_array_equal(run(pieces, rows, 160, 170), run(whole, rows, 160, 170))


def test_under_an_evictor_it_scores_the_kept_keys() -> None:
    rows = numbers(9, 300)
    both, snap = (
        kv.build(policy, SHAPE, Arena(1 << 25, Ledger()), 400)
        for policy in ("snapkv(0.5)+think(0.4)+float32", "snapkv(0.5)+float32")
    )
    for cache in (both, snap):
        run(cache, rows, 0, 300)
    count = snap.inner.length
    for layer in range(2):
        kept = snap.inner._keys[layer].rows(0, count)
        channels = slow_channels(rows[0][layer], kept, 12)
        np.testing.assert_array_equal(both.inner.channels[layer], channels)
        compact = both.inner.store._compact[layer].rows(0, count - 32)
        np.testing.assert_array_equal(compact, narrow_rows(kept[: count - 32], channels))


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ("think(1)", "must be below 1"),
        ("think(0.4,recent=0)", "at least 1"),
        ("think(0.4,depth=1)", "unknown setting"),
        ("think(0.4,recent=16)+kivi", "residual"),
    ],
)
def test_bad_settings_are_named(policy: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        cache_of(policy)


def test_widths_are_the_papers() -> None:
    for dim, share, width in ((128, 0.4, 77), (64, 0.4, 39), (32, 0.4, 20), (10, 0.3, 7), (80, 0.6, 32)):
        assert ThinkSettings.from_policy(kv.resolve(f"think({share})"), dim).width == width

"""SnapKV against a dense reference of its steps: what it keeps, and what later tokens then see."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from memwall import kv
from memwall.errors import InputError
from memwall.kv import evict
from memwall.kv.policy import parse
from memwall.kv.snapkv import SnapCache, SnapSettings
from memwall.memory import Arena, Ledger

HEADS, KV_HEADS, DIM = 4, 2, 32
SHAPE = kv.CacheShape(num_layers=2, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM)


def numbers(seed: int, num_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    rows = (rng.standard_normal((2, num_tokens, heads, DIM)) for heads in (HEADS, KV_HEADS, KV_HEADS))
    return tuple(x.astype(np.float16).astype(np.float32) for x in rows)


def run(cache: kv.KVCache, rows: tuple[np.ndarray, ...], begin: int, end: int) -> np.ndarray:
    """Outputs of both layers; queries come in blocks of at most 50, as a decoder's do."""
    out, positions = np.empty_like(rows[0][:, begin:end]), np.arange(begin, end)
    for layer in range(2):
        q, k, v = (x[layer, begin:end] for x in rows)
        cache.append(layer, k, v, positions)
        for block in range(0, end - begin, 50):
            part = slice(block, min(block + 50, end - begin))
            cache.attend(layer, q[part], positions[part], out[layer, part])
        cache.settle(layer)
    return out


def cache_of(policy: str, capacity: int = 400, ledger: Ledger | None = None) -> kv.KVCache:
    return kv.build(policy, SHAPE, Arena(1 << 25, ledger or Ledger()), capacity)


def slow_votes(q: np.ndarray, k: np.ndarray, settings: SnapSettings) -> torch.Tensor:
    """[Hkv, T - w]: steps 1 to 5 with a dense matrix, in torch."""
    length, w = len(k), settings.window
    keys = torch.from_numpy(k).repeat_interleave(HEADS // KV_HEADS, 1)
    logits = torch.einsum("whd,thd->hwt", torch.from_numpy(q[-w:]), keys) / DIM**0.5
    logits += torch.triu(torch.full((w, length), -torch.inf), length - w + 1)
    votes = logits.softmax(-1).sum(1)[:, : length - w].view(KV_HEADS, -1, length - w).sum(1)
    pool = {"avg": torch.nn.functional.avg_pool1d, "max": torch.nn.functional.max_pool1d}[settings.pool]
    return pool(votes[None], settings.kernel, 1, settings.kernel // 2)[0]


def places_in(kept: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Which of the rows these are."""
    return np.array([int(np.flatnonzero((rows == row).all(-1))[0]) for row in kept])


@pytest.mark.parametrize(
    "policy", ["snapkv(0.25)", "snapkv(tokens=100,window=16,kernel=7,pool=max)", "snapkv(0.1,kernel=1)"]
)
def test_kept_rows_are_those_of_the_dense_reference(policy: str) -> None:
    rows = numbers(0, 330)
    cache = cache_of(f"{policy}+float32")
    run(cache, rows, 0, 330)
    assert isinstance(cache, SnapCache)
    count = cache.settings.kept(330)
    for layer in range(2):
        q, k, v = (x[layer] for x in rows)
        votes, window = slow_votes(q, k, cache.settings), cache.settings.window
        best = votes.topk(count - window).values
        keys, values = cache.inner._keys[layer].rows(0, count), cache.inner._values[layer].rows(0, count)
        chosen = []
        for head in range(KV_HEADS):
            places = places_in(keys[:, head], k[:, head])
            chosen.append(places)
            np.testing.assert_array_equal(places[-window:], np.arange(330 - window, 330))
            assert (np.diff(places) > 0).all()
            # maxima pooled over neighbours are often equal: any of them will do
            np.testing.assert_allclose(
                np.sort(votes[head].numpy()[places[:-window]]), best[head].numpy()[::-1], rtol=1e-4
            )
            np.testing.assert_array_equal(values[:, head], v[places, head])
        assert not np.array_equal(*chosen)  # heads choose for themselves
    assert cache.inner.length == count
    assert cache.length == cache.next_position == 330


@pytest.mark.parametrize("policy", ["snapkv(1)", "snapkv(tokens=330)", "snapkv"])
def test_where_all_fits_nothing_changes(policy: str) -> None:
    rows, full = numbers(1, 340), cache_of("float16")
    cache = cache_of(policy)
    for begin, end in [(0, 330), (330, 331), (331, 340)]:
        np.testing.assert_array_equal(run(cache, rows, begin, end), run(full, rows, begin, end))
    assert cache.nbytes == full.nbytes


def test_dropping_what_nobody_looks_at_changes_nothing() -> None:
    """Tokens in the middle lie so far from all queries that their weight is zero in float32."""
    q, k, v = numbers(2, 300)
    q[..., 0], k[..., 0] = 8, 8
    k[:, 40:200, :, 0] = -200
    q, k = (x.astype(np.float16).astype(np.float32) for x in (q, k))
    full, cache = cache_of("float16"), cache_of("snapkv(tokens=140,kernel=1)")
    for begin, end in [(0, 299), (299, 300)]:
        want, found = run(full, (q, k, v), begin, end), run(cache, (q, k, v), begin, end)
        np.testing.assert_allclose(found, want, atol=1e-6)
    assert cache.inner.length == 141


def test_each_head_keeps_its_own_needle() -> None:
    q, k, v = numbers(3, 300)
    needles = {(layer, head): 20 + 100 * head + 37 * layer for layer in range(2) for head in range(KV_HEADS)}
    for (layer, head), place in needles.items():
        k[layer, place, head] = 4 * np.sign(np.sin(np.arange(DIM) * (1 + head)))
        q[layer, -32:, 2 * head : 2 * head + 2] = k[layer, place, head] / 2
    cache = cache_of("snapkv(tokens=37)+float32")
    run(cache, (q, k, v), 0, 300)
    for (layer, head), place in needles.items():
        kept = cache.inner._keys[layer].rows(0, 37)
        for near in range(place - 2, place + 3):  # pooling brings the neighbours along
            assert (kept[:, head] == k[layer, near, head]).all(-1).any()
        other = kept[:, 1 - head]
        assert not (other == k[layer, place, 1 - head]).all(-1).any()


def test_bytes_really_go_and_staging_too() -> None:
    ledger = Ledger()
    cache = cache_of("snapkv(0.1)", ledger=ledger)
    run(cache, numbers(4, 400), 0, 390)
    count = int(0.1 * (390 - 32)) + 32
    assert {row.owner: row.nbytes for row in ledger.rows()} == kv.predict("float16", SHAPE, count)
    # the highest point holds the last layer's selection besides, and no layer's whole prompt
    selection = evict.array_bytes(4 * (32 * HEADS * (DIM + 2) + 2 * count * KV_HEADS * DIM))
    assert cache.arena.peak_bytes == cache.nbytes + selection
    assert kv.predict("snapkv(0.1)", SHAPE, 390, 390, 400)["kv/staging"] == selection


def test_later_prompts_are_kept_whole_and_the_pruned_one_is_not_entered() -> None:
    rows = numbers(5, 400)
    cache = cache_of("snapkv(0.25)")
    run(cache, rows, 0, 200)
    held = cache.inner.length
    run(cache, rows, 200, 350)
    assert cache.inner.length == held + 150
    assert (cache.rewindable(199), cache.rewindable(200), cache.rewindable(340)) == (0, 200, 340)
    with pytest.raises(ValueError, match="pruned together"):
        cache.truncate(199)
    cache.truncate(200)
    assert (cache.length, cache.inner.length) == (200, held)
    cache.truncate(0)
    alone = cache_of("snapkv(0.25)")
    np.testing.assert_array_equal(run(cache, rows, 0, 300), run(alone, rows, 0, 300))


def test_the_prompt_itself_attends_to_all_of_itself() -> None:
    rows = numbers(6, 300)
    exact = run(cache_of("float32"), rows, 0, 300)
    np.testing.assert_allclose(run(cache_of("snapkv(0.1)+kivi(2bit)"), rows, 0, 300), exact, atol=1e-6)


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ("snapkv(0)", "above 0 and at most 1"),
        ("snapkv(1.5)", "above 0 and at most 1"),
        ("snapkv(tokens=0)", "no more than the window of 32"),
        ("snapkv(0.5,tokens=100)", "give one"),
        ("snapkv(0.5,kernel=4)", "try 5"),
        ("snapkv(0.5,window=0)", "at least 1"),
        ("snapkv(0.5,pool=sum)", "avg, max"),
        ("snapkv(0.5,depth=3)", "unknown setting"),
    ],
)
def test_bad_settings_are_named(policy: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        cache_of(policy)


def test_settings() -> None:
    default = SnapSettings.from_policy(parse("snapkv"))
    assert (default.tokens, default.window, default.kernel, default.pool) == (2048, 32, 5, "avg")
    half = SnapSettings.from_policy(parse("snapkv(.5,window=16)"))
    assert [half.kept(n) for n in (1, 16, 17, 18, 117)] == [1, 16, 16, 17, 66]
    assert str(half) == "snapkv(0.5,window=16)"

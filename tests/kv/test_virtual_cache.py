"""One sequence in the virtual store: as the float16 cache bit for bit, exact bytes, forks in shared pages."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from memwall import kv
from memwall.errors import BudgetExceeded, DoesNotFit, InputError
from memwall.memory import Arena, Ledger

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memfd is Linux's")
# a row has 2 * 20 numbers: 80 bytes, so that a token may lie across two pages
SHAPE = kv.CacheShape(num_layers=2, num_heads=6, num_kv_heads=2, head_dim=20, windows=(None, 9))


def feed(cache: kv.KVCache, seed: int, first: int, *counts: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    outs = []
    for count in counts:
        q, k, v = (rng.standard_normal((count, heads, 20), np.float32) for heads in (6, 2, 2))
        positions, out = np.arange(first, first + count), np.empty_like(q)
        for layer in range(2):
            cache.append(layer, k, v, positions)
            cache.attend(layer, q, positions, out)
            cache.settle(layer)
            outs.append(out.copy())
        first += count
    return np.concatenate(outs)


@pytest.mark.parametrize(
    ("policy", "plain"),
    [
        ("vattention(page_kib=4)", "float16"),
        ("vattention(bits=32)", "float32"),
        ("vattention(page_kib=4,megacache=1)", "float16"),
        ("vattention(page_kib=8,bits=32,megacache=1)", "float32"),
    ],
)
def test_is_the_float_cache_bit_for_bit(policy: str, plain: str) -> None:
    counts = (60, 1, 1, 1, 300, *[1] * 60)
    outs = [feed(kv.build(name, SHAPE, Arena(1 << 26, Ledger()), 500), 0, 0, *counts) for name in (policy, plain)]
    np.testing.assert_array_equal(*outs)


@pytest.mark.parametrize("ahead", [0, 1, 60, 500])
def test_the_ledger_holds_the_mapped_pages_at_every_length(ahead: int) -> None:
    ledger, policy = Ledger(), f"vattention(page_kib=4,ahead={ahead})"
    cache = kv.build(policy, SHAPE, Arena(1 << 26, ledger), 300)
    assert ledger.total() == 0
    for first, count in [(0, 49), *((i, 1) for i in range(49, 56)), (56, 150)]:
        feed(cache, first, first, count)
        held = first + count
        pages = -(-min(held + ahead, 300) * 80 // 4096)  # keys or values of one layer
        assert ledger.total() == cache.nbytes == 4 * pages * 4096
        assert kv.predict(policy, SHAPE, held, 0, 300) == {"kv/mapped": ledger.total()}
    cache.truncate(51)
    assert ledger.total() == kv.predict(policy, SHAPE, 51, 0, 300)["kv/mapped"]
    cache.truncate(0)
    assert ledger.total() == 0
    feed(cache, 0, 0, 10)
    cache.release()
    cache.release()
    assert ledger.total() == 0


def test_one_page_for_all_layers() -> None:
    """Keys of both layers lie in one array, and values in another: 25.6 tokens a page."""
    ledger, policy = Ledger(), "vattention(page_kib=4,ahead=0,megacache=1)"
    cache = kv.build(policy, SHAPE, Arena(1 << 26, ledger), 300)
    for first, count in [(0, 25), (25, 1), (26, 200)]:
        feed(cache, first, first, count)
        pages = -(-(first + count) * 160 // 4096)
        assert ledger.total() == cache.nbytes == 2 * pages * 4096
        assert kv.predict(policy, SHAPE, first + count, 0, 300) == {"kv/mapped": ledger.total()}
    assert kv.read_bytes(policy, SHAPE, 100) == kv.read_bytes("vattention", SHAPE, 100)
    fork, alone = cache.fork(), kv.build("float16", SHAPE, Arena(1 << 26, Ledger()), 300)
    for seed, first, count in ((0, 0, 25), (25, 25, 1), (26, 26, 200)):
        feed(alone, seed, first, count)
    np.testing.assert_array_equal(feed(fork, 5, 226, 3), feed(alone, 5, 226, 3))
    cache.release()
    fork.release()
    assert ledger.total() == 0


def test_forks_share_whole_pages_and_write_into_their_own() -> None:
    ledger = Ledger()
    caches = [kv.build("vattention(page_kib=4,ahead=0)", SHAPE, Arena(1 << 26, ledger), 400)]
    alone = [kv.build("float16", SHAPE, Arena(1 << 26, Ledger()), 400) for _ in range(3)]
    for cache in (*caches, *alone):
        feed(cache, 1, 0, 200)
    page = 4 * 4096
    assert ledger.total() == 4 * page
    caches += [caches[0].fork() for _ in range(2)]
    # each has its own fourth page, and a third one, as a token lies across their border
    assert ledger.total() == (4 + 2 + 2) * page
    assert sum(cache.nbytes for cache in caches) == pytest.approx(ledger.total(), abs=12)
    for lengths in ((200, 200, 200), (120, 201, 60)):  # then two go back into pages that others see
        for index, (cache, plain, length) in enumerate(zip(caches, alone, lengths)):
            cache.truncate(length)
            plain.truncate(length)
            np.testing.assert_array_equal(feed(cache, 7 + index, length, 1, 9), feed(plain, 7 + index, length, 1, 9))
    for cache, plain in zip(caches, alone):
        length = cache.length
        np.testing.assert_array_equal(feed(cache, 3, length, 1), feed(plain, 3, length, 1))
        cache.release()
    assert ledger.total() == 0


def test_a_fork_is_refused_when_no_slot_or_memory_is_left() -> None:
    cache = kv.build("vattention(page_kib=4,ahead=0)", SHAPE, Arena(1 << 26, Ledger()), 100)
    feed(cache, 0, 0, 30)
    forks = [cache.fork() for _ in range(63)]
    with pytest.raises(DoesNotFit, match="64"):
        cache.fork()
    forks.pop().release()
    cache.arena.set_cap(cache.arena.used_bytes)
    with pytest.raises(BudgetExceeded):
        cache.fork()
    assert all(fork.length == 30 for fork in forks)


def test_a_very_long_context_only_takes_addresses() -> None:
    shape = kv.CacheShape(num_layers=80, num_heads=64, num_kv_heads=8, head_dim=128)
    ledger = Ledger()
    cache = kv.build("vattention(page_kib=2048)", shape, Arena(1 << 20, ledger), 10_000_000)
    assert ledger.total() == 0
    assert kv.read_bytes("vattention", shape, 1000) == 2 * 80 * 8 * 128 * 2 * 1000
    row = np.ones((1, 8, 128), np.float32)
    with pytest.raises(BudgetExceeded):
        cache.append(0, row, row, np.arange(1))
    cache.release()


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ("vattention(page_kib=96)", "power of two"),
        ("vattention(page_kib=4096)", "2048"),
        ("vattention(4bit)", "kivi"),
        ("vattention(megacache=2)", "0 or 1"),
        ("vattention(pages=3)", "page_kib"),
    ],
)
def test_settings_are_checked(policy: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        kv.build(policy, SHAPE, Arena(1 << 20, Ledger()), 10)
    with pytest.raises(InputError, match=says):
        kv.predict(policy, SHAPE, 10)


def test_a_released_cache_says_so() -> None:
    cache = kv.build("vattention", SHAPE, Arena(1 << 26, Ledger()), 10)
    cache.release()
    with pytest.raises(ValueError, match="released"):
        cache.truncate(0)

"""Slots by themselves: how large pages are, what the pool refuses, attention over slots, what does not go with them."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest

from memwall import kernels, kv
from memwall.engine.executor import Entry
from memwall.engine.sequence import Request, Sequence
from memwall.engine.serving import LoraSettings, ServingSettings
from memwall.engine.slots import SlotCache, SlotLayout, SlotPool
from memwall.engine.switching import SwitchSettings
from memwall.errors import DoesNotFit, InputError
from memwall.hardware.units import KIB
from memwall.memory import OutOfPages
from tests.engine.test_slots import serving

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memfd is Linux's")


def test_pages_hold_whole_rows() -> None:
    shape = kv.CacheShape(num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64)
    layout = SlotLayout.of("vattention", shape)
    assert (layout.page_bytes, layout.page_tokens, layout.planes) == (3 * 64 * KIB, 512, 60)
    together = SlotLayout.of("vattention(megacache=1,page_kib=4)", shape)
    assert (together.planes, together.page_bytes % together.row_bytes) == (2, 0)
    assert together.block_bytes * layout.page_tokens == layout.block_bytes * together.page_tokens


def test_a_pool_without_a_slot_left() -> None:
    held = serving(max_sequences=1)
    pool = held.pool
    first = pool.take("kv", 2, 7)
    with pytest.raises(OutOfPages, match="all 1 slots"):
        pool.take("kv", 1, 8)
    assert pool.begin(8, [], 1) == []
    pool.drop(first)
    pool.close(7)
    assert pool.take("kv", 1, 8) == first[:1]
    with pytest.raises(DoesNotFit, match="1 pages are in use"):
        pool.set_limit(0)
    held.release()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"lora": LoraSettings()}, "adapters"),
        ({"shared_prefixes": True}, "batchllm"),
        ({"ahead": True}, "not moved in groups"),
        ({"switch": SwitchSettings(keep_turns=True)}, "not moved in groups"),
        ({"kv": "vattention(page_kib=5)"}, "power of two"),
        ({"kv": "vattention(bits=4)"}, "16 or 32"),
        ({"kv": "vattention(pages=4)"}, "unknown setting"),
    ],
)
def test_what_slots_cannot_do_is_refused(changes: dict[str, object], why: str) -> None:
    with pytest.raises(InputError, match=why):
        ServingSettings(**{"kv": "vattention", **changes})  # type: ignore[arg-type]


def test_what_a_model_has_no_slots_for_is_refused() -> None:
    with pytest.raises(InputError, match="pages are of 256 tokens"):
        serving("vattention", page_tokens=16)
    shape = kv.CacheShape(num_layers=100, num_heads=8, num_kv_heads=8, head_dim=128)
    held = serving()
    layout = replace(SlotLayout.of("vattention", shape), page_bytes=1 << 30)
    with pytest.raises(InputError, match=r"of addresses.*fewer --max-sequences"):
        SlotPool(layout, shape, held.arena, num_slots=1000, context_pages=64, most_pages=1, limit_pages=1)
    held.release()


def test_windows_are_kept_to() -> None:
    """Attention of a batch over slots is the kernel's for each sequence by itself, with a window too."""
    shape = kv.CacheShape(num_layers=1, num_heads=4, num_kv_heads=2, head_dim=32, windows=(24,))
    held = serving()
    layout = SlotLayout.of("vattention(page_kib=4)", shape)
    pool = SlotPool(layout, shape, held.arena, num_slots=3, context_pages=4, most_pages=20, limit_pages=20)
    cache = SlotCache(shape, pool, layout.page_tokens)
    rng = np.random.default_rng(0)
    lengths, counts = (50, 33, 90), (1, 7, 40)
    batch, entries = [], []
    for number, (length, count) in enumerate(zip(lengths, counts)):
        one = Sequence(id=number, request=Request(prompt=(0,) * length), arrival=0.0, eos=())
        pool.take("kv", -(-length // layout.page_tokens), number)
        batch.append(Entry(one, 0, length - count, False))
        entries.append(Entry(one, length - count, count, True))
    whole = [rng.standard_normal((2, n, 2, 32)).astype(np.float32) for n in lengths]
    for step in (batch, entries):
        positions = cache.begin(step)
        k, v = (np.concatenate([w[i][e.first : e.first + e.count] for w, e in zip(whole, step)]) for i in (0, 1))
        cache.append(0, k, v, positions)
        q = rng.standard_normal((len(positions), 4, 32)).astype(np.float32)
        out = np.empty_like(q)
        for begin in range(0, len(q), 11):  # the decoder comes with blocks of rows
            cache.attend(0, q[begin : begin + 11], positions[begin : begin + 11], out[begin : begin + 11])
        cache.settle(0)
    row = 0
    for held_rows, entry in zip(whole, entries):
        mine = slice(row, row + entry.count)
        plain = np.empty_like(q[mine])
        kernels.attend_float(
            q[mine], held_rows[0].astype(np.float16), held_rows[1].astype(np.float16), scale=shape.logit_scale,
            first_position=entry.first, window=24, out=plain,
        )  # fmt: skip
        assert np.allclose(out[mine], plain, atol=1e-5)
        row += entry.count
    pool.release()
    held.release()

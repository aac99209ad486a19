"""The store of many sequences: slots, steps, mapping ahead, reclaiming, sharing; random walks with canaries."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall import kv
from memwall.errors import BudgetExceeded, DoesNotFit, InputError
from memwall.kernels.attention import attend_float
from memwall.kv.vattention import VirtualKV, VirtualSettings
from memwall.memory import Arena, Ledger
from memwall.memory.virtual import OutOfBlocks

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memfd is Linux's")
SHAPE = kv.CacheShape(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32)  # 128 bytes a row
PAGE = 4096  # 32 rows


def make(
    num_blocks: int = 40, *, slots: int = 6, max_tokens: int = 150, arena: Arena | None = None, fill: bool = True,
    shape: kv.CacheShape = SHAPE, **changes: object,
) -> VirtualKV:  # fmt: skip
    return VirtualKV(
        shape, arena or Arena(1 << 30, Ledger()), num_slots=slots, max_tokens=max_tokens, num_blocks=num_blocks,
        settings=VirtualSettings(**{"page_bytes": PAGE, **changes}), fill=fill,
    )  # fmt: skip


def test_arrays_never_move_and_sequences_keep_apart() -> None:
    store = make()
    addresses = [array.ctypes.data for array in (*store.keys, *store.values)]
    slots = [store.alloc(1) for _ in range(5)]
    for length in range(1, 151, 7):
        store.step_async(dict.fromkeys(slots, length))
        for layer in range(2):
            for slot in slots:
                store.keys[layer][slot, max(length - 7, 0) : length] = 10 * slot + layer
                store.values[layer][slot, max(length - 7, 0) : length] = -(10 * slot + layer)
    for layer in range(2):
        for slot in slots:
            keys, values = store.rows(layer, slot, 0, 148)
            assert keys.flags.c_contiguous
            assert (keys == 10 * slot + layer).all()
            assert (values == -(10 * slot + layer)).all()
    assert [array.ctypes.data for array in (*store.keys, *store.values)] == addresses
    with pytest.raises(ValueError, match="holds 148 tokens"):
        store.rows(0, slots[0], 0, 149)
    with pytest.raises(DoesNotFit, match="150 at most"):
        store.step({slots[0]: 151})
    store.release()
    assert store.pool.arena.used_bytes == 0


@pytest.mark.parametrize("megacache", [False, True])
def test_a_length_that_no_page_divides(megacache: bool) -> None:
    """Rows of 80 bytes (160 with both layers): slots begin at whole pages, tokens may lie across two."""
    shape = kv.CacheShape(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=20)
    store = make(shape=shape, max_tokens=101, megacache=megacache)
    row = 160 if megacache else 80
    assert store.block_bytes == PAGE * (2 if megacache else 4)
    assert store.keys[0].strides[0] == -(-101 * row // PAGE) * PAGE
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, 2, 6, 101, 2, 20)).astype(np.float16)
    slots = [store.alloc(101) for _ in range(6)]
    for length in (1, 50, 51, 52, 101):
        store.step(dict.fromkeys(slots, length))
        assert store.mapped_blocks(slots[0]) == -(-length * row // PAGE)
        for layer in range(2):
            store.keys[layer][:, :length] = k[layer, :, :length]
            store.values[layer][:, :length] = v[layer, :, :length]
    q = rng.standard_normal((1, 4, 20), np.float32)
    for layer in range(2):
        for slot in slots:
            plain, out = np.empty_like(q), np.empty_like(q)
            setting = {"scale": 0.2, "first_position": 100}
            attend_float(q, k[layer, slot].copy(), v[layer, slot].copy(), **setting, out=plain)
            attend_float(q, *store.rows(layer, slot, 0, 101), **setting, out=out)
            np.testing.assert_array_equal(out, plain)


def test_decoding_maps_nothing_on_the_critical_path() -> None:
    store = make(120, slots=8, max_tokens=400)
    slots = [store.alloc(10) for _ in range(8)]
    lengths = {slot: 5 + 3 * slot for slot in slots}
    assert store.step_async(lengths) == store.critical_blocks == 8
    for _ in range(300):
        lengths = {slot: n + 1 for slot, n in lengths.items()}
        assert store.step_async(lengths) == 0
    store.wait()
    assert store.background_blocks >= 8 * 9
    sequential = make(120, slots=8, max_tokens=400)
    lengths = {sequential.alloc(10): 32 for _ in range(8)}
    sequential.step_async(lengths)  # all eight cross into the next page together: none may be left out
    assert sequential.step_async(dict.fromkeys(lengths, 33)) == 0


def test_freed_pages_wait_for_the_next_sequence() -> None:
    store = make(slots=4)
    for num_tokens in (100, 40, 70):
        store.step({store.alloc(num_tokens): num_tokens})
    assert [store.mapped_blocks(slot) for slot in range(4)] == [4, 2, 3, 0]
    for slot in range(3):
        store.free(slot)
    assert store.free_blocks == 40
    assert store.pool.available == 31
    assert store.alloc(65) == 2  # the fewest that are enough
    assert store.step({2: 65}) == 0
    assert store.alloc(150) == 0  # none is enough: the one with the most
    assert store.step({0: 150}) == 1
    assert store.alloc(10) == 1
    assert store.alloc(10) == 3
    with pytest.raises(OutOfBlocks, match="4 slots"):
        store.alloc(1)
    assert not store.can_admit(1)
    with pytest.raises(ValueError, match="holds no sequence"):
        make().free(0)


def test_at_once_instead_of_deferred() -> None:
    store = make(deferred=False)
    slot = store.alloc(100)
    store.step({slot: 100})
    store.free(slot)
    assert store.pool.mapped == 0


def test_memory_is_taken_back_from_idle_slots_and_only_from_them() -> None:
    store = make(8, slots=4)
    first, second = store.alloc(120), store.alloc(60)
    store.step({first: 120, second: 60})
    store.keys[1][second, :60] = 3
    store.free(first)
    assert (store.pool.available, store.free_blocks) == (2, 6)
    assert store.can_admit(150)
    third = store.alloc(30)
    assert third == first
    store.free(third)
    store._active.add(3)  # an empty slot, so that nothing is left mapped in it
    assert store.step({3: 130}) == 5
    assert (store.keys[1][second, :60] == 3).all()
    assert store.mapped_blocks(second) == 2
    assert store.mapped_blocks(first) == 1
    before = list(store.lengths)
    with pytest.raises(OutOfBlocks, match="wanted"):
        store.step({3: 150, second: 140})
    assert store.lengths == before
    assert store.step({second: 96}) == 1


def test_the_arena_s_cap_bounds_a_pool_that_is_not_filled() -> None:
    ledger = Ledger()
    arena = Arena(10 * 4 * PAGE, ledger)
    with pytest.raises(BudgetExceeded):
        make(40, arena=arena)
    assert arena.used_bytes == 0
    store = make(40, arena=arena, fill=False, keep=False)
    slots = [store.alloc(1) for _ in range(3)]
    assert (store.free_blocks, arena.used_bytes) == (10, 0)
    store.step({slots[0]: 150, slots[1]: 140})
    with pytest.raises(BudgetExceeded, match="kv/mapped"):
        store.step({slots[2]: 1})
    store.truncate(slots[0], 33)
    assert arena.used_bytes == ledger.total() == 7 * 4 * PAGE
    assert store.step({slots[2]: 65}) == 3


def test_a_prefix_is_shared_in_memory_until_someone_writes() -> None:
    store = make(12, slots=4)
    first = store.alloc(100)
    store.step({first: 100})
    store.keys[0][first, :100] = np.arange(100)[:, None, None]
    others = [store.alloc(100) for _ in range(3)]
    assert [store.share(first, other, 100) for other in others] == [96, 96, 96]
    assert store.pool.mapped == 4
    for other in others:
        store.step({other: 100})
        store.keys[0][other, 96:100] = -other
    assert store.pool.mapped == 7
    assert sum(store.slot_bytes(slot) for slot in range(4)) == pytest.approx(7 * store.block_bytes, abs=16)
    store.free(first)
    assert store.free_blocks == 12 - 6  # what others see is not free
    assert store.alloc(100) == first  # still mapped there, and not to be written to
    assert store.step({first: 40}) == 2
    store.keys[0][first, :40] = 99
    for other in others:
        np.testing.assert_array_equal(store.keys[0][other, :96, 0, 0], np.arange(96))
    store.truncate(others[0], 50)
    assert store.step({others[0]: 51}) == 1  # the page of token 50 is copied first
    store.keys[0][others[0], 50] = -1
    np.testing.assert_array_equal(store.keys[0][others[0], :50, 0, 0], np.arange(50))
    np.testing.assert_array_equal(store.keys[0][others[1], :96, 0, 0], np.arange(96))
    with pytest.raises(ValueError, match="cannot begin"):
        store.share(others[0], others[1], 10)
    with pytest.raises(ValueError, match="truncate it first"):
        store.step({others[1]: 5})


def test_the_background_unmaps_idle_slots_when_asked_to() -> None:
    store = make(eager=True)
    slots = [store.alloc(n) for n in (100, 100, 100, 10)]
    store.step(dict(zip(slots, (100, 100, 100, 10))))
    for slot in slots[:3]:
        store.free(slot)
    held = []
    for length in range(11, 31):
        store.step_async({slots[3]: length})
        store.wait()
        held.append([store.mapped_blocks(slot) for slot in slots[:3]])
    assert held[0] == [4, 4, 3]  # the highest first
    # one a step, all but what the next sequence of that length will get
    assert [sum(blocks) for blocks in held] == [*range(11, 0, -1), *[1] * 9]
    assert store.step({store.alloc(10): 10}) == 0


def test_sizes_are_checked() -> None:
    with pytest.raises(InputError, match="at least 1"):
        make(0)
    with pytest.raises(InputError, match="max_map_count"):
        make(slots=900, shape=kv.CacheShape(num_layers=80, num_heads=8, num_kv_heads=8, head_dim=128))


STEPS = st.lists(
    st.tuples(st.sampled_from(["begin", "end", "grow", "grow", "cut", "share"]), st.integers(0, 10**6)), max_size=60
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(STEPS, st.booleans(), st.booleans(), st.integers(3, 20))
def test_random_walk_keeps_every_sequence_s_rows(
    steps: list[tuple[str, int]], deferred: bool, megacache: bool, num_blocks: int
) -> None:
    """Each sequence's rows are what it wrote, whoever shared, grew, was cut or took memory in between."""
    ledger = Ledger()
    store = make(
        num_blocks, slots=4, arena=Arena(1 << 30, ledger), deferred=deferred, megacache=megacache, eager=not deferred
    )
    rows: dict[int, np.ndarray] = {}
    for stamp, (verb, number) in enumerate(steps, 1):
        slots = sorted(rows)
        try:
            if verb == "begin":
                rows[store.alloc(number % 150)] = np.zeros(0, np.float16)
            elif slots:
                slot, amount = slots[number % len(slots)], number // 7
                if verb == "end":
                    del rows[slot]
                    store.free(slot)
                elif verb == "cut":
                    rows[slot] = rows[slot][: amount % (len(rows[slot]) + 1)]
                    store.truncate(slot, len(rows[slot]))
                elif verb == "share" and not len(rows[slot]):
                    source = slots[amount % len(slots)]
                    if source != slot:
                        rows[slot] = rows[source][: store.share(source, slot, len(rows[source]))]
                elif verb == "grow":
                    first, length = len(rows[slot]), min(len(rows[slot]) + 1 + amount % 70, 150)
                    store.step_async({slot: length})
                    for layer in range(2):
                        store.keys[layer][slot, first:length] = stamp
                        store.values[layer][slot, first:length] = -stamp
                    rows[slot] = np.append(rows[slot], np.full(length - first, stamp, np.float16))
        except OutOfBlocks:
            pass
        store.wait()
        assert store.pool.mapped + store.pool.spare == num_blocks
        assert ledger.total() == num_blocks * store.block_bytes == store.source.held_bytes
        assert store.free_blocks >= store.pool.spare
        for slot, wrote in rows.items():
            for layer in range(2):
                keys, values = store.rows(layer, slot, 0, len(wrote))
                assert (keys == wrote[:, None, None]).all()
                assert (values == -wrote[:, None, None]).all()
    store.release()
    assert ledger.total() == 0

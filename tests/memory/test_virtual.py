"""Pages mapped on demand: what the system says of them, the pool's books, and random walks with canaries."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.errors import BudgetExceeded, DoesNotFit, InputError
from memwall.memory import Arena, Ledger, resident_bytes
from memwall.memory.virtual import BlockPool, HostPages, LazyPages, OutOfBlocks, SlotRanges, runs

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memfd is Linux's")
PAGE = 65536


def make(
    num_blocks: int = 16, planes: int = 2, *, slots: int = 4, slot_pages: int = 8, cap: int = 1 << 30, keep: bool = True
) -> tuple[BlockPool, SlotRanges, Ledger]:
    ledger = Ledger()
    source = HostPages(PAGE, num_blocks * planes)
    pool = BlockPool(source, Arena(cap, ledger), "kv", num_blocks=num_blocks, planes=planes, keep=keep)
    return pool, SlotRanges(pool, num_slots=slots, slot_bytes=slot_pages * PAGE), ledger


def window(ranges: SlotRanges, plane: int) -> np.ndarray:
    """[slots, pages, numbers] over a whole plane."""
    slots, pages = len(ranges.blocks), ranges.slot_bytes // PAGE
    strides = (ranges.slot_bytes, PAGE, 8)
    return ranges.pool.source.view(ranges.ranges[plane], (slots, pages, PAGE // 8), strides, np.int64, 0)


def in_a_child(body: str) -> subprocess.CompletedProcess:
    code = (
        "import json, numpy as np\nfrom memwall.memory import *\nfrom memwall.memory.virtual import *\n"
        f"PAGE = {PAGE}\n" + textwrap.dedent(body)
    )
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(path for path in sys.path if path))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count("\n")


def test_addresses_cost_nothing_and_pages_keep_what_is_in_them() -> None:
    source = HostPages(PAGE, 4)
    before = resident_bytes(exact=True)
    target = source.reserve(1 << 42)
    whole = source.view(target, (1 << 39,), (8,), np.int64, 0)
    assert source.held_bytes == 0
    assert resident_bytes(exact=True) - before < 1 << 20
    source.touch(1, 2)
    assert source.held_bytes == source.unseen_bytes == 2 * PAGE
    source.map(target, 1 << 41, 1, 2)
    assert source.unseen_bytes == 0
    there = (1 << 41) // 8
    whole[there : there + 2 * PAGE // 8] = np.arange(2 * PAGE // 8)
    source.map(target, 0, 2, 1)  # the second of them once more
    assert source.unseen_bytes == -PAGE
    np.testing.assert_array_equal(whole[: PAGE // 8], np.arange(PAGE // 8, 2 * PAGE // 8))
    whole[3] = -1
    assert whole[there + PAGE // 8 + 3] == -1
    source.unmap(target, 1 << 41, 2)
    assert whole[3] == -1
    source.unmap(target, 0, 1)
    source.discard(2, 1)
    assert source.held_bytes == PAGE
    source.touch(2, 1)
    source.map(target, PAGE, 2, 1)
    assert not whole[PAGE // 8 : 2 * PAGE // 8].any()
    source.close()


def test_a_range_lives_as_long_as_an_array_over_it() -> None:
    source = HostPages(PAGE, 1)
    source.touch(0, 1)
    target = source.reserve(PAGE)
    source.map(target, 0, 0, 1)
    array = source.view(target, (PAGE,), (1,), np.uint8, 0)[5:9]
    address = target.address
    del target
    array[:] = 3
    assert array.sum() == 12
    del array
    assert f"{address:x}-" not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("where", ["PAGE - 1", "PAGE", "-1"])
def test_an_address_past_the_mapped_pages_ends_the_process(where: str) -> None:
    done = in_a_child(
        f"""
        source = HostPages(PAGE, 1)
        source.touch(0, 1)
        target = source.reserve(1 << 40)
        source.map(target, 0, 0, 1)
        whole = source.view(target, (1 << 40,), (1,), np.uint8, 0)
        whole[{where}] = 1
        print("lives")
        """
    )
    if where == "PAGE - 1":
        assert done.stdout.strip() == "lives"
    else:
        assert done.returncode == -signal.SIGSEGV


def test_the_ledger_agrees_with_the_system_for_spare_mapped_and_shared_pages() -> None:
    done = in_a_child(
        """
        def use():
            ledger = Ledger()
            arena = Arena(1 << 30, ledger)
            pool = BlockPool(HostPages(PAGE, 3200), arena, "kv", num_blocks=800, planes=4, keep=True)
            ranges = SlotRanges(pool, num_slots=8, slot_bytes=1 << 38)
            out = []
            measure_runtime(ledger)
            def note():
                shown = resident_split().shared_bytes
                rows = {row.owner: row.nbytes for row in ledger.rows()}
                out.append([ledger_error(ledger), rows.get("kv", 0), rows.get("kv/spare", 0), shown])
            pool.fill(800); note()
            ranges.grow(3, pool.take(500)); note()
            pool.share(ranges.blocks[3][:200]); ranges.grow(5, ranges.blocks[3][:200]); note()
            ranges.shrink(3, 0); note()
            pool.give_back(); note()
            ranges.release(); pool.give_back(); note()
            return out
        use()  # code comes in at its first call, up to megabytes at a time
        print(json.dumps(use()))
        """
    )
    assert done.returncode == 0, done.stderr
    block = 4 * PAGE
    found = json.loads(done.stdout)
    assert all(abs(error) < 0.03 for error, *_ in found)
    assert [row[1:3] for row in found] == [
        [0, 800 * block], [500 * block, 300 * block], [500 * block, 300 * block], [200 * block, 600 * block],
        [200 * block, 0], [0, 0],
    ]  # fmt: skip
    shown = [row[3] // block for row in found]  # what the system shows: every mapping
    assert shown == [0, 500, 700, 200, 200, 0]


def test_the_pool_refuses_before_it_touches() -> None:
    pool, ranges, ledger = make(num_blocks=16, cap=6 * 2 * PAGE)
    with pytest.raises(BudgetExceeded, match="kv"):
        pool.take(7)
    with pytest.raises(BudgetExceeded):
        pool.fill(7)
    with pytest.raises(OutOfBlocks, match="17 blocks"):
        pool.take(17)
    with pytest.raises(OutOfBlocks):
        pool.fill(17)
    assert (ledger.total(), pool.spare, pool.mapped, pool.available, pool.source.held_bytes) == (0, 0, 0, 6, 0)
    ranges.grow(0, pool.take(4))
    pool.fill(2)
    assert (pool.spare, pool.mapped, pool.available) == (2, 4, 2)
    with pytest.raises(BudgetExceeded):
        pool.check(3)
    ranges.grow(0, pool.take(2))
    assert pool.source.held_bytes == ledger.total() == 6 * pool.block_bytes
    ranges.release()
    pool.release()
    assert ledger.total() == 0


def test_a_system_without_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, _, ledger = make()
    touch = pool.source.touch

    def fails_at_the_second_plane(first: int, count: int) -> None:
        if first >= pool.num_blocks:
            raise MemoryError("none left")
        touch(first, count)

    monkeypatch.setattr(pool.source, "touch", fails_at_the_second_plane)
    with pytest.raises(MemoryError, match="none left"):
        pool.take(3)
    assert (ledger.total(), pool.spare, pool.mapped, pool.source.held_bytes) == (0, 0, 0, 0)
    monkeypatch.undo()
    assert len(pool.take(16)) == 16


def test_blocks_follow_each_other_and_their_mappings_merge() -> None:
    pool, ranges, _ = make(num_blocks=120, planes=3, slots=6, slot_pages=30)
    pool.fill(120)
    before = mappings()
    for _ in range(12):
        for slot in range(4):
            held = ranges.blocks[slot]
            ranges.grow(slot, pool.take(1, held[-1] if held else None))
    assert [len(list(runs(blocks))) for blocks in ranges.blocks[:4]] == [1, 1, 1, 1]
    assert mappings() - before <= ranges.mappings == 3 * (1 + 8)
    ranges.release()
    assert mappings() - before <= 1  # reserved addresses merge again


def test_the_limit_on_mappings_is_kept() -> None:
    pool, ranges, _ = make(num_blocks=64, planes=4, slots=4, slot_pages=16)
    ranges.most_mappings = 4 * 8
    for block in range(3):
        ranges.grow(0, pool.take(1, None if block == 0 else 20 * block))
    held = ranges.mappings
    with pytest.raises(DoesNotFit, match="max_map_count"):
        ranges.grow(1, pool.take(3, 50) + pool.take(1, 10))
    assert held == ranges.mappings <= ranges.most_mappings
    assert not ranges.blocks[1]
    with pytest.raises(InputError, match="max_map_count"):
        SlotRanges(pool, num_slots=10**6, slot_bytes=PAGE)


def test_a_replaced_block_keeps_its_content_and_leaves_the_other_slot_alone() -> None:
    pool, ranges, _ = make()
    ranges.grow(0, pool.take(2))
    for plane in range(2):
        window(ranges, plane)[0, :2] = 7 + plane
    pool.share(ranges.blocks[0])
    ranges.grow(1, list(ranges.blocks[0]))
    ranges.replace(1, 1, pool.take(1)[0])
    for plane in range(2):
        whole = window(ranges, plane)
        assert (whole[1, 1] == 7 + plane).all()
        whole[1, 1] = -1
        whole[1, 0, 0] = -2
        assert whole[0, 0, 0] == -2
        assert (whole[0, 1] == 7 + plane).all()
    assert (pool.mapped, pool.uses(ranges.blocks[0][0]), pool.uses(ranges.blocks[0][1])) == (3, 2, 1)


def test_arguments_are_checked() -> None:
    for page_bytes, huge in ((1000, False), (0, False), (PAGE, True)):
        with pytest.raises(InputError, match="multiple"):
            HostPages(page_bytes, 4, huge=huge)
    pool, ranges, _ = make(slot_pages=2)
    with pytest.raises(ValueError, match="do not fit"):
        ranges.grow(0, pool.take(3))


def test_huge_pages_come_from_wherever_they_can() -> None:
    source = HostPages(2 << 20, 3, huge=True)
    target = source.reserve(8 << 20)
    assert target.address % (2 << 20) == 0
    source.touch(1, 2)
    source.map(target, 2 << 20, 1, 2)
    array = source.view(target, (4 << 20,), (1,), np.uint8, 2 << 20)
    array[:] = 5
    assert array.sum() == 5 * (4 << 20)
    assert source.held_bytes == 4 << 20
    source.unmap(target, 2 << 20, 2)


def test_lazy_pages_come_at_the_first_touch() -> None:
    source = LazyPages(PAGE, 64)
    target = source.reserve(1 << 36)
    array = source.view(target, (1 << 36,), (1,), np.uint8, 0)
    before = resident_bytes(exact=True)
    array[: 64 * PAGE] = 1
    assert resident_bytes(exact=True) - before > 60 * PAGE
    source.unmap(target, 0, 64)
    assert resident_bytes(exact=True) - before < 4 * PAGE
    assert not array[: 64 * PAGE].any()


STEPS = st.lists(
    st.tuples(st.sampled_from(["grow", "shrink", "share", "replace", "fill", "back"]), st.integers(0, 10**6)),
    max_size=60,
)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(STEPS, st.booleans(), st.integers(2, 24))
def test_random_walk_conserves_blocks_and_never_mixes_slots(
    steps: list[tuple[str, int]], keep: bool, cap_blocks: int
) -> None:
    pool, ranges, ledger = make(num_blocks=20, slot_pages=10, cap=cap_blocks * 2 * PAGE, keep=keep)
    whole = [window(ranges, plane) for plane in range(2)]
    content: dict[int, int] = {}
    before = mappings()
    for stamp, (verb, number) in enumerate(steps, 1):
        slot, count = number % 4, number // 4 % 5
        held = ranges.blocks[slot]
        try:
            if verb == "grow" and len(held) + count <= 10:
                blocks = pool.take(count, held[-1] if held else None)
                ranges.grow(slot, blocks)
                for index, block in enumerate(blocks, len(held) - count):
                    content[block] = stamp
                    for plane in range(2):
                        whole[plane][slot, index, ::512] = stamp
            elif verb == "shrink":
                ranges.shrink(slot, min(count, len(held)))
            elif verb == "share" and not ranges.blocks[(slot + 1) % 4]:
                pool.share(held[:count])
                ranges.grow((slot + 1) % 4, held[:count])
            elif verb == "replace" and count < len(held):
                old = held[count]
                ranges.replace(slot, count, pool.take(1)[0])
                content[held[count]] = content[old]
            elif verb == "fill":
                pool.fill(count)
            elif verb == "back":
                pool.give_back(count)
        except DoesNotFit:
            pass
        uses: dict[int, int] = {}
        for each, blocks in enumerate(ranges.blocks):
            for index, block in enumerate(blocks):
                uses[block] = uses.get(block, 0) + 1
                assert all((whole[plane][each, index, ::512] == content[block]).all() for plane in range(2))
        assert pool.mapped == len(uses)
        assert all(pool.uses(block) == uses.get(block, 0) for block in range(20))
        assert pool.mapped + pool.spare <= min(cap_blocks, 20)
        assert keep or verb in ("fill", "back") or pool.spare == 0 or any(v == "fill" for v, _ in steps)
        rows = {row.owner: row.nbytes for row in ledger.rows()}
        assert rows.get("kv", 0) == pool.mapped * pool.block_bytes
        assert rows.get("kv/spare", 0) == pool.spare * pool.block_bytes
        assert pool.source.held_bytes == ledger.total()
        assert mappings() - before <= ranges.mappings + 2
    ranges.release()
    pool.release()
    assert ledger.total() == 0

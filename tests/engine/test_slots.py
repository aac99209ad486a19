"""Requests in slots of one `VirtualKV`: the tokens of the paged server, the engine's books, the system's memory."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pytest

from memwall.engine import Sampling
from memwall.engine.base import Costs
from memwall.engine.fastswitch import FastSwitch
from memwall.engine.sequence import Request
from memwall.engine.serving import Serving, ServingSettings, load_engine
from memwall.engine.slots import SlotCache, SlotPool
from memwall.errors import DoesNotFit
from memwall.hardware.units import KIB, MB
from memwall.memory import Budget, ledger_error, resident_bytes
from memwall.models import DEMO_DIRECTORY
from memwall.models.tokenizer import Tokenizer
from tests.models.families import make_family

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memfd is Linux's")
TOKENIZER = Tokenizer.from_directory(DEMO_DIRECTORY)
TEXT = TOKENIZER.encode(
    "The history of the city begins with a small harbour on the river, where ships from the north came to trade. "
    "In the spring the water rose and the people moved to the hills, and there they built the first walls of stone."
)
SMALL = "vattention(page_kib=4)"  # 16 tokens of the demo model a page
LENGTHS = (3, 61, 40, 17, 33, 64, 31, 1)


def requests(made: int = 24, lengths: tuple[int, ...] = LENGTHS) -> list[Request]:
    return [
        Request(prompt=(0, *TEXT[at : at + n]), sampling=Sampling(max_new_tokens=made - at, ignore_eos=True))
        for at, n in enumerate(lengths)
    ]


def serving(store: str = SMALL, **changes: object) -> Serving:
    settings = {
        "weights": "int8",
        "context_tokens": 128,
        "token_budget": 32,
        "threads": 1,
        "kv": store,
        "exact": True,
        **changes,
    }
    return load_engine(DEMO_DIRECTORY, ServingSettings(**settings), tokenizer=TOKENIZER)  # type: ignore[arg-type]


def run(held: Serving, wanted: list[Request], *, num_pages: int | None = None) -> list[list[int]]:
    if num_pages is not None:
        held.engine.wanted_pages = num_pages
    sequences = [held.engine.submit(request) for request in wanted]
    while held.engine.busy:
        held.engine.step()
        check(held)
    return [list(one.made) for one in sequences]


def check(held: Serving) -> None:
    """Engine, store, ledger and system say the same."""
    pool, engine = held.pool, held.engine
    assert isinstance(pool, SlotPool)
    store = pool.store
    held_bytes = store.pool.held * store.block_bytes
    assert pool.committed_bytes == held_bytes == held.ledger.owned("kv/mapped") == store.source.held_bytes
    assert store.pool.held <= pool.limit_pages
    mapped = sum(store.mapped_blocks(slot) for slot in range(store.num_slots))
    assert store.source._mapped_pages == mapped * 2 * store.shape.num_layers  # type: ignore[attr-defined]
    assert store.pool.pinned == set(pool._uses)
    if not pool._pages.tight:
        assert pool.free_pages == min(store.free_blocks, pool.limit_pages - pool.used_pages)
    running = {one.id: one for one in engine.running.values()}
    for one in running.values():
        if one.pages:
            assert store.ranges.blocks[pool.slot(one.id)][: len(one.pages)] == one.pages
    assert store.num_active <= len(running) + sum(one.status == "arriving" for one in engine.swapped.values())


@pytest.fixture(scope="module")
def paged() -> list[list[int]]:
    """What the paged server makes of the requests."""
    held = serving("float16")
    sequences = [held.engine.submit(request) for request in requests()]
    while held.engine.busy:
        held.engine.step()
    held.release()
    return [list(one.made) for one in sequences]


@pytest.mark.parametrize("ahead", [0, 1, 10])
def test_requests_make_what_the_paged_server_makes(paged: list[list[int]], ahead: int) -> None:
    held = serving(f"vattention(page_kib=4,ahead={ahead})")
    assert held.settings.page_tokens == 16
    assert run(held, requests()) == paged
    told = held.pool.told()
    assert (told["mapped_beside_steps"] > 0) == (ahead > 0)
    assert run(held, requests()) == paged  # from kept beginnings and pages that waited
    held.release()
    assert held.ledger.owned("kv") == 0


def test_pages_larger_than_requests_and_a_megacache(paged: list[list[int]]) -> None:
    held = serving("vattention")
    assert (held.settings.page_tokens, held.pool.page_bytes) == (256, 2 * 8 * 64 * KIB)
    assert run(held, requests()) == paged
    held.release()
    held = serving("vattention(megacache=1,page_kib=16)")
    assert (held.settings.page_tokens, held.pool.page_bytes) == (8, 2 * 16 * KIB)
    sequences = [held.engine.submit(request) for request in requests()]
    while held.engine.busy:
        held.engine.step()
    assert [list(one.made) for one in sequences] == paged
    held.release()


def test_32_bits_are_the_paged_float32() -> None:
    wanted, held = serving("float32"), serving("vattention(page_kib=4,bits=32)")
    sequences = [wanted.engine.submit(request) for request in requests()]
    while wanted.engine.busy:
        wanted.engine.step()
    assert run(held, requests()) == [list(one.made) for one in sequences]
    wanted.release()
    held.release()


@pytest.mark.parametrize(
    ("family", "store", "page_tokens"),
    [
        ("mistral", "vattention(page_kib=4)", 256),  # rows of 80 bytes, sliding windows
        ("llama", "vattention(page_kib=4,megacache=1)", 64),  # rows of 192 bytes in three layers
        ("qwen3", "vattention(page_kib=4)", 32),
    ],
)
def test_rows_that_no_page_of_the_system_holds(family: str, store: str, page_tokens: int, tmp_path: Path) -> None:
    path, rng = make_family(family, tmp_path), np.random.default_rng(0)
    wanted = [
        Request(prompt=tuple(rng.integers(2, 300, n).tolist()), sampling=Sampling(max_new_tokens=90, ignore_eos=True))
        for n in (1, 70, 33, 130, 64)
    ]
    made = []
    for kind in ("float16", store):
        settings = ServingSettings(weights="int8", kv=kind, context_tokens=256, token_budget=48, threads=1)
        held = load_engine(path, settings)
        sequences = [held.engine.submit(request) for request in wanted]
        while held.engine.busy:
            held.engine.step()
        again = [held.engine.submit(request) for request in wanted]  # beginnings are there by now
        while held.engine.busy:
            held.engine.step()
        made.append([list(one.made) for one in (*sequences, *again)])
        assert held.settings.page_tokens == (page_tokens if kind == store else 16)
        held.release()
    assert made[0] == made[1]


def test_no_table_is_made_and_no_paged_kernel_called(paged: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    from memwall import _native

    def refused(*arguments: object) -> None:
        raise AssertionError("a kernel that walks tables")

    for name in ("attend_paged", "attend_paged_sequences", "attend_shared"):
        monkeypatch.setattr(_native, name, refused)
    held = serving()
    assert run(held, requests()) == paged
    held.release()


@pytest.mark.parametrize(("swap", "by"), [(0, "recompute"), (1 << 24, "swap")])
def test_requests_that_were_set_aside_make_the_same(paged: list[list[int]], swap: int, by: str) -> None:
    held = serving(swap_bytes=swap)
    held.engine.costs, held.engine._measures = Costs(seconds_per_token=1.0, seconds_per_page=1e-6), False
    assert run(held, requests(), num_pages=9) == paged
    assert set(held.engine.totals.preempted) == {by}
    assert held.engine.totals.preempted[by] > 0
    assert held.pool.peak_pages <= 9
    held.release()


def test_pages_are_out_before_the_slot_is_another_s(paged: list[list[int]]) -> None:
    """Whatever a scheduler asks for: the next request in a slot would unmap what is still being copied."""
    held = serving(swap_bytes=1 << 24)
    held.engine.scheduler = FastSwitch()
    held.engine.costs, held.engine._measures = Costs(seconds_per_token=1.0, seconds_per_page=1e-6), False
    assert run(held, requests(), num_pages=9) == paged
    assert held.engine.totals.preempted["swap"] > 0
    assert held.engine.switch.counts.conflicts == 0
    held.release()


def test_beginnings_are_the_same_memory_for_all() -> None:
    held = serving(swap_bytes=0)
    store = held.pool.store  # type: ignore[attr-defined]
    common = (0, *TEXT[:63])  # four pages
    wanted = [
        Request(prompt=(*common, *TEXT[n : n + 5]), sampling=Sampling(max_new_tokens=20, ignore_eos=True))
        for n in range(6)
    ]
    first = run(held, wanted[:1])
    sequences = [held.engine.submit(request) for request in wanted]
    held.engine.step()
    running = [one for one in held.engine.running.values() if one.pages]
    assert len(running) == 6
    assert len({tuple(one.pages[:4]) for one in running}) == 1
    assert all(store.pool.uses(page) == 6 for page in running[0].pages[:4])
    assert held.pool.used_pages - held.engine.pages.idle_pages == 4 + 6
    while held.engine.busy:
        held.engine.step()
        check(held)
    assert held.engine.totals.prefix_hits == 6 * 64
    assert list(sequences[0].made) == first[0]
    alone = serving(keep_prefixes=False)
    assert run(alone, wanted) == [list(one.made) for one in sequences]
    assert alone.engine.totals.prefix_hits == 0
    held.release()
    alone.release()


def test_the_next_request_finds_the_pages_of_the_last_one_in_its_slot() -> None:
    held = serving(keep_prefixes=False)
    ranges = held.pool.store.ranges  # type: ignore[attr-defined]
    run(held, requests(lengths=(60, 20)))
    assert held.pool.used_pages == 0
    assert held.pool.told()["waiting_pages"] == ranges.pool.held
    before = ranges.num_calls
    run(held, requests(lengths=(20, 60)))  # the other way round: best fit finds the slot that is long enough
    assert ranges.num_calls == before
    held.engine.wanted_pages = 8
    held.engine.fit_limit()
    assert held.pool.limit_pages == ranges.pool.held == 8
    held.release()


def test_nothing_is_mapped_in_steps_that_only_decode() -> None:
    held = serving(keep_prefixes=False, max_sequences=8)
    sequences = [held.engine.submit(request) for request in requests(made=100, lengths=(5, 9, 14, 2, 11, 7))]
    while any(not one.made for one in sequences):
        held.engine.step()
    prompts = held.pool.told()["mapped_in_steps"]
    assert prompts >= len(sequences)
    while held.engine.busy:
        held.engine.step()
        check(held)
    told = held.pool.told()
    assert told["mapped_in_steps"] == prompts
    assert told["mapped_beside_steps"] >= 6 * 5
    held.release()


def test_a_cancelled_request_frees_its_slot_and_hurts_nobody(paged: list[list[int]]) -> None:
    held = serving(max_sequences=4)
    sequences = [held.engine.submit(request) for request in requests()]
    for step in range(200):
        if step in (2, 5, 9):
            ended = held.engine.cancel((3, 1, 6)[(2, 5, 9).index(step)])
            assert ended is not None
        held.engine.step()
        check(held)
        if not held.engine.busy:
            break
    assert held.pool.store.num_active == 0  # type: ignore[attr-defined]
    assert held.engine.pages.available_pages == held.pool.limit_pages
    kept = [n for n in range(len(paged)) if n not in (1, 3, 6)]
    assert [list(sequences[n].made) for n in kept] == [paged[n] for n in kept]
    held.release()


def test_a_step_that_fails_ends_its_requests_and_no_others(
    paged: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = serving()
    for request in requests():
        held.engine.submit(request)
    held.engine.step()
    monkeypatch.setattr(SlotCache, "attend_rows", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        held.engine.step()
    assert len(held.engine.abandon()) == len(paged)
    monkeypatch.undo()
    assert held.pool.used_pages == held.engine.pages.idle_pages
    assert run(held, requests()) == paged
    held.release()


def test_the_budget_moves_while_requests_run() -> None:
    held = load_engine(
        DEMO_DIRECTORY,
        ServingSettings(weights="int8", context_tokens=512, token_budget=64, threads=1, kv=SMALL, exact=True),
        budget=Budget(tiers={"ram": resident_bytes(exact=True) + 60 * MB}), tokenizer=TOKENIZER,
    )  # fmt: skip
    # set aside at moments that depend on the heap: swapped, so that the bits are the same whenever that is
    held.engine.costs, held.engine._measures = Costs(seconds_per_token=1.0, seconds_per_page=1e-6), False
    wanted = [
        Request(prompt=(0, *(TEXT * 4)[n : n + 200]), sampling=Sampling(max_new_tokens=60, ignore_eos=True))
        for n in range(10)
    ]
    sequences = [held.engine.submit(request) for request in wanted]
    budgets = {10: 2 * MB, 40: 60 * MB, 60: 1 * MB}
    sizes = []
    for step in range(2000):
        if step in budgets:
            held.set_budget(held.least_budget_bytes() + budgets[step])
        held.govern()
        held.engine.step()
        check(held)
        sizes.append(held.pool.limit_pages)
        if not held.engine.busy:
            break
    assert max(sizes[15:40]) < 150 < min(sizes[9], sizes[45])
    assert max(sizes[65:]) < 150
    assert [one.finish for one in sequences] == ["length"] * len(wanted)
    with pytest.raises(DoesNotFit, match="the smallest that does is"):
        held.set_budget(held.least_budget_bytes() // 2)
    held.close_books()
    assert abs(ledger_error(held.ledger)) < 0.03
    plain = serving("float16", context_tokens=512, token_budget=64)
    others = [plain.engine.submit(request) for request in wanted]
    while plain.engine.busy:
        plain.engine.step()
    assert [list(one.made) for one in sequences] == [list(one.made) for one in others]
    plain.release()
    held.release()


@pytest.mark.parametrize(
    ("seed", "swap", "runs"), [(0, 0, 0), (1, 1 << 24, 0), (2, 1 << 24, 0), (3, 0, 0), (4, 0, 14), (5, 1 << 20, 20)]
)
def test_requests_come_and_go_at_random(seed: int, swap: int, runs: int) -> None:
    """runs: of pages that the system has mappings for; 0 for as many as it really has."""
    draw = random.Random(seed)
    held = serving(swap_bytes=swap, max_sequences=6, context_tokens=128)
    ranges = held.pool.store.ranges  # type: ignore[attr-defined]
    ranges.most_mappings = ranges.mappings + 16 * runs if runs else ranges.most_mappings
    held.engine.costs, held.engine._measures = Costs(seconds_per_token=1.0, seconds_per_page=1e-6), False
    alive: dict[int, Request] = {}
    done: list[tuple[Request, list[int]]] = []
    sequences = {}
    for _ in range(400):
        if draw.random() < 0.3 and len(alive) < 12:
            at = draw.choice((0, 0, 3, 9))
            request = Request(
                prompt=(0, *TEXT[at : at + draw.randint(1, 60)]),
                sampling=Sampling(max_new_tokens=draw.randint(1, 40), ignore_eos=True),
            )
            one = held.engine.submit(request)
            alive[one.id], sequences[one.id] = request, one
        if alive and draw.random() < 0.05:
            number = draw.choice(list(alive))
            held.engine.cancel(number)
            del alive[number]
        if draw.random() < 0.05:
            held.engine.wanted_pages = draw.randint(8, 40)
        held.engine.step()
        check(held)
        for number in [n for n in alive if sequences[n].status == "finished"]:
            done.append((alive.pop(number), list(sequences[number].made)))
    assert len(done) > 40
    assert sum(held.engine.totals.preempted.values()) > 0
    for number in list(alive):
        held.engine.cancel(number)
    check(held)
    assert held.pool.used_pages == held.engine.pages.idle_pages
    assert runs or held.engine.pages.available_pages == held.pool.limit_pages
    held.release()
    plain = serving("float16", max_sequences=6)
    again = [plain.engine.submit(request) for request, _ in done]
    while plain.engine.busy:
        plain.engine.step()
    assert [list(one.made) for one in again] == [made for _, made in done]
    plain.release()


@pytest.mark.parametrize(("swap", "by"), [(0, "recompute"), (1 << 24, "swap")])
def test_the_system_allows_few_mappings(paged: list[list[int]], swap: int, by: str) -> None:
    held = serving(swap_bytes=swap, keep_prefixes=False)
    held.engine.costs, held.engine._measures = Costs(seconds_per_token=1.0, seconds_per_page=1e-6), False
    ranges = held.pool.store.ranges  # type: ignore[attr-defined]
    ranges.most_mappings = ranges.mappings + 16 * 12  # three runs and what is left of three slots
    assert run(held, requests()) == paged
    assert held.engine.totals.preempted[by] > 0
    held.release()

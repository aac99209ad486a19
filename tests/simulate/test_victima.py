"""Address translation: the fast machine against the slow one, access by access, and what a toy would get wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.hardware.units import KIB, MIB
from memwall.simulate.access_traces import FLUSH_HOST, FLUSH_PROCESS, INVALIDATE, READ, WRITE, Trace, made_trace
from memwall.simulate.core_model import CacheLevel, CoreModel
from memwall.simulate.victima import (
    VARIANTS,
    Blocks,
    Machine,
    Simulation,
    Tlb,
    costly_pages,
    fit_corners,
    predicted_costly,
    scores,
    simulate,
    variant,
)
from memwall.simulate.victima_reference import SlowMachine

PAGE = 4 * KIB
TINY = Machine(
    core=CoreModel(
        data=CacheLevel(num_bytes=KIB, ways=2, cycles=4), code=CacheLevel(num_bytes=KIB, ways=2, cycles=4),
        second=CacheLevel(num_bytes=4 * KIB, ways=4, cycles=16), third=CacheLevel(num_bytes=8 * KIB, ways=4, cycles=35),
        outstanding_misses=3, window=40,
    ),
    data_tlb=Tlb(entries=4, ways=2, cycles=0), code_tlb=Tlb(entries=2, ways=2, cycles=0),
    second_tlb=Tlb(entries=8, ways=2, cycles=12), nested_tlb=Tlb(entries=4, ways=2, cycles=1),
    walk_caches=(Tlb(entries=4, ways=2, cycles=4), Tlb(entries=2, ways=2, cycles=4), Tlb(entries=2, ways=2, cycles=4)),
    window_instructions=300, software_ways=4,
)  # fmt: skip
"""Small enough for everything to be evicted within a thousand accesses."""
EXACT = Blocks(predictor=False, aware=False)


def drawn(seed: int, count: int = 1500, pages: int = 700) -> Trace:
    """Accesses of all kinds by two processes, near and far, in small and large pages."""
    draw = np.random.default_rng(seed)
    page = np.where(draw.random(count) < 0.5, draw.integers(0, 24, count), draw.integers(0, pages, count) * 37)
    kinds = draw.choice(6, count, p=(0.6, 0.25, 0.13, 0.014, 0.003, 0.003))
    return made_trace(
        "drawn", PAGE * page + draw.integers(0, PAGE, count), kinds=kinds, gaps=draw.integers(0, 12, count),
        depends=draw.integers(0, 5, count) * (draw.random(count) < 0.5), processes=draw.integers(0, 2, count),
    )  # fmt: skip


def reads(addresses: Any, **columns: Any) -> Trace:
    return made_trace("reads", np.asarray(addresses), **columns)


def run(trace: Trace, machine: Machine) -> Any:
    return simulate(trace, machine, warm=0.0)


# ---- the slow machine ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("virtualised", [False, True], ids=["native", "virtual"])
@pytest.mark.parametrize(
    "name", ["radix", "pom-tlb", "victima", "victima-all", "victima-srrip", "victima-walks", "victima-evictions", "l3"]
)
def test_the_fast_machine_is_the_slow_one(name: str, virtualised: bool) -> None:
    for seed, scattered in ((0, False), (1, True)):
        machine = replace(TINY, virtualised=virtualised, seed=seed, scattered=scattered)
        if name == "l3":
            machine = replace(machine, third_tlb=Tlb(entries=32, ways=4, cycles=20))
        elif name == "pom-tlb":
            machine = replace(machine, software_entries=64)
        else:
            machine = variant(name, machine)
        trace = drawn(seed, count=700)
        fast, slow = Simulation(machine), SlowMachine(machine.fields())
        for process, first, pages in trace[: len(trace) // 2].mapped_runs():  # the rest is mapped when it is touched
            fast._native.map(process, first, pages)
            slow.map(process, first, pages)
        cycles = np.zeros((2, len(trace)), np.uint32)
        fast._native.run(trace.addresses, trace.kinds, trace.gaps, trace.depends, trace.processes, *cycles)
        told = slow.run(trace)
        wrong = [at for at, row in enumerate(told) if tuple(cycles[:, at]) != row]
        assert not wrong, (wrong[0], told[wrong[0]], cycles[:, wrong[0]])
        assert {key: slow.counters[key] for key in fast.counters()} == fast.counters()
        pages = fast.walked_pages()
        assert pages[:, 2].sum() == fast.counters()["walks"]


def test_decisions_need_nothing_that_comes_later() -> None:
    trace, cycles = drawn(3), []
    for part in (trace, trace[:900]):
        simulation = Simulation(variant("victima", TINY))
        out = np.zeros((2, len(part)), np.uint32)
        simulation._native.run(part.addresses, part.kinds, part.gaps, part.depends, part.processes, *out)
        cycles.append(out)
    assert np.array_equal(cycles[0][:, :900], cycles[1])


def test_cycles_are_instructions_and_stalls() -> None:
    trace = drawn(4)
    for name in ("radix", "victima"):
        found = run(trace, variant(name, TINY))
        assert found["slots"] == found["instructions"] + found["data_stall_slots"] + found["translation_stall_slots"]
        assert found["instructions"] == trace.instructions
        read = [found[f"memory_reads_{why}"] for why in ("data", "walk", "background", "software")]
        assert found["memory_reads"] == sum(read)


# ---- what a toy would skip -----------------------------------------------------------------------------------------


def test_a_block_covers_eight_pages() -> None:
    small = replace(Machine(), large_pages=0.0)
    scan = reads(PAGE * np.arange(4096))
    radix, parked = run(scan, small), run(scan, replace(small, blocks=EXACT))
    assert radix["walks"] == 4096
    assert parked["walks"] == 4096 // 8
    assert parked["block_hits"] == 4096 - 4096 // 8
    large = run(reads(2 * MIB * np.arange(2048)), replace(Machine(), large_pages=1.0, blocks=EXACT))
    assert large["walks"] == 2048 // 8


def test_a_smaller_third_level_makes_walks_longer() -> None:
    draw = np.random.default_rng(0)
    trace = reads(8 * draw.integers(0, 64 * MIB, 60_000))
    walks = []
    for ways in (11, 4, 1):
        core = CoreModel(second=CacheLevel(num_bytes=256 * KIB, ways=16, cycles=16),
                         third=CacheLevel(num_bytes=ways * 128 * KIB, ways=ways, cycles=35))  # fmt: skip
        walks.append(simulate(trace, Machine(core=core)).share("walk_cycles", "walks"))
    assert walks[0] < walks[1] < walks[2]


def test_processes_that_share_page_numbers_do_not_share_translations() -> None:
    machine = replace(TINY, large_pages=0.0, blocks=EXACT)
    # process 0 parks page 0 and pushes it out of its TLBs; process 1 asks for the same page number
    others = [8 * PAGE * k for k in range(1, 24)]
    trace = reads([0, *others, 0, 0], processes=[0] * 24 + [1, 0])
    both = run(trace, replace(machine, core=CoreModel()))
    alone = run(trace[:24], replace(machine, core=CoreModel()))
    assert both["walks"] == alone["walks"] + 1
    assert both["block_hits"] == alone["block_hits"] + 1


@pytest.mark.parametrize("kind", [INVALIDATE, FLUSH_PROCESS, FLUSH_HOST])
@pytest.mark.parametrize("neighbour", [0, 3])
def test_nothing_is_hit_after_a_shootdown(kind: int, neighbour: int) -> None:
    """The whole block goes, so that a neighbour's translation in it is walked for again, too."""
    machine = replace(TINY, core=CoreModel(), large_pages=0.0, blocks=EXACT)
    others = [8 * PAGE * k for k in range(1, 24)]
    before = [0, *others]
    trace = reads([*before, 0, neighbour * PAGE], kinds=[READ] * 24 + [kind, READ])
    kept = reads([*before, neighbour * PAGE])
    assert run(kept, machine)["block_hits"] == 1
    found = run(trace, machine)
    assert (found["block_hits"], found["walks"]) == (0, 25)
    assert found["invalidated"] == (1 if kind == INVALIDATE else 24)


def test_blocks_of_translations_are_never_written_back() -> None:
    draw = np.random.default_rng(0)
    only_reads = reads(64 * draw.integers(0, MIB, 30_000))
    found = run(only_reads, replace(TINY, blocks=EXACT))
    assert found["block_drops"] > 1000
    assert found["memory_writes"] == found["second_writebacks"] == found["translation_writebacks"] == 0
    writes = replace(only_reads, kinds=np.full(len(only_reads), WRITE, np.uint8))
    radix, parked = run(writes, replace(TINY, third_tlb=None)), run(writes, replace(TINY, blocks=EXACT))
    lines = len(np.unique(only_reads.addresses))
    assert parked["translation_writebacks"] == 0
    assert parked["memory_writes"] == pytest.approx(radix["memory_writes"], rel=0.01)
    assert radix["memory_writes"] > lines / 2


def test_walks_for_evicted_entries_read_memory_off_the_critical_path() -> None:
    """Nine pages in one set of eight ways of the L2 TLB: the ninth evicts the first, whose leaf must be read."""
    machine = replace(
        Machine(), large_pages=0.0, second_tlb=Tlb(entries=8, ways=8, cycles=12), blocks=Blocks(on_walk=False),
        core=CoreModel(second=CacheLevel(num_bytes=64 * KIB, ways=1, cycles=16),
                       third=CacheLevel(num_bytes=64 * KIB, ways=1, cycles=35)),
    )  # fmt: skip
    pages = PAGE * 512 * 16 * np.arange(1, 10)
    found = run(reads(pages), machine)
    without = run(reads(pages), replace(machine, blocks=Blocks(on_walk=False, on_eviction=False)))
    assert found["background_walks"] == 1
    assert without["background_walks"] == without["memory_reads_background"] == 0
    assert found["memory_reads"] == without["memory_reads"] + found["memory_reads_background"]
    assert found["walks"] == without["walks"] == 9
    assert found["second_tlb_miss_cycles"] == without["second_tlb_miss_cycles"]
    assert found["block_inserts"] == 1


def test_a_page_is_parked_when_a_walk_of_it_has_read_memory() -> None:
    """The first walk of a block reads memory, (1, 1), and parks it; a walk that found its leaf cached does not."""
    machine = replace(Machine(), large_pages=0.0, blocks=Blocks())
    found = run(reads(PAGE * 8 * np.arange(4)), machine)
    assert (found["block_inserts"], found["refused"]) == (4, 0)
    unparked = replace(machine, blocks=Blocks(lower=(2, 1)))
    assert run(reads(PAGE * np.arange(8)), unparked)["refused"] == 8


def test_a_virtual_machine_knows_eight_frames_only_where_they_lie_together() -> None:
    base = replace(Machine(), large_pages=0.0, virtualised=True, blocks=EXACT)
    scan = reads(PAGE * np.arange(800))
    assert run(scan, base)["walks"] == 100
    assert run(scan, replace(base, scattered=True))["walks"] == 800
    assert run(scan, replace(base, blocks=None))["walk_steps"] > run(scan, Machine(large_pages=0.0))["walk_steps"]
    again = reads(PAGE * np.tile(512 * np.arange(100), 2))  # more tables than the nested TLB holds
    assert run(again, base)["nested_block_hits"] > 0


def test_a_core_overlaps_what_does_not_depend() -> None:
    lines = 64 * np.arange(0, 4000, 7)
    free, chained = (run(reads(lines, depends=depends, gaps=0), Machine()) for depends in (0, 1))
    assert chained.cycles > 5 * free.cycles
    narrow = run(reads(lines, gaps=0), Machine(core=CoreModel(outstanding_misses=1)))
    assert narrow.cycles > 3 * free.cycles


# ---- predictor -----------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 50)), min_size=3, max_size=40))
def test_fitted_corners_are_the_best(rows: list[tuple[int, int, int]]) -> None:
    pages = np.array([(a, b, a, b, c) for a, b, c in rows])
    truth = costly_pages(pages)

    def f1(lower: tuple[int, int], upper: tuple[int, int]) -> float:
        return scores(predicted_costly(pages, lower, upper), truth)["f1"]

    best = max(f1((a, b), (c, d)) for a in range(4) for b in range(4) for c in range(a, 4) for d in range(b, 4))
    assert f1(*fit_corners(pages, (3, 3))) == pytest.approx(best)


def test_scores_by_hand() -> None:
    told, truth = np.array([True, True, False, False]), np.array([True, False, True, False])
    assert scores(told, truth) == {"recall": 0.5, "accuracy": 0.5, "precision": 0.5, "f1": 0.5}


# ---- settings ------------------------------------------------------------------------------------------------------


def test_every_variant_is_a_machine() -> None:
    trace = drawn(5, count=300)
    assert {run(trace, variant(name, Machine()))["accesses"] for name in VARIANTS} == {int((trace.kinds < 2).sum())}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Tlb(entries=100, ways=12, cycles=1).fields("L2 TLB"), "power of two of sets; 96 are"),
        (lambda: Machine(large_pages=1.5), "between 0 and 1"),
        (lambda: Machine(software_entries=1000), "POM-TLB"),
        (lambda: Machine(walkers=0), "1 to 64"),
        (lambda: CoreModel(window=1000), "1 to 255"),
        (lambda: CoreModel(hertz=0), "positive"),
        (lambda: Blocks(lower=(3, 1), upper=(2, 12)), "lower corner below"),
        (lambda: Blocks(upper=(8, 12)), "between 0 and 7"),
        (lambda: Blocks(bypass_misses=-1), "0 or more"),
        (lambda: variant("victim", Machine()), "there are radix"),
        (lambda: simulate(drawn(0, count=5), Machine(), warm=1.0), "1 excluded"),
    ],
)
def test_bad_settings(make: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        make()

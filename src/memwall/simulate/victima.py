"""Translations parked in the second-level cache: what that spares of page walks, beside larger TLBs and one in memory.

*Source*: Victima: Drastically Increasing Address Translation Reach by Leveraging Underutilized Cache Resources,
Kanellopoulos, 2023, MICRO, arXiv 2310.04158; official simulator CMU-SAFARI/Victima (Sniper).
*Idea*: a line of leaf entries that a walk brought into the L2 cache is turned into a TLB block: eight translations,
looked up by page number while a walk begins, which a hit aborts. Two counters of each entry (walks, walks that read
memory) say which pages deserve that; blocks of translations outlive data while TLBs miss much.
*Units and shapes*: a trace is `access_traces.Trace`; cycles of the core, bytes, 4 KiB and 2 MiB pages. Counters are
those of `kernels/cpp/translation.cpp`, which `victima_reference` repeats slowly.
*Decided here*, where the paper was not at hand or is silent. Walkers' reads begin at L2. Probes need no walker. What
turns into a block leaves the place of its physical address for that of its page number. An aborted walk has read
nothing yet. Entries that map nothing, or another size, are no translations. Only walks on the critical path count for
an entry; counters cost no traffic. Background walks take memory's channel, no walker. Misses per kilo of instructions
are those of the last 50,000. In a virtual machine the guest's leaf line becomes the TLB block, the host's the nested
one, and of eight pages those are known whose frames stand in the two lines that the walk read. Arrays are mapped in
order before a trace begins; whether a 2 MiB region is one page is drawn by its number. A look-up in the TLB in memory
is one read of the right line, whatever the size of the page.
*Cost*: about 0.2 microseconds an access; 16 bytes a mapped page.
*Holds when*: page numbers have 36 bits; one core; up to 64 GiB in small pages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from memwall import _native
from memwall.errors import InputError
from memwall.hardware.units import KIB
from memwall.simulate.access_traces import Trace
from memwall.simulate.core_model import CoreModel, checked_sets

PAGE_BYTES = 4 * KIB
COSTLY_SHARE = 0.4
"""Of pages, by what their walks took in all: those the predictor should call costly (paper)."""
RUN_ACCESSES = 1 << 20
"""Of a run at once, between reports of progress."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tlb:
    """Entries of both page sizes, LRU. cycles: added by a lookup; 0 where the first cache's own hide it."""

    entries: int
    ways: int
    cycles: int

    def fields(self, name: str) -> dict[str, int]:
        """For the simulator."""
        sets = checked_sets(name, self.entries, self.ways)
        return {f"{name}_sets": sets, f"{name}_ways": self.ways, f"{name}_cycles": self.cycles}


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """What is parked, and how it is kept. Corners: (walks, walks to memory) of pages that deserve it, both included."""

    on_walk: bool = True
    on_eviction: bool = True
    predictor: bool = True
    aware: bool = True
    lower: tuple[int, int] = (1, 1)
    upper: tuple[int, int] = (7, 12)
    frequency_bits: int = 3
    cost_bits: int = 4
    bypass_misses: int = 5
    """L2 misses of data per 1,000 instructions above which everything is parked."""
    pressure_misses: int = 5
    """Misses of the L2 TLB per 1,000 instructions above which blocks of translations are favoured."""

    def __post_init__(self) -> None:
        most = (2**self.frequency_bits - 1, 2**self.cost_bits - 1)
        pairs = zip(self.lower, self.upper, most, strict=True)
        if not all(0 <= low <= high <= end for low, high, end in pairs) or max(most) > 255:
            raise InputError(
                f"corners {self.lower} and {self.upper}: walks lie between 0 and {most[0]}, those to memory between "
                f"0 and {most[1]}, the lower corner below the upper one"
            )
        if min(self.bypass_misses, self.pressure_misses) < 0:
            raise InputError("thresholds of misses are 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A core and its translation. blocks: None without Victima; software_entries: of a POM-TLB, 0 without."""

    core: CoreModel = field(default_factory=CoreModel)
    data_tlb: Tlb = Tlb(entries=64, ways=4, cycles=0)
    code_tlb: Tlb = Tlb(entries=128, ways=8, cycles=0)
    second_tlb: Tlb = Tlb(entries=1536, ways=12, cycles=12)
    third_tlb: Tlb | None = None
    nested_tlb: Tlb = Tlb(entries=64, ways=4, cycles=1)
    walk_caches: tuple[Tlb, Tlb, Tlb] = (
        Tlb(entries=32, ways=4, cycles=4), Tlb(entries=16, ways=4, cycles=4), Tlb(entries=16, ways=4, cycles=4),
    )  # fmt: skip
    """Of entries at level 2, 3 and 4."""
    walkers: int = 50
    """Walks at once: that many in the official simulator's configuration, so no limit; real cores have 2 to 4."""
    blocks: Blocks | None = None
    software_entries: int = 0
    software_ways: int = 16
    virtualised: bool = False
    large_pages: float = 0.3
    scattered: bool = False
    """Whether neighbouring pages have frames far apart; else arrays lie in memory as they were filled."""
    window_instructions: int = 50_000
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.large_pages <= 1:
            raise InputError(f"a share of {self.large_pages:g} in large pages; it lies between 0 and 1")
        if not (1 <= self.walkers <= 64 and self.window_instructions >= 1):
            raise InputError(f"{self.walkers} walkers; 1 to 64 can be simulated")
        self.fields()

    def fields(self) -> dict[str, int]:
        """For the simulator; InputError for sizes without a power of two of sets."""
        blocks = self.blocks or Blocks()
        sets = checked_sets("POM-TLB", self.software_entries, self.software_ways) if self.software_entries else 0
        third = {"third_tlb_sets": 0, "third_tlb_ways": 0, "third_tlb_cycles": 0}
        found = {
            **self.core.fields(), **self.data_tlb.fields("data_tlb"), **self.code_tlb.fields("code_tlb"),
            **self.second_tlb.fields("second_tlb"), **self.nested_tlb.fields("nested_tlb"),
            **(self.third_tlb.fields("third_tlb") if self.third_tlb else third),
            "walkers": self.walkers, "software_sets": sets, "software_ways": self.software_ways if sets else 0,
            "virtualised": self.virtualised, "large_per_mille": round(1000 * self.large_pages),
            "scattered": self.scattered, "seed": self.seed, "window_instructions": self.window_instructions,
            "victima": self.blocks is not None, "on_walk": blocks.on_walk, "on_eviction": blocks.on_eviction,
            "predictor": blocks.predictor, "aware": blocks.aware, "frequency_low": blocks.lower[0],
            "cost_low": blocks.lower[1], "frequency_high": blocks.upper[0], "cost_high": blocks.upper[1],
            "frequency_most": 2**blocks.frequency_bits - 1, "cost_most": 2**blocks.cost_bits - 1,
            "bypass_misses": blocks.bypass_misses, "pressure_misses": blocks.pressure_misses,
        }  # fmt: skip
        for level, cache in enumerate(self.walk_caches, 2):
            found |= cache.fields(f"walk_cache_{level}")
        return {name: int(value) for name, value in found.items()}


def _larger(entries: int) -> Callable[[Machine], Machine]:
    return lambda machine: replace(machine, second_tlb=Tlb(entries=entries, ways=16, cycles=machine.second_tlb.cycles))


def _third(cycles: int) -> Callable[[Machine], Machine]:
    return lambda machine: replace(machine, third_tlb=Tlb(entries=64 * KIB, ways=16, cycles=cycles))


def _parked(**settings: Any) -> Callable[[Machine], Machine]:
    return lambda machine: replace(machine, blocks=replace(machine.blocks or Blocks(), **settings))


VARIANTS: dict[str, Callable[[Machine], Machine]] = {
    "radix": lambda machine: replace(machine, blocks=None),
    "pom-tlb": lambda machine: replace(machine, blocks=None, software_entries=64 * KIB),
    "victima": _parked(),
    "victima-all": _parked(predictor=False),
    "victima-srrip": _parked(aware=False),
    "victima-walks": _parked(on_eviction=False),
    "victima-evictions": _parked(on_walk=False),
    **{f"tlb-{thousand}k": _larger(thousand * KIB) for thousand in (2, 4, 8, 16, 32, 64, 128)},
    **{f"l3tlb-{cycles}": _third(cycles) for cycles in (15, 20, 25, 30, 35, 40)},
}
"""What `--variants` takes: page walks alone, a TLB in memory, Victima, Victima without one of its parts, ideal TLBs."""


def variant(name: str, machine: Machine) -> Machine:
    """A machine with that technique; InputError for a name that is not in the table."""
    if name not in VARIANTS:
        raise InputError(f"no variant {name!r}; there are {', '.join(VARIANTS)}")
    return VARIANTS[name](machine)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Counters of a run, those of its first part left out."""

    trace: str
    variant: str
    width: int
    counters: dict[str, int]

    def __getitem__(self, name: str) -> int:
        return self.counters[name]

    def per_kilo(self, name: str) -> float:
        """So many of what a counter counts in 1,000 instructions."""
        return 1000 * self[name] / max(self["instructions"], 1)

    def share(self, name: str, of: str) -> float:
        """One counter by another, 0 where that is 0."""
        return self[name] / self[of] if self[of] else 0.0

    @property
    def cycles(self) -> float:
        """Of the core: instructions at full width, and stalls that are exposed."""
        return self["slots"] / self.width

    @property
    def instructions_per_cycle(self) -> float:
        """Modelled."""
        return self["instructions"] / self.cycles if self.cycles else 0.0

    @property
    def reach_bytes(self) -> float:
        """That translations in the cache cover, the mean over windows."""
        return self.share("reach_bytes_sum", "samples")

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return {
            "trace": self.trace, "variant": self.variant, "cycles": self.cycles,
            "instructions_per_cycle": self.instructions_per_cycle,
            "data_stall_cycles": self["data_stall_slots"] / self.width,
            "translation_stall_cycles": self["translation_stall_slots"] / self.width,
            "tlb_misses_per_kilo": self.per_kilo("second_tlb_misses"),
            "mean_tlb_miss_cycles": self.share("second_tlb_miss_cycles", "second_tlb_misses"),
            "mean_walk_cycles": self.share("walk_cycles", "walks"), "reach_bytes": self.reach_bytes,
            "data_misses_per_kilo": self.per_kilo("second_misses_data"), "counters": dict(self.counters),
        }  # fmt: skip


class Simulation:
    """A machine on the way through traces; what is cached stays between them."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._native = _native.TranslationMachine(machine.fields())

    def map(self, trace: Trace) -> None:
        """Maps what a trace touches, in order, as if it had been filled before. InputError beyond 64 GiB."""
        try:
            for process, first_page, pages in trace.mapped_runs():
                self._native.map(process, first_page, pages)
        except ValueError as error:
            raise InputError(f"{trace.name}: {error}") from None

    def run(self, trace: Trace) -> None:
        """All accesses in order."""
        try:
            self._native.run(trace.addresses, trace.kinds, trace.gaps, trace.depends, trace.processes)
        except ValueError as error:
            raise InputError(f"{trace.name}: {error}") from None

    def counters(self) -> dict[str, int]:
        """Of all that has been run."""
        return dict(self._native.counters())

    def walked_pages(self) -> np.ndarray:
        """int64 [pages, 5]: frequency, cost, walks, walks to memory, cycles of each page that was walked."""
        return np.array(self._native.walked_pages(), np.int64).reshape(-1, 5)


def simulate(
    trace: Trace,
    machine: Machine,
    *,
    name: str = "",
    warm: float = 0.25,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """A trace on a machine that begins empty; the first `warm` of it fills caches and is not counted."""
    if not 0 <= warm < 1:
        raise InputError(f"a share of {warm:g} to warm up with; it lies between 0 and 1, 1 excluded")
    simulation = Simulation(machine)
    simulation.map(trace)
    cut = int(warm * len(trace))
    before: dict[str, int] = {}
    for first in (*range(0, cut, RUN_ACCESSES), *range(cut, len(trace), RUN_ACCESSES)):
        if first == cut:
            before = simulation.counters()
        end = min(first + RUN_ACCESSES, cut if first < cut else len(trace))
        simulation.run(trace[first:end])
        if progress is not None:
            progress(end, len(trace))
    counters = {key: value - before.get(key, 0) for key, value in simulation.counters().items()}
    return Result(trace=trace.name, variant=name, width=machine.core.width, counters=counters)


# ---- which translations deserve a place ----------------------------------------------------------------------------


def costly_pages(pages: np.ndarray) -> np.ndarray:
    """bool: pages (as `Simulation.walked_pages` gives them) whose walks took longest, the upper 40 %."""
    return pages[:, 4] > np.quantile(pages[:, 4], 1 - COSTLY_SHARE)


def predicted_costly(pages: np.ndarray, lower: tuple[int, int], upper: tuple[int, int]) -> np.ndarray:
    """bool: pages whose counters lie in the rectangle."""
    return np.all((pages[:, :2] >= lower) & (pages[:, :2] <= upper), axis=1)


def scores(told: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Recall, accuracy, precision and F1 of a prediction."""
    right = int(np.sum(told & truth))
    recall, precision = right / max(int(truth.sum()), 1), right / max(int(told.sum()), 1)
    return {
        "recall": recall, "accuracy": float(np.mean(told == truth)), "precision": precision,
        "f1": 2 * recall * precision / max(recall + precision, 1e-12),
    }  # fmt: skip


def fit_corners(pages: np.ndarray, most: tuple[int, int] = (7, 15)) -> tuple[tuple[int, int], tuple[int, int]]:
    """The rectangle of counters with the best F1 on these pages, the smallest of equal ones."""
    truth = costly_pages(pages)
    sums = np.zeros((2, most[0] + 2, most[1] + 2))
    for kind, chosen in enumerate((truth, np.ones_like(truth))):
        np.add.at(sums[kind], (pages[chosen, 0] + 1, pages[chosen, 1] + 1), 1)
    sums = sums.cumsum(axis=1).cumsum(axis=2)
    best, found = -1.0, ((0, 0), most)
    for low in np.ndindex(most[0] + 1, most[1] + 1):
        corner = sums[:, low[0] + 1 :, low[1] + 1 :] - sums[:, low[0] : low[0] + 1, low[1] + 1 :]
        inside = corner - sums[:, low[0] + 1 :, low[1] : low[1] + 1] + sums[:, low[0], low[1]][:, None, None]
        f1 = 2 * inside[0] / np.maximum(inside[1] + truth.sum(), 1)
        place = np.unravel_index(int(np.argmax(f1)), f1.shape)
        if f1[place] > best + 1e-12:
            best = float(f1[place])
            found = (low[0], low[1]), (low[0] + int(place[0]), low[1] + int(place[1]))
    return found

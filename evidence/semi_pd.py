"""semi-PD's claims: memory, overlap, hand-over, switches and interference in real processes on a random model; models,
controller and disaggregation at equal memory on a virtual device (the same scheduler, pages and bookkeeping).

Real part: a random Llama (12 layers of 768; 6 of 512 with --quick), int8, 2 threads. Its load has ShareGPT's lengths
(log-normal by medians and means of Nexus' table) scaled by 1/4, Poisson arrivals.

Rates are told by what chunked prefill serves with 90 % of the requests within both limits, found by halving: half of
that, all of it, and 1.55 times as much, which is what the paper's semi-PD serves (against split-fuse). Limits are 7.5
times one request's latencies alone, as in the paper.

Virtual part: a device of 190 TFLOP/s and 1.7 TB/s with saturating shares, Llama-3-8B's sizes, 40 GB for weights and
keys and values. Disaggregation has two copies of the weights, half of what is left on either side, half of the compute,
and 25 GB/s between.

What does not hold there, and why: up to what it serves within limits, chunked prefill has the lowest time to the first
token. Its iteration reads the weights once for prompts and tokens, and has the whole device (82 % of the peak by the
saturation); beside a decode worker that keeps 20 to 30 % of the shares prefill has 70 to 74 %. So no share whatever
can give it less: at 10 requests/s P90 is 0.20 s, and 0.22 to 0.26 s with fixed shares of 80/20 to 75/25; it is the time
per token that falls, from 28 to 16 ms. From 0.95 of chunked prefill's capacity on the order turns, since tokens there
cost prompts their place in the iteration: at 17 requests/s 0.96 s and 104 ms against 0.78 s and 37 ms with 85/15.

`--data` is not used.
"""

from __future__ import annotations

import dataclasses
import os
import random
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import Lock
from pathlib import Path
from typing import Any

import numpy as np

from memwall.claims import Claim, Progress, main, not_run
from memwall.engine import Sampling
from memwall.engine.base import PHASES, Limits, Scheduler, Shares, State, Step, Window, Work
from memwall.engine.executor import Entry
from memwall.engine.fcfs import FirstComeFirstServed
from memwall.engine.phase_device import Device, ModelSize, colocated_engine, segments, virtual_engine
from memwall.engine.phase_loading import PhaseSettings
from memwall.engine.phase_study import LONG, SHAREGPT, Figures, Lengths, arrivals, r_squared, serve_all
from memwall.engine.phased import Done, PhasedEngine
from memwall.engine.phases import Split, plan_phases
from memwall.engine.semi_pd import SemiPD, percentile
from memwall.engine.sequence import Request
from memwall.engine.sequence import Sequence as Running
from memwall.engine.serving import Serving, ServingSettings, load_engine
from memwall.engine.simulated import Arrival
from memwall.memory.pages import Pages
from memwall.models.random_llama import write_random_llama

HALVES = Shares(prefill=50, decode=50)
RISING = (0.5, 1.0, 1.55)
"""Rates by what chunked prefill serves with 90 % of the requests within both limits: the paper's semi-PD serves 1.55
times as many so, and rates rise to that."""
HALVINGS = 4
Tick = Callable[[str], None]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    layers: int = 12
    hidden: int = 768
    intermediate: int = 2048
    requests: int = 100
    virtual_requests: int = 240
    operations: int = 1_000_000
    cycles: int = 2
    seconds: float = 40.0
    splits: tuple[int, ...] = (20, 30, 40, 50, 60, 70, 80)


FULL = Sizes()
QUICK = Sizes(
    layers=6,
    hidden=512,
    intermediate=1536,
    requests=12,
    virtual_requests=60,
    operations=100_000,
    cycles=1,
    seconds=30.0,
    splits=(40, 60, 70),
)

# ---- a real model --------------------------------------------------------------------------------------------------


def write_model(folder: Path, sizes: Sizes) -> Path:
    """A random Llama."""
    write_random_llama(
        folder, hidden=sizes.hidden, intermediate=sizes.intermediate, layers=sizes.layers, positions=4096
    )
    return folder


def start(model: Path, phases: PhaseSettings | None, scheduler: Scheduler | None = None) -> Serving:
    settings = ServingSettings(
        weights="int8", context_tokens=2048, token_budget=256, max_sequences=16, threads=2, keep_prefixes=False,
        phases=phases,
    )  # fmt: skip
    return load_engine(model, settings, scheduler=scheduler)


def phased(serving: Serving) -> PhasedEngine:
    assert isinstance(serving.engine, PhasedEngine)
    return serving.engine


def real_load(sizes: Sizes, rate: float, seed: int) -> list[Arrival]:
    return arrivals([(SHAREGPT, 1.0)], rate, sizes.requests, seed, scale=0.25)


def copies(serving: Serving) -> tuple[int, int]:
    """(bytes of the weights' and pages' mappings that are private to some worker, bytes that they share)."""
    assert serving.workers is not None
    own = shared = 0
    for region in (*serving._loaded.weights.regions, serving.pool._region):
        assert region is not None
        assert region._pages is not None
        for pid in serving.workers.pids:
            inside = False
            for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
                name, _, rest = line.partition(":")
                if "-" in line.split()[0]:
                    begin, end = (int(part, 16) for part in line.split()[0].split("-"))
                    inside = begin <= region._pages._address < end
                elif inside and name.startswith("Private_"):
                    own += int(rest.split()[0]) * 1024
                elif inside and name.startswith("Shared_"):
                    shared += int(rest.split()[0]) * 1024
    return own, shared


def memory_claims(model: Path, sizes: Sizes) -> Iterator[Claim]:
    held = start(model, PhaseSettings(shares=HALVES))
    engine, seen, moved, before = phased(held), [], 0, {}  # type: ignore[var-annotated]

    def watch(done: Done) -> None:
        nonlocal moved
        seen.append(done)
        for entry in done.batch:
            one = entry.sequence
            old = before.get(one.id, [])
            moved += one.status == "running" and one.pages[: len(old)] != old
            before[one.id] = list(one.pages) if one.status == "running" else []

    engine.on_done = watch
    serve_all(engine, real_load(sizes, 1000.0, 1), held.govern)
    own, shared = copies(held)
    assert held.workers is not None
    memory = held.workers.measure()
    weights = sum(row.nbytes for row in held.ledger.rows() if row.owner.startswith("weights"))
    yield Claim(
        claim="one copy of the weights and of keys and values: no worker has a page of them to itself",
        measured=f"{own / 1e6:.2f} MB private of {shared / 1e6:.0f} MB mapped by 3 processes; all hold "
        f"{memory['held'] / 1e6:.0f} MB, the engine shows {memory['engine'] / 1e6:.0f}, weights {weights / 1e6:.0f} MB",
        required="private at most 1 % of the weights",
        passed=own <= 0.01 * weights,
    )
    swapped = held.engine.swap.written_bytes if held.engine.swap is not None else 0
    yield Claim(
        claim="a prompt is handed over by its page numbers: no key or value is copied",
        measured=f"{moved} of {len(before)} requests changed a page; {swapped} bytes written elsewhere",
        required="0 and 0",
        passed=moved == 0 and swapped == 0,
    )
    both = [done for done in seen if done.ended > done.began]
    # while both have work: up to the last prompt
    end = max(done.ended for done in both if done.phase == "prefill")
    begin = min(done.began for done in both if done.phase == "decode")
    busy = sum(max(min(done.ended, end) - max(done.began, begin), 0.0) for done in both) / max(end - begin, 1e-9)
    cpu = sum(done.cpu_seconds for done in both if begin <= done.began and done.ended <= end) / max(end - begin, 1e-9)
    yield Claim(
        claim="prefill and decode compute at the same time",
        measured=f"busy sum {busy:.2f}, processor time {cpu:.2f} cores, while both had work",
        required="busy sum above 1.2 and more than 1.2 cores",
        passed=busy > 1.2 and cpu > 1.2,
    )
    held.release()


def batch_of(engine: PhasedEngine, phase: str, count: int) -> list[Entry]:
    """A chunk, or a step of 8 sequences that have `count` tokens each."""
    found = []
    for number in range(1 if phase == "prefill" else 8):
        one = Running(id=-1 - number, request=Request(prompt=(5,) * count), arrival=0.0, eos=())
        one.pages = engine.pages.take(engine.limits.pages(count))
        found.append(Entry(one, 0, count, True) if phase == "prefill" else Entry(one, count - 1, 1, True))
    return found


def paced(engine: PhasedEngine, phase: str, batch: list[Entry], share: int, seconds: float) -> tuple[float, float]:
    """(iterations a second, cores' worth of processor time) of one phase alone with a share."""
    workers = engine.workers
    workers.switch(Shares(prefill=share, decode=share))
    workers.run_as(phase, batch)  # type: ignore[attr-defined]
    done: list[Done] = []
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or len(done) < 3:
        workers.start(phase, batch)  # type: ignore[arg-type]
        while not (some := workers.collect()):
            pass
        done += some
    wall = done[-1].ended - done[0].began
    return len(done) / wall, sum(one.cpu_seconds for one in done) / wall


def share_claims(model: Path, sizes: Sizes) -> Iterator[Claim]:
    """Quotas, one phase at a time: rates and processor time by share. All shares in turn, several times, and medians
    count: measured once each, a second in which the machine was busy elsewhere could be taken for a share.
    """
    shares, rounds = (25, 50, 75, 100), 1 if sizes is QUICK else 5
    held = start(model, PhaseSettings(shares=HALVES, fresh=False))
    engine = phased(held)
    held.govern()
    engine.fit_limit()
    told: dict[tuple[str, int], list[tuple[float, float]]] = {(phase, s): [] for phase in PHASES for s in shares}
    for phase in PHASES:
        batch = batch_of(engine, phase, 256)
        for _ in range(rounds):
            for share in shares:
                told[phase, share].append(paced(engine, phase, batch, share, 0.5))
        for entry in batch:
            engine.pages.release(entry.sequence.pages)
    held.release()
    kept = {
        (phase, share): statistics.median(
            one / whole for (one, _), (whole, _) in zip(told[phase, share], told[phase, 100])
        )
        for phase, share in told
    }
    off = max(abs(kept[phase, share] / (share / 100) - 1) for phase in PHASES for share in (50, 75))
    used = max(
        statistics.median(cores for _, cores in told[phase, share]) / (share / 100 * 2)
        for phase in PHASES
        for share in (25, 50, 75)
    )
    yield Claim(
        claim="shares hold within an iteration: a phase's rate follows its share of the processor's time",
        measured="rates against 100 %, medians of "
        f"{rounds} rounds - "
        + "; ".join(f"{phase} " + ", ".join(f"{s} %: {kept[phase, s]:.2f}" for s in shares) for phase in PHASES)
        + f"; processor time at most {used:.2f} of the quota",
        required="rates within 25 % of the share at 50 and 75 %, processor time at most 1.1 of the quota",
        passed=off <= 0.25 and used <= 1.1,
    )
    points = [(1 / share, statistics.median(1 / rate for rate, _ in told["decode", share])) for share in shares]
    fit = r_squared(points)
    yield Claim(
        claim="time per token over 1 / y is a line with duty-cycle shares",
        measured=f"R^2 {fit:.4f} over shares {shares}",
        required="above 0.95",
        passed=fit > 0.95,
    )


def capacity(figures: Figures) -> float:
    """Requests a second that prompts were begun to be answered at, of a load that was there at once: what is left to be
    answered in the end keeps no batch full and is not counted.
    """
    return len(figures.first) / max(figures.first)


def within_limits(attained: Callable[[float], float], most: float) -> float:
    """The rate up to which 90 % of the requests are within limits, by halving what lies below the capacity."""
    low, high = 0.0, most
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if attained(middle) >= 0.9 else (low, middle)
    return max(low, most / 2**HALVINGS)


def interference_claim(model: Path, sizes: Sizes, tick: Tick) -> Claim:
    """Real processes against chunked prefill in one, at the same loads."""
    one = start(model, None)
    serve_all(one.engine, real_load(sizes, 1000.0, 2)[: sizes.requests // 4], one.govern)
    most = capacity(serve_all(one.engine, real_load(sizes, 1000.0, 3), one.govern))
    alone = serve_all(one.engine, [dataclasses.replace(real_load(sizes, 1.0, 4)[0], at=0.0)], one.govern)
    limits = (7.5 * alone.first_mean, 7.5 * alone.token_mean)
    tick("what chunked prefill serves within limits")
    held = within_limits(
        lambda rate: serve_all(one.engine, real_load(sizes, rate, 39), one.govern).attained(*limits), most
    )
    loads = [real_load(sizes, factor * held, 40 + number) for number, factor in enumerate(RISING)]
    chunked = []
    for factor, load in zip(RISING, loads):
        tick(f"chunked prefill at {factor} of that")
        chunked.append(serve_all(one.engine, load, one.govern))
    one.release()
    scheduler = SemiPD(first_seconds=limits[0], token_seconds=limits[1])
    apart = []
    for factor, load in zip(RISING, loads):
        tick(f"semi-PD at {factor}")
        two = start(model, PhaseSettings(shares=scheduler.start), scheduler)
        serve_all(two.engine, real_load(sizes, 1000.0, 2)[: sizes.requests // 4], two.govern)
        apart.append(serve_all(two.engine, load, two.govern))
        two.release()

    def row(figures: Figures) -> str:
        return (
            f"{figures.first_at(90):.3f} s {1e3 * figures.token_at(90):.1f} ms ({figures.attained(*limits):.0%} "
            "within 7.5 times one request's)"
        )

    return Claim(
        claim="real processes against chunked prefill in one, ShareGPT's lengths, rising rate: the lowest P90 of both "
        "latencies",
        measured="; ".join(
            f"{factor * held:.1f} requests/s: {row(ours)}, chunked {row(theirs)}"
            for factor, ours, theirs in zip(RISING, apart, chunked)
        )
        + f"; chunked prefill can serve {most:.1f}, and {held:.1f} within limits",
        required="both below at the two higher rates",
        passed=all(
            ours.first_at(90) < theirs.first_at(90) and ours.token_at(90) < theirs.token_at(90)
            for ours, theirs in list(zip(apart, chunked))[1:]
        ),
    )


def switch_claims(model: Path, sizes: Sizes) -> Iterator[Claim]:
    """Longest time without an iteration while shares change: in the background, and by stopping all."""
    # no more than run together: chunks of prompts then do not depend on when answers end
    asked = real_load(dataclasses.replace(sizes, requests=16), 1000.0, 7)
    plain = start(model, PhaseSettings(shares=HALVES))
    want = tokens(phased(plain), asked, plain, lambda done: None)
    plain.release()
    held = start(model, PhaseSettings(shares=HALVES))
    engine, spans = phased(held), []  # type: ignore[var-annotated]

    def watch(done: Done) -> None:
        spans.append((done.began, done.ended, done.phase))
        if len(spans) % 25 == 0 and engine.workers.preparing is None:
            engine.switches += 1
            engine.workers.switch(
                Shares(prefill=70 - 20 * (engine.switches % 3), decode=30 + 20 * (engine.switches % 3))
            )

    got = tokens(engine, asked, held, watch)
    ordered, last, gap = sorted(spans), min(spans)[1], 0.0
    for began, ended, _ in ordered:
        gap, last = max(gap, began - last), max(last, ended)
    # the slowest of an ordinary iteration is what one worker alone would leave open
    longest = max(ended - began for began, ended, _ in spans)
    began = time.perf_counter()
    held.release()
    again = start(model, PhaseSettings(shares=HALVES))  # the naive way: stop, read the model again, start
    naive = time.perf_counter() - began
    again.release()
    yield Claim(
        claim="workers with new shares are made in the background and each phase changes over by itself",
        measured=f"{engine.switches} switches: at most {1e3 * gap:.1f} ms without an iteration, the longest iteration "
        f"takes {1e3 * longest:.1f} ms; stopping and loading again takes {naive:.2f} s",
        required="no gap longer than one iteration, and at least 2 switches; the naive way is longer",
        passed=engine.switches >= 2 and gap <= longest < naive,
    )
    yield Claim(
        claim="tokens are the same across switches",
        measured=f"{sum(a == b for a, b in zip(got, want))} of {len(want)} requests, half of them drawn at random",
        required="all",
        passed=got == want,
    )


def tokens(
    engine: PhasedEngine, asked: Sequence[Arrival], held: Serving, watch: Callable[[Done], None]
) -> list[tuple[int, ...]]:
    engine.on_done = watch
    found = []
    for number, arrival in enumerate(asked):
        drawn = Sampling(max_new_tokens=24, ignore_eos=True, temperature=0.8 * (number % 2), seed=number)
        found.append(engine.submit(dataclasses.replace(arrival.request, sampling=drawn)))
    while engine.busy:
        held.govern()
        engine.step()
    return [tuple(one.made) for one in found]


# ---- two allocators ------------------------------------------------------------------------------------------------


class SharedPages:
    """A free list in shared memory: [count of free pages, pages...] and a page's owner. With a lock, query, take and
    update are one; without it two processes may take the same page.
    """

    def __init__(self, count: int, lock: Any) -> None:
        memory = Pages(8 * (2 * count + 2), huge=False, shared=True)
        memory.populate(0, memory.capacity_bytes)
        words = memory.view((2 * count + 2,), np.dtype(np.int64), 0)
        self.words, self.owner, self.lock = memoryview(words[: count + 1]), memoryview(words[count + 1 :]), lock
        self.words[0] = count
        for page in range(count):
            self.words[page + 1] = page

    def work(self, who: int, operations: int, seed: int) -> int:
        """Takes and gives back pages at random; how often something was wrong."""
        draw, held, wrong = random.Random(seed), [], 0
        for _ in range(operations // 2):
            if held and draw.random() < 0.5:
                page = held.pop()
                wrong += self.owner[page] != who
                self.owner[page] = 0
                self._atomic(lambda page=page: self._give(page))  # type: ignore[misc]
            elif (page := self._atomic(self._take)) is not None:
                wrong += self.owner[page] != 0
                self.owner[page] = who
                held.append(page)
        for page in held:
            self.owner[page] = 0
            self._atomic(lambda page=page: self._give(page))  # type: ignore[misc]
        return wrong

    def _atomic(self, do: Callable[[], Any]) -> Any:
        if self.lock is None:
            return do()
        with self.lock:
            return do()

    def _take(self) -> int | None:
        count = self.words[0]  # query
        if count <= 0:
            return None
        page = self.words[count]  # take
        self.words[0] = count - 1  # update
        return page

    def _give(self, page: int) -> None:
        count = self.words[0]
        if count + 1 < len(self.words):
            self.words[count + 1] = page
        self.words[0] = count + 1


def race(operations: int, *, locked: bool) -> tuple[int, bool, float]:
    """(wrong answers, whether the free list is whole in the end, seconds) of two processes on one list."""
    pages = SharedPages(64, Lock() if locked else None)
    ends, began = [], time.perf_counter()
    for who in (1, 2):
        ours, theirs = socket.socketpair()
        if os.fork() == 0:
            try:
                theirs.sendall(str(pages.work(who, operations, who)).encode())
            finally:
                os._exit(0)
        theirs.close()
        ends.append(ours)
    wrong = sum(int(end.recv(64) or b"1") for end in ends)
    for end in ends:
        end.close()
        os.wait()
    whole = pages.words[0] == 64 and sorted(pages.words[1:]) == list(range(64))
    return wrong, whole, time.perf_counter() - began


def atomic_claims(sizes: Sizes) -> Iterator[Claim]:
    wrong, whole, seconds = race(sizes.operations, locked=True)
    yield Claim(
        claim="with query, take and update under one lock two allocators never give a page twice",
        measured=f"{sizes.operations:,} operations of each of two processes in {seconds:.1f} s: {wrong} pages given "
        f"twice, the list is {'whole' if whole else 'broken'}",
        required="0, and whole",
        passed=wrong == 0 and whole,
    )
    wrong, whole, _ = race(sizes.operations, locked=False)
    yield Claim(
        claim="without it they do: the stress finds the hazard (the engine itself has one allocator and needs no lock)",
        measured=f"{wrong:,} pages given twice or lost, the list is {'whole' if whole else 'broken'}",
        required="some, or broken",
        passed=wrong > 0 or not whole,
    )


# ---- a virtual device ----------------------------------------------------------------------------------------------

LLAMA = ModelSize(
    parameters=7_500_000_000, weight_bytes=16_000_000_000, kv_bytes=131072, attention_flop=4 * 32 * 32 * 128
)
DEVICE = Device(flop_per_s=1.9e14, bytes_per_s=1.7e12)
LIMITS = Limits(token_budget=1024, max_sequences=256)
MEMORY, LINK = 40e9, 25e9
PAGES = int((MEMORY - LLAMA.weight_bytes) / (16 * LLAMA.kv_bytes))
SIDE_PAGES = int((MEMORY - 2 * LLAMA.weight_bytes) / 2 / (16 * LLAMA.kv_bytes))


def objectives(prompt: int = 432) -> tuple[float, float]:
    """7.5 times what a request has alone, by the median prompt (ShareGPT's)."""
    first = DEVICE.alone_seconds(segments(LLAMA, [(0, prompt)]), 100)
    token = DEVICE.alone_seconds(segments(LLAMA, [(prompt, 1)]), 100)
    return 7.5 * first, 7.5 * token


class Disaggregated:
    """Two sides with pages of their own, `side` each; a finished prompt moves once the other side has room, and its
    keys and values take their time. For the comparison only: it remembers who moved.
    """

    def __init__(self, side: int) -> None:
        self.side = side
        self.there: dict[int, float] = {}

    def plan_step(self, state: State, now: float) -> Step:
        """See `Scheduler`."""
        assert state.lanes is not None
        limits = state.limits
        running = {view.id for view in state.running}
        self.there = {number: at for number, at in self.there.items() if number in running}
        held = sum(view.pages for view in state.running if view.id in self.there)
        for view in sorted(state.running, key=lambda view: view.rank):
            if view.decodes and view.id not in self.there and held + limits.pages(view.known) <= self.side:
                held += limits.pages(view.known)
                self.there[view.id] = now + view.computed * LLAMA.kv_bytes / LINK
        flying = {work.id: work for work in state.lanes.flying}
        idle = state.lanes.idle
        decode = dataclasses.replace(
            state, running=tuple(v for v in state.running if self.there.get(v.id, now + 1) <= now or (v.id in flying
                                 and v.id in self.there)), waiting=(), swapped=(), free_pages=self.side - held,
            lanes=dataclasses.replace(state.lanes, idle=tuple(p for p in idle if p == "decode")),
        )  # fmt: skip
        mine = tuple(view for view in state.running if view.id not in self.there)
        fixed = tuple(Work(id=v.id, tokens=1) for v in mine if v.decodes)
        prefill = dataclasses.replace(
            state, running=mine, free_pages=self.side - sum(view.pages for view in mine),
            lanes=dataclasses.replace(
                state.lanes, idle=tuple(p for p in idle if p == "prefill"), flying=(*state.lanes.flying, *fixed)
            ),
        )  # fmt: skip
        steps = [plan_phases(part, 1) for part in (decode, prefill)]
        return Step(
            preempt=tuple(one for step in steps for one in step.preempt),
            admit=steps[1].admit,
            work=tuple(one for step in steps for one in step.work),
        )


def colocated(coming: Sequence[Arrival]) -> tuple[Figures, int]:
    """Chunked prefill in one worker: figures, and how often somebody was set aside."""
    one = colocated_engine(FirstComeFirstServed(), device=DEVICE, size=LLAMA, num_pages=PAGES, limits=LIMITS)
    return serve_all(one, coming), one.totals.preempted.total()


def ways(coming: Sequence[Arrival], limits: tuple[float, float]) -> dict[str, tuple[Figures, int]]:
    """The three of them under one load: figures, and how often somebody was set aside."""
    found = {"chunked": colocated(coming)}
    apart = virtual_engine(
        Disaggregated(SIDE_PAGES), device=DEVICE, size=LLAMA, shares=HALVES, num_pages=2 * SIDE_PAGES, limits=LIMITS
    )
    found["disaggregated"] = (serve_all(apart, coming), apart.totals.preempted.total())
    scheduler = SemiPD(first_seconds=limits[0], token_seconds=limits[1])
    ours = virtual_engine(
        scheduler, device=DEVICE, size=LLAMA, shares=scheduler.start, num_pages=PAGES, limits=LIMITS,
        prepare_seconds=0.5,
    )  # fmt: skip
    found["semi-PD"] = (serve_all(ours, coming), ours.totals.preempted.total())
    return found


def comparison_claims(sizes: Sizes, tick: Tick) -> Iterator[Claim]:
    limits, count, kinds = objectives(), 2 * sizes.virtual_requests, [(SHAREGPT, 1.0)]
    tick("what chunked prefill serves within limits")
    most = capacity(colocated(arrivals(kinds, 1e4, count, 50))[0])
    held = within_limits(lambda rate: colocated(arrivals(kinds, rate, count, 50))[0].attained(*limits), most)
    rates = tuple(round(factor * held, 1) for factor in RISING)
    runs = {}
    for number, rate in enumerate(rates):
        tick(f"three ways at {rate:.0f} requests/s")
        runs[rate] = ways(arrivals(kinds, rate, count, 51 + number), limits)
    names = ("chunked", "disaggregated", "semi-PD")

    def row(name: str) -> str:
        return f"{name} " + ", ".join(
            f"{runs[rate][name][0].first_at(90):.2f} s {1e3 * runs[rate][name][0].token_at(90):.0f} ms"
            for rate in rates
        )

    lowest = all(
        runs[rate]["semi-PD"][0].first_at(90) <= min(runs[rate][name][0].first_at(90) for name in names)
        and runs[rate]["semi-PD"][0].token_at(90) <= min(runs[rate][name][0].token_at(90) for name in names)
        for rate in rates[1:]
    )
    yield Claim(
        claim="rising rate at equal memory, ShareGPT's lengths: semi-PD has the lowest P90 of both latencies",
        measured=f"P90 of first token and per token at {rates} requests/s: "
        + "; ".join(map(row, names))
        + f"; chunked prefill can serve {most:.1f}",
        required="lowest of the three in both at the two higher rates",
        passed=lowest,
    )
    met = {name: [runs[rate][name][0].attained(*limits) for rate in rates] for name in names}
    yield Claim(
        claim="requests within both objectives: semi-PD above chunked prefill and disaggregation",
        measured="; ".join(f"{name} {', '.join(f'{share:.0%}' for share in met[name])}" for name in names)
        + f" at {rates} requests/s; objectives {limits[0]:.2f} s, {1e3 * limits[1]:.0f} ms",
        required="at least as many at every rate, more at the highest",
        passed=all(ours >= max(a, b) for ours, a, b in zip(met["semi-PD"], met["chunked"], met["disaggregated"]))
        and met["semi-PD"][-1] > max(met["chunked"][-1], met["disaggregated"][-1]),
    )
    tick("exhaustion")
    long = Lengths(prompt=(432, 496), output=(500, 600))
    heavy = ways(arrivals([(long, 1.0)], 10.0, sizes.virtual_requests, 2), limits)
    yield Claim(
        claim="disaggregation runs out of pages first: half of the store, beside a second copy of the weights",
        measured="; ".join(
            f"{name} set aside {count}, waits at P90 {figures.first_at(90):.1f} s"
            for name, (figures, count) in heavy.items()
        )
        + f"; pages {PAGES:,} against {SIDE_PAGES:,} a side",
        required="more set aside than both others, which set nobody aside",
        passed=heavy["disaggregated"][1] > 0 and heavy["chunked"][1] == heavy["semi-PD"][1] == 0,
    )
    tick("interference")
    tokens_at = {}
    for median in (400, 3200):
        kind = Lengths(prompt=(median, 1.1 * median), output=(100, 120))
        pair = ways(arrivals([(kind, 1.0)], 4000 / median, sizes.virtual_requests // 2, 3), objectives(median))
        tokens_at[median] = {name: pair[name][0].token_at(90) for name in ("chunked", "semi-PD")}
    grown = {name: tokens_at[3200][name] / tokens_at[400][name] for name in ("chunked", "semi-PD")}
    yield Claim(
        claim="chunked prefill shows interference, at equal prompt tokens a second, and semi-PD does not",
        measured="; ".join(
            f"{name} {1e3 * tokens_at[400][name]:.0f} to {1e3 * tokens_at[3200][name]:.0f} ms" for name in grown
        )
        + " per token at P90 with prompts of 400 and 3,200",
        required="chunked above semi-PD at both lengths",
        passed=all(tokens_at[m]["chunked"] > tokens_at[m]["semi-PD"] for m in tokens_at),
    )


def model_claims(sizes: Sizes, tick: Tick) -> Iterator[Claim]:
    """Poisson prompts of exponential length, one at a time: TTFT and TPOT over shares."""
    shares = (40, 50, 60, 70, 80)
    rate, scheduler, seen = 3.0, SemiPD(cap=100, start=HALVES), []
    for share in shares:
        tick(f"models at {share} %")
        pair = Shares(prefill=share, decode=100 - share)
        coming = exponential(rate, 3 * sizes.virtual_requests, 4)
        linear = dataclasses.replace(DEVICE, compute_saturation=1.0, memory_saturation=1.0)
        made = virtual_engine(
            Split(), device=linear, size=LLAMA, shares=pair, num_pages=10 * PAGES,
            limits=Limits(token_budget=16384, max_sequences=256), window=1 << 60,
        )  # fmt: skip
        figures = serve_all(made, coming)
        window = made._open.close(pair, made.clock())
        seen.append((pair, figures, window))
    theta = [scheduler.fit([window]).theta for _, _, window in seen]
    first = [(1 / (pair.prefill - at), figures.first_mean) for (pair, figures, _), at in zip(seen, theta)]
    token = [(1 / pair.decode, figures.token_mean) for pair, figures, _ in seen]
    fits = r_squared(first), r_squared(token)
    yield Claim(
        claim="on the virtual device time to the first token is a line over 1 / (x - theta), time per token over 1 / y",
        measured=f"R^2 {fits[0]:.4f} and {fits[1]:.4f} over x = {shares}, theta {np.mean(theta):.1f}",
        required="both above 0.95",
        passed=min(fits) > 0.95,
    )
    windows: list[Window] = []
    errors = []
    for number, rate in enumerate((1.0, 1.0, 1.0, 4.0, 4.0, 4.0, 4.0)):
        pair = Shares(prefill=60 + 10 * (number % 3), decode=40 - 10 * (number % 3))
        made = virtual_engine(
            Split(), device=DEVICE, size=LLAMA, shares=pair, num_pages=10 * PAGES, limits=LIMITS, window=1 << 60
        )
        serve_all(made, exponential(rate, 4 * sizes.virtual_requests, 10 + number))
        window = made._open.close(pair, made.clock())
        if windows:
            predicted = scheduler.fit(windows[-scheduler.recent :]).first_seconds(pair.prefill)
            errors.append(abs(predicted / percentile(window.first, 90) - 1))
        windows.append(window)
    yield Claim(
        claim="after a change of rate the prediction comes right within a few windows",
        measured="error of the predicted time to the first token, window by window: "
        + ", ".join(f"{error:.0%}" for error in errors)
        + " (the rate is four times as high from the third on)",
        required="the last below half of the first after the change",
        passed=errors[-1] < 0.5 * errors[2],
    )


def exponential(rate: float, count: int, seed: int) -> list[Arrival]:
    source, at, found = random.Random(seed), 0.0, []
    for number in range(count):
        at += source.expovariate(rate)
        prompt = max(round(source.expovariate(1 / 1000)), 1)
        sampling = Sampling(max_new_tokens=30, ignore_eos=True)
        found.append(Arrival(at=at, request=Request(prompt=(number % 4000,) * prompt, sampling=sampling)))
    return found


def shifting(sizes: Sizes) -> list[Arrival]:
    """Long prompts and short answers, then short prompts and long answers, in turn."""
    found: list[Arrival] = []
    reading, writing = Lengths(prompt=(3000, 3300), output=(20, 24)), Lengths(prompt=(100, 120), output=(400, 450))
    for number in range(2 * sizes.cycles):
        kind, rate = ((reading, 2.1), (writing, 14.0))[number % 2]
        count = round(rate * sizes.seconds)
        found += arrivals([(kind, 1.0)], rate, count, 20 + number, at=number * sizes.seconds)
    return found


def controller_claims(sizes: Sizes, tick: Tick) -> Iterator[Claim]:
    coming, limits = shifting(sizes), (3.0, 0.025)
    met = {}
    for share in sizes.splits:
        tick(f"fixed at {share} %")
        pair = Shares(prefill=share, decode=100 - share)
        made = virtual_engine(Split(), device=DEVICE, size=LLAMA, shares=pair, num_pages=PAGES, limits=LIMITS)
        met[share] = serve_all(made, coming).attained(*limits)
    tick("controlled")
    scheduler = SemiPD(first_seconds=limits[0], token_seconds=limits[1], cap=100, start=HALVES)
    ours = virtual_engine(
        scheduler, device=DEVICE, size=LLAMA, shares=HALVES, num_pages=PAGES, limits=LIMITS, prepare_seconds=0.5
    )
    reached = serve_all(ours, coming).attained(*limits)
    yield Claim(
        claim="load steps between prompts and answers: attainment above every fixed split",
        measured=f"{reached:.1%} with {ours.switches} switches; fixed "
        + ", ".join(f"{share} %: {value:.1%}" for share, value in met.items()),
        required="above the best of them",
        passed=reached > max(met.values()),
    )
    tick("steady")
    steady = virtual_engine(
        dataclasses.replace(scheduler, first_seconds=2.0, token_seconds=0.03), device=DEVICE, size=LLAMA, shares=HALVES,
        num_pages=PAGES, limits=LIMITS, prepare_seconds=0.5,
    )  # fmt: skip
    at: list[float] = []
    steady.observer = lambda state, step: at.append(steady.clock()) if step.shares is not None else None
    figures = serve_all(steady, arrivals([(LONG, 0.3), (SHAREGPT, 0.7)], 4.0, 2 * sizes.virtual_requests, 6))
    late = sum(each > figures.seconds / 2 for each in at)
    yield Claim(
        claim="under a steady load shares settle",
        measured=f"{len(at)} switches in {figures.seconds:.0f} s, {late} of them in the second half",
        required="at most 2 in the second half",
        passed=late <= 2,
    )


# ---- all -----------------------------------------------------------------------------------------------------------


def run(quick: bool, data: Path | None, progress: Progress | None = None) -> list[Claim]:
    """Measures and judges."""
    sizes, done = QUICK if quick else FULL, 0

    def tick(what: str) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(min(done, 40), 40, what)

    claims: list[Claim] = []
    tick("two allocators")
    claims += atomic_claims(sizes)
    with tempfile.TemporaryDirectory(prefix="memwall-semi-pd-") as name:
        model = write_model(Path(name) / "model", sizes)
        tick("memory and overlap")
        claims += memory_claims(model, sizes)
        tick("shares")
        claims += share_claims(model, sizes)
        tick("switches")
        claims += switch_claims(model, sizes)
        tick("interference in real processes")
        claims.append(interference_claim(model, sizes, tick))
    claims += comparison_claims(sizes, tick)
    claims += model_claims(sizes, tick)
    claims += controller_claims(sizes, tick)
    claims.append(
        not_run(
            "two processes on one GPU with MPS shares", "order as on the virtual device",
            needs="GPU (and an engine that computes on it)",
        )
    )  # fmt: skip
    return claims


if __name__ == "__main__":
    sys.exit(main("semi-pd", sys.modules[__name__]))

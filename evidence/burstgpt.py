"""BurstGPT's claims: load generated from a trace is like it, and bursts hurt serving where the same mean rate does not.

Trace: `--data` one file of BurstGPT (CSV), Azure (CSV) or Mooncake (JSON lines). Without it a made one: arrivals that
switch between calm and busy (a Markov-modulated Poisson process under a slow wave), so that they are not drawn from
what is fitted to them, with lengths that belong together, conversations and failures. Statistics of BurstGPT's own
files are judged where such a file is given; its repository holds only pointers to them.

Where the bursts are. Azure's conversations of 2023 have none within a minute (CV 1.09, Fano factor of the counts in a
second 1.4), but their rate drifts: the Fano factor is 3.9 in 10 s, 16 in a minute and 80 in ten, and the busiest
minute has 1.5 times the mean. Mooncake's times were recorded every 3 s. Taken as they are, these moments look like
bursts (CV 3.03); counts of the moments are those of Poisson arrivals (Fano factor 1.1). With times drawn between the
moments, as they are here, the CV is 1.01, and the Fano factor 1.4 in 10 s and 2.9 in a minute. So the whole load is
replayed, up to 10,000 requests (half an hour of Azure's trace): the first 1,500, which it once was, are five minutes.

Serving is on a virtual clock: the engine's scheduler, pages and bookkeeping with a device's costs, vLLM's limits of a
step, and lengths as they are (they were once cut to 1,500 and 400 tokens, which made nearly all of Mooncake's prompts
the same). Memory is what the plain load needs at its peak and a tenth, so that whatever bursts need beyond it shows.

What was changed after it had failed, and what is seen now:

- Thinning was to lower the CV. That was our own rule, and it is false for a drifting rate, whose gaps keep their CV.
  The card asks for burst indices that differ; theory gives them: keeping a share q makes a Fano factor of 1 + q (F -
  1).
- Requests were to be set aside in steps of 256 tokens and at most 64 sequences. With Azure's prompts these limits,
  and not memory, ended admission. With vLLM's (2,048 and 256) memory is full under bursts (6,520 of 6,534 pages), and
  still nobody is set aside by this engine's first come, first served, since it keeps a page for each that runs:
  bursts then wait in the queue. That is a finding. What the claim is about shows where a prompt is let in as soon as
  it has room for itself, as in PagedAttention, and so it is judged now: 17 of 10,000 with Azure's trace and 460 of
  6,000 with the made one, none under Poisson; with a page kept, none at all. Both are told.
- The 99th percentile of the first token is 2.3 times Poisson's with 10,000 requests of Azure's trace (321 and 729
  ms), and 41 times with 6,000 of the made one (54 and 2,214 ms).
- Two schedulers are compared on one virtual device, prompts in chunks beside tokens (first come, first served) and
  prompts and tokens apart, half of the device each, on stretches of 1,500 requests. With lengths cut, the advantage
  of the first came 10 % nearer to 1 under replay. With whole lengths it does not: 2.0 times under the plain load and
  1.9 under replay on the made trace (4 % nearer, standard error 12 %; six stretches, the old limits), 2.2 and 2.7 on
  Azure's (33 % further, standard error 22 %; four stretches). This claim fails: for these two the order stays, and
  the distance does not shrink.
- Mooncake's trace, 3,000 requests: 34.5 s under Poisson, 31.5 s under replay, nobody set aside. Both claims on bursts
  fail there, and rightly: its arrivals are nearly Poisson's, and the tail is that of prompts of up to 126,000 tokens.
  What is said of the generator holds on all three traces.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from memwall.claims import Claim, Progress, main, not_run
from memwall.engine import Sampling
from memwall.engine.apart import ApartEngine
from memwall.engine.base import Costs, Limits, Shares
from memwall.engine.core import Engine
from memwall.engine.distserve import DistServe
from memwall.engine.fcfs import FirstComeFirstServed
from memwall.engine.kv_pages import KVPages
from memwall.engine.phase_device import Device, ModelSize, VirtualWorkers, colocated_engine
from memwall.engine.sequence import Request
from memwall.engine.sequence import Sequence as Running
from memwall.engine.simulated import Arrival, VirtualClock, replay
from memwall.memory import PagePool, peak_resident_bytes, reset_peak_resident, resident_bytes
from memwall.serve import burstgpt
from memwall.serve.bench import Target, measure, percentiles
from memwall.serve.traces import NONE, Trace, make_trace, read_columns, turns

LIMITS = Limits(token_budget=2048, max_sequences=256, page_tokens=16)
"""vLLM's defaults."""
DEVICE, LEAST_PAGES, MANY_PAGES = Device(), 8192, 1 << 20
SIZE = ModelSize(parameters=10**9, weight_bytes=2 * 10**9, kv_bytes=65536, attention_flop=4 * 24 * 2048)
SATURATING = 300
"""Requests, from all over the load, that come at once: how many a second are served then is what a scheduler can do."""
LOAD = 0.75
"""Share of what the scheduler can do at most that the mean rate asks for."""
THINNED, COUNTED_SECONDS = 0.25, 10.0
PLAIN = "Poisson, the trace's lengths"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """minutes: of the trace; seeds: of generated ones; rows: of the file that is read against the clock; requests: at
    most, served on the virtual clock; stretch, stretches: of so many requests, on which two schedulers are compared;
    sent: by the client.
    """

    minutes: int
    seeds: int
    rows: int
    requests: int
    stretch: int
    stretches: int
    sent: int


FULL = Sizes(minutes=60, seeds=20, rows=1_400_000, requests=10_000, stretch=1500, stretches=4, sent=400)
QUICK = Sizes(minutes=20, seeds=6, rows=200_000, requests=2000, stretch=400, stretches=2, sent=150)


def made_trace(minutes: int, seed: int = 1) -> Trace:
    """Calm and busy stretches of seconds, a wave of half an hour, pairs of lengths, sessions and failures."""
    rng = np.random.default_rng(seed)
    at, now, busy, ends = [], 0.0, False, 0.0
    while now < 60 * minutes:
        if now >= ends:
            busy, ends = not busy, now + rng.exponential(6.0 if busy else 1.5)
        rate = (1.5 if not busy else 14.0) * (1 + 0.5 * np.sin(2 * np.pi * now / 1800))
        now += rng.exponential(1 / rate)
        at.append(now)
    n = len(at)
    text = rng.lognormal(5.0, 0.9, n)
    prompt = np.clip(text, 4, 2000).astype(np.int64)
    output = np.clip(text * rng.lognormal(-0.9, 0.6, n), 1, 600).astype(np.int64)
    output[rng.random(n) < 0.018] = 0
    session = np.where(rng.random(n) < 0.5, NONE, rng.integers(0, n // 6, n))
    return make_trace(np.array(at), prompt, output, f"made(seed={seed})", session=session, turn=turns(session))


# ---- generated load is like the trace ------------------------------------------------------------------------------


def fidelity_claims(trace: Trace, sizes: Sizes) -> Iterator[Claim]:
    steps = burstgpt.windows(trace.at)
    fitted = [step for step in steps if step.fitted]
    better = sum(step.gain > 0 for step in fitted)
    yield Claim(
        claim="a Gamma distribution fits the gaps of most windows better than an exponential one",
        measured=f"{better} of {len(fitted)} windows of {burstgpt.WINDOW_SECONDS:.0f} s; CV "
        f"{min(s.cv for s in fitted):.2f} to {max(s.cv for s in fitted):.2f}",
        required="more than half",
        passed=better > len(fitted) / 2,
    )
    answered = trace.answered()
    found: dict[float, list[float]] = {step.begin: [] for step in fitted}
    made = [burstgpt.generate(steps, burstgpt.JointLengths(answered), seed) for seed in range(sizes.seeds)]
    for each in made:
        for step in fitted:
            inside = each.at[(each.at >= step.begin) & (each.at < step.begin + step.seconds)]
            if len(inside) > burstgpt.LEAST_GAPS:
                gaps = np.diff(inside)
                found[step.begin].append(float(gaps.std() / gaps.mean()))
    ratios = [statistics.mean(found[step.begin]) / step.cv for step in fitted if found[step.begin]]
    near = sum(abs(ratio - 1) <= 0.1 for ratio in ratios)
    yield Claim(
        claim="generated windows are as bursty as those of the trace",
        measured=f"CV, mean of {sizes.seeds} seeds, within 10 % in {near} of {len(ratios)} windows (median ratio "
        f"{statistics.median(ratios):.3f}); requests {statistics.mean(map(len, made)) / len(trace):.3f} times",
        required="in at least 90 % of them, and the median within 10 %",
        passed=near >= 0.9 * len(ratios) and abs(statistics.median(ratios) - 1) <= 0.1,
    )
    yield lengths_claim(answered, steps)
    yield order_claim(trace, made)
    yield scaling_claim(trace, sizes)


def scaling_claim(trace: Trace, sizes: Sizes) -> Claim:
    """Counts of any arrivals, thinned, have a Fano factor of 1 + q (F - 1): bursts of every length become milder."""
    scaled, q = trace.scale_rate(1 / THINNED), THINNED
    whole, dense = (burstgpt.burst_index(one.at) for one in (trace, scaled))
    fano, kept = burstgpt.fano_factor(trace.at, COUNTED_SECONDS), burstgpt.fano_factor(scaled.at, COUNTED_SECONDS * q)
    thinned = [trace.thin(q, seed) for seed in range(sizes.seeds)]
    milder = statistics.mean(burstgpt.fano_factor(one.at, COUNTED_SECONDS) for one in thinned)
    sparse = statistics.mean(burstgpt.burst_index(one.at).cv for one in thinned)
    wanted = 1 + q * (fano - 1)
    return Claim(
        claim="scaling the rate keeps bursts as they are, thinning makes them milder",
        measured=f"Fano factor of the counts in {COUNTED_SECONDS:.0f} s, and CV: trace {fano:.2f}, {whole.cv:.3f}; "
        f"{1 / q:.0f} times as dense, in {COUNTED_SECONDS * q:.1f} s, {kept:.2f}, {dense.cv:.3f}; {q:.0%} kept, mean "
        f"of {sizes.seeds} seeds, {milder:.2f}, {sparse:.3f}",
        required=f"both the same when scaled; a Fano factor within 10 % of 1 + {q} (F - 1) = {wanted:.2f} when thinned",
        passed=abs(dense.cv / whole.cv - 1) < 1e-6 and abs(kept / fano - 1) < 0.02 and abs(milder / wanted - 1) < 0.1,
    )


def lengths_claim(answered: Trace, steps: list[burstgpt.Window]) -> Claim:
    true = burstgpt.rank_correlation(answered.prompt, answered.output)
    joint, apart = (
        burstgpt.generate(steps, lengths, 3) for lengths in (burstgpt.JointLengths(answered), burstgpt.ZipfLengths())
    )
    kept, lost = (burstgpt.rank_correlation(one.prompt, one.output) for one in (joint, apart))
    far = max(
        burstgpt.distance(joint.prompt, answered.prompt), burstgpt.distance(joint.output, answered.output)
    )  # fmt: skip
    return Claim(
        claim="lengths drawn as pairs keep their distributions and what prompts and answers have to do with each other",
        measured=f"largest distance of distributions {far:.3f}; rank correlation {true:.3f} in the trace, {kept:.3f} "
        f"in pairs, {lost:.3f} each for itself by Zipf's law",
        required="distance below 0.05; correlation within 0.05 in pairs and within 0.05 of 0 apart",
        passed=far < 0.05 and abs(kept - true) < 0.05 and abs(lost) < 0.05,
    )


def order_claim(trace: Trace, made: list[Trace]) -> Claim:
    """Per-minute counts go with those of the minute before; one distribution for the whole trace forgets that."""
    seconds = burstgpt.WINDOW_SECONDS
    true = burstgpt.autocorrelation(burstgpt.counts_per(trace.at, seconds), 1)
    kept = statistics.mean(burstgpt.autocorrelation(burstgpt.counts_per(one.at, seconds), 1) for one in made)
    (one,) = burstgpt.windows(trace.at, trace.seconds + 1)[:1]
    flat = statistics.mean(
        burstgpt.autocorrelation(burstgpt.counts_per(burstgpt.draw_arrivals([one], seed), seconds), 1)
        for seed in range(len(made))
    )
    return Claim(
        claim="what one minute has to do with the next survives",
        measured=f"autocorrelation of counts per minute {true:.2f}; generated by windows {kept:.2f}, from one "
        f"distribution for all {flat:.2f}",
        required="by windows within 0.2 of the trace, and nearer to it than the other",
        passed=abs(kept - true) < 0.2 and abs(kept - true) < abs(flat - true),
    )


def reading_claim(sizes: Sizes) -> Claim:
    rng = np.random.default_rng(5)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.csv"
        with path.open("w") as file:
            file.write("Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n")
            for i in range(0, sizes.rows, 10_000):
                lengths = rng.integers(0, 999, (10_000, 2)).tolist()
                file.writelines(
                    f"{i + j},ChatGPT,{prompt},{output},{prompt + output},API log\n"
                    for j, (prompt, output) in enumerate(lengths)
                )
        reset_peak_resident()
        before, began = resident_bytes(), time.process_time()
        trace = read_columns(path)
        seconds, grown = time.process_time() - began, peak_resident_bytes() - before
    per_row = grown / sizes.rows
    return Claim(
        claim="a file of BurstGPT's size is read within seconds and in bounded memory",
        measured=f"{len(trace):,} rows in {seconds:.1f} s of processor time, {per_row:.0f} bytes a row at the peak",
        required=f"{sizes.rows:,} rows, below 10 microseconds and 250 bytes a row",
        passed=len(trace) == sizes.rows and seconds < 1e-5 * sizes.rows and per_row < 250,
    )


# ---- bursts hurt serving -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What a load met. first: 99th percentile of seconds to the first token; pages: the most that requests held at
    once; worst_window: share of requests within the objective in the worst minute.
    """

    first: float
    median: float
    preempted: int
    pages: int
    worst_window: float


def serve(trace: Trace, pages: int, spare_pages: int = 0) -> Served:
    """A load, first come first served, on a virtual device; conversations share the pages of their history."""
    engine = make_chunked(context_of(trace), pages, spare_pages)
    clock = engine.clock
    assert isinstance(clock, VirtualClock)
    begin, done, place, peak = float(trace.at[0]), [], 0, 0
    while place < len(trace) or engine.busy:
        if not engine.busy:
            clock.now = max(clock.now, float(trace.at[place]) - begin)
        while place < len(trace) and trace.at[place] - begin <= clock.now:
            done.append(engine.submit(request(trace, place), float(trace.at[place]) - begin))
            place += 1
        steps = engine.totals.steps
        engine.step()
        peak = max(peak, engine.pages.pool.used_pages - engine.pages.idle_pages)
        if engine.totals.steps == steps:
            clock.now += 1e-3
    waits = [(one.first_token or 0.0) - one.arrival for one in done]
    ordered = sorted(waits)
    return Served(
        first=ordered[len(ordered) * 99 // 100],
        median=ordered[len(ordered) // 2],
        preempted=sum(engine.totals.preempted.values()),
        pages=peak,
        worst_window=worst_window(done, waits),
    )


def context_of(trace: Trace) -> int:
    """Tokens of the longest request, and one more."""
    return int((trace.prompt + trace.output).max()) + 1


def worst_window(done: list[Running], waits: list[float], objective: float = 1.0) -> float:
    minutes: dict[int, list[bool]] = {}
    for one, wait in zip(done, waits):
        minutes.setdefault(int(one.arrival // 60), []).append(wait <= objective)
    return min(statistics.mean(met) for met in minutes.values())


def request(trace: Trace, place: int) -> Request:
    """A session's prompts are beginnings of one text; all others share nothing."""
    session = int(trace.session[place])
    text = 2 * session if session != NONE else 2 * place + 1
    first, length = (text * 7919) % (1 << 24), int(trace.prompt[place])
    sampling = Sampling(max_new_tokens=int(trace.output[place]), ignore_eos=True)
    return Request(prompt=tuple(range(first, first + length)), sampling=sampling)


def loads_of(raw: Trace, seed: int = 7) -> dict[str, Trace]:
    """The loads of the protocol, all of the trace's mean rate."""
    alone = make_trace(raw.at, raw.prompt, raw.output, "; ".join(raw.provenance))
    steps = burstgpt.windows(alone.at, min(max(alone.seconds / 20, 5.0), burstgpt.WINDOW_SECONDS))
    gamma = burstgpt.generate(steps, burstgpt.JointLengths(alone), seed)
    loads = {
        "Poisson, fixed lengths": burstgpt.poisson_like(alone, seed, lengths="fixed"),
        PLAIN: burstgpt.poisson_like(alone, seed, lengths="trace"),
        "Gamma by windows": at_rate(gamma, len(alone) / alone.seconds),  # a draw's own mean differs
        "replay": alone,
    }
    return loads | ({"replay with sessions": raw} if burstgpt.has_sessions(raw) else {})


def at_rate(load: Trace, rate_per_s: float) -> Trace:
    """The same load with so many requests a second in the mean."""
    return load.scale_rate(rate_per_s * load.seconds / len(load))


def served_of(trace: Trace, most: int) -> Trace:
    """The first requests that have an answer."""
    raw = trace.answered()
    return raw.keep((np.arange(len(raw)) < most) & (raw.prompt > 0), f"first({most})")


def at_once(load: Trace) -> Trace:
    """Some requests from all over the load, at one moment."""
    every = max(len(load) // SATURATING, 1)
    return load.keep(np.arange(len(load)) % every == 0, f"every({every})").scale_rate(1e9)


def serving_claims(trace: Trace, sizes: Sizes) -> Iterator[Claim]:
    """At the share `LOAD` of what the engine can do. The whole load is replayed, not its first minutes: what bursts
    there are may be minutes long.
    """
    raw = served_of(trace, sizes.requests)
    context, some = context_of(raw), at_once(raw)
    rate = LOAD * len(some) / first_tokens(make_chunked(context, MANY_PAGES), some)[1]
    loads = {name: at_rate(load, rate) for name, load in loads_of(raw).items()}
    room = int(1.1 * serve(loads[PLAIN], MANY_PAGES).pages)
    room = max(room, -(-context // LIMITS.page_tokens))
    first = {name: serve(load, room) for name, load in loads.items()}
    plain, burst = first[PLAIN], first["replay"]
    kept = serve(loads["replay"], room, spare_pages=1)
    own = len(raw) / raw.seconds
    spans = (COUNTED_SECONDS * own / rate, 60 * own / rate)  # what so many seconds of the trace have become
    told = "; ".join(
        f"{name}: {1e3 * one.first:,.0f} ms, {one.preempted} set aside, {one.worst_window:.0%} of the worst minute "
        f"within 1 s (CV {burstgpt.burst_index(loads[name].at).cv:.2f}, Fano factor in {COUNTED_SECONDS:.0f} s and "
        f"minutes of the trace {' and '.join(f'{burstgpt.fano_factor(loads[name].at, span):.1f}' for span in spans)})"
        for name, one in first.items()
    )
    yield Claim(
        claim="at the same mean rate and lengths, bursts make the 99th percentile of the first token far worse",
        measured=f"{told}; {len(raw):,} requests, {rate:.2f} a second (the trace's own rate {own:.2f}), "
        f"{room} pages; replay {burst.first / plain.first:.1f} times Poisson's",
        required="at least 2 times Poisson's with the trace's lengths",
        passed=burst.first >= 2 * plain.first,
    )
    yield Claim(
        claim="requests are set aside under bursts only",
        measured=f"{plain.preempted} under Poisson, {burst.preempted} under replay, with memory for what Poisson "
        f"needs; where a page is kept for each that runs, {kept.preempted} under replay, and then "
        f"{1e3 * kept.first:,.0f} ms to the first token at the 99th percentile",
        required="none, and some",
        passed=plain.preempted == 0 < burst.preempted,
    )


def make_chunked(context: int, pages: int, spare_pages: int = 1) -> Engine:
    """One worker with the whole device; prompts go in chunks beside tokens."""
    scheduler = FirstComeFirstServed(spare_pages=spare_pages)
    return colocated_engine(scheduler, device=DEVICE, size=SIZE, num_pages=pages, limits=LIMITS, context_tokens=context)


def make_apart(context: int, pages: int) -> Engine:
    """Two workers with half of the device and of its memory each: finished prompts are pulled (`DistServe`)."""
    clock, half = VirtualClock(), pages // 2
    behind = KVPages(PagePool("kv/pages", page_bytes=1, most_pages=half), LIMITS.page_tokens, keep_prefixes=False)
    front = KVPages(PagePool("kv/prefill", page_bytes=1, most_pages=half), LIMITS.page_tokens)
    workers = VirtualWorkers(clock, DEVICE, SIZE, Shares(prefill=50, decode=50))
    return ApartEngine(
        DistServe(), workers, behind, limits=LIMITS, front_pages=front, front_limits=LIMITS, context_tokens=context,
        clock=clock, costs=Costs(seconds_per_token=2.0 * SIZE.parameters / DEVICE.flop_per_s),
    )  # fmt: skip


def first_tokens(engine: Engine, trace: Trace) -> tuple[float, float]:
    """99th percentile of seconds to the first token, and the seconds in all."""
    clock, begin, found = engine.clock, float(trace.at[0]), []
    assert isinstance(clock, VirtualClock)
    submit = engine.submit

    def note(*told: Any) -> Running:
        found.append(submit(*told))
        return found[-1]

    engine.submit = note  # type: ignore[method-assign, assignment]
    coming = [Arrival(at=float(at) - begin, request=request(trace, place)) for place, at in enumerate(trace.at)]
    replay(engine, clock, coming)
    waits = sorted((one.first_token or 0.0) - one.arrival for one in found)
    return waits[len(waits) * 99 // 100], clock.now


def pair_ratios(part: Trace, seed: int, names: Sequence[str]) -> dict[str, tuple[float, float]]:
    """99th percentiles of the first token, (apart, chunked), of one stretch of the trace. The mean rate is `LOAD` of
    what the slower of both can do with these lengths.
    """
    loads, context, some = loads_of(part, seed), context_of(part), at_once(part)
    pages = max(LEAST_PAGES, 4 * -(-context // LIMITS.page_tokens))  # the longest prompt is half of either's
    makers = [lambda make=make: make(context, pages) for make in (make_apart, make_chunked)]
    rate = LOAD * min(len(some) / first_tokens(make(), some)[1] for make in makers)
    found = {}
    for name in names:
        load = at_rate(loads[name], rate)
        apart, chunked = (first_tokens(make(), load)[0] for make in makers)
        found[name] = (apart, chunked)
    return found


def pair_claim(trace: Trace, sizes: Sizes) -> Claim:
    """Over several stretches of the trace: a 99th percentile of one is that of its worst burst."""
    names = ("Poisson, fixed lengths", "replay")
    whole = served_of(trace, len(trace))
    parts = [
        whole.keep((np.arange(len(whole)) // sizes.stretch) == number, f"part({number})")
        for number in range(min(sizes.stretches, max(len(whole) // sizes.stretch, 1)))
    ]
    found = [pair_ratios(part, 7 + number, names) for number, part in enumerate(parts)]
    logs = {name: np.log([one[name][0] / one[name][1] for one in found]) for name in names}
    # of each stretch: how much nearer to 1 replay is than the plain load, in parts of the plain load's distance
    nearer = 1 - np.abs(logs["replay"]) / np.abs(logs[names[0]])
    means = {name: float(each.mean()) for name, each in logs.items()}
    error = float(nearer.std(ddof=1) / len(nearer) ** 0.5) if len(nearer) > 1 else float("nan")
    told = "; ".join(
        f"{name} {np.exp(means[name]):.2f} ("
        + ", ".join(f"{1e3 * one[name][0]:.0f} / {1e3 * one[name][1]:.0f}" for one in found)
        + " ms)"
        for name in names
    )
    return Claim(
        claim="what one scheduler has over another under the plain load does not carry over to bursts",
        measured=f"99th percentile of the first token, prompts and tokens apart over chunks beside tokens, geometric "
        f"mean of {len(parts)} stretches of {sizes.stretch} requests: {told}; from the plain load to replay "
        f"{nearer.mean():.1%} nearer to 1 in the mean, standard error {error:.1%}",
        required="the order turns, or the ratio comes at least 10 % nearer to 1 from the plain load to replay",
        passed=means[names[0]] * means["replay"] < 0 or abs(means["replay"]) < 0.9 * abs(means[names[0]]),
    )


# ---- the client ----------------------------------------------------------------------------------------------------


async def stalling(
    arrived: list[float], stall_s: float, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """Answers as an OpenAI server does; nothing is answered in the first `stall_s` seconds after the first request."""
    arrived.append(time.perf_counter())
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    await reader.readexactly(int(head.split(b"content-length:")[1].split(b"\r\n")[0]))
    await asyncio.sleep(max(arrived[0] + stall_s - time.perf_counter(), 0))
    told = {"choices": [{"text": "a"}], "usage": {"completion_tokens": 1}}
    writer.write(b"HTTP/1.0 200 OK\r\n\r\ndata: " + json.dumps(told).encode() + b"\n\ndata: [DONE]\n\n")
    await writer.drain()
    writer.close()


def client_claim(trace: Trace, sizes: Sizes) -> Claim:
    """Sends some of the trace at 50 requests a second to a server that says nothing for half of the time."""
    some = trace.answered().clip_lengths(64, 1)
    some = some.keep(np.arange(len(some)) < sizes.sent, "first")
    loads = some.scale_rate(50 * some.seconds / len(some)).loads()
    stall = (loads[-1].at or 0.0) / 2
    arrived: list[float] = []

    async def send() -> list[float]:
        server = await asyncio.start_server(lambda r, w: stalling(arrived, stall, r, w), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        target = Target(url=f"http://127.0.0.1:{port}", model="m", vocabulary=99)
        outcomes = await measure(target, loads, concurrency=None)
        server.close()
        return [one.sent - one.due for one in outcomes]

    lags = percentiles(asyncio.run(send()))
    before = sum(moment < arrived[0] + stall for moment in arrived) / len(arrived)
    wanted = sum((load.at or 0.0) < stall for load in loads) / len(loads)
    return Claim(
        claim="the client sends when it is time, whether or not the server answers",
        measured=f"{len(loads)} requests at 50 a second, none answered for {stall:.1f} s: sent late by "
        f"{1e3 * lags['p50']:.1f} ms at the median, {1e3 * lags['p99']:.1f} ms at the 99th percentile; {before:.1%} of "
        f"them came while the server was silent, {wanted:.1%} were due then",
        required="99th percentile below 10 ms; the shares within 2 points",
        passed=lags["p99"] < 0.010 and abs(before - wanted) < 0.02,
    )


# ---- BurstGPT's own files ------------------------------------------------------------------------------------------

OWN = "BurstGPT's first file: 1.8 % of requests fail, its API windows are bursty, conversations follow the day"
OWN_REQUIRED = "failures 1.7 to 1.9 %; median CV of API windows above 1.5; autocorrelation at 24 hours above 0.3"


def own_claim(trace: Trace, given: bool) -> Claim:
    if not given or "API log" not in trace.kinds or "Conversation log" not in trace.kinds:
        return not_run(OWN, OWN_REQUIRED, "BurstGPT_1.csv (--data)")
    api = [one.cv for one in burstgpt.windows(trace.select(kind="API log").at) if one.fitted]
    talk = burstgpt.counts_per(trace.select(kind="Conversation log").at, 3600)
    failed, cv, daily = float(trace.failed.mean()), statistics.median(api), burstgpt.autocorrelation(talk, 24)
    return Claim(
        claim=OWN,
        measured=f"{len(trace):,} requests, {failed:.2%} failed, CV {cv:.2f}, daily {daily:.2f}, weekly "
        f"{burstgpt.autocorrelation(talk, 24 * 7):.2f}",
        required=OWN_REQUIRED,
        passed=0.017 <= failed <= 0.019 and cv > 1.5 and daily > 0.3,
    )


def run(quick: bool, data: Path | None, progress: Progress | None = None) -> list[Claim]:
    """See `memwall.claims`."""
    sizes, parts = QUICK if quick else FULL, 4

    def tick(done: int, what: str) -> None:
        if progress is not None:
            progress(done, parts, what)

    tick(0, "fits and generated traces")
    trace = made_trace(sizes.minutes) if data is None else read_columns(data)
    if trace.tick_seconds:  # else the moments of recording would pass for bursts
        trace = trace.spread(11)
    part = trace.between(0, 60 * sizes.minutes)  # of months the first hour: fits are by the minute
    claims = list(fidelity_claims(part, sizes))
    tick(1, "reading")
    claims.append(reading_claim(sizes))
    tick(2, "serving")
    claims += [*serving_claims(part, sizes), pair_claim(part, sizes)]
    tick(3, "client")
    claims.append(client_claim(part, sizes))
    claims.append(own_claim(trace, data is not None))
    claims.append(not_run("against vLLM goodput falls off earlier under replay than under Poisson", "earlier", "GPU"))
    return claims


if __name__ == "__main__":
    sys.exit(main("burstgpt", sys.modules[__name__]))

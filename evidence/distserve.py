"""DistServe's claims: what simulation says of prefill and decode apart, against queueing theory and colocation.

Lengths: `--data` a trace in Azure's columns; without it made ones, as long in the mean as the published simulation's
(prompts 750 tokens, answers 230). The published figure (1.56 requests a second
and device for OPT-13B) is judged where a trace is given. Two processes that hand keys and values over are not built:
claims that need them are not run.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

from memwall.claims import Claim, Progress, main, not_run
from memwall.engine import Sampling
from memwall.engine.arrivals import read_trace
from memwall.engine.sequence import Request
from memwall.engine.serving import Serving, ServingSettings, load_engine
from memwall.models import DEMO_DIRECTORY
from memwall.simulate.distserve import Cluster, Degrees, Lengths, Limits, Plan, Search, Served, Simulation, poisson_jobs
from memwall.simulate.phase_instances import Events, Job, PrefillInstance
from memwall.simulate.phase_latency import (
    OPT_13B,
    OPT_66B,
    fit_decode,
    fit_prefill,
    pipeline_first_token,
    relative_errors,
    tensor_first_token,
    waiting_first_token,
)

MODEL = Served(latencies=OPT_13B, layers=40, heads=40, kv_bytes_per_token=2 * 40 * 5120 * 2)
LARGE = Served(latencies=OPT_66B, layers=64, heads=72, kv_bytes_per_token=2 * 64 * 9216 * 2)
LIMITS = Limits(first_token=0.2, per_token=0.1)
LONGEST = 2048
PUBLISHED = (Degrees(tensor=2), Degrees(tensor=1), 1.56)
STEADY = 2000
"""Requests of simulations beside the published setting's 300, which end before a queue that grows has grown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """requests: of a queueing check; seeds: of simulations; repeats: of each measured step."""

    requests: int
    seeds: tuple[int, ...]
    repeats: int


FULL = Sizes(requests=60_000, seeds=(0, 1, 2), repeats=9)
QUICK = Sizes(requests=20_000, seeds=(0,), repeats=3)


def read_lengths(data: Path | None) -> Lengths:
    """Of a trace, those that the model's context holds; or made ones."""
    if data is not None:
        loads = read_trace(data, 1 << 30)
        return [
            (load.prompt_tokens, load.output_tokens)
            for load in loads
            if load.prompt_tokens + load.output_tokens <= LONGEST and load.output_tokens > 1
        ]
    draw, found = random.Random(0), []
    while len(found) < 5000:
        prompt, output = int(draw.lognormvariate(6.65, 0.8)), int(draw.lognormvariate(5.25, 0.7))
        if prompt > 3 and output > 1 and prompt + output <= LONGEST:
            found.append((prompt, output))
    return found


def run(quick: bool, data: Path | None, progress: Progress | None = None) -> list[Claim]:
    """Measures and judges."""
    sizes, lengths = QUICK if quick else FULL, read_lengths(data)
    parts = [
        lambda: queueing(sizes),
        lambda: published(lengths, data, sizes),
        lambda: attainment(lengths),
        lambda: joint(),
        lambda: bursts(),
        lambda: segments(lengths),
        lambda: fitted(sizes),
        lambda: not_built(),
    ]
    claims: list[Claim] = []
    for number, part in enumerate(parts):
        claims += part()
        if progress is not None:
            progress(number + 1, len(parts), "claims")
    return claims


# -- queueing theory --------------------------------------------------------------------------------------------------


def first_tokens(rate: float, stages: int, scale: float, count: int) -> tuple[float, float]:
    """Mean time to the first token of one-at-a-time prompts of 512 tokens, and what one takes. scale: of all times."""
    one = OPT_13B[1]
    a, b, c = (scale * value for value in one.prefill)
    draw, events, at, jobs = random.Random(3), Events(), 0.0, []
    instance = PrefillInstance(
        events, replace(one, prefill=(a, b, c)), stages=stages, kv_tokens=1 << 40, saturating_tokens=1,
        finished=lambda job, release: release(),
    )  # fmt: skip
    for _ in range(count):
        at += draw.expovariate(rate)
        jobs.append(Job(at, 512, 1))
        events.at(at, partial(instance.submit, jobs[-1]))
    events.run()
    return statistics.fmean(job.first_token_seconds for job in jobs), instance.prefill_seconds(jobs[:1])


def queueing(sizes: Sizes) -> list[Claim]:
    """Simulated means against the formulas."""
    seconds = first_tokens(1.0, 1, 1.0, 1)[1]
    off, crossed, speedup = [], [], 1.7
    for load in (0.1, 0.3, 0.5, 0.7, 0.8):
        rate = load / seconds
        off.append(first_tokens(rate, 1, 1.0, sizes.requests)[0] / waiting_first_token(rate, seconds) - 1)
    for load in (0.2, 0.6, 1.0, 1.3, 1.5, 1.6):
        rate = load / seconds
        side, _ = first_tokens(rate, 1, 1 / speedup, sizes.requests)
        deep, service = first_tokens(rate, 2, 1.0, sizes.requests)
        theory = tensor_first_token(rate, seconds, speedup) < pipeline_first_token(rate, service)
        crossed.append((side < deep, theory))
    worst = max(map(abs, off))
    agree = sum(a == b for a, b in crossed)
    order = [side for side, _ in crossed]
    return [
        Claim(
            claim="simulated mean time to the first token is what the M/D/1 formula says, for fixed lengths",
            measured=f"{100 * worst:.2f} % off at most, at loads from 0.1 to 0.8", required="3 % or less",
            passed=worst <= 0.03,
        ),
        Claim(
            claim="tensor is better at low rates, pipeline at high ones, and they cross where the formulas say",
            measured=f"{agree} of {len(crossed)} loads agree; tensor better: {order}",
            required="all agree; better first, then not",
            passed=agree == len(crossed) and order == sorted(order, reverse=True) and order[0] and not order[-1],
        ),
    ]  # fmt: skip


# -- the published simulation -----------------------------------------------------------------------------------------


def shown(plan: Plan) -> str:
    parts = [f"(tensor {one.tensor}, pipeline {one.pipeline})" for one in (plan.prefill, plan.decode)]
    return f"prefill {parts[0]}, decode {parts[1]}: {plan.goodput:.2f}"


def search(lengths: Lengths, requests: int = 300, seeds: tuple[int, ...] = (0,), limits: Limits = LIMITS) -> Search:
    return Search(
        model=MODEL, cluster=Cluster(devices=4, per_node=4), lengths=lengths, limits=limits, requests=requests,
        seeds=seeds,
    )  # fmt: skip


def published(lengths: Lengths, data: Path | None, sizes: Sizes) -> list[Claim]:
    """OPT-13B on four devices, 200 ms and 100 ms, 300 requests, rates up to 5 by 0.25."""
    began = time.perf_counter()
    plans = search(lengths).together()
    took, best = time.perf_counter() - began, plans[0]
    prefill, decode, figure = PUBLISHED
    found = f"{shown(best)} requests/s and device; next {shown(plans[1])}"
    claims = [
        Claim(
            claim="the best split of OPT-13B is two devices side by side for prefill and one for decode",
            measured=found, required="prefill (tensor 2), decode (tensor 1)",
            passed=(best.prefill, best.decode) == (prefill, decode),
        ),
        Claim(
            claim="the search over all splits of four devices takes seconds to a minute",
            measured=f"{took:.1f} s, {len(plans)} plans", required="under 90 s", passed=took < 90,
        ),
    ]  # fmt: skip
    what, wanted = "its goodput is the published one", f"about 1.5 (published {figure}) requests/s and device"
    if data is None:
        claims.append(not_run(what, wanted, "a trace with long prompts (--data)"))
    else:
        good = abs(best.goodput - figure) <= 0.25
        claims.append(Claim(claim=what, measured=f"{best.goodput:.2f}", required=f"{wanted}, within 0.25", passed=good))
    both = {one: search(lengths).goodput_colocated(one) for one in search(lengths).degrees(4)}
    single = both[Degrees(tensor=1)]
    told = ", ".join(f"({one.tensor}, {one.pipeline}) {rate:.2f}" for one, rate in both.items())
    steady = search(lengths, STEADY, sizes.seeds)
    long_best, long_both = steady.goodput_split(prefill, decode), steady.goodput_colocated(Degrees(tensor=1))
    return [
        *claims,
        Claim(
            claim="a colocated instance of one device, as vLLM runs this model, has less goodput a device",
            measured=f"{single:.2f} against {best.goodput:.2f}", required="below", passed=single < best.goodput,
        ),
        Claim(
            claim="so has a colocated instance of any other degree on up to four devices",
            measured=f"(tensor, pipeline) {told}", required=f"all below {best.goodput:.2f}",
            passed=max(both.values()) < best.goodput,
        ),
        Claim(
            claim=f"the order of the two holds over {STEADY:,} requests too",
            measured=f"split {long_best:.2f}, colocated {long_both:.2f}", required="split above",
            passed=long_best > long_both,
        ),
    ]  # fmt: skip


def attainment(lengths: Lengths) -> list[Claim]:
    """Attainment over rates and over scales of both limits."""
    one = search(lengths, STEADY)
    prefill, decode, _ = PUBLISHED
    rates = [0.5, 1.0, 1.5, 2.0, 3.0]
    over_rate = [one.attainment(prefill, decode, rate) for rate in rates]
    scales = [0.5, 0.75, 1.0, 1.5, 2.0]
    over_scale = [one.attainment(prefill, decode, 1.0, LIMITS.scaled(scale)) for scale in scales]
    slack = 0.01
    falls = all(b <= a + slack for a, b in pairwise(over_rate))
    rises = all(b >= a - slack for a, b in pairwise(over_scale))
    return [
        Claim(
            claim="attainment falls with the rate and rises as limits loosen, on the same draws",
            measured=f"rates {rates}: {[round(v, 3) for v in over_rate]}; scales {scales}: "
            f"{[round(v, 3) for v in over_scale]}",
            required="monotone within 0.01", passed=falls and rises,
        )
    ]  # fmt: skip


def joint() -> list[Claim]:
    """Two kinds of requests: one is slow to begin, the other slow to go on."""
    jobs = [Job(0.0, 10, 11, first=0.1, last=0.1 + 10 * 0.2) for _ in range(50)]
    jobs += [Job(0.0, 10, 11, first=0.3, last=0.3 + 10 * 0.05) for _ in range(50)]
    both, apart = LIMITS.attained(jobs), replace(LIMITS, separate=True).attained(jobs)
    return [
        Claim(
            claim="a request counts only where it meets both limits",
            measured=f"both {both:.2f}, each on its own {apart:.2f}, with two kinds of requests",
            required="0 and 0.5", passed=both == 0.0 and apart == 0.5,
        )
    ]  # fmt: skip


def bursts() -> list[Claim]:
    """All prompts at once, a decode side with little memory."""
    tight = replace(MODEL, latencies={1: replace(OPT_13B[1], kv_tokens=8192)})
    jobs = [Job(0.0, 600, 200) for _ in range(200)]
    simulation = Simulation(model=tight, cluster=Cluster(devices=2, per_node=2))
    simulation.split(jobs, Degrees(tensor=1), Degrees(tensor=1))
    most = simulation.decoders[0].blocks.most
    done = sum(job.made == job.output_tokens for job in jobs)
    return [
        Claim(
            claim="under a burst the decode side pulls only what it has room for, and nothing is lost",
            measured=f"{done} of {len(jobs)} end; {simulation.peak_blocks} of {most} blocks held at most, "
            f"{sum(job.set_aside for job in jobs)} times set aside",
            required="all end, never above", passed=done == len(jobs) and simulation.peak_blocks <= most,
        )
    ]  # fmt: skip


def segments(lengths: Lengths) -> list[Claim]:
    """Slow links between nodes of four; and OPT-66B, which takes four devices an instance."""
    slow = replace(search(lengths, 100), cluster=Cluster(devices=8, per_node=4))
    plans = slow.in_segments()
    inside = all((plan.prefill.devices + plan.decode.devices) // plan.segments <= 4 for plan in plans)
    whole = [plan for plan in plans if plan.segments > 1]
    large = Search(
        model=LARGE, cluster=Cluster(devices=8, per_node=8), lengths=lengths, requests=300,
        limits=Limits(first_token=2.5, per_token=0.15),
    )  # fmt: skip
    best = large.together()[0]
    jobs = poisson_jobs(lengths, 8 * max(best.goodput, 0.1), 300, 1)
    Simulation(model=LARGE, cluster=large.cluster).split(jobs, best.prefill, best.decode)
    moves = [Simulation(model=LARGE, cluster=large.cluster).move_seconds(job.prompt_tokens) for job in jobs]
    share = sum(moves) / sum((job.last or 0.0) - job.at for job in jobs)
    return [
        Claim(
            claim="with slow links both phases of a segment share a node",
            measured=f"{len(plans)} plans, {len(whole)} over two nodes; best {shown(plans[0])}",
            required="no segment wider than its node, and plans over two nodes", passed=inside and bool(whole),
        ),
        Claim(
            claim="moving keys and values is a small part of a request's time inside a node (OPT-66B, 600 GB/s)",
            measured=f"{100 * share:.3f} % of the time of all requests", required="under 0.1 %", passed=share < 1e-3,
        ),
    ]  # fmt: skip


# -- formulas of this engine ------------------------------------------------------------------------------------------


def timed_steps(serving: Serving, prompts: list[int], repeats: int) -> tuple[float, float, int]:
    """Median seconds of the step that computes the prompts together, and of a decode step after it, with the sum of
    contexts in it.
    """
    first, then, context = [], [], 0
    draw = random.Random(sum(prompts))
    for _ in range(repeats):
        sampling = Sampling(max_new_tokens=6, ignore_eos=True)
        held = [
            serving.engine.submit(Request(prompt=tuple(draw.randrange(8, 4000) for _ in range(n)), sampling=sampling))
            for n in prompts
        ]
        began = time.perf_counter()
        serving.engine.step()
        first.append(time.perf_counter() - began)
        assert all(one.num_made == 1 for one in held)
        context = sum(prompts) + 3 * len(prompts)
        for number in range(5):
            began = time.perf_counter()
            serving.engine.step()
            if number == 2:
                then.append(time.perf_counter() - began)
        while serving.engine.busy:
            serving.engine.step()
    return statistics.median(first), statistics.median(then), context


def settings() -> Iterator[list[int]]:
    """Prompt lengths of a batch, alternately for the fit and for the test."""
    for count in (1, 2, 3, 4, 6, 8, 12, 16):
        for length in (16, 48, 96, 160, 256):
            if count * length <= 2048:
                yield [length] * count


def fitted(sizes: Sizes) -> list[Claim]:
    """Both formulas, fitted to half of what this engine took, on the other half."""
    serving = load_engine(
        DEMO_DIRECTORY,
        ServingSettings(
            weights="int8", context_tokens=512, token_budget=2048, max_sequences=16, threads=1, keep_prefixes=False,
        ),
    )  # fmt: skip
    batches = list(settings())
    timed_steps(serving, [64], sizes.repeats)
    rows = [timed_steps(serving, batch, sizes.repeats) for batch in batches]
    serving.release()
    a, b, c = fit_prefill(batches[::2], [row[0] for row in rows[::2]])
    prompts = [a + b * sum(batch) + c * sum(n * n for n in batch) for batch in batches[1::2]]
    d, e, f = fit_decode(
        [(row[2], len(batch)) for row, batch in zip(rows[::2], batches[::2])], [r[1] for r in rows[::2]]
    )
    tokens = [d + e * row[2] + f * len(batch) for row, batch in zip(rows[1::2], batches[1::2])]
    claims = []
    for what, predicted, place in (("prefill", prompts, 0), ("decode", tokens, 1)):
        off = relative_errors(predicted, [row[place] for row in rows[1::2]])
        claims.append(
            Claim(
                claim=f"the {what} formula, fitted to half of this engine's steps, tells the other half's times",
                measured=f"{100 * off.mean():.1f} % off in the mean, {100 * off.max():.1f} % at most, of {len(off)}",
                required="under 10 % in the mean", passed=off.mean() < 0.10,
            )
        )  # fmt: skip
    return claims


def not_built() -> list[Claim]:
    """What needs prefill and decode in processes of their own."""
    needs = "two processes that hand keys and values over, which are not built"
    return [
        not_run(
            "under mixed load P90 time per token of the split hardly depends on prompts",
            "clearly lower than colocated",
            needs,
        ),
        not_run("goodput of the split is above colocation's for tight limits per token", "ratio above 1", needs),
        not_run("tokens are the same after moves between different tensor degrees (2 to 1, 1 to 2)", "the same", needs),
    ]


if __name__ == "__main__":
    sys.exit(main("distserve", sys.modules[__name__]))

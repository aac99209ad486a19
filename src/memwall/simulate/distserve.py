"""DistServe (arXiv 2401.09670): prefill and decode on devices of their own, and how many of which each needs.

Goodput per device is the highest rate of requests per device at which enough of them (90 %) meet both limits: time to
the first token, and time per further token. A plan says for each phase how wide (tensor) and deep (pipeline) an
instance is. With fast links everywhere each phase is planned for itself and instances are counted by the rate wanted;
with slow links between nodes the layers are cut in segments, and the prefill and decode parts of a segment share a
node, so that keys and values never leave it: then both are simulated together.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from memwall.errors import DoesNotFit, InputError
from memwall.simulate.phase_instances import (
    BLOCK_TOKENS,
    PREFILL_TOKENS,
    ColocatedInstance,
    DecodeInstance,
    Events,
    Job,
    PrefillInstance,
)
from memwall.simulate.phase_latency import PhaseLatency

Lengths = Sequence[tuple[int, int]]
"""(prompt tokens, output tokens) of requests, to draw from."""
Progress = Callable[[int, int], None]

ATTAINMENT = 0.9
RATE_STEP, RATE_MOST = 0.25, 5.0
REQUESTS = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """devices: in all; per_node: of a node; link_bytes_per_s and link_seconds: what moves keys and values there, per
    layer of the model the latter.
    """

    devices: int
    per_node: int
    link_bytes_per_s: float = 600e9
    link_seconds: float = 5e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A model: its latencies by tensor degree, layers and heads, and bytes of keys and values per token."""

    latencies: Mapping[int, PhaseLatency]
    layers: int
    heads: int
    kv_bytes_per_token: int

    def kv_tokens(self, tensor: int, pipeline: int) -> int | None:
        """Room for keys and values of an instance; None where nothing is known of its tensor degree.

        As many devices side by side hold as much as one after the other: each has the same share of the weights. So
        room is a line over devices, less the weights; where one point of it is known, its share of a device is.
        """
        devices = tensor * pipeline
        whole = self.latencies.get(devices)
        if whole is not None or tensor not in self.latencies:
            return None if whole is None else whole.kv_tokens
        known = sorted((n, latency.kv_tokens) for n, latency in self.latencies.items() if latency.kv_tokens)
        if not known:
            return 0
        (few, least), (many, most) = known[0], known[-1]
        if few == many:
            return least * devices // few if devices >= few else 0
        return max(least + (most - least) * (devices - few) // (many - few), 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Objectives in seconds. separate: each limit's attainment on its own, as the released simulator judges; else the
    share of requests that meet both.
    """

    first_token: float
    per_token: float
    attainment: float = ATTAINMENT
    separate: bool = False

    def scaled(self, factor: float) -> Limits:
        return replace(self, first_token=self.first_token * factor, per_token=self.per_token * factor)

    def attained(self, jobs: Sequence[Job], *, first: bool = True, per_token: bool = True) -> float:
        """Share of requests within the limits (of one phase alone where the other is left out)."""
        fast = [not first or job.first_token_seconds <= self.first_token for job in jobs]
        steady = [not per_token or job.per_token_seconds <= self.per_token for job in jobs]
        if self.separate:
            return min(sum(fast), sum(steady)) / len(jobs)
        return sum(a and b for a, b in zip(fast, steady, strict=True)) / len(jobs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Degrees:
    """One instance: tensor degree of a stage, stages."""

    tensor: int
    pipeline: int = 1

    @property
    def devices(self) -> int:
        return self.tensor * self.pipeline


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """goodput: requests a second and device. segments: how many nodes the layers are cut over (slow links)."""

    prefill: Degrees
    decode: Degrees
    goodput: float
    prefill_instances: int = 1
    decode_instances: int = 1
    segments: int = 1

    @property
    def devices(self) -> int:
        return self.prefill_instances * self.prefill.devices + self.decode_instances * self.decode.devices


# -- one simulation ---------------------------------------------------------------------------------------------------


def poisson_jobs(lengths: Lengths, rate: float, count: int, seed: int) -> list[Job]:
    """Requests at Poisson times; the same draws at every rate, so that a higher one only moves them closer."""
    draw = random.Random(seed)
    picked = [lengths[draw.randrange(len(lengths))] for _ in range(count)]
    at, jobs = 0.0, []
    for prompt, output in picked:
        at += draw.expovariate(1.0)
        jobs.append(Job(at / rate, prompt, output))
    return jobs


@dataclass(kw_only=True)
class Simulation:
    """Instances of one model under a list of requests. fill: prompts are batched near L_m, from which on a batch fills
    the instance (section 4.2); else up to what the released simulator lets in.
    """

    model: Served
    cluster: Cluster
    fill: bool = False
    events: Events = field(default_factory=Events)

    def split(
        self, jobs: Sequence[Job], prefill: Degrees, decode: Degrees, counts: tuple[int, int] = (1, 1)
    ) -> Simulation:
        """Prefill and decode apart; the least loaded instance of a phase takes the next request."""
        self.decoders = [self._decoder(decode) for _ in range(counts[1])]

        def hand_over(job: Job, release: Callable[[], None]) -> None:
            min(self.decoders, key=lambda one: one.load).offer(job, release)

        self.prefills = [self._prefill(prefill, hand_over) for _ in range(counts[0])]
        return self._feed(jobs, lambda job: min(self.prefills, key=lambda one: one.load).submit(job))

    def prefill_alone(self, jobs: Sequence[Job], degrees: Degrees) -> Simulation:
        """As if the decode side took everything at once."""
        self.prefills = [self._prefill(degrees, lambda job, release: release())]
        return self._feed(jobs, self.prefills[0].submit)

    def decode_alone(self, jobs: Sequence[Job], degrees: Degrees) -> Simulation:
        """As if every prompt were done when it comes."""
        self.decoders = [self._decoder(degrees)]

        def come(job: Job) -> None:
            job.first, job.made = self.events.now, 1
            self.decoders[0].offer(job, lambda: None)

        return self._feed(jobs, come)

    def colocated(self, jobs: Sequence[Job], degrees: Degrees, count: int = 1) -> Simulation:
        """Both phases on the same instances."""
        latency, room = self._of(degrees)
        both = [ColocatedInstance(self.events, latency, stages=degrees.pipeline, kv_tokens=room) for _ in range(count)]
        return self._feed(jobs, lambda job: min(both, key=lambda one: one.load).submit(job))

    @property
    def peak_blocks(self) -> int:
        """Most that any decode instance held."""
        return max(one.blocks.peak for one in self.decoders)

    def _feed(self, jobs: Sequence[Job], submit: Callable[[Job], None]) -> Simulation:
        for job in jobs:
            self.events.at(job.at, partial(submit, job))
        self.events.run()
        return self

    def _prefill(self, degrees: Degrees, finished: Callable[[Job, Callable[[], None]], None]) -> PrefillInstance:
        latency, room = self._of(degrees)
        most = latency.saturating_tokens if self.fill else PREFILL_TOKENS
        return PrefillInstance(
            self.events, latency, stages=degrees.pipeline, kv_tokens=room, finished=finished, saturating_tokens=most
        )

    def _decoder(self, degrees: Degrees) -> DecodeInstance:
        latency, room = self._of(degrees)
        return DecodeInstance(
            self.events, latency, stages=degrees.pipeline, kv_tokens=room, move_seconds=self.move_seconds
        )

    def _of(self, degrees: Degrees) -> tuple[PhaseLatency, int]:
        room = self.model.kv_tokens(degrees.tensor, degrees.pipeline)
        if degrees.tensor not in self.model.latencies or room is None:
            raise InputError(f"no latencies for a tensor degree of {degrees.tensor}")
        return self.model.latencies[degrees.tensor], room

    def move_seconds(self, prompt_tokens: int) -> float:
        """What a prompt's keys and values take from instance to instance."""
        nbytes = prompt_tokens * self.model.kv_bytes_per_token
        return nbytes / self.cluster.link_bytes_per_s + self.model.layers * self.cluster.link_seconds


# -- goodput ----------------------------------------------------------------------------------------------------------


def highest_rate(attained: Callable[[float], float], wanted: float, step: float, most: float) -> float:
    """The highest rate at which `attained(rate)` is what is wanted, by bisection to `step`; 0 where none is."""
    low, high = 0.0, most
    while high - low >= step:
        middle = (low + high) / 2
        low, high = (middle, high) if attained(middle) >= wanted else (low, middle)
    return low


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """What goodput is measured with. requests: of one simulation; seeds: whose mean attainment counts; fill: see
    `Simulation`.
    """

    model: Served
    cluster: Cluster
    lengths: Lengths
    limits: Limits
    requests: int = REQUESTS
    seeds: tuple[int, ...] = (0,)
    rate_step: float = RATE_STEP
    rate_most: float = RATE_MOST
    fill: bool = False

    def goodput_split(self, prefill: Degrees, decode: Degrees) -> float:
        """Requests a second and device of one instance of each, simulated together."""
        run = partial(self._split, prefill, decode)
        return self._goodput(run, prefill.devices + decode.devices)

    def goodput_colocated(self, degrees: Degrees) -> float:
        """The same of one instance that does both."""
        return self._goodput(lambda jobs: self._new().colocated(jobs, degrees), degrees.devices)

    def goodput_prefill(self, degrees: Degrees) -> float:
        """Of a prefill instance alone: only the first token counts."""
        return self._goodput(lambda jobs: self._new().prefill_alone(jobs, degrees), degrees.devices, per_token=False)

    def goodput_decode(self, degrees: Degrees) -> float:
        """Of a decode instance alone: only further tokens count."""
        return self._goodput(lambda jobs: self._new().decode_alone(jobs, degrees), degrees.devices, first=False)

    def attainment(
        self, prefill: Degrees, decode: Degrees, rate_per_device: float, limits: Limits | None = None
    ) -> float:
        """Share of requests within the limits at a rate."""
        devices = prefill.devices + decode.devices
        return self._attained(partial(self._split, prefill, decode), devices * rate_per_device, limits or self.limits)

    def attained_by(self, plan: Plan, rate: float, limits: Limits | None = None) -> float:
        """Share of requests within the limits, all of a plan's instances together. rate: of all, a second."""
        counts = (plan.prefill_instances, plan.decode_instances)
        run = partial(self._split, plan.prefill, plan.decode, counts=counts)
        return self._attained(run, rate, limits or self.limits)

    def attained_colocated(self, degrees: Degrees, count: int, rate: float, limits: Limits | None = None) -> float:
        """The same of instances that do both."""
        return self._attained(lambda jobs: self._new().colocated(jobs, degrees, count), rate, limits or self.limits)

    def degrees(self, most_devices: int) -> Iterator[Degrees]:
        """Instances that the model can be cut into and whose weights fit, beside the longest request."""
        longest = max(prompt + output for prompt, output in self.lengths)
        for tensor in sorted(self.model.latencies):
            for pipeline in range(1, most_devices // tensor + 1):
                cuts = self.model.layers % pipeline == 0 and self.model.heads % tensor == 0
                if cuts and (self.model.kv_tokens(tensor, pipeline) or 0) >= longest + BLOCK_TOKENS:
                    yield Degrees(tensor=tensor, pipeline=pipeline)

    def together(self, progress: Progress | None = None) -> list[Plan]:
        """All pairs that fit the cluster as one instance of each, best first (the released simulator's search)."""
        pairs = [
            (prefill, decode)
            for prefill in self.degrees(self.cluster.devices)
            for decode in self.degrees(self.cluster.devices - prefill.devices)
        ]
        return self._ranked([Plan(prefill=p, decode=d, goodput=0.0) for p, d in pairs], progress)

    def apart(self, rate: float) -> Plan:
        """Fast links: the best instance of each phase on its own, and as many of each as `rate` asks for."""
        options = list(self.degrees(self.cluster.devices))
        prefill, each_prefill = self._best(options, self.goodput_prefill, "time to the first token")
        decode, each_decode = self._best(options, self.goodput_decode, "time per token")
        counts = (
            max(math.ceil(rate / (each_prefill * prefill.devices)), 1),
            max(math.ceil(rate / (each_decode * decode.devices)), 1),
        )
        plan = Plan(
            prefill=prefill, decode=decode, goodput=0.0, prefill_instances=counts[0], decode_instances=counts[1]
        )
        return replace(plan, goodput=rate / plan.devices)

    def in_segments(self, progress: Progress | None = None) -> list[Plan]:
        """Slow links: layers cut over nodes, both phases of a segment on one node; simulated together, best first.

        A plan's degrees are those of the whole instance: its pipeline runs through all segments.
        """
        found: list[Plan] = []
        node, options = self.cluster.per_node, list(self.degrees(self.cluster.per_node))
        for segments in range(1, self.cluster.devices // node + 1 if self.cluster.devices >= node else 2):
            for prefill in options:
                for decode in options:
                    if prefill.devices + decode.devices > node:
                        continue
                    parts = [replace(one, pipeline=one.pipeline * segments) for one in (prefill, decode)]
                    if all(self.model.layers % part.pipeline == 0 for part in parts):
                        found.append(Plan(prefill=parts[0], decode=parts[1], goodput=0.0, segments=segments))
        return self._ranked(found, progress)

    def _ranked(self, plans: list[Plan], progress: Progress | None) -> list[Plan]:
        if not plans:
            raise DoesNotFit(f"{self.cluster.devices} devices hold no instance of each phase")
        done = []
        for number, plan in enumerate(plans):
            done.append(replace(plan, goodput=self.goodput_split(plan.prefill, plan.decode)))
            if progress is not None:
                progress(number + 1, len(plans))
        return sorted(done, key=lambda plan: (-plan.goodput, plan.devices))

    @staticmethod
    def _best(options: list[Degrees], goodput: Callable[[Degrees], float], what: str) -> tuple[Degrees, float]:
        ranked = sorted(((goodput(one), -one.devices, one) for one in options), key=lambda row: row[:2])
        if not ranked or ranked[-1][0] <= 0:
            raise DoesNotFit(f"no instance meets the limit on the {what} at any rate; loosen it")
        return ranked[-1][2], ranked[-1][0]

    def _goodput(
        self, run: Callable[[list[Job]], Simulation], devices: int, *, first: bool = True, per_token: bool = True
    ) -> float:
        def attained(rate: float) -> float:
            return self._attained(run, rate * devices, self.limits, first=first, per_token=per_token)

        return highest_rate(attained, self.limits.attainment, self.rate_step, self.rate_most)

    def _attained(
        self, run: Callable[[list[Job]], Simulation], rate: float, limits: Limits, *, first: bool = True,
        per_token: bool = True,
    ) -> float:  # fmt: skip
        found = []
        for seed in self.seeds:
            jobs = poisson_jobs(self.lengths, rate, self.requests, seed)
            run(jobs)
            found.append(limits.attained(jobs, first=first, per_token=per_token))
        return sum(found) / len(found)

    def _split(
        self, prefill: Degrees, decode: Degrees, jobs: list[Job], counts: tuple[int, int] = (1, 1)
    ) -> Simulation:
        return self._new().split(jobs, prefill, decode, counts)

    def _new(self) -> Simulation:
        return Simulation(model=self.model, cluster=self.cluster, fill=self.fill)

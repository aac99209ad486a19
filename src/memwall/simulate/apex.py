"""APEX: which parallel plan serves a model and a load fastest, or with least energy, found without the cluster.

*Source*: APEX: An Extensible and Dynamism-Aware Simulator for Automated Parallel Execution in LLM Serving (Lin 2024,
arXiv 2411.17651), sections 3 to 5; official code microsoft/apex_plus (MIT), read for formats and defaults.
*Idea*: a model is one repeated block of cells; every way to spread the cells over devices is enumerated (`plans`), and
each is simulated with the batches that iteration-level scheduling makes of the real load (`iterations`), each
iteration's time being the sum of its operations (`blocks`) as measured or by a roofline (`tables`, `base`, `cluster`).
*Units and shapes*: seconds, bytes, tokens, joules; a load is a list of `engine.arrivals.Load`.
*Differs from the paper*: see `blocks` and `iterations`; here too a plan whose clock passes `SLACK` times the
fastest plan's end is given up (not where energy or objectives count, nor with `keep_all`).
*Cost*: every plan costs one simulation, about 10 us for each token made and 0.1 ms for each iteration; memory is that
of the load.
*Holds when*: blocks are alike, links are not shared with others, and the time of an operation does not depend on what
ran before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from typing import Any, Literal

from memwall.engine.arrivals import Load
from memwall.errors import DoesNotFit, InputError
from memwall.simulate.base import CostModel, Priced, Roofline
from memwall.simulate.blocks import BatchShape, StepTimer
from memwall.simulate.cluster import Cluster, LinkModel
from memwall.simulate.iterations import Batching, run_plan
from memwall.simulate.metrics import Figures, Objectives, device_figures, figures_of
from memwall.simulate.plans import Room, ServingPlan, enumerate_plans, fitting_plans, room_of
from memwall.simulate.serving_model import ServedModel
from memwall.simulate.tables import Tables

Goal = Literal["latency", "time", "energy", "slo"]
GOALS: tuple[Goal, ...] = ("latency", "time", "energy", "slo")
SLACK = 3.0
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is planned for: a model on a cluster under a load. tables: measured times, asked before the roofline.

    kv_tokens: what an attention replica may cache, all stages' requests together, where that is known and need not be
    worked out from the devices' memory.
    """

    model: ServedModel
    cluster: Cluster
    loads: tuple[Load, ...]
    tables: Tables | None = None
    roofline: Roofline | None = None
    batching: Batching = field(default_factory=Batching)
    objectives: Objectives = field(default_factory=Objectives)
    kv_tokens: int | None = None

    def __post_init__(self) -> None:
        if not self.loads:
            raise InputError("there is no load to plan for; give at least one request")

    @property
    def longest_tokens(self) -> int:
        """Of one request, prompt and answer, in whole pages."""
        longest = max(load.prompt_tokens + load.output_tokens for load in self.loads)
        page = self.batching.limits.page_tokens
        return -(-longest // page) * page

    def room(self, plan: ServingPlan) -> Room:
        """What a plan leaves for keys and values."""
        room = room_of(plan, self.model, self.cluster.device.capacity_bytes)
        return room if self.kv_tokens is None else replace(room, kv_tokens=self.kv_tokens)

    def price(self) -> Priced:
        """Measured times first, then the roofline and the links' rates."""
        models: list[tuple[str, CostModel]] = [] if self.tables is None else [("measured", self.tables)]
        models.append(("roofline", self.roofline or Roofline(device=self.cluster.device)))
        models.append(("link rates", LinkModel(cluster=self.cluster)))
        return Priced(models)

    def timer(self, plan: ServingPlan) -> StepTimer:
        """Times iterations of a plan."""
        return StepTimer(self.model, plan, self.cluster, self.price())


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One plan's simulation. seconds_by_operator: of one device's stages, summed over iterations. sources: share of
    that time by who told it. batches: iterations by requests in them.
    """

    plan: ServingPlan
    room: Room
    figures: Figures
    weights: str
    clock: float
    seconds_by_operator: dict[str, float]
    sources: dict[str, float]
    batches: dict[int, int]
    iterations: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "plan": self.plan.to_dict(),
            "weights": self.weights,
            "clock": self.clock,
            "parameter_bytes_per_device": self.room.parameter_bytes,
            "kv_tokens_per_attention_replica": self.room.kv_tokens,
            "iterations": self.iterations,
            **self.figures.to_dict(),
            "seconds_by_operator": self.seconds_by_operator,
            "time_sources": self.sources,
            "batch_histogram": {str(size): count for size, count in sorted(self.batches.items())},
        }

    def worth(self, goal: Goal) -> float:
        """What a goal minimises."""
        if goal == "energy":
            if self.figures.joules is None:
                raise InputError("the machine states no power, so energy is not known; add power to its [[compute]]")
            return self.figures.joules
        if goal == "slo":
            return 1 - self.figures.both_met
        return self.figures.seconds if goal == "time" else self.figures.completion["mean"]

    def rank(self, goal: Goal) -> tuple[float, float]:
        """What results are sorted by: the goal, and among equals the mean time of an answer."""
        return self.worth(goal), self.figures.completion["mean"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """All plans, the best first. given_up: those whose clock passed the limit. misfits: those without memory."""

    goal: Goal
    results: tuple[Result, ...]
    given_up: tuple[ServingPlan, ...]
    misfits: tuple[ServingPlan, ...]
    heuristic: Result | None = None

    @property
    def best(self) -> Result:
        """The plan to take."""
        return self.results[0]


def simulate(case: Case, plan: ServingPlan, *, give_up_after: float | None = None) -> Result | None:
    """Serves the case's load by one plan; None where it was given up. DoesNotFit where the weights leave no room."""
    room = case.room(plan)
    if room.kv_tokens // plan.stages < case.longest_tokens:
        raise DoesNotFit(
            f"{plan.name}: weights of {room.parameter_bytes:,} bytes a device leave room for {room.kv_tokens:,} cached "
            f"tokens in {plan.stages} stages, and the longest request has {case.longest_tokens:,}"
        )
    timer = case.timer(plan)
    run = run_plan(timer, room.kv_tokens, case.loads, case.batching, give_up_after=give_up_after)
    if run.given_up:
        return None
    figures = figures_of(run.requests, run.gaps, case.objectives)
    used = device_figures(
        run, figures.seconds, case.cluster.device, case.model.formats.compute, plan.devices, plan.stages * plan.replicas
    )
    told = sum(timer.price.seconds_by_source.values()) or 1.0
    return Result(
        plan=plan,
        room=room,
        figures=replace(figures, **used),
        weights=case.model.formats.weights,
        clock=case.cluster.device.clock,
        seconds_by_operator=dict(run.by_operator),
        sources={source: seconds / told for source, seconds in timer.price.seconds_by_source.items()},
        batches=dict(run.batches),
        iterations=run.steps,
    )


def search(
    case: Case,
    *,
    goal: Goal = "latency",
    clocks: Sequence[float] = (1.0,),
    keep_all: bool = False,
    jobs: int = 1,
    progress: Progress | None = None,
) -> Search:
    """Simulates every plan that fits, likely ones first, and orders them by the goal.

    clocks: shares of the full clock to try each plan at (they matter for energy). keep_all: give no plan up. jobs:
    processes that simulate. DoesNotFit where no plan fits.
    """
    if goal not in GOALS:
        raise InputError(f"unknown goal {goal!r}; it is one of {', '.join(GOALS)}")
    cluster = case.cluster
    fit, misfits = fitting_plans(case.model, cluster.devices, cluster.device.capacity_bytes, case.longest_tokens)
    fit.sort(key=lambda plan: static_estimate(case, plan).seconds)
    tries = [(_at_clock(case, clock), plan) for plan in fit for clock in clocks]
    results: list[Result] = []
    given_up: list[ServingPlan] = []
    began = min(load.at or 0.0 for load in case.loads)

    def limit() -> float | None:
        best = min((one.figures.seconds for one in results), default=None)
        return None if best is None or keep_all or goal in ("energy", "slo") else began + SLACK * best

    for number, (plan, found) in enumerate(_each(tries, limit, jobs)):
        if progress is not None:
            progress(number + 1, len(tries), plan.name)
        if found is None:
            given_up.append(plan)
        else:
            results.append(found)
    results.sort(key=lambda one: one.rank(goal))
    usual = heuristic_plan(case.model, cluster)
    return Search(
        goal=goal,
        results=tuple(results),
        given_up=tuple(given_up),
        misfits=tuple(misfits),
        heuristic=next((one for one in results if one.plan == usual and one.clock == max(clocks)), None),
    )


def join(searches: Sequence[Search]) -> Search:
    """One search out of several with the same goal, such as one for each format of the weights."""
    goal = searches[0].goal
    results = sorted((one for each in searches for one in each.results), key=lambda one: one.rank(goal))
    return Search(
        goal=goal,
        results=tuple(results),
        given_up=tuple(plan for each in searches for plan in each.given_up),
        misfits=tuple(plan for each in searches for plan in each.misfits),
        heuristic=next((each.heuristic for each in searches if each.heuristic is not None), None),
    )


def _each(
    tries: Sequence[tuple[Case, ServingPlan]], limit: Callable[[], float | None], jobs: int
) -> Iterator[tuple[ServingPlan, Result | None]]:
    """All simulations, in the order in which they end; `limit` is asked when one begins."""
    if jobs <= 1 or len(tries) < 2:
        for case, plan in tries:
            yield plan, simulate(case, plan, give_up_after=limit())
        return
    # spawned: a fork would copy the kernels' threads half-way
    with ProcessPoolExecutor(min(jobs, len(tries)), mp_context=get_context("spawn")) as pool:
        waiting = list(reversed(tries))
        running: dict[Future[Result | None], ServingPlan] = {}
        while waiting or running:
            while waiting and len(running) < jobs:
                case, plan = waiting.pop()
                running[pool.submit(simulate, case, plan, give_up_after=limit())] = plan
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield running.pop(future), future.result()


def _at_clock(case: Case, clock: float) -> Case:
    if clock == case.cluster.device.clock:
        return case
    device = case.cluster.device.at_clock(clock)
    roofline = None if case.roofline is None else replace(case.roofline, device=device)
    return replace(case, cluster=replace(case.cluster, device=device), roofline=roofline)


def heuristic_plan(model: ServedModel, cluster: Cluster) -> ServingPlan | None:
    """What people take without a search: tensor parallel inside a node, pipeline stages across nodes; None where the
    blocks do not divide.
    """
    for plan in enumerate_plans(model, cluster.devices):
        whole = all(cell.replicas == 1 and cell.template != "expert" for cell in plan.cells)
        if plan.replicas == 1 and plan.stages == cluster.nodes and whole:
            return plan
    return None


# ---- the estimator that looks at no iteration ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """From mean lengths and a steady batch; seconds in all, to the first token, and per token."""

    seconds: float
    first_token: float
    per_token: float
    batch: float


def static_estimate(case: Case, plan: ServingPlan) -> Estimate:
    """What a static estimator says of a plan: all requests have the mean lengths, arrivals are even, the batch steady.

    The batch follows from Little's law, at most what the cache holds; what the simulation is compared with, and in
    which order plans are tried.
    """
    loads, timer = case.loads, case.timer(plan)
    prompt = sum(load.prompt_tokens for load in loads) / len(loads)
    output = sum(load.output_tokens for load in loads) / len(loads)
    arrivals = [load.at or 0.0 for load in loads]
    span = max(arrivals) - min(arrivals)
    engines = plan.replicas * plan.stages * plan.cells[0].replicas
    room = case.room(plan)
    most = min(room.kv_tokens / plan.stages / (prompt + output), case.batching.limits.max_sequences)
    most = max(min(most, len(loads) / engines), 1.0)
    rate = len(loads) / engines / span if span else float("inf")
    prefill = _seconds(timer, BatchShape(prompts=1, prompt_tokens=round(prompt), prompt_keys=prompt * (prompt + 1) / 2,
                                         last_keys=round(prompt), sampled=1))  # fmt: skip
    batch, step = 1.0, 0.0
    for _ in range(30):
        many = max(round(batch), 1)
        cached = round(many * (prompt + output / 2))
        step = _seconds(timer, BatchShape(decodes=many, cached=cached, sampled=many))
        # a request stays for its prompt, its steps, and the prompts of others that come between them
        stay = prefill + output * (step + min(prefill * batch / output, prefill * rate * step))
        batch = min(most, rate * stay) if rate != float("inf") else most
        batch = max(batch, 1.0)
    each = output * step + batch * prefill
    busy = len(loads) / engines / batch * each
    return Estimate(
        seconds=max(busy, span + prefill + output * step),
        first_token=prefill,
        per_token=each / output,
        batch=batch,
    )


def _seconds(timer: StepTimer, shape: BatchShape) -> float:
    """Of an iteration in which every attention replica has such a batch, through all stages."""
    times = timer.step([shape] * timer.plan.cells[0].replicas)
    return sum(times.stages) + times.send * (len(times.stages) - 1)

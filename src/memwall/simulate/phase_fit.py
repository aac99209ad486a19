"""DistServe's latency formulas for any model on any cluster, fitted to what a cost model says of its batches.

A cost model is APEX's: measured tables where there are some (`memwall simulate profile`), else a roofline and the
links' rates. So one device's profile is enough to ask how two to eight of them would best be split.

Source: DistServe, arXiv 2401.09670, section 3 and appendix (the formulas, fitted per tensor degree to measured
batches). Differs from the paper: batches are priced, not run, where there is no profile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from memwall.errors import DoesNotFit
from memwall.simulate.base import Priced
from memwall.simulate.blocks import BatchShape, StepTimer
from memwall.simulate.cluster import Cluster
from memwall.simulate.distserve import Served
from memwall.simulate.phase_latency import PhaseLatency, fit_decode, fit_prefill, relative_errors
from memwall.simulate.plans import CellPlan, ServingPlan, room_of
from memwall.simulate.serving_model import Attention, Experts, ServedModel

LENGTHS = (32, 64, 128, 256, 512, 1024, 2048)
PROMPTS = (1, 2, 4, 8)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 94)
LARGE_BATCHES = (95, 128, 192, 256)
CONTEXTS = (128, 512, 1024, 2048)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """The formulas by tensor degree, and how far they are off what they were fitted to (mean of relative errors)."""

    served: Served
    prefill_error: float
    decode_error: float


def tensor_plan(model: ServedModel, tensor: int) -> ServingPlan | None:
    """Every cell over so many devices; None where one has too few tasks for that."""
    cells = []
    for cell in model.cells:
        templates = cell.templates(tensor)
        if not templates:
            return None
        cells.append(CellPlan(replicas=1, devices=tensor, template=templates[0]))
    return ServingPlan(replicas=1, stages=1, cells=tuple(cells))


def fit(model: ServedModel, cluster: Cluster, price: Priced) -> Fit:
    """Formulas for tensor degrees of 1, 2, 4 ... devices of a node. DoesNotFit where no node holds the weights."""
    attention = next(cell for cell in model.cells if isinstance(cell, Attention))
    found: dict[int, PhaseLatency] = {}
    off: tuple[list[float], list[float]] = ([], [])
    for tensor in [1 << n for n in range(cluster.per_node.bit_length())]:
        plan = tensor_plan(model, tensor)
        if tensor > cluster.per_node or plan is None or attention.heads % tensor:
            continue
        timer = StepTimer(model, plan, cluster, price)
        room = room_of(plan, model, cluster.device.capacity_bytes)
        found[tensor], errors = _fit(timer, room.kv_tokens)
        for mine, more in zip(off, errors):
            mine.extend(more)
    if not any(latency.kv_tokens for latency in found.values()):
        raise DoesNotFit(
            f"{model.name} with {model.formats.weights} weights does not fit {cluster.per_node} devices of a node; "
            "try fewer bits with --weights, or more --devices"
        )
    kv_bytes = model.blocks * model.formats.kv_bytes * attention.kv_values()
    served = Served(latencies=found, layers=model.blocks, heads=attention.heads, kv_bytes_per_token=round(kv_bytes))
    return Fit(served=served, prefill_error=float(np.mean(off[0])), decode_error=float(np.mean(off[1])))


def _fit(timer: StepTimer, kv_tokens: int) -> tuple[PhaseLatency, tuple[list[float], list[float]]]:
    prompts = [[length] * count for length in LENGTHS for count in PROMPTS if length * count <= 2 * max(LENGTHS)]
    took = [_seconds(timer, _prompts(batch)) for batch in prompts]
    small = [(count * context, count) for count in BATCHES for context in CONTEXTS]
    large = [(count * context, count) for count in LARGE_BATCHES for context in CONTEXTS]
    times = {steps: _seconds(timer, _tokens(*steps)) for steps in (*small, *large)}
    made = PhaseLatency(
        prefill=fit_prefill(prompts, took),
        decode=fit_decode(small, [times[one] for one in small]),
        decode_large=fit_decode(large, [times[one] for one in large]),
        kv_tokens=kv_tokens,
    )
    first = relative_errors([made.prefill_seconds(batch) for batch in prompts], took)
    then = relative_errors([made.decode_seconds(*steps) for steps in times], list(times.values()))
    return made, (first.tolist(), then.tolist())


def _seconds(timer: StepTimer, shape: BatchShape) -> float:
    return sum(timer.step([shape]).stages)


def _prompts(batch: Sequence[int]) -> BatchShape:
    keys = sum(length * (length + 1) / 2 for length in batch)
    return BatchShape(
        prompts=len(batch), prompt_tokens=sum(batch), prompt_keys=keys, last_keys=sum(batch), sampled=len(batch)
    )


def _tokens(context: int, count: int) -> BatchShape:
    return BatchShape(decodes=count, cached=context, sampled=count)


def has_experts(model: ServedModel) -> bool:
    """Whether a batch's time depends on which experts its tokens meet, so that the formulas are only means."""
    return any(isinstance(cell, Experts) for cell in model.cells)


def highest_rate(latencies: Mapping[int, PhaseLatency], prompt_tokens: float) -> float:
    """Requests a second and device that no prefill instance can exceed: where a search over rates may end."""
    return max(
        latency.saturating_tokens / latency.prefill_seconds([latency.saturating_tokens]) / prompt_tokens / tensor
        for tensor, latency in latencies.items()
    )

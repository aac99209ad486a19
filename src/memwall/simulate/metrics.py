"""What a simulated (or measured) run of a server comes to: throughput, latencies, objectives, use of the devices,
energy.

Symbols: a request arrives at a, its first token is there at f, its last of o tokens at l. Time to first token f - a;
per token (l - f) / (o - 1); between tokens: each gap by itself; completion l - a. Total: from the first arrival to the
last token. MFU, MBU: operations (bytes of device memory) per second over what all devices could do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from memwall.errors import InputError
from memwall.simulate.base import Device
from memwall.simulate.iterations import Run, Served

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Objectives:
    """Seconds to the first token and per further token that a request should keep (the paper's defaults)."""

    first_token: float = 0.01
    per_token: float = 0.01

    def __post_init__(self) -> None:
        for name in ("first_token", "per_token"):
            if not getattr(self, name) > 0:
                raise InputError(f"objective {name} is {getattr(self, name)} s; it must be above zero")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Figures of a run; seconds, tokens, joules. None where nobody knows (energy without a stated power)."""

    seconds: float
    requests: int
    requests_per_s: float
    output_tokens_per_s: float
    tokens_per_s: float
    first_token: dict[str, float]
    per_token: dict[str, float]
    between_tokens: dict[str, float]
    completion: dict[str, float]
    first_token_met: float
    per_token_met: float
    both_met: float
    goodput_per_s: float
    preempted: int
    mfu: float | None = None
    mbu: float | None = None
    idle_share: float | None = None
    joules: float | None = None
    joules_per_token: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def spread(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Mean and percentiles; empty for no values."""
    found = np.asarray(values, np.float64)
    if not len(found):
        return {}
    return {
        "mean": float(found.mean()),
        **{f"p{p}": float(q) for p, q in zip(PERCENTILES, np.percentile(found, PERCENTILES))},
    }


def figures_of(requests: Sequence[Served], gaps: Sequence[float], objectives: Objectives) -> Figures:
    """What requests and gaps between tokens come to; InputError where none was answered."""
    answered = [one for one in requests if one.tokens]
    if not answered:
        raise InputError("no request was answered; give at least one with an answer")
    began, ended = min(one.arrival for one in requests), max(one.last for one in answered)
    seconds = max(ended - began, 1e-12)
    first = np.array([one.first - one.arrival for one in answered])
    per = np.array([(one.last - one.first) / max(one.tokens - 1, 1) for one in answered])
    made = sum(one.tokens for one in answered)
    in_time, in_pace = first <= objectives.first_token, per <= objectives.per_token
    return Figures(
        seconds=seconds,
        requests=len(answered),
        requests_per_s=len(answered) / seconds,
        output_tokens_per_s=made / seconds,
        tokens_per_s=(made + sum(one.prompt for one in answered)) / seconds,
        first_token=spread(first),
        per_token=spread(per[np.array([one.tokens > 1 for one in answered])]),
        between_tokens=spread(np.frombuffer(gaps) if len(gaps) else ()),  # type: ignore[call-overload]
        completion=spread([one.last - one.arrival for one in answered]),
        first_token_met=float(in_time.mean()),
        per_token_met=float(in_pace.mean()),
        both_met=float((in_time & in_pace).mean()),
        goodput_per_s=float((in_time & in_pace).sum()) / seconds,
        preempted=sum(one.preemptions for one in answered),
    )


def device_figures(run: Run, seconds: float, device: Device, dtype: str, devices: int, stages: int) -> dict[str, Any]:
    """Use and energy of `devices` over a run. Devices of a stage are busy together; what they idle costs idle power."""
    device_seconds = seconds * devices
    busy = min(run.busy_seconds * devices / max(stages, 1), device_seconds)
    # busy_seconds sums the stages of one replica's iterations; replicas and stages share the devices among them
    idle = max(device_seconds - busy, 0.0)
    joules = run.joules + device.joules(idle, 0.0) if device.watts is not None else None
    made = sum(one.tokens for one in run.requests)
    return {
        "mfu": run.flop / (device_seconds * device.rate(dtype)),
        "mbu": run.tier_bytes / (device_seconds * device.bytes_per_s),
        "idle_share": idle / device_seconds,
        "joules": joules,
        "joules_per_token": joules / made if joules is not None and made else None,
    }

"""The seam of cost models: one record for an operation, and back ends that say what it takes on a device.

An `Operation` says what is done (operations, bytes by tier and link, and the shape that a profile is looked up by), not
how long it takes. A `CostModel` gives its `Cost`: a roofline works it out from the machine's figures, a table looks up
what was measured. `Priced` asks the tables first and the roofline for what they lack, and counts both, so that a report
can say how much of a time was measured.

Units: FLOP (a multiply and an add are two), bytes, seconds, watts, joules. Figures that no data sheet and no profile
gives are marked `model`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from memwall.errors import InputError
from memwall.hardware import Machine

Kind = Literal["gemm", "attention", "pass", "all_reduce", "all_gather", "reduce_scatter", "alltoall", "sendrecv"]
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "alltoall", "sendrecv")

COMPUTE_EFFICIENCY = 0.66
MEMORY_EFFICIENCY = 0.70
"""Shares of a data sheet's rates that kernels reach (model; fitted to the A100 figures that DistServe publishes for
OPT-13B on one device, see `evidence/apex.py`, which tries the fit on the other models and plans of that file)."""
LAUNCH_SECONDS = 5e-6
"""Least time of a kernel (model; engines that launch each kernel from Python take more, 16 us in that fit)."""
IDLE_SHARE = 0.15
"""Share of its power that a device draws while it waits (model)."""
WIDER = {"int4": "int8", "float8": "float16", "int8": "float16", "float16": "bfloat16", "bfloat16": "float32"}
"""Where a device knows no rate for a number type, the next one that holds its numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One piece of work of one device. tier_bytes: read and written in its memory. link_bytes: of a collective, the
    bytes of the whole tensor. repeat: so many of them, one after another.

    shape: gemm (m, k, n): rows of the weight, columns, tokens; attention (head size, heads, kv heads, sequences,
    queries of each, keys of each); collectives (nodes, devices of each); a pass: (values,).
    """

    name: str
    kind: Kind
    dtype: str
    shape: tuple[float, ...]
    flop: float = 0.0
    tier_bytes: float = 0.0
    link_bytes: float = 0.0
    repeat: float = 1.0


@dataclass(frozen=True, slots=True)
class Cost:
    """What an operation takes of one device."""

    seconds: float
    joules: float


class CostModel(Protocol):
    """A time back end."""

    def cost(self, operation: Operation) -> Cost | None:
        """None where it knows nothing about such an operation."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What one accelerator (or processor) of a machine can do. clock: share of its full clock rate that it runs at."""

    name: str
    flop_per_s: Mapping[str, float]
    bytes_per_s: float
    capacity_bytes: int
    watts: float | None = None
    clock: float = 1.0

    @staticmethod
    def of(machine: Machine, unit: str | None = None) -> Device:
        """The machine's first unit that computes from the memory named as itself, else its first one at all."""
        if not machine.compute:
            raise InputError(f"{machine.name}: it computes nothing; add a [[compute]] table")
        units = {one.unit: one for one in machine.compute}
        if unit is not None and unit not in units:
            raise InputError(f"{machine.name} has no {unit!r}; it has {', '.join(units)}")
        chosen = units[unit] if unit is not None else units.get("gpu", machine.compute[0])
        tier = machine.tier(chosen.tier)
        return Device(
            name=machine.name,
            flop_per_s=dict(chosen.flop_per_s),
            bytes_per_s=tier.read_bytes_per_s,
            capacity_bytes=tier.capacity_bytes,
            watts=chosen.watts,
        )

    def rate(self, dtype: str) -> float:
        """Peak operations per second, at the device's clock."""
        wanted = dtype
        while wanted not in self.flop_per_s:
            if wanted not in WIDER:
                raise InputError(f"{self.name}: no rate for {dtype}; known are {', '.join(self.flop_per_s)}")
            wanted = WIDER[wanted]
        return self.flop_per_s[wanted] * self.clock

    def at_clock(self, share: float) -> Device:
        """The same device clocked down: arithmetic slows with the clock, memory and links do not."""
        if not 0 < share <= 1:
            raise InputError(f"a clock of {share:g} of the full rate; it must be above 0 and at most 1")
        return replace(self, clock=share)

    def joules(self, seconds: float, load: float) -> float:
        """Energy of a stretch of time in which the device is busy for the share `load` of what it could do.

        Power between idle and full grows with the load, and that part with clock times voltage squared; the voltage
        falls by 0.4 of the clock's share (model). 0 where the machine states no power.
        """
        if self.watts is None:
            return 0.0
        dynamic = self.clock * (0.6 + 0.4 * self.clock) ** 2
        return seconds * self.watts * (IDLE_SHARE + (1 - IDLE_SHARE) * min(max(load, 0.0), 1.0) * dynamic)


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """Time from a device's figures: the slower of arithmetic and memory, at the shares of the peak that kernels reach.

    Power's load is the share of the peak that the slower of both reaches.
    """

    device: Device
    compute_efficiency: float = COMPUTE_EFFICIENCY
    memory_efficiency: float = MEMORY_EFFICIENCY
    launch_seconds: float = LAUNCH_SECONDS

    def cost(self, operation: Operation) -> Cost | None:
        """See `CostModel`; collectives are not its matter."""
        if operation.kind in COLLECTIVES:
            return None
        device = self.device
        arithmetic = operation.flop / (device.rate(operation.dtype) * self.compute_efficiency)
        moving = operation.tier_bytes / (device.bytes_per_s * self.memory_efficiency)
        seconds = max(arithmetic, moving) + self.launch_seconds * operation.repeat
        load = max(arithmetic * self.compute_efficiency, moving * self.memory_efficiency) / seconds if seconds else 0.0
        return Cost(seconds, device.joules(seconds, load))


@dataclass(frozen=True, slots=True)
class Priced:
    """Back ends in the order they are asked. `seconds_by_source` says how many seconds each one answered for."""

    models: Sequence[tuple[str, CostModel]]
    seconds_by_source: Counter[str] = field(default_factory=Counter)

    def cost(self, operation: Operation) -> Cost:
        """The first answer there is."""
        for source, model in self.models:
            found = model.cost(operation)
            if found is not None:
                self.seconds_by_source[source] += found.seconds  # type: ignore[assignment]
                return found
        raise InputError(f"nothing says what {operation.kind} {operation.shape} takes; give a profile or a link's rate")

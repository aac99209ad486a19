"""All ways to spread a served model over devices: replicas of the model, pipeline stages, and for each cell of a block
replicas and a template for its tasks.

Source: APEX (Lin 2024, arXiv 2411.17651), section 3: nested divisors of the device count, with its pruning rules:
stages divide the blocks; the replica counts of a block's cells have no common divisor (else they are replicas of the
model); attention cells have equally many; counts of neighbours divide one another, also of the last and the first; and
what a device holds leaves room for keys and values.

Number of plans: depends on devices and on the kinds of cells in a block, not on how many blocks there are, as long as
stages divide them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from memwall.errors import DoesNotFit
from memwall.hardware.units import GB, format_bytes
from memwall.simulate.serving_model import Attention, Cell, Experts, ServedModel, Template

WORKSPACE_BYTES = 1 * GB
"""Kept free on every device for activations and the runtime (the paper's figure)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CellPlan:
    """How one cell is spread: `replicas` of it, each over `devices`."""

    replicas: int
    devices: int
    template: Template


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingPlan:
    """replicas of the whole model; stages of each; cells as in the model's block."""

    replicas: int
    stages: int
    cells: tuple[CellPlan, ...]

    @property
    def devices(self) -> int:
        """Of all replicas."""
        return self.replicas * self.stages * self.stage_devices

    @property
    def stage_devices(self) -> int:
        """Of one stage."""
        return self.cells[0].replicas * self.cells[0].devices

    @property
    def name(self) -> str:
        """Short form, such as `DP2 PP4 attention DP2xTP2 experts EP4`."""
        parts = [f"DP{self.replicas}"] if self.replicas > 1 else []
        parts += [f"PP{self.stages}"] if self.stages > 1 else []
        told = [_spread(cell) for cell in self.cells]
        if len(set(told)) == 1:
            parts += [told[0]] if told[0] != "whole" or not parts else []
        else:
            parts += [f"{_KINDS[cell.template]} {text}" for cell, text in zip(self.cells, told)]
        return " ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "model_replicas": self.replicas,
            "pipeline_stages": self.stages,
            "cells": [
                {"replicas": cell.replicas, "devices": cell.devices, "template": cell.template} for cell in self.cells
            ],
        }


_KINDS = {"heads": "attention", "filters": "ffn", "tensor": "experts", "expert": "experts"}


def _spread(cell: CellPlan) -> str:
    parts = [f"DP{cell.replicas}"] if cell.replicas > 1 else []
    parts += [f"{'EP' if cell.template == 'expert' else 'TP'}{cell.devices}"] if cell.devices > 1 else []
    return "x".join(parts) or "whole"


def divisors(number: int) -> list[int]:
    """All of them, ascending."""
    return [each for each in range(1, number + 1) if number % each == 0]


def enumerate_plans(model: ServedModel, devices: int) -> Iterator[ServingPlan]:
    """Every plan that uses all devices and keeps the rules of structure; memory is not looked at."""
    for replicas in divisors(devices):
        for stages in divisors(devices // replicas):
            if model.blocks % stages:
                continue
            yield from (
                ServingPlan(replicas=replicas, stages=stages, cells=cells)
                for cells in _cell_plans(model.cells, devices // replicas // stages)
            )


def _cell_plans(cells: Sequence[Cell], devices: int) -> Iterator[tuple[CellPlan, ...]]:
    choices = [
        [
            CellPlan(replicas=replicas, devices=devices // replicas, template=template)
            for replicas in divisors(devices)
            for template in cell.templates(devices // replicas)
        ]
        for cell in cells
    ]
    for chosen in itertools.product(*choices):
        counts = [one.replicas for one in chosen]
        if math.gcd(*counts) > 1:
            continue
        if len({one.replicas for one, cell in zip(chosen, cells) if isinstance(cell, Attention)}) > 1:
            continue
        around = zip(counts, [*counts[1:], counts[0]])
        if all(a % b == 0 or b % a == 0 for a, b in around):
            yield chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What the fullest device of a plan holds and what it leaves. kv_tokens: cached tokens of one attention replica,
    all stages' requests together.
    """

    parameter_bytes: int
    kv_bytes_per_token: float
    free_bytes: int
    kv_tokens: int


def room_of(plan: ServingPlan, model: ServedModel, capacity_bytes: int) -> Room:
    """Memory of a plan on devices of this capacity; `free_bytes` is negative where the weights do not fit."""
    formats, blocks = model.formats, model.blocks // plan.stages
    weights = blocks * sum(_parameters(cell, how) for cell, how in zip(model.cells, plan.cells))
    # embedding and head are split over the stage's devices; one stage holds both, or the same matrix for both
    ends = model.vocabulary * model.hidden * (2 if plan.stages == 1 and not model.tied else 1)
    held = round((weights + ends / plan.stage_devices) * formats.weight_bytes)
    kv = blocks * formats.kv_bytes * sum(
        cell.kv_values(how.devices) for cell, how in zip(model.cells, plan.cells) if isinstance(cell, Attention)
    )  # fmt: skip
    free = capacity_bytes - WORKSPACE_BYTES - held
    return Room(
        parameter_bytes=held, kv_bytes_per_token=kv, free_bytes=free, kv_tokens=max(int(free // kv), 0) if kv else 0
    )


def _parameters(cell: Cell, how: CellPlan) -> int:
    return cell.parameters(how.devices, how.template) if isinstance(cell, Experts) else cell.parameters(how.devices)


def fitting_plans(
    model: ServedModel, devices: int, capacity_bytes: int, longest_tokens: int
) -> tuple[list[ServingPlan], list[ServingPlan]]:
    """(plans that fit, plans that do not): one request of the longest length must fit a stage's share of the cache.

    DoesNotFit where none does, with the number of devices that would.
    """
    fit: list[ServingPlan] = []
    misfit: list[ServingPlan] = []
    for plan in enumerate_plans(model, devices):
        enough = room_of(plan, model, capacity_bytes).kv_tokens // plan.stages >= longest_tokens
        (fit if enough else misfit).append(plan)
    if not fit:
        raise DoesNotFit(_misfit(model, devices, capacity_bytes, longest_tokens))
    return fit, misfit


def _misfit(model: ServedModel, devices: int, capacity_bytes: int, longest_tokens: int) -> str:
    size = format_bytes(int(model.parameters * model.formats.weight_bytes))
    text = (
        f"{model.name} with {model.formats.weights} weights ({size})"
        f" and a request of {longest_tokens:,} tokens does not fit {devices} devices of {format_bytes(capacity_bytes)}"
    )
    more = devices
    while more < 64 * max(devices, 16):
        more *= 2
        for plan in enumerate_plans(model, more):
            if room_of(plan, model, capacity_bytes).kv_tokens // plan.stages >= longest_tokens:
                return f"{text}; it fits {more} of them, or try fewer bits with --weights"
    return f"{text}; try fewer bits with --weights"

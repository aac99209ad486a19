"""GPU form of `kernels.lora`, in Triton: low-rank additions for a batch of adapters that lie in pages of one pool.

Source: S-LoRA (Sheng 2023, arXiv 2311.03285), sections 5 (unified paging) and 6 (heterogeneous batching). Idea: tokens
of one adapter form tiles; a launch for `A x` ("shrink") has a task for each tile and 16 of the adapter's own ranks,
one for `B` times that ("expand") a task for each tile; both walk the adapter's page table, so that rows may lie in any
pages, and nothing is padded beyond a tile of 16.

Shapes: x [T, in], outs [T, out], float16, bfloat16 or float32; pool uint8 [pages, page bytes] on the GPU, as the CPU
kernels fill it. Cost: each factor is read once per tile of tokens. Holds when: all adapters of a batch have one form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from memwall.errors import InputError
from memwall.kernels.lora import TARGETS, LoraRoom, lora_table

TILE = 16  # tokens, and ranks: the smallest tile of tensor cores' products
WIDE = 64  # numbers of a row that a product takes at a time
FIELDS = 8
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@triton.jit
def _address(pages, table, unit, layer_at, PAGE: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr, live):  # type: ignore[no-untyped-def]
    """Where units of an adapter begin in the pool, in numbers."""
    page = tl.load(pages + table + unit // UNITS, mask=live, other=0).to(tl.int64)
    return page * PAGE + layer_at + (unit % UNITS) * UNIT


@triton.jit
def _shrink(  # type: ignore[no-untyped-def]
    x, pool, pages, tasks, scratch, layer_at, width, row_units, room,
    FIELDS: tl.constexpr, PAGE: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr, TILE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    task = tasks + tl.program_id(0) * FIELDS
    first, count, ranks, table = tl.load(task), tl.load(task + 1), tl.load(task + 2), tl.load(task + 3)
    unit, at = tl.load(task + 4), tl.load(task + 5)
    token, rank, lane = tl.arange(0, TILE), tl.arange(0, TILE), tl.arange(0, WIDE)
    total = tl.zeros([TILE, TILE], tl.float32)
    for begin in range(0, width, WIDE):
        number = begin + lane
        live = (token < count)[:, None] & (number < width)[None, :]
        tile = tl.load(x + (first + token)[:, None] * width + number[None, :], mask=live, other=0.0)
        live = (rank < ranks)[None, :] & (number < width)[:, None]
        own = unit + rank[None, :] * row_units + (number // UNIT)[:, None]
        place = _address(pages, table, own, layer_at, PAGE, UNIT, UNITS, live) + (number % UNIT)[:, None]
        rows = tl.load(pool + place, mask=live, other=0.0)
        total += tl.dot(tile.to(rows.dtype), rows, input_precision="ieee")
    live = (token < count)[:, None] & (rank < ranks)[None, :]
    tl.store(scratch + (first + token)[:, None] * room + at + rank[None, :], total, mask=live)


@triton.jit
def _expand(  # type: ignore[no-untyped-def]
    scratch, pool, pages, tasks, scales, out, layer_at, width, row_units, room,
    FIELDS: tl.constexpr, PAGE: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr, TILE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    task, number = tasks + tl.program_id(0) * FIELDS, tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    first, count, ranks, table = tl.load(task), tl.load(task + 1), tl.load(task + 2), tl.load(task + 3)
    unit, at, scale = tl.load(task + 4), tl.load(task + 5), tl.load(scales + tl.load(task + 6))
    token, rank = tl.arange(0, TILE), tl.arange(0, TILE)
    total = tl.zeros([TILE, WIDE], tl.float32)
    for begin in range(0, ranks, TILE):
        live = (token < count)[:, None] & (begin + rank < ranks)[None, :]
        tile = tl.load(scratch + (first + token)[:, None] * room + at + begin + rank[None, :], mask=live, other=0.0)
        live = (begin + rank < ranks)[:, None] & (number < width)[None, :]
        own = unit + (begin + rank)[:, None] * row_units + (number // UNIT)[None, :]
        place = _address(pages, table, own, layer_at, PAGE, UNIT, UNITS, live) + (number % UNIT)[None, :]
        rows = tl.load(pool + place, mask=live, other=0.0).to(tl.float32)
        total += tl.dot(tile, rows, input_precision="ieee")
    live = (token < count)[:, None] & (number < width)[None, :]
    place = (first + token)[:, None] * width + number[None, :]
    before = tl.load(out + place, mask=live, other=0.0)
    tl.store(out + place, (before + scale * total).to(before.dtype), mask=live)


@dataclass(frozen=True, kw_only=True)
class PlacedLora:
    """One adapter as the GPU reads it: its shapes by target (rank, inputs, outputs), and the pages it lies in."""

    form: str
    scale: float
    shapes: dict[str, tuple[int, int, int]]
    pages: Sequence[int]


class LoraLaunch:
    """Which rows of a batch belong to which adapter, on the GPU; made once for a step, used by all its layers.

    segments: (first row, rows, adapter). InputError where adapters differ in form.
    """

    def __init__(
        self, room: LoraRoom, segments: Sequence[tuple[int, int, PlacedLora]], device: torch.device | str
    ) -> None:
        forms = {adapter.form for _, _, adapter in segments}
        if len(forms) > 1:
            raise InputError(f"adapters of one batch are {' and '.join(sorted(forms))}; they must have one form")
        self.room, self.device = room, torch.device(device)
        self.dtype = DTYPES[forms.pop()] if forms else torch.float16
        self._segments: list[tuple[int, int, int, np.ndarray]] = []
        places: dict[int, int] = {}
        pages: list[int] = []
        for first, count, adapter in segments:
            if id(adapter) not in places:
                places[id(adapter)] = len(pages)
                pages += adapter.pages
            table, _ = lora_table(room, adapter.form, adapter.shapes)
            self._segments.append((first, count, places[id(adapter)], table))
        self._pages = torch.tensor(pages, dtype=torch.int32, device=self.device)
        self._scales = torch.tensor([adapter.scale for *_, adapter in segments], dtype=torch.float32, device=device)
        self._tasks: dict[tuple[str, ...], tuple[torch.Tensor, list[torch.Tensor], int]] = {}

    def add(
        self, layer: int, pool: torch.Tensor, x: torch.Tensor, targets: Sequence[str], outs: Sequence[torch.Tensor]
    ) -> None:
        """outs[i] [T, out] += what the adapters add to the product of x [T, in] with the matrix targets[i]."""
        room, itemsize = self.room, self.dtype.itemsize
        shrinks, expands, width = self._listed(tuple(targets))
        if not len(shrinks):
            return
        scratch = torch.empty(len(x), width, dtype=torch.float32, device=x.device)
        numbers, layer_at = pool.view(-1).view(self.dtype), layer * room.unit_bytes * room.units_per_block // itemsize
        shape = {
            "FIELDS": FIELDS, "PAGE": room.page_bytes // itemsize, "UNIT": room.unit_bytes // itemsize,
            "UNITS": room.units_per_block, "TILE": TILE, "WIDE": WIDE,
        }  # fmt: skip
        inputs = x.shape[1]
        _shrink[(len(shrinks),)](
            x.contiguous(), numbers, self._pages, shrinks, scratch, layer_at, inputs, room.row_units(inputs, itemsize),
            width, **shape,
        )  # fmt: skip
        for tasks, out in zip(expands, outs, strict=True):
            if len(tasks):
                outputs = out.shape[1]
                _expand[(len(tasks), triton.cdiv(outputs, WIDE))](
                    scratch, numbers, self._pages, tasks, self._scales, out, layer_at, outputs,
                    room.row_units(outputs, itemsize), width, **shape,
                )  # fmt: skip

    def _listed(self, targets: tuple[str, ...]) -> tuple[torch.Tensor, list[torch.Tensor], int]:
        """Tasks (first row, rows, ranks, page table, first unit, place in the scratch, segment) of both launches, and
        how wide a row of the scratch is: the largest sum of ranks.
        """
        if targets not in self._tasks:
            shrinks: list[tuple[int, ...]] = []
            expands: list[list[tuple[int, ...]]] = [[] for _ in targets]
            widest = 0
            for number, (first, count, pages, table) in enumerate(self._segments):
                at = 0
                for place, target in enumerate(targets):
                    rank, inputs, _, unit = (int(value) for value in table[TARGETS.index(target)])
                    behind = unit + rank * self.room.row_units(inputs, self.dtype.itemsize)
                    step = behind - unit
                    for tile in range(0, count if rank else 0, TILE):
                        rows = (first + tile, min(TILE, count - tile))
                        expands[place].append((*rows, rank, pages, behind, at, number, 0))
                        shrinks += [
                            (*rows, min(TILE, rank - r), pages, unit + r * (step // rank), at + r, number, 0)
                            for r in range(0, rank, TILE)
                        ]
                    at += rank
                widest = max(widest, at)
            first_list, *others = (
                torch.from_numpy(np.array(tasks, np.int64).reshape(-1, FIELDS)).to(self.device)
                for tasks in (shrinks, *expands)
            )
            self._tasks[targets] = first_list, others, widest
        return self._tasks[targets]

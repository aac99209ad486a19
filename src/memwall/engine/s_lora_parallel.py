"""Adapters cut for tensor parallelism: what each of two processes keeps of them, and what they tell each other.

Source: S-LoRA (Sheng 2023, arXiv 2311.03285), section 7. The base is cut as Megatron does: queries, keys, values, gate
and up by outputs, the output and down projections by inputs, and no number of an adapter is held twice.

- first kind (by outputs): A is cut along the rank, B along the outputs. Each process makes its part of A x; the parts
  are gathered and go through its own part of B, which adds to its own outputs.
- second kind (by inputs): A is cut along the inputs, B along the outputs. Partial sums of A x are added between the
  processes; each makes a slice of the result and adds it to its partial sums of the base product, so that the slices
  are gathered by the sum over processes that the base needs anyway.

Sent by a process beside the base's sums, for N processes, T tokens and rank r, in attention: 5 (N - 1) T r / N numbers
(three gathers and one sum), against 2 (N - 1) T h / N of the base. Products here are NumPy's, a rank being small.

Shapes: x [T, in], outs [T, out] float32. A rank that N does not divide is filled up with zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from memwall.errors import InputError
from memwall.kernels.lora import TARGETS
from memwall.memory import Arena
from memwall.models.config import ModelConfig
from memwall.models.lora import LoraWeights, target_shapes

OWNER = "adapters/parts"
BY_OUTPUTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
RANKS = 2


class Exchange(Protocol):
    """The way to the other process."""

    rank: int

    def exchange(self, x: np.ndarray) -> np.ndarray:
        """Shows x and gives what the other showed at its call of the same turn, as large; valid until the next."""


class LoraParts:
    """One process' parts of some adapters, over the configuration of the whole model.

    arena: holds the parts, counted as `OWNER`. sent_numbers: shown to the other process so far.
    """

    def __init__(self, adapters: Sequence[LoraWeights], whole: ModelConfig, wire: Exchange, arena: Arena) -> None:
        self.wire, self.sent_numbers, self.nbytes = wire, 0, 0
        self._arena = arena
        self._held: list[np.ndarray] = []
        self._scales = [adapter.scale for adapter in adapters]
        self._segments: list[tuple[int, int, int]] = []
        shapes = target_shapes(whole)
        self._parts = [
            {
                (layer, TARGETS.index(name)): self._keep(name, *factors)
                for layer in range(whole.num_layers)
                for name in shapes
                if (factors := adapter.factors(layer, name)) is not None
            }
            for adapter in adapters
        ]

    def _keep(self, name: str, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """This process' parts of A [r, in] and B [out, r]: [r / N, in] or [r, in / N], and [out / N, r]."""
        spare = -len(a) % RANKS
        a, b = np.pad(a, ((0, spare), (0, 0))), np.pad(b, ((0, 0), (0, spare)))
        cut = 0 if name in BY_OUTPUTS else 1
        if a.shape[cut] % RANKS or len(b) % RANKS:
            raise InputError(f"{name}: {a.shape[1]} inputs and {len(b)} outputs cannot be cut in {RANKS}")
        parts = []
        for matrix, axis in ((a, cut), (b, 0)):
            part = np.split(matrix, RANKS, axis)[self.wire.rank]
            room = self._arena.allocate(OWNER, part.shape, np.float32)
            room[...] = part
            self._held.append(room)
            self.nbytes += room.nbytes
            parts.append(room)
        return parts[0], parts[1]

    def release(self) -> None:
        """Gives the parts back."""
        while self._held:
            self._arena.free(self._held.pop())

    def assign(self, segments: Sequence[tuple[int, int, int]]) -> None:
        """Rows of the batch at hand: (first, count, place of the adapter). Both processes say the same."""
        self._segments = list(segments)

    def add(
        self, layer: int, first_row: int, x: np.ndarray, targets: Sequence[int], outs: Sequence[np.ndarray]
    ) -> None:
        """The first kind, as `kernels.lora.LoraBatch.add`: whole inputs x, this process' outputs."""
        found = [(at, target, out) for at in self._rows(first_row, len(x)) for target, out in zip(targets, outs)]
        work = [
            (at, *self._parts[at[2]][layer, target], out) for at, target, out in found if self._has(at, layer, target)
        ]
        halves = [x[first:end] @ a.T for (first, end, _), a, _, _ in work]
        for ((first, end, which), _, b, out), half, other in zip(work, halves, self._swap(halves)):
            inner = np.hstack((half, other) if self.wire.rank == 0 else (other, half))
            out[first:end] += self._scales[which] * (inner @ b.T)

    def add_to_sums(self, layer: int, first_row: int, x: np.ndarray, target: int, sums: np.ndarray) -> None:
        """The second kind: this process' inputs x; its slice goes into its partial sums, before these are exchanged."""
        rows = [at for at in self._rows(first_row, len(x)) if self._has(at, layer, target)]
        halves = [x[first:end] @ self._parts[which][layer, target][0].T for first, end, which in rows]
        for (first, end, which), half, other in zip(rows, halves, self._swap(halves)):
            b = self._parts[which][layer, target][1]
            mine = slice(self.wire.rank * len(b), (self.wire.rank + 1) * len(b))
            sums[first:end, mine] += self._scales[which] * ((half + other) @ b.T)

    def _has(self, at: tuple[int, int, int], layer: int, target: int) -> bool:
        return (layer, target) in self._parts[at[2]]

    def _rows(self, first_row: int, count: int) -> list[tuple[int, int, int]]:
        """Segments within a call's rows: (first, end, adapter), counted from the call's first row."""
        cut = [(max(f - first_row, 0), min(f + n - first_row, count), which) for f, n, which in self._segments]
        return [one for one in cut if one[0] < one[1]]

    def _swap(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The other process' arrays of the same shapes, all in one message."""
        if not arrays:
            return []
        flat = np.concatenate([one.ravel() for one in arrays])
        self.sent_numbers += flat.size
        theirs = self.wire.exchange(flat)
        ends = np.cumsum([one.size for one in arrays])
        return [theirs[end - one.size : end].reshape(one.shape) for one, end in zip(arrays, ends)]

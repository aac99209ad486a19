"""The memory of a model without attention: per layer one state and the last inputs of its convolution, however long
the text.

Source: Mamba-2, "Transformers are SSMs" (Tri Dao, 2024, arXiv 2405.21060), section 6; as integers of 8 bits, Quamba2
(Hung-Yueh Chiang, 2025, arXiv 2503.22879), section 4.
Idea: what a cache of keys and values is to attention, this is to a scan; it stands behind the same seam, so that
sessions, plans and the ledger need no other. There are no keys: `append` and `attend` are never called.
Units and shapes: states [H, P, N], inputs [taps - 1, channels]; float32, or int8 in layers with fixed scales.
Differs from the paper: nothing known.
Cost: resident layers * (H * P * N + (taps - 1) * channels) numbers, whatever the length; a step reads and writes all.
Holds when: a sequence is only continued. It can be forgotten as a whole, not in part.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from memwall.errors import InputError
from memwall.kv.base import CacheModel, CacheShape, Facts, KVCache, Reader
from memwall.kv.policy import Policy
from memwall.memory.arena import allocated_bytes

if TYPE_CHECKING:
    from memwall.memory import Arena

STATE, INPUTS = "state/scan", "state/convolution"
"""Ledger owners."""


class StateCache(KVCache):
    """See the module's text."""

    saves = True

    def __init__(
        self, policy: Policy, shape: CacheShape, arena: Arena, capacity_tokens: int, model: CacheModel | None = None
    ) -> None:
        super().__init__(shape, arena, capacity_tokens)
        self._forms = _forms(policy, shape)
        self._length = 0
        self._held: dict[str, np.ndarray] = {}
        try:
            for owner, count in _counts(self._forms).items():
                self._held[owner] = arena.allocate(owner, (count,), np.uint8)
        except BaseException:
            self.release()
            raise
        self.states = self._views(STATE)
        self.inputs = self._views(INPUTS)

    def _views(self, owner: str) -> list[np.ndarray]:
        views, at = [], 0
        for size, dtype in self._forms[owner]:
            nbytes = math.prod(size) * dtype.itemsize
            views.append(self._held[owner][at : at + nbytes].view(dtype).reshape(size))
            at += _padded(nbytes)
        return views

    @staticmethod
    def predict(
        policy: Policy, shape: CacheShape, num_tokens: int, prefill_tokens: int, capacity_tokens: int
    ) -> dict[str, int]:
        """The same for any length."""
        return {owner: allocated_bytes(count) for owner, count in _counts(_forms(policy, shape)).items()}

    @staticmethod
    def read_bytes(policy: Policy, shape: CacheShape, num_tokens: int) -> int:
        """All of it is read, and written."""
        return 2 * sum(_counts(_forms(policy, shape)).values())

    @property
    def policy(self) -> str:
        return "state"

    @property
    def length(self) -> int:
        return self._length

    def advance(self, num_tokens: int) -> None:
        """All layers have taken in so many more tokens."""
        self._length += num_tokens

    def append(self, layer: int, k: np.ndarray, v: np.ndarray, positions: np.ndarray) -> None:
        raise ValueError("a state holds no keys and values")

    def attend(
        self, layer: int, q: np.ndarray, positions: np.ndarray, out: np.ndarray, stats: np.ndarray | None = None
    ) -> np.ndarray:
        raise ValueError("a state is not attended to")

    def settle(self, layer: int) -> None:
        """Nothing to compress."""

    def rewindable(self, length: int) -> int:
        return length if length == self._length else 0

    def truncate(self, length: int) -> None:
        self._check_truncate(length)
        if length == self._length:
            return
        if length:
            raise ValueError(f"a state of {self._length} tokens cannot go back to {length}, only to none")
        for held in self._held.values():
            held.fill(0)
        self._length = 0

    def fork(self) -> StateCache:
        other = StateCache(Policy("state"), self.shape, self.arena, self.capacity_tokens)
        for owner, held in self._held.items():
            np.copyto(other._held[owner], held)
        other._length = self._length
        return other

    def release(self) -> None:
        self.states, self.inputs = [], []
        for held in self._held.values():
            self.arena.free(held)
        self._held = {}

    @property
    def nbytes(self) -> int:
        return sum(allocated_bytes(held.nbytes) for held in self._held.values())

    def dump(self) -> tuple[dict[str, np.ndarray], dict[str, int]]:
        return self._named(), {"tokens": self._length}

    def layout(self, facts: Facts) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        if facts["tokens"] < 0:
            raise InputError(f"a state of {facts['tokens']} tokens")
        return {name: (array.shape, array.dtype) for name, array in self._named().items()}

    def restore(self, facts: Facts, keep: int, reader: Reader) -> None:
        self._check_restore(keep, facts["tokens"])
        if keep != facts["tokens"]:
            return  # a state cannot go back in time
        try:
            for name, array in self._named().items():
                reader(name, array)
        except BaseException:
            for held in self._held.values():
                held.fill(0)
            raise
        self._length = keep

    def _named(self) -> dict[str, np.ndarray]:
        parts = {"state": self.states, "inputs": self.inputs}
        return {f"{part}.{layer}": array for part, arrays in parts.items() for layer, array in enumerate(arrays)}


def _forms(policy: Policy, shape: CacheShape) -> dict[str, list[tuple[tuple[int, ...], np.dtype]]]:
    """Shape and type of each layer's arrays, by owner."""
    if policy.settings:
        raise InputError(f"KV policy {policy}: a state has no settings; write state")
    held = shape.state
    assert held is not None
    single, byte = np.dtype(np.float32), np.dtype(np.int8)
    scan = (shape.num_heads, shape.head_dim, held.state_size)
    return {
        STATE: [(scan, byte if static and held.static_states else single) for static in held.static_layers],
        INPUTS: [((held.conv_taps - 1, held.conv_size), byte if static else single) for static in held.static_layers],
    }


def _counts(forms: dict[str, list[tuple[tuple[int, ...], np.dtype]]]) -> dict[str, int]:
    return {
        owner: sum(_padded(math.prod(size) * dtype.itemsize) for size, dtype in arrays)
        for owner, arrays in forms.items()
    }


def _padded(nbytes: int) -> int:
    return -(-nbytes // 64) * 64

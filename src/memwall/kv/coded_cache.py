"""A cache of two parts: tokens coded in units, and the newest ones exact until a unit is full or a window passes.

A prompt is staged, one layer at a time, so that its tokens attend exactly; what is settled then is coded at once. The
techniques on it (`kv.kivi`, `kv.bfp_outlier_reorder`) say what a unit is and how it is coded.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np

from memwall.errors import InputError
from memwall.kernels.parts import CachePart
from memwall.kv.base import CacheShape, Facts, KVCache, Reader
from memwall.kv.coded_state import RECENT, STAGING, CodedForm, LayerState
from memwall.kv.decoding import Decoding, PartsDecoding
from memwall.kv.float_store import GrowingRows, float_dtype
from memwall.kv.policy import Policy
from memwall.memory.arena import ALIGNMENT_BYTES, SMALL_BYTES
from memwall.memory.pages import round_up

if TYPE_CHECKING:
    from memwall.memory import Arena


class CodedCache(KVCache):
    """Coded past, exact recent tokens. A technique gives `form`, and codes, decodes and attends."""

    codes_prompt = True
    saves = True
    plain_rows = True

    def __init__(
        self,
        policy: Policy,
        form: CodedForm,
        shape: CacheShape,
        arena: Arena,
        capacity_tokens: int,
    ) -> None:
        super().__init__(shape, arena, capacity_tokens)
        self._policy = policy
        self.form = form
        self.key_dim = shape.head_dim  # channels of coded keys
        dtype = float_dtype(form.exact)
        key_rows, value_rows = form.recent_rows(capacity_tokens)
        row_shape = (shape.num_kv_heads, shape.head_dim)
        self._recent = arena.allocate(RECENT, (shape.num_layers, key_rows + value_rows, *row_shape), dtype)
        sizes = (
            form.key_bytes(shape, round_up(capacity_tokens, form.units[0])),
            form.value_bytes(shape, round_up(capacity_tokens, form.units[1])),
        )
        self._layers = [LayerState(arena, *sizes, rows[:key_rows], rows[key_rows:]) for rows in self._recent]
        self._staged_keys = GrowingRows(arena, STAGING, capacity_tokens, shape, dtype)
        self._staged_values = GrowingRows(arena, STAGING, capacity_tokens, shape, dtype)
        self._staged: tuple[int, np.ndarray, np.ndarray] | None = None
        self._parts: list[CachePart] = []
        self._coding = (0, 0)  # keys and values that are coded behind a token that comes with those of other caches

    @property
    def length(self) -> int:
        return min(layer.length for layer in self._layers)

    @property
    def nbytes(self) -> int:
        recent = self._recent.nbytes
        recent = round_up(recent, ALIGNMENT_BYTES) if recent < SMALL_BYTES else round_up(recent)
        coded = sum(b.region.committed_bytes for layer in self._layers for b in (layer.key_blocks, layer.value_blocks))
        return recent + coded + self._staged_keys.nbytes + self._staged_values.nbytes

    def append(self, layer: int, k: np.ndarray, v: np.ndarray, positions: np.ndarray) -> None:
        state = self._layers[layer]
        self._check_append(state.length, len(k), positions)
        # the first layer takes room for all: a refusal must come before any layer has changed
        for each in self._layers if layer == 0 else [state]:
            self._reserve(each, len(k))
        if len(k) == 1:
            state.keys.push(k)
            state.values.push(v)
        else:
            keys = self._staged_keys.rows(0, state.keys.count + len(k))
            values = self._staged_values.rows(0, state.values.count + len(k))
            for rows, recent, new in ((keys, state.keys, k), (values, state.values, v)):
                rows[: recent.count] = recent.rows
                rows[recent.count :] = new
            self._staged = (layer, keys, values)
        state.length += len(k)

    def settle(self, layer: int) -> None:
        state = self._layers[layer]
        keys, values = self._exact(layer)
        num_keys, num_values = self.form.to_code(len(keys), len(values))
        if num_keys:
            self._encode_keys(layer, keys[:num_keys], state.coded_keys)
            state.coded_keys += num_keys
        if num_values:
            self._encode_values(layer, values[:num_values], state.coded_values)
            state.coded_values += num_values
        if self._staged is not None and self._staged[0] == layer:
            state.keys.set(keys[num_keys:])
            state.values.set(values[num_values:])
            self._unstage(release=layer == self.shape.num_layers - 1)
        else:
            state.keys.drop(num_keys)
            state.values.drop(num_values)

    @classmethod
    def decode_together(cls, caches: Sequence[KVCache]) -> Decoding:
        return PartsDecoding(caches, cast("Sequence[CodedCache]", caches))

    def parts(self) -> list[CachePart]:
        """See `decoding.PartedCache`."""
        if not self._parts:
            self._parts = [self._part(layer) for layer in range(self.shape.num_layers)]
        return self._parts

    def begin_decode(self) -> tuple[int, ...]:
        """See `decoding.PartedCache`; layers differ only within a forward pass."""
        first = self._layers[0]
        self._check_room(first.length, 1)
        keys, values, coded_keys, coded_values = first.keys, first.values, first.coded_keys, first.coded_values
        self._coding = num_keys, num_values = self.form.to_code(keys.count + 1, values.count + 1)
        if (num_keys or num_values) and not self._has_room(num_keys, num_values):
            for state in self._layers:
                self._reserve(state, 1)
        if keys.end == len(keys.buffer) or values.end == len(values.buffer):
            for state in self._layers:
                state.keys.make_room(1)
                state.values.make_room(1)
        rows = (keys.end, values.end)
        places = (coded_keys, coded_values, 0, keys.first, values.first, first.length + 1, first.length, 0)
        return (*rows, *places, keys.first, num_keys, coded_keys, values.first, num_values, coded_values)

    def end_decode(self) -> None:
        """See `decoding.PartedCache`."""
        for state in self._layers:
            state.took(*self._coding)

    def truncate(self, length: int) -> None:
        self._check_truncate(length)
        self._unstage(release=True)
        form, (key_unit, value_unit) = self.form, self.form.units
        for layer, state in enumerate(self._layers):
            if length < state.coded_keys:
                whole = length // key_unit * key_unit
                rest = np.empty((length - whole, *self._recent.shape[2:]), np.float32)
                if len(rest):
                    self._decode_keys(layer, whole, rest)
                state.coded_keys = whole
                state.keys.set(rest)
            state.keys.count = length - state.coded_keys
            if length < state.coded_values:
                whole = length // value_unit * value_unit
                rest = np.empty((length - whole, *self._recent.shape[2:]), np.float32)
                if len(rest):
                    self._decode_values(layer, whole, rest)
                state.coded_values = whole
                state.values.set(rest)
            state.values.count = length - state.coded_values
            state.length = length
            state.key_blocks.shrink(form.key_bytes(self.shape, state.coded_keys, self.key_dim))
            state.value_blocks.shrink(form.value_bytes(self.shape, state.coded_values))

    def fork(self) -> CodedCache:
        other = self._empty()
        try:
            for mine, theirs in zip(self._layers, other._layers):
                theirs.copy_from(mine)
        except BaseException:
            other.release()
            raise
        return other

    def dump(self) -> tuple[dict[str, np.ndarray], dict[str, int]]:
        arrays = {}
        for index, state in enumerate(self._layers):
            arrays[f"key_blocks.{index}"] = state.key_blocks.bytes[: self.form.key_bytes(self.shape, state.coded_keys)]
            arrays[f"value_blocks.{index}"] = state.value_blocks.bytes[
                : self.form.value_bytes(self.shape, state.coded_values)
            ]
            arrays[f"keys.{index}"], arrays[f"values.{index}"] = state.keys.rows, state.values.rows
        first = self._layers[0]  # layers differ only within a forward pass
        return arrays, {"tokens": self.length, "coded_keys": first.coded_keys, "coded_values": first.coded_values}

    def layout(self, facts: Facts) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        tokens, coded = facts["tokens"], (facts["coded_keys"], facts["coded_values"])
        keys, values = (tokens - each for each in coded)
        left = self.form.to_code(max(keys, 0), max(values, 0))
        if min(keys, values) < 0 or any(each % unit for each, unit in zip(coded, self.form.units)) or any(left):
            raise InputError(f"{coded[0]} coded keys and {coded[1]} coded values of {tokens} tokens cannot be")
        row_shape, exact, bytes_ = self._recent.shape[2:], self._recent.dtype, np.dtype(np.uint8)
        one = {
            "key_blocks": ((self.form.key_bytes(self.shape, coded[0], self.key_dim),), bytes_),
            "value_blocks": ((self.form.value_bytes(self.shape, coded[1]),), bytes_),
            "keys": ((keys, *row_shape), exact),
            "values": ((values, *row_shape), exact),
        }
        return {f"{name}.{layer}": form for layer in range(self.shape.num_layers) for name, form in one.items()}

    def restore(self, facts: Facts, keep: int, reader: Reader) -> None:
        """Where `keep` cuts a coded unit, what is left of it is decoded, as `truncate` does it."""
        self._check_restore(keep, facts["tokens"])
        units = self.form.units
        coded_keys = min(facts["coded_keys"], round_up(keep, units[0]))
        coded_values = min(facts["coded_values"], round_up(keep, units[1]))
        key_bytes = self.form.key_bytes(self.shape, coded_keys, self.key_dim)
        value_bytes = self.form.value_bytes(self.shape, coded_values)
        try:
            for state in self._layers:
                state.key_blocks.reserve(key_bytes)
                state.value_blocks.reserve(value_bytes)
            for index, state in enumerate(self._layers):
                reader(f"key_blocks.{index}", state.key_blocks.bytes[:key_bytes])
                reader(f"value_blocks.{index}", state.value_blocks.bytes[:value_bytes])
                reader(f"keys.{index}", state.keys.buffer[: max(keep - coded_keys, 0)])
                reader(f"values.{index}", state.values.buffer[: max(keep - coded_values, 0)])
        except BaseException:
            self.truncate(0)
            raise
        for state in self._layers:
            state.restored(keep, coded_keys, coded_values)
        self.truncate(keep)

    def rows(self, layer: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        state = self._layers[layer]
        keys, values = (np.empty((end - begin, *self._recent.shape[2:]), np.float32) for _ in range(2))
        for out, coded, recent, decode in (
            (keys, state.coded_keys, state.keys, self._decode_keys),
            (values, state.coded_values, state.values, self._decode_values),
        ):
            cut = min(max(coded, begin), end)
            if cut > begin:
                decode(layer, begin, out[: cut - begin])
            if end > cut:
                out[cut - begin :] = recent.rows[cut - coded : end - coded]
        return keys, values

    def release(self) -> None:
        self._parts = []
        self._unstage(release=False)
        for layer in self._layers:
            layer.key_blocks.region.release()
            layer.value_blocks.region.release()
        self._layers = []
        self._staged_keys.release()
        self._staged_values.release()
        self.arena.free(self._recent)

    def _reserve(self, state: LayerState, num_new: int) -> None:
        """Room for new tokens' staging and for what settling will code."""
        num_keys, num_values = state.keys.count + num_new, state.values.count + num_new
        if num_new > 1:
            self._staged_keys.reserve(num_keys)
            self._staged_values.reserve(num_values)
        coding = self.form.to_code(num_keys, num_values)
        state.key_blocks.reserve(self.form.key_bytes(self.shape, state.coded_keys + coding[0], self.key_dim))
        state.value_blocks.reserve(self.form.value_bytes(self.shape, state.coded_values + coding[1]))

    def _has_room(self, num_keys: int, num_values: int) -> bool:
        """For so many more coded keys and values in all layers: in the last one, which is the last to get some."""
        last = self._layers[-1]
        key_bytes = self.form.key_bytes(self.shape, last.coded_keys + num_keys, self.key_dim)
        value_bytes = self.form.value_bytes(self.shape, last.coded_values + num_values)
        return key_bytes <= len(last.key_blocks.bytes) and value_bytes <= len(last.value_blocks.bytes)

    @abstractmethod
    def _empty(self) -> CodedCache:
        """Another of the same kind."""

    @abstractmethod
    def _part(self, layer: int) -> CachePart:
        """The layer as kernels take it."""

    @abstractmethod
    def _encode_keys(self, layer: int, keys: np.ndarray, first: int) -> None:
        """Codes exact keys [n, Hkv, D], whole units, as the layer's tokens `first .. first + n`."""

    @abstractmethod
    def _decode_keys(self, layer: int, first: int, out: np.ndarray) -> None:
        """Coded keys `first .. first + n` of the layer into out [n, Hkv, D] float32."""

    @abstractmethod
    def _encode_values(self, layer: int, values: np.ndarray, first: int) -> None:
        """As `_encode_keys`."""

    @abstractmethod
    def _decode_values(self, layer: int, first: int, out: np.ndarray) -> None:
        """As `_decode_keys`."""

    def _exact(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Exact keys and values of the layer: the staged ones of a prompt, else the recent ones."""
        if self._staged is not None and self._staged[0] == layer:
            return self._staged[1:]
        return self._layers[layer].keys.rows, self._layers[layer].values.rows

    def _unstage(self, *, release: bool) -> None:
        self._staged = None
        if release:
            self._staged_keys.shrink(0)
            self._staged_values.shrink(0)

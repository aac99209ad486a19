"""KIVI: the past in 2 to 8 bits a number, keys grouped per channel, values per token, the newest tokens exact.

Source: KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache; Liu et al., 2024 (ICML), arXiv 2402.02750;
official code github.com/jy-yuan/KIVI.
Idea: keys have a few channels of large, stable magnitude, so a group of keys runs along tokens inside one channel and
an outlier channel spoils nothing but itself; attention sums few values, so an error in a value must stay in its own
token, and its groups run along channels. Groups of keys need many tokens: until R have come they wait, exact, and are
coded together.
Units and shapes: rows [tokens, Hkv, D]; G numbers share a float16 scale and minimum; lengths and R in tokens.
Differs from the paper: words hold other neighbours than in the official code, so that vectors load them whole; codes
are computed from the rounded scale and minimum; a constant group is coded as zeros of scale zero; 3 bits are offered;
R = 0 keeps keys exact until a group is full, the least that grouping along tokens allows. After `truncate` inside a
coded group its remaining keys go back to the exact part as they were decoded, and are coded anew with those to come.
Cost: resident 2 * layers * tokens * Hkv * D * (b + 32 / G) / 8 bytes plus the exact part, R to 2 R tokens; a prompt
stages one layer's exact keys and values besides. A decode step reads all of it once, and multiplies with the codes.
Holds when: G divides D, R is a multiple of G, and numbers stay below 65,504.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from memwall.errors import InputError
from memwall.kernels import attention
from memwall.kv.base import CacheModel, CacheShape, Facts, KVCache, Reader
from memwall.kv.float_store import GrowingRows, float_dtype
from memwall.kv.kivi_state import RECENT, STAGING, LayerState
from memwall.kv.kivi_state import KiviSettings as KiviSettings
from memwall.kv.kivi_state import predict_kivi as predict_kivi
from memwall.kv.kivi_state import read_bytes_kivi as read_bytes_kivi
from memwall.kv.policy import Policy
from memwall.memory.arena import ALIGNMENT_BYTES, SMALL_BYTES
from memwall.memory.pages import round_up

if TYPE_CHECKING:
    from memwall.memory import Arena


class KiviCache(KVCache):
    """See the module's text."""

    codes_prompt = True
    saves = True
    plain_rows = True

    def __init__(
        self,
        policy: Policy,
        shape: CacheShape,
        arena: Arena,
        capacity_tokens: int,
        model: CacheModel | None = None,
    ) -> None:
        super().__init__(shape, arena, capacity_tokens)
        self._policy = policy
        self.settings = settings = KiviSettings.from_policy(policy, shape.head_dim)
        self.key_dim = shape.head_dim  # channels of coded keys
        dtype = float_dtype(settings.exact)
        key_rows, value_rows = settings.recent_rows(capacity_tokens)
        row_shape = (shape.num_kv_heads, shape.head_dim)
        self._recent = arena.allocate(RECENT, (shape.num_layers, key_rows + value_rows, *row_shape), dtype)
        most = round_up(capacity_tokens, settings.group)
        sizes = settings.key_bytes(shape, most), settings.value_bytes(shape, most)
        self._layers = [LayerState(arena, *sizes, rows[:key_rows], rows[key_rows:]) for rows in self._recent]
        self._staged_keys = GrowingRows(arena, STAGING, capacity_tokens, shape, dtype)
        self._staged_values = GrowingRows(arena, STAGING, capacity_tokens, shape, dtype)
        self._staged: tuple[int, np.ndarray, np.ndarray] | None = None

    @staticmethod
    def predict(
        policy: Policy, shape: CacheShape, num_tokens: int, prefill_tokens: int, capacity_tokens: int
    ) -> dict[str, int]:
        """Bytes per ledger owner once `num_tokens` are held, and of the staging of `prefill_tokens` at once."""
        return predict_kivi(policy, shape, (num_tokens, prefill_tokens, capacity_tokens))

    @staticmethod
    def read_bytes(policy: Policy, shape: CacheShape, num_tokens: int) -> int:
        """Bytes that one decode step reads with `num_tokens` held."""
        return read_bytes_kivi(policy, shape, num_tokens)

    @property
    def policy(self) -> str:
        s = self.settings
        exact = "" if s.exact == "float16" else f",exact={s.exact}"
        return f"kivi(bits={s.bits},group={s.group},residual={s.residual}{exact})"

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

    def attend(
        self, layer: int, q: np.ndarray, positions: np.ndarray, out: np.ndarray, stats: np.ndarray | None = None
    ) -> np.ndarray:
        state = self._layers[layer]
        keys, values = self._exact(layer)
        return attention.attend_kivi(
            q,
            state.key_blocks.bytes,
            state.value_blocks.bytes,
            keys,
            values,
            coded_keys=state.coded_keys,
            coded_values=state.coded_values,
            bits=self.settings.bits,
            group=self.settings.group,
            scale=self.shape.logit_scale,
            first_position=int(positions[0]),
            window=self.shape.window(layer),
            out=out,
            stats=stats,
        )

    def settle(self, layer: int) -> None:
        state, settings = self._layers[layer], self.settings
        keys, values = self._exact(layer)
        num_keys = len(keys) - len(keys) % settings.cycle
        num_values = max(len(values) - settings.residual, 0)
        if num_keys:
            start = settings.key_bytes(self.shape, state.coded_keys, self.key_dim)
            self._encode_keys(layer, keys[:num_keys], state.key_blocks.bytes[start:])
            state.coded_keys += num_keys
        if num_values:
            form = {"bits": settings.bits, "group": settings.group}
            attention.kivi_encode_values(values[:num_values], state.coded_values, state.value_blocks.bytes, **form)
            state.coded_values += num_values
        if self._staged is not None and self._staged[0] == layer:
            state.keys.set(keys[num_keys:])
            state.values.set(values[num_values:])
            self._unstage(release=layer == self.shape.num_layers - 1)
        else:
            state.keys.drop(num_keys)
            state.values.drop(num_values)

    def truncate(self, length: int) -> None:
        self._check_truncate(length)
        self._unstage(release=True)
        settings = self.settings
        for layer, state in enumerate(self._layers):
            if length < state.coded_keys:
                whole = length // settings.group * settings.group
                rest = np.empty((length - whole, *self._recent.shape[2:]), np.float32)
                self._decode_keys(layer, whole, rest)
                state.coded_keys = whole
                state.keys.set(rest)
            state.keys.count = length - state.coded_keys
            state.coded_values = min(state.coded_values, length)
            state.values.count = length - state.coded_values
            state.length = length
            state.key_blocks.shrink(settings.key_bytes(self.shape, state.coded_keys, self.key_dim))
            state.value_blocks.shrink(settings.value_bytes(self.shape, state.coded_values))

    def fork(self) -> KiviCache:
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
            arrays[f"key_blocks.{index}"] = state.key_blocks.bytes[
                : self.settings.key_bytes(self.shape, state.coded_keys)
            ]
            arrays[f"value_blocks.{index}"] = state.value_blocks.bytes[
                : self.settings.value_bytes(self.shape, state.coded_values)
            ]
            arrays[f"keys.{index}"], arrays[f"values.{index}"] = state.keys.rows, state.values.rows
        first = self._layers[0]  # layers differ only within a forward pass
        return arrays, {"tokens": self.length, "coded_keys": first.coded_keys, "coded_values": first.coded_values}

    def layout(self, facts: Facts) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        settings, tokens = self.settings, facts["tokens"]
        coded_keys, coded_values = facts["coded_keys"], facts["coded_values"]
        keys, values = tokens - coded_keys, tokens - coded_values
        if coded_keys % settings.group or not 0 <= keys < settings.cycle or not 0 <= values <= settings.residual:
            raise InputError(f"{coded_keys} coded keys and {coded_values} coded values of {tokens} tokens cannot be")
        row_shape, exact, coded = self._recent.shape[2:], self._recent.dtype, np.dtype(np.uint8)
        one = {
            "key_blocks": ((settings.key_bytes(self.shape, coded_keys, self.key_dim),), coded),
            "value_blocks": ((settings.value_bytes(self.shape, coded_values),), coded),
            "keys": ((keys, *row_shape), exact),
            "values": ((values, *row_shape), exact),
        }
        return {f"{name}.{layer}": form for layer in range(self.shape.num_layers) for name, form in one.items()}

    def restore(self, facts: Facts, keep: int, reader: Reader) -> None:
        """Where `keep` cuts a coded group, its keys are decoded, as `truncate` does it."""
        self._check_restore(keep, facts["tokens"])
        coded_keys = min(facts["coded_keys"], round_up(keep, self.settings.group))
        coded_values = min(facts["coded_values"], keep)
        key_bytes = self.settings.key_bytes(self.shape, coded_keys, self.key_dim)
        value_bytes = self.settings.value_bytes(self.shape, coded_values)
        try:
            for state in self._layers:
                state.key_blocks.reserve(key_bytes)
                state.value_blocks.reserve(value_bytes)
            for index, state in enumerate(self._layers):
                reader(f"key_blocks.{index}", state.key_blocks.bytes[:key_bytes])
                reader(f"value_blocks.{index}", state.value_blocks.bytes[:value_bytes])
                reader(f"keys.{index}", state.keys.buffer[: max(keep - coded_keys, 0)])
                reader(f"values.{index}", state.values.buffer[: keep - coded_values])
        except BaseException:
            self.truncate(0)
            raise
        for state in self._layers:
            state.restored(max(keep, coded_keys), coded_keys, coded_values)
        self.truncate(keep)

    def rows(self, layer: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        state = self._layers[layer]
        keys, values = (np.empty((end - begin, *self._recent.shape[2:]), np.float32) for _ in range(2))
        split = min(max(state.coded_keys, begin), end)
        if split > begin:
            self._decode_keys(layer, begin, keys[: split - begin])
        keys[split - begin :] = state.keys.rows[split - state.coded_keys : end - state.coded_keys] if end > split else 0
        split = min(max(state.coded_values, begin), end)
        form = {"bits": self.settings.bits, "group": self.settings.group}
        if split > begin:
            attention.kivi_decode_values(state.value_blocks.bytes, begin, values[: split - begin], **form)
        first = state.coded_values
        values[split - begin :] = state.values.rows[split - first : end - first] if end > split else 0
        return keys, values

    def release(self) -> None:
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
        key_tokens = state.coded_keys + num_keys - num_keys % self.settings.cycle
        value_tokens = state.coded_values + max(num_values - self.settings.residual, 0)
        state.key_blocks.reserve(self.settings.key_bytes(self.shape, key_tokens, self.key_dim))
        state.value_blocks.reserve(self.settings.value_bytes(self.shape, value_tokens))

    def _empty(self) -> KiviCache:
        return KiviCache(self._policy, self.shape, self.arena, self.capacity_tokens)

    def _encode_keys(self, layer: int, keys: np.ndarray, blocks: np.ndarray) -> None:
        attention.kivi_encode_keys(keys, blocks, bits=self.settings.bits, group=self.settings.group)

    def _decode_keys(self, layer: int, first: int, out: np.ndarray) -> None:
        blocks = self._layers[layer].key_blocks.bytes
        attention.kivi_decode_keys(blocks, first, out, bits=self.settings.bits, group=self.settings.group)

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

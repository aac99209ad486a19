"""KIVI: the past in 2 to 8 bits a number, keys grouped per channel, values per token, the newest tokens exact.

Source: KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache; Liu et al., 2024 (ICML), arXiv 2402.02750;
official code github.com/jy-yuan/KIVI.
Idea: keys have a few channels of large, stable magnitude, so a group of keys runs along tokens inside one channel and
an outlier channel spoils nothing but itself; attention sums few values, so an error in a value must stay in its own
token, and its groups run along channels. Groups of keys need many tokens: until R have come they wait, exact, and are
coded together.
Units and shapes: rows [tokens, Hkv, D]; G numbers share a float16 scale and minimum; lengths and R in tokens.
Differs from the paper: words hold other neighbours than in the official code, so that vectors load them whole; codes
are computed from the rounded scale and minimum; a constant group is coded as zeros of scale zero; 3 bits are offered,
groups of keys of another length than those of values, and `queries=int8`, with which queries and shares meet codes of
2 or 4 bits as integers (AccLLM's KV4); R = 0 keeps keys exact until a group is full, the least that grouping along
tokens allows. After `truncate` inside a coded group its remaining keys go back to the exact part as they were decoded,
and are coded anew with those to come.
Cost: resident 2 * layers * tokens * Hkv * D * (b + 32 / G) / 8 bytes plus the exact part, R to 2 R tokens; a prompt
stages one layer's exact keys and values besides. A decode step reads all of it once, and multiplies with the codes.
Holds when: G divides D, R is a multiple of G, and numbers stay below 65,504.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from memwall.kernels import attention
from memwall.kernels.parts import CachePart, coded_part
from memwall.kv.base import CacheModel, CacheShape
from memwall.kv.coded_cache import CodedCache
from memwall.kv.kivi_state import KiviSettings as KiviSettings
from memwall.kv.kivi_state import predict_kivi as predict_kivi
from memwall.kv.kivi_state import read_bytes_kivi as read_bytes_kivi
from memwall.kv.policy import Policy

if TYPE_CHECKING:
    from memwall.memory import Arena


class KiviCache(CodedCache):
    """See the module's text."""

    def __init__(
        self,
        policy: Policy,
        shape: CacheShape,
        arena: Arena,
        capacity_tokens: int,
        model: CacheModel | None = None,
    ) -> None:
        self.settings = self.settings_of(policy, shape)
        super().__init__(policy, self.settings, shape, arena, capacity_tokens)

    @classmethod
    def settings_of(cls, policy: Policy, shape: CacheShape) -> KiviSettings:
        """What a policy string asks for."""
        return KiviSettings.from_policy(policy, shape.head_dim)

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
        keys = f",key_group={s.key_group}" if s.key_group else ""
        queries = f",queries={s.queries}" if s.integers else ""
        return f"kivi(bits={s.bits},group={s.group},residual={s.residual}{keys}{exact}{queries})"

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
            key_group=self.settings.key_tokens,
            integers=self.settings.integers,
            scale=self.shape.logit_scale,
            first_position=int(positions[0]),
            window=self.shape.window(layer),
            out=out,
            stats=stats,
        )

    def _part(self, layer: int) -> CachePart:
        state = self._layers[layer]
        blocks = (state.key_blocks.capacity(), state.value_blocks.capacity())
        return coded_part((state.keys.buffer, state.values.buffer), blocks, self.settings.form)

    def _empty(self) -> KiviCache:
        return type(self)(self._policy, self.shape, self.arena, self.capacity_tokens)

    def _encode_keys(self, layer: int, keys: np.ndarray, first: int) -> None:
        blocks = self._layers[layer].key_blocks.bytes[self.settings.key_bytes(self.shape, first, self.key_dim) :]
        attention.kivi_encode_keys(keys, blocks, bits=self.settings.bits, group=self.settings.key_tokens)

    def _decode_keys(self, layer: int, first: int, out: np.ndarray) -> None:
        blocks = self._layers[layer].key_blocks.bytes
        attention.kivi_decode_keys(blocks, first, out, bits=self.settings.bits, group=self.settings.key_tokens)

    def _encode_values(self, layer: int, values: np.ndarray, first: int) -> None:
        blocks = self._layers[layer].value_blocks.bytes
        attention.kivi_encode_values(values, first, blocks, bits=self.settings.bits, group=self.settings.group)

    def _decode_values(self, layer: int, first: int, out: np.ndarray) -> None:
        blocks = self._layers[layer].value_blocks.bytes
        attention.kivi_decode_values(blocks, first, out, bits=self.settings.bits, group=self.settings.group)

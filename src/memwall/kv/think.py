"""ThinK: after the prompt is read, each key head keeps only the channels that the prompt's last queries use.

Source: ThinK: Thinner Key Cache by Query-Driven Pruning; Xu et al., 2024 (ICLR 2025), arXiv 2407.21018; official code
github.com/SalesforceAIResearch/ThinK.
Idea: leaving out channel j takes from the logits a matrix of rank one, whose norm is |q_j| |k_j| over the observed
queries and the keys. So the channels with the lowest product go, per head and prompt; a large key channel that meets no
query is worth nothing. Keys are really narrower then, and the query is gathered to match.
Units and shapes: keys [T, Hkv, D] after rotation; w observed queries and R recent keys in tokens; share: of the D
channels, floor(share * D) are dropped.
Differs from the paper: scores are summed over the query heads that share a key head, and these share one mask (the
official code repeats keys for every query head first). Channels of values are not pruned, which the paper treats as an
extension. Over KIVI the exact residual is the recent segment, and a prompt that fills no residual is not pruned. Where
no query was ever seen the keys' own norm decides.
Cost: resident keys of the older rows take (1 - share) of their bytes: with share 0.4 a fifth of keys and values
together goes; two bytes per surviving channel, head and layer come. A decode step gathers its query, merges two parts.
Holds when: a prompt has at least w tokens and more than R; what comes after it stays at full width over float stores.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, cast

import numpy as np

from memwall.errors import InputError
from memwall.kv.base import CacheModel, CacheShape, KVCache, Role
from memwall.kv.decoding import Decoding, InnerDecoding
from memwall.kv.float_store import OWNER, float_dtype
from memwall.kv.kivi import KiviSettings, predict_kivi, read_bytes_kivi
from memwall.kv.narrow_store import COMPACT, NarrowFloat, NarrowKivi
from memwall.kv.policy import AMOUNT, Policy
from memwall.memory.arena import ALIGNMENT_BYTES, SMALL_BYTES
from memwall.memory.pages import round_up

if TYPE_CHECKING:
    from typing import ClassVar

    from memwall.memory import Arena

CHANNELS = "kv/channels"
FLOATS = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinkSettings:
    """width: channels of D that stay; window: last queries w looked at; recent: newest keys R left as they are.

    residual: keys that KIVI codes at once, which takes the place of `recent`; 0 over a float store.
    """

    share: float
    width: int
    window: int
    recent: int
    residual: int = 0

    @classmethod
    @lru_cache(maxsize=256)
    def from_policy(cls, policy: Policy, head_dim: int) -> ThinkSettings:
        """Settings of a policy string, checked against the store below and the head dimension."""
        own = Policy(policy.name, policy.settings)
        store = policy.inner or Policy("float16")
        numbers = own.numbers({AMOUNT: 0.4, "window": 32, "recent": 32})
        share, window, recent = numbers[AMOUNT], int(numbers["window"]), int(numbers["recent"])
        width = head_dim - int(share * head_dim + 1e-6)  # 0.3 * 10 is a hair below 3
        if width < 1 or share >= 1:
            raise InputError(f"policy {own}: drops {share:g} of the channels; must be below 1, such as 0.4")
        if window < 1 or recent < 1:
            raise InputError(f"policy {own}: window and recent must be at least 1")
        if store.name in FLOATS:
            return cls(share=share, width=width, window=window, recent=recent)
        if store.name != "kivi":
            raise InputError(
                f"KV policy {policy}: think narrows keys that are stored in {', '.join(FLOATS)} or kivi, not "
                f"in {store.name}"
            )
        if "recent" in policy.settings:
            raise InputError(f"policy {policy}: over kivi the recent keys are its residual; write kivi(residual=...)")
        residual = KiviSettings.from_policy(store, head_dim).cycle
        return cls(share=share, width=width, window=window, recent=recent, residual=residual)

    def dropped(self, prompt: int, head_dim: int) -> bool:
        """Whether a prompt of so many tokens is pruned."""
        return self.width < head_dim and prompt >= self.window and prompt >= (self.residual or self.recent + 1)

    def __str__(self) -> str:
        rest = [f"{key}={n}" for key, n in (("window", self.window), ("recent", self.recent)) if n != 32]
        return f"think({','.join([f'{self.share:g}', *rest])})"


def channel_scores(query_energy: np.ndarray, key_energy: np.ndarray) -> np.ndarray:
    """Squared norms of the rank-one parts [Hkv, D], of squares summed over queries and group, and over keys."""
    return key_energy * query_energy if query_energy.any() else key_energy


def energy(x: np.ndarray, num_groups: int) -> np.ndarray:
    """Squares of x [tokens, heads, D] summed over tokens and over the heads of a group: [groups, D]."""
    per_head: np.ndarray = np.einsum("thd,thd->hd", x, x)
    return per_head.reshape(num_groups, -1, x.shape[2]).sum(axis=1)


class ThinkCache(KVCache):
    """See the module's text."""

    role: ClassVar[Role] = "channels"
    codes_prompt = True

    def __init__(
        self,
        policy: Policy,
        shape: CacheShape,
        arena: Arena,
        capacity_tokens: int,
        model: CacheModel | None = None,
    ) -> None:
        super().__init__(shape, arena, capacity_tokens)
        self.settings = settings = ThinkSettings.from_policy(policy, shape.head_dim)
        self.channels = arena.allocate(CHANNELS, (shape.num_layers, shape.num_kv_heads, settings.width), np.uint16)
        below = policy.inner or Policy("float16")
        try:
            self.store: NarrowFloat | NarrowKivi = (
                NarrowKivi(below, shape, arena, capacity_tokens, settings.width)
                if settings.residual
                else NarrowFloat(below, shape, arena, capacity_tokens, settings.width, settings.recent)
            )
        except BaseException:
            arena.free(self.channels)
            raise
        self._expected = 0  # tokens of an announced prompt, while it comes
        self._energy: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # of queries and keys, per layer not yet pruned
        self._pass = (0, False)  # length of the prompt of this pass, and whether it ends here

    @staticmethod
    def predict(
        policy: Policy, shape: CacheShape, num_tokens: int, prefill_tokens: int, capacity_tokens: int
    ) -> dict[str, int]:
        """Bytes per ledger owner with `num_tokens` taken in, the first `prefill_tokens` of them as the prompt."""
        settings, below = ThinkSettings.from_policy(policy, shape.head_dim), policy.inner or Policy("float16")
        prompt = min(prefill_tokens, num_tokens)
        dropped = settings.dropped(prompt, shape.head_dim)
        held = 2 * shape.num_layers * shape.num_kv_heads * settings.width
        found = {CHANNELS: round_up(held, ALIGNMENT_BYTES) if held < SMALL_BYTES else round_up(held)}
        if settings.residual:
            width = settings.width if dropped else shape.head_dim
            return found | predict_kivi(below, shape, (num_tokens, prefill_tokens, capacity_tokens), width)
        row = shape.row_values * float_dtype(below.name).itemsize
        old = prompt - settings.recent if dropped else 0
        old_row = row // shape.head_dim * settings.width
        return found | {
            COMPACT: shape.num_layers * round_up(old * old_row),
            OWNER: shape.num_layers * (round_up((num_tokens - old) * row) + round_up(num_tokens * row)),
        }

    @staticmethod
    def read_bytes(policy: Policy, shape: CacheShape, num_tokens: int) -> int:
        """Bytes that one decode step reads after a prompt of `num_tokens`."""
        settings, below = ThinkSettings.from_policy(policy, shape.head_dim), policy.inner or Policy("float16")
        dropped = settings.dropped(num_tokens, shape.head_dim)
        if settings.residual:
            return read_bytes_kivi(below, shape, num_tokens, settings.width if dropped else shape.head_dim)
        row = shape.row_values * float_dtype(below.name).itemsize
        spared = row // shape.head_dim * (shape.head_dim - settings.width)
        total = 0
        for layer in range(shape.num_layers):
            seen = min(num_tokens, shape.window(layer) or num_tokens)
            total += 2 * seen * row - (max(seen - settings.recent, 0) * spared if dropped else 0)
        return total

    @property
    def policy(self) -> str:
        return f"{self.settings}+{self.store.policy}"

    @property
    def length(self) -> int:
        return self.store.length

    @property
    def nbytes(self) -> int:
        held = self.channels.nbytes
        return self.store.nbytes + (round_up(held, ALIGNMENT_BYTES) if held < SMALL_BYTES else round_up(held))

    def begin_prompt(self, num_tokens: int, longest: int) -> list[int]:
        if self.store.waits and (self.length == 0 or self._expected > self.length):
            self._expected = self.length + num_tokens
        return self.store.begin_prompt(num_tokens, longest)

    def observe(self, layer: int, q: np.ndarray) -> None:
        if layer in self._energy:
            self._energy[layer][0][:] = energy(q[-self.settings.window :], self.shape.num_kv_heads)

    def append(self, layer: int, k: np.ndarray, v: np.ndarray, positions: np.ndarray) -> None:
        held = int(positions[0]) if len(positions) else 0
        end = held + len(k)
        prompt = max(self._expected, end) if held == 0 or self._expected > held else 0
        pruned = self.settings.dropped(prompt, self.shape.head_dim)
        if layer == 0:
            self._pass = (prompt if pruned else 0, pruned and end == prompt)
            self.store.begin_pass(narrowing=self._pass[1])
        self.store.append(layer, k, v, positions)
        if pruned:
            keys = energy(k, self.shape.num_kv_heads)
            if held and layer in self._energy:
                self._energy[layer][1][:] += keys
            else:
                self._energy[layer] = (np.zeros_like(keys), keys)

    def attend(
        self, layer: int, q: np.ndarray, positions: np.ndarray, out: np.ndarray, stats: np.ndarray | None = None
    ) -> np.ndarray:
        prompt = self._pass[0]
        if prompt and layer in self._energy:
            seen = q[positions >= prompt - self.settings.window]
            if len(seen):
                self._energy[layer][0][:] += energy(seen, self.shape.num_kv_heads)
        return self.store.attend(layer, q, positions, out, stats)

    def settle(self, layer: int) -> None:
        if self._pass[1] and layer in self._energy:
            scores = self.scores(layer, *self._energy.pop(layer))
            best = np.argpartition(scores, -self.settings.width, axis=1)[:, -self.settings.width :]
            self.channels[layer] = np.sort(best, axis=1)
            self.store.narrow(layer, self.channels[layer])
        self.store.settle(layer)
        if layer == self.shape.num_layers - 1:
            self._pass = (0, False)
            if self.length >= self._expected:
                self._expected = 0

    @classmethod
    def decode_together(cls, caches: Sequence[KVCache]) -> Decoding:
        return InnerDecoding(caches, cast("Sequence[ThinkCache]", caches))

    @property
    def inner(self) -> KVCache:
        """See `decoding.OuterCache`."""
        return self.store

    @property
    def passes_on(self) -> bool:
        """See `decoding.OuterCache`."""
        return 0 < self.length >= self._expected

    def took_in(self, num_tokens: int) -> None:
        """See `decoding.OuterCache`: nothing is counted here."""

    def scores(self, layer: int, query_energy: np.ndarray, key_energy: np.ndarray) -> np.ndarray:
        """What each channel [Hkv, D] is worth."""
        return channel_scores(query_energy, key_energy)

    def rewindable(self, length: int) -> int:
        return self.store.rewindable(length)

    def truncate(self, length: int) -> None:
        self.store.truncate(length)
        # a prompt cut off in the middle is kept at full width: what its last queries would have said is not known
        self._expected, self._pass = 0, (0, False)
        self._energy.clear()

    def fork(self) -> ThinkCache:
        other = copy.copy(self)
        other.channels = self.arena.allocate(CHANNELS, self.channels.shape, np.uint16)
        try:
            other.store = self.store.fork()
        except BaseException:
            self.arena.free(other.channels)
            raise
        other.channels[:] = self.channels
        for layer, own in enumerate(other.channels):
            if other.store._channels[layer] is not None:
                other.store.narrowed_by(layer, own)
        other._energy = {layer: (q.copy(), k.copy()) for layer, (q, k) in self._energy.items()}
        return other

    def release(self) -> None:
        self._energy.clear()
        self.store.release()
        self.arena.free(self.channels)

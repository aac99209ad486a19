"""Lambda-shaped attention: a query sees the first few tokens and the last many, in bytes that never grow.

Source: AccLLM (Liang 2025, arXiv 2505.03745), the cache side of its recipe; LM-Infinite (Han 2023, arXiv 2308.16137)
and StreamingLLM (Xiao 2023, arXiv 2309.17453) for the two ways to count positions. No official code of AccLLM known.
Idea: a model puts attention that it has no use for on its first tokens, and knows no distance beyond those it was
trained at. So the first g tokens (sinks) and the last n (window) are kept, the latter in a ring (`kv.ring`), and no
distance is ever longer than g + n. `positions=cache` counts places in the cache, so that sinks stay in front of the
window (StreamingLLM); `positions=clip` puts all sinks that have left the window n tokens away (LM-Infinite).
Units and shapes: g, n in tokens; rows [tokens, Hkv, D] of the inner store: float types, or KIVI's codes (KV4: 4 bits).
Differs from the paper: how many tokens it keeps is not known; 4 and 1,024 are StreamingLLM's and within what its
authors recommend. Keys are not kept unrotated but rotated by their place in a frame of the ring, which serves the same
end with two rotations of a query instead of one of every key. Sinks are float32. New tokens attend to each other
exactly, before they are coded.
Cost: resident 2 * layers * (n + 16) * Hkv * D numbers of the store (KIVI: n rounded up to units), and g float32 rows;
a decode step reads g + n rows of each kind; a prompt of S tokens costs S (g + n) products a head: a band and a column.
Holds when: layers see everything (no sliding window), and g + n is at most the positions that the model knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np

from memwall import kernels
from memwall.errors import InputError
from memwall.kernels.attention import attend_float
from memwall.kernels.parts import CachePart, float_part, join_pieces
from memwall.kv.base import CacheModel, CacheShape, KVCache
from memwall.kv.evict import array_bytes, inner_of
from memwall.kv.float_store import float_dtype
from memwall.kv.kivi_state import KiviSettings
from memwall.kv.policy import Policy
from memwall.kv.ring import FloatRing, KiviRing, NextToken, RingLayout, recent_rows

if TYPE_CHECKING:
    from memwall.kv.decoding import Decoding
    from memwall.memory import Arena
    from memwall.models.rope import RotaryTable

SINKS = "kv/sinks"
RECENT = "kv/recent"
POSITIONS = ("cache", "clip")

Sight = tuple[int, int, tuple[int, ...]]
"""What one token sees of a cache: which of `LambdaCache.parts`, by how many places its query is turned for it, and
where its tokens are (`kernels.parts`).
"""
_WHY = "its ring holds float32, float16 or bfloat16 rows, or kivi's codes"


@dataclass(frozen=True, slots=True, kw_only=True)
class LambdaSettings:
    """sinks: the first tokens that stay; window: the last ones; positions: how far away sinks are, see the module."""

    sinks: int = 4
    window: int = 1024
    positions: str = "cache"

    @classmethod
    @lru_cache(maxsize=256)
    def from_policy(cls, policy: Policy, shape: CacheShape) -> LambdaSettings:
        """Settings of a policy string, checked."""
        positions = policy.settings.get("positions", "cache")
        own = Policy(policy.name, policy.settings)
        settings = cls(**own.integers({"sinks": 4, "window": 1024}, words=("positions",)), positions=positions)
        if positions not in POSITIONS:
            raise InputError(f"policy {policy}: positions={positions}; must be one of {', '.join(POSITIONS)}")
        if settings.window < 1:
            raise InputError(f"policy {policy}: a window of {settings.window} tokens; must be at least 1")
        if any(shape.windows or ()):
            raise InputError(f"policy {policy}: lambda needs layers that see everything; this model has windows")
        return settings

    @property
    def tokens(self) -> int:
        """Tokens that a query sees at most."""
        return self.sinks + self.window


def ring_kind(policy: Policy) -> type[FloatRing] | type[KiviRing]:
    """What holds the window, by the store under the policy."""
    return KiviRing if inner_of(policy).name == "kivi" else FloatRing


class Turns:
    """Rotations of queries by so many places, made once a pass for all layers."""

    def __init__(self, model: CacheModel) -> None:
        self._rotary = model.rotary
        # a turn leaves YaRN's factor in the queries as it is
        self._factor = np.float32(self._rotary.rope.attention_factor)
        self._known: dict[Any, tuple[np.ndarray, np.ndarray]] = {}

    def forget(self) -> None:
        """Before another pass."""
        self._known.clear()

    def turned(self, q: np.ndarray, key: tuple[Any, ...], by: Callable[[], np.ndarray] | int) -> np.ndarray:
        """q [T, H, D] turned by so many places: the same for all, or [T]; key: names them within a pass."""
        if by == 0:
            return q
        tables = self._known.get(key)
        if tables is None:
            places = np.full(len(q), by) if isinstance(by, int) else by()
            cos, sin = self._rotary.at(places.astype(np.float32))
            tables = self._known[key] = (cos / self._factor, sin / self._factor)
        return kernels.rope(q.copy(), *tables)


class Parts:
    """Attentions of the same queries over tokens apart, joined at the end."""

    MOST = 8
    """At most four pieces of a ring, the new tokens, sinks on either side of the end of the window."""

    def __init__(self, q: np.ndarray) -> None:
        self._outs = np.empty((self.MOST, *q.shape), np.float32)
        self._stats = np.empty((self.MOST, *q.shape[:2], 2), np.float32)
        self._count = 0

    def next(self) -> dict[str, Any]:
        """Where another part's output and stats go."""
        self._count += 1
        return {"out": self._outs[self._count - 1], "stats": self._stats[self._count - 1]}

    def join(self, out: np.ndarray, stats: np.ndarray | None) -> None:
        """All parts together. A query sees its own token, so that the highest peak is a number."""
        outs, found = self._outs[: self._count], self._stats[: self._count]
        if outs.shape[1] == 1:  # as of the next tokens of several caches: the same sums
            join_pieces(outs[:, 0], found[:, 0], np.array([self._count]), out, stats)
            return
        peaks, sums = found[..., 0], found[..., 1]
        peak = peaks.max(axis=0, where=sums > 0, initial=-np.inf)
        with np.errstate(invalid="ignore", over="ignore"):
            weights = np.where(sums > 0, sums * np.exp(peaks - peak), np.float32(0))
        total = weights.sum(axis=0)
        weights /= total
        np.einsum("pth,pthd->thd", weights, outs, out=out)
        if stats is not None:
            stats[..., 0], stats[..., 1] = peak, total


class LambdaCache(KVCache):
    """See the module's text."""

    role = "tokens"
    needs_model = True
    packs_positions = True
    streams_prompt = True
    sheds_prompt = True
    goes_on = True
    refuses: ClassVar[dict[str, str]] = dict.fromkeys(
        ("int8", "int4", "kv4", "bfp", "think", "cskv", "xquant", "vattention", "instinfer"), _WHY
    )

    def __init__(
        self,
        policy: Policy,
        shape: CacheShape,
        arena: Arena,
        capacity_tokens: int,
        model: CacheModel | None = None,
    ) -> None:
        super().__init__(shape, arena, capacity_tokens)
        assert model is not None
        self.settings = s = LambdaSettings.from_policy(policy, shape)
        if s.tokens > model.config.max_position:
            raise InputError(
                f"policy {policy}: {s.sinks} sinks and a window of {s.window} are more than the "
                f"{model.config.max_position} positions that the model knows; try "
                f"window={max(model.config.max_position - s.sinks, 1)}"
            )
        self._policy, self._model, self._turns = policy, model, Turns(model)
        inner, layers = inner_of(policy), range(shape.num_layers)
        self.ring_layout: RingLayout = ring_kind(policy).layout_of(inner, shape, s.sinks, s.window)
        rows = (shape.num_kv_heads, shape.head_dim)
        # keys as rotated, values, and keys unrotated; the last only where distances are clipped
        self._sinks = arena.allocate(SINKS, (shape.num_layers, 2 + (s.positions == "clip"), s.sinks, *rows), np.float32)
        self._recent: np.ndarray | None = None
        self._rings: list[FloatRing | KiviRing] = []
        try:
            if inner.name == "kivi":
                coded = KiviSettings.from_policy(inner, shape.head_dim)
                size = (shape.num_layers, 2, recent_rows(coded), *rows)
                self._recent = arena.allocate(RECENT, size, float_dtype(coded.exact))
                self._rings = [KiviRing(self.ring_layout, arena, shape, coded, self._recent[layer]) for layer in layers]
            else:
                self._rings = [FloatRing(self.ring_layout, arena, shape, capacity_tokens, inner.name) for _ in layers]
        except BaseException:
            self.release()
            raise
        self._lengths = [0] * shape.num_layers
        self._begin = 0  # tokens held when the pass began
        self._new: tuple[np.ndarray, np.ndarray] | None = None  # a long pass's own rows, between append and settle
        self._parts: list[tuple[CachePart, ...]] = []

    @staticmethod
    def predict(
        policy: Policy, shape: CacheShape, num_tokens: int, prefill_tokens: int, capacity_tokens: int
    ) -> dict[str, int]:
        """Bytes per ledger owner once `num_tokens` are taken in; a prompt stages nothing."""
        s = LambdaSettings.from_policy(policy, shape)
        kind, inner = ring_kind(policy), inner_of(policy)
        layout = kind.layout_of(inner, shape, s.sinks, s.window)
        sinks = 4 * shape.num_layers * (2 + (s.positions == "clip")) * s.sinks * shape.row_values
        return {
            **kind.predict(inner, shape, layout, max(num_tokens - s.sinks, 0), capacity_tokens),
            SINKS: array_bytes(sinks),
        }

    @staticmethod
    def read_bytes(policy: Policy, shape: CacheShape, num_tokens: int) -> int:
        """Bytes that one decode step reads with `num_tokens` taken in: the sinks and the window."""
        s = LambdaSettings.from_policy(policy, shape)
        kind, inner = ring_kind(policy), inner_of(policy)
        seen = min(max(num_tokens - s.sinks, 0), s.window)
        layout = kind.layout_of(inner, shape, s.sinks, s.window)
        sinks = 2 * 4 * shape.num_layers * min(s.sinks, num_tokens) * shape.row_values
        return sinks + kind.read_bytes(inner, shape, layout, seen)

    @staticmethod
    def seen_tokens(policy: Policy, shape: CacheShape, num_tokens: int) -> int:
        """The sinks and the window."""
        return min(num_tokens, LambdaSettings.from_policy(policy, shape).tokens)

    @property
    def policy(self) -> str:
        return str(self._policy)

    @property
    def length(self) -> int:
        return min(self._lengths)

    @property
    def next_position(self) -> int:
        length = self.length
        return self.ring_layout.place(length, self.ring_layout.frame_of(length))

    @property
    def nbytes(self) -> int:
        recent = 0 if self._recent is None else array_bytes(self._recent.nbytes)
        return array_bytes(self._sinks.nbytes) + recent + sum(ring.nbytes for ring in self._rings)

    def append(self, layer: int, k: np.ndarray, v: np.ndarray, positions: np.ndarray) -> None:
        held, end = self._lengths[layer], self._lengths[layer] + len(k)
        self._check_append(held, len(k), positions)
        if layer == 0:  # room in all layers: a refusal must come before any has changed
            for ring in self._rings:
                ring.reserve(end)
            self._begin = held
            self._turns.forget()
        if held < self.settings.sinks:
            self._take_sinks(layer, k, v)
        self._new = (k, v)
        if len(k) <= self._rings[layer].spare:
            self._keep(layer)
        self._lengths[layer] = end

    def attend(
        self, layer: int, q: np.ndarray, positions: np.ndarray, out: np.ndarray, stats: np.ndarray | None = None
    ) -> np.ndarray:
        first, s = int(positions[0]), self.settings
        parts = Parts(q)
        where: dict[str, Any] = {"scale": self.shape.logit_scale, "first_position": first, "window": s.window}
        frame = self.ring_layout.frame_of(self._begin)
        oldest = max(first - s.window + 1, s.sinks)
        for piece in self._rings[layer].pieces(oldest):
            by = (frame - piece.frame) * self.ring_layout.frame
            piece.attend(self._turns.turned(q, (first, by), by), **where, **parts.next())
        if self._new is not None:  # not in the ring yet: as the decoder made them, in the pass's own frame
            k, v = self._new
            begin = max(oldest - self._begin, 0)
            end = first + len(q) - self._begin
            if begin < end:
                start = self._begin + begin
                attend_float(q, k[begin:end], v[begin:end], **where, key_start=start, **parts.next())
        self._attend_sinks(layer, q, first, frame, parts)
        parts.join(out, stats)
        return out

    def settle(self, layer: int) -> None:
        if self._new is not None:
            self._keep(layer)

    @classmethod
    def decode_together(cls, caches: Sequence[KVCache]) -> Decoding:
        from memwall.kv.lambda_decoding import LambdaDecoding

        return LambdaDecoding(cast("Sequence[LambdaCache]", caches))

    @property
    def rotary(self) -> RotaryTable:
        """What its queries are turned with."""
        return self._model.rotary

    @property
    def steady(self) -> bool:
        """Whether the next token is one for the ring."""
        return self._lengths[0] >= self.settings.sinks

    def parts(self) -> list[tuple[CachePart, ...]]:
        """Of each layer: the ring; sinks as they were rotated; and unrotated, where distances are clipped."""
        if not self._parts:
            held = zip(self._rings, self._sinks if self.settings.sinks else [()] * len(self._rings))
            self._parts = [
                (ring.part(), *(float_part(sinks[at], sinks[1]) for at in (0, 2) if at < len(sinks)))
                for ring, sinks in held
            ]
        return self._parts

    def begin_decode(self) -> tuple[NextToken, list[Sight]]:
        """Makes room in all layers for another token, or raises with all that is held as it was. Gives what the rings
        do for it, and what it sees, part by part.
        """
        position, s, layout, ring = self._lengths[0], self.settings, self.ring_layout, self._rings[-1]
        self._check_room(position, 1)
        if not ring.has(position + 1):
            for each in self._rings:
                each.reserve(position + 1)
        for each in self._rings:
            each.make_room()
        frame = layout.frame_of(position)
        shift = frame * layout.frame
        told = ring.next_token(max(position - s.window + 1, s.sinks))
        seen = [(0, shift - layout.frame_of(at) * layout.frame, places) for at, places in told.runs]
        return told, [*seen, *self._sinks_seen(position, shift)]

    def _sinks_seen(self, position: int, shift: int) -> Iterator[Sight]:
        """As `_attend_sinks` has it, for one token that comes after them."""
        s = self.settings
        places = (0, 0, 0, 0, 0, s.sinks)
        if not s.sinks:
            return
        if s.positions == "cache":
            yield 1, min(position, s.tokens - 1) - position + shift, (*places, position, 0)
            return
        if position >= s.window:
            yield 2, s.window - position + shift, (*places, position - s.window, 0)
        if position < s.tokens - 1:
            yield 1, shift, (*places, position, max(position - s.window + 1, 0))

    def end_decode(self) -> None:
        """That was done in all layers: the token is held."""
        for ring in self._rings:
            ring.take_next()
        self._lengths = [self._lengths[0] + 1] * self.shape.num_layers

    def rewindable(self, length: int) -> int:
        """As long as all tokens are held that the next one would see."""
        oldest = max(length - self.settings.window + 1, self.settings.sinks)
        return length if all(ring.first <= oldest for ring in self._rings) else 0

    def truncate(self, length: int) -> None:
        self._check_truncate(length)
        if length and len(set(self._lengths)) == 1 and self.rewindable(length) != length:
            raise ValueError(f"cannot truncate to {length} tokens: some of those before were dropped")
        # layers that went ahead in a long pass that broke off have lost what it overwrote: their window is shorter
        self._new = None
        for ring in self._rings:
            ring.truncate(length)
        self._lengths = [length] * self.shape.num_layers

    def fork(self) -> LambdaCache:
        other = LambdaCache(self._policy, self.shape, self.arena, self.capacity_tokens, self._model)
        try:
            other._sinks[:] = self._sinks
            for mine, theirs in zip(self._rings, other._rings):
                theirs.copy_from(mine)  # type: ignore[arg-type]
        except BaseException:
            other.release()
            raise
        other._lengths = list(self._lengths)
        return other

    def release(self) -> None:
        self._parts = []
        for ring in self._rings:
            ring.release()
        self._rings = []
        self.arena.free(self._sinks)
        if self._recent is not None:
            self.arena.free(self._recent)

    def _take_sinks(self, layer: int, k: np.ndarray, v: np.ndarray) -> None:
        """The first tokens of the stream, whose places are their positions."""
        held = self._lengths[layer]
        end = min(held + len(k), self.settings.sinks)
        sinks = self._sinks[layer]
        sinks[0, held:end], sinks[1, held:end] = k[: end - held], v[: end - held]
        if self.settings.positions == "clip":
            sinks[2, held:end] = self._turns.turned(k[: end - held], ("sinks",), lambda: -np.arange(held, end))

    def _keep(self, layer: int) -> None:
        """The pass's new tokens go to the ring; keys beyond the frame that it began in are turned to their own."""
        assert self._new is not None
        (k, v), layout, begin = self._new, self.ring_layout, self._begin
        self._new = None
        frame, end = layout.frame_of(begin), begin + len(k)
        for first, stop, own in layout.frames(max(begin, layout.sinks), end):
            keys = k[first - begin : stop - begin]
            if own != frame:
                keys = self._turns.turned(keys, ("keys", first), (frame - own) * layout.frame)
            self._rings[layer].put(keys, v[first - begin : stop - begin])

    def _attend_sinks(self, layer: int, q: np.ndarray, first: int, frame: int, parts: Parts) -> None:
        s, last = self.settings, first + len(q) - 1
        if not s.sinks:
            return
        turned, rows = self._turns.turned, self._sinks[layer]
        where: dict[str, Any] = {"scale": self.shape.logit_scale, "first_position": first}
        shift = frame * self.ring_layout.frame  # of a query's place in its frame from its position

        def places() -> np.ndarray:
            return np.arange(first, last + 1)

        if s.positions == "cache":
            moved = turned(q, (first, "cache"), lambda: np.minimum(places(), s.tokens - 1) - places() + shift)
            attend_float(moved, rows[0], rows[1], **where, **parts.next())
            return
        if last >= s.window:  # sinks that have left the window, for some of the queries
            moved = turned(q, (first, "clip"), lambda: s.window - places() + shift)
            attend_float(moved, rows[2], rows[1], **{**where, "first_position": first - s.window}, **parts.next())
        if first < s.tokens - 1:  # and those that have not
            moved = turned(q, (first, "near"), shift)
            attend_float(moved, rows[0], rows[1], **where, window=s.window, **parts.next())

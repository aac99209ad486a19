"""Locret: small trained heads say at once what each token will be worth; the cache keeps the best, whatever the prompt.

Source: Locret: Enhancing Eviction in Long-Context LLM Inference with Trained Retaining Heads; Huang et al., 2024, arXiv
2410.01805; official code github.com/huangyuxiang03/Locret.
Idea: attention statistics need queries that come later, so their scores change and a dropped token cannot come back. A
retaining head S = W2 act(W1 [q; k; v]) predicts from a token's own query, key and value (before rotation) the largest
logit that an answer will give it; the score is final, and a prompt can be read chunk by chunk, evicting after each.
Units and shapes: a unit is one token's key and value in one head; b kept units and chunks of c tokens, per head and
layer; W1 [width, (H + 2 Hkv) D], W2 [Hkv, width]; scores [T, Hkv].
Differs from the paper: keys are kept rotated to their packed place, and turned by the difference when that moves,
rather than rotated anew at every step: a key that moved n times carries n roundings to half precision, n at most T / c,
whose sum grows with the root of n (at 128 moves the error of one rounding to bfloat16), and decoding turns nothing. The
answer, and later turns of a conversation, gather like a prompt: when c tokens are there they are folded too, so that
the peak holds for any stream; an answer shorter than c is kept whole, as in the paper.
Cost: resident 2 * layers * Hkv * D * itemsize * (b + c) bytes at most, a score of 4 bytes a unit, the heads; a decode
step reads all of it once. The heads add (H + 2 Hkv) D width multiplications per token and layer.
Holds when: layers see everything (no sliding window), and b + c positions are ones the model knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from memwall import kernels
from memwall.errors import InputError
from memwall.formats import codec
from memwall.kv import fitted
from memwall.kv.base import CacheModel, CacheShape
from memwall.kv.blocks import BlockCache, Scorer, Uniform
from memwall.kv.float_store import float_dtype
from memwall.kv.policy import AMOUNT, Policy, kept_share
from memwall.kv.ragged import block_bytes
from memwall.memory.arena import ALIGNMENT_BYTES, SMALL_BYTES
from memwall.memory.pages import round_up
from memwall.models.rope import RotaryTable

if TYPE_CHECKING:
    from memwall.memory import Arena

HEADS = "kv/heads"
FLOATS = ("float32", "float16", "bfloat16")
SCORED_ROWS = 64
"""Tokens scored at once: bounds the buffers of the heads."""
WIDEST = 1024  # paper: section 4.1, hidden width of the heads


@dataclass(frozen=True, slots=True, kw_only=True)
class LocretSettings:
    """Kept units b per head; tokens of a chunk c; newest units safe from an eviction n_s; last tokens of a prompt that
    are kept whole n_loc; hidden width of the heads. share: of the context, where b was given so.
    """

    tokens: int
    chunk: int
    stable: int
    local: int
    width: int
    share: float | None
    dtype: str

    @classmethod
    def from_policy(cls, policy: Policy, shape: CacheShape, capacity_tokens: int) -> LocretSettings:
        """Settings of a policy string, checked; what it leaves out follows the paper's proportions."""
        store = policy.inner.name if policy.inner is not None else "float16"
        if store not in FLOATS:
            raise InputError(f"policy {policy}: locret turns its keys to new places; {_WHY}")
        if any(shape.windows or ()):
            raise InputError(
                f"policy {policy}: locret needs layers that see everything; this model has sliding windows"
            )
        zero = {AMOUNT: 0.0, "tokens": 0, "chunk": 512, "stable": -1, "local": -1, "width": heads_width(shape)}
        given = policy.numbers(zero)
        share = kept_share(policy)
        tokens = int(given["tokens"]) if share is None else max(int(share * capacity_tokens), 1)
        chunk = int(given["chunk"])
        # paper: 2500 of 16384 units stable, the last 100 tokens local
        stable = int(given["stable"]) if given["stable"] >= 0 else min(tokens * 2500 // 16384, 2500)
        local = int(given["local"]) if given["local"] >= 0 else min(100, chunk // 2)
        if chunk < 1 or given["width"] < 1:
            raise InputError(f"policy {policy}: chunk and width must be at least 1")
        if stable >= tokens:
            raise InputError(
                f"policy {policy}: {stable} stable units leave none to choose of {tokens}; try {tokens // 2}"
            )
        if local >= chunk:
            raise InputError(f"policy {policy}: local must be below the chunk of {chunk} tokens, not {local}")
        return cls(
            tokens=tokens,
            chunk=chunk,
            stable=stable,
            local=local,
            width=int(given["width"]),
            share=share,
            dtype=store,
        )


_WHY = "it works with float32, float16 and bfloat16 rows only"


def heads_width(shape: CacheShape) -> int:
    """Hidden width of the heads: half the input, up to the paper's 1024."""
    return max(min(WIDEST, head_inputs(shape) // 2), 1)


def head_inputs(shape: CacheShape) -> int:
    """Numbers that a retaining head sees of a token."""
    return (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim


class RetainingHeads(Scorer):
    """The trained heads of all layers, shared by a cache and its forks."""

    is_final = True

    def __init__(
        self,
        shape: CacheShape,
        rotary: RotaryTable,
        width: int,
        arena: Arena,
        read: Callable[[], Mapping[str, np.ndarray]],
    ) -> None:
        """read: gives the fitted arrays; called once their bytes are counted."""
        self.shape, self.rotary, self.width = shape, rotary, width
        self.users = 1
        self._arena = arena
        self._charge = arena.charge(HEADS, self.weight_bytes(shape, width))
        try:
            arrays = read()
            turned = (shape.num_heads + shape.num_kv_heads) * shape.head_dim
            self._layers = []
            for layer in range(shape.num_layers):
                first, second = arrays[f"{layer}.w1"], arrays[f"{layer}.w2"]
                if first.shape != (width, head_inputs(shape)) or second.shape != (shape.num_kv_heads, width):
                    raise InputError(
                        f"retaining heads of shape {list(first.shape)} do not fit this model; fit them anew"
                    )
                parts = (first[:, :turned], first[:, turned:], second)
                self._layers.append([_matrix(part) for part in parts])
            self._work = arena.allocate(HEADS, self.work_shape(shape, width), np.float32)
        except BaseException:
            self._charge.release()
            raise
        self._work.reshape(-1)[-SCORED_ROWS * width :] = 1

    @staticmethod
    def weight_bytes(shape: CacheShape, width: int) -> int:
        """Bytes of both matrices of all layers, in half precision."""
        return 2 * shape.num_layers * width * (head_inputs(shape) + shape.num_kv_heads)

    @staticmethod
    def work_shape(shape: CacheShape, width: int) -> tuple[int, int]:
        """Hidden numbers, scores, and the ones that the gated kernel multiplies them with."""
        return SCORED_ROWS, 2 * width + shape.num_kv_heads

    @classmethod
    def nbytes_of(cls, shape: CacheShape, width: int) -> int:
        """Bytes on the ledger."""
        rows, columns = cls.work_shape(shape, width)
        work = 4 * rows * columns
        return cls.weight_bytes(shape, width) + (
            round_up(work, ALIGNMENT_BYTES) if work < SMALL_BYTES else round_up(work)
        )

    def see(self, layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray, turns: np.ndarray) -> np.ndarray:
        cos, sin = self.rotary.at(turns)
        # tables carry YaRN's factor; a turn back divides by it
        square = np.float32(self.rotary.rope.attention_factor**2)
        scores = np.empty((len(q), self.shape.num_kv_heads), np.float32)
        for begin in range(0, len(q), SCORED_ROWS):
            rows = slice(begin, min(begin + SCORED_ROWS, len(q)))
            unturned = np.concatenate([q[rows], k[rows]], axis=1)
            kernels.rope(unturned, cos[rows] / square, -sin[rows] / square)
            self._score(layer, unturned.reshape(len(unturned), -1), v[rows].reshape(len(unturned), -1), scores[rows])
        return scores

    def release(self) -> None:
        """One user less; the last one gives the memory back."""
        self.users -= 1
        if not self.users:
            self._layers = []
            self._arena.free(self._work)
            self._charge.release()

    def _score(self, layer: int, unturned: np.ndarray, v: np.ndarray, scores: np.ndarray) -> None:
        flat, count, width = self._work.reshape(-1), len(unturned), self.width
        hidden = flat[: count * width].reshape(count, width)
        ones = flat[-SCORED_ROWS * width :][: count * width].reshape(count, width)
        first, rest, second = self._layers[layer]
        kernels.linear(unturned, [first], [hidden])
        kernels.linear(np.ascontiguousarray(v), [rest], [hidden], accumulate=True)
        kernels.swiglu(hidden, ones, hidden)
        kernels.linear(hidden, [second], [scores])


def _matrix(part: np.ndarray) -> kernels.Matrix:
    return kernels.matrix(codec("float16").encode(np.ascontiguousarray(part)))


class LocretCache(BlockCache):
    """See the module's text."""

    role = "tokens"
    needs_model = True
    fits = True
    packs_positions = True
    refuses: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("kivi", "kv4", "bfp", "think", "cskv", "xquant", "cachegen"), _WHY
    )

    def __init__(
        self,
        policy: Policy,
        shape: CacheShape,
        arena: Arena,
        capacity_tokens: int,
        model: CacheModel | None = None,
        heads: RetainingHeads | None = None,
    ) -> None:
        self.settings = s = LocretSettings.from_policy(policy, shape, capacity_tokens)
        assert model is not None
        if min(s.tokens, capacity_tokens) + s.chunk > model.config.max_position:
            most = model.config.max_position - s.chunk
            raise InputError(
                f"policy {policy}: {s.tokens} units and a chunk of {s.chunk} need more positions than the "
                f"{model.config.max_position} that the model knows; try tokens={max(most, 1)}"
            )
        self._policy, self._model = policy, model
        self.heads = heads or RetainingHeads(
            shape, model.rotary, s.width, arena, lambda: fitted.load(model, policy, self.fit_key(policy))
        )
        super().__init__(
            shape,
            arena,
            capacity_tokens,
            scorer=self.heads,
            allocator=Uniform([s.tokens] * shape.num_layers),
            chunk=s.chunk,
            stable=s.stable,
            local=s.local,
            turns=model.rotary,
            dtype=float_dtype(s.dtype),
        )

    @staticmethod
    def predict(
        policy: Policy, shape: CacheShape, num_tokens: int, prefill_tokens: int, capacity_tokens: int
    ) -> dict[str, int]:
        """The peak: bytes per ledger owner that are reached with `num_tokens` taken in, and never gone over."""
        s = LocretSettings.from_policy(policy, shape, capacity_tokens)
        kept = min(s.tokens, num_tokens) if num_tokens >= s.chunk else 0
        tail = min(s.chunk, num_tokens)
        rows = block_bytes(shape, float_dtype(s.dtype), kept, tail, staged=prefill_tokens > 0, has_scores=True)
        return {**rows, HEADS: RetainingHeads.nbytes_of(shape, s.width)}

    @staticmethod
    def read_bytes(policy: Policy, shape: CacheShape, num_tokens: int) -> int:
        """Bytes that one decode step reads with `num_tokens` taken in, just after a fold."""
        s = LocretSettings.from_policy(policy, shape, num_tokens)
        row_bytes = 2 * shape.row_values * float_dtype(s.dtype).itemsize
        return shape.num_layers * min(s.tokens, num_tokens) * row_bytes + RetainingHeads.weight_bytes(shape, s.width)

    @classmethod
    def fit_key(cls, policy: Policy) -> str:
        """Only the width of the heads changes what is learned."""
        return f"locret heads 2, width {policy.settings.get('width', 'auto')}"

    @classmethod
    def fit(
        cls,
        policy: Policy,
        directory: Path,
        text: str | None,
        threads: int | None,
        progress: Callable[[str, int, int], None] | None,
    ) -> dict[str, np.ndarray]:
        """The heads' matrices, trained on the frozen model; see `kv.retaining`."""
        from memwall.kv.retaining import TrainSettings, train

        width = policy.settings.get("width")
        return train(directory, TrainSettings(width=int(width) if width else None), text, threads, progress)

    @property
    def policy(self) -> str:
        return str(self._policy)

    @property
    def nbytes(self) -> int:
        return super().nbytes + RetainingHeads.nbytes_of(self.shape, self.settings.width)

    def fork(self) -> LocretCache:
        other = LocretCache(self._policy, self.shape, self.arena, self.capacity_tokens, self._model, self.heads)
        self.heads.users += 1
        self.copy_to(other)
        return other

    def release(self) -> None:
        super().release()
        self.heads.release()

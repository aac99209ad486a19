"""Latent caches: what is kept is a projection of the layers' inputs, and keys and values are rebuilt from it.

`BlockAttention` attends over latent rows (`kv.latent_rows`) a block of tokens at a time: rebuild, norm, rotate,
attend, forget; `LatentCache` is the base of caches that do so. Keys of no more than BLOCK_TOKENS tokens of one layer
exist at any moment.

Values need no rebuilding while one token is decoded: with V = C M the sum over tokens p V is (p C) M, so the weights
are summed over the latent rows, and M is applied once a head instead of once a token. Keys are rotated after they are
rebuilt, which stands between q and the latent row, so that they have no such shortcut.

Shapes: n tokens, w numbers of a latent row, h = Hkv * D numbers of a rebuilt one, T queries, H query heads.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeVar, cast

import numpy as np

from memwall import kernels
from memwall.errors import InputError
from memwall.formats import Packed
from memwall.formats.base import PLAIN_BUFFER
from memwall.kernels import Matrix, latent
from memwall.kernels.parts import join_pieces
from memwall.kv.base import CacheModel, CacheShape, KVCache
from memwall.kv.latent_rows import LatentRows, LatentStack, allocated_bytes
from memwall.models.rope import BLOCK_POSITIONS

if TYPE_CHECKING:
    from memwall.kv.decoding import Decoding
    from memwall.memory import Arena
    from memwall.models.rope import RotaryTable

BLOCK_TOKENS = 128
"""Tokens rebuilt at once: what the decoder multiplies at once, so that the products' scratch is no larger."""
REBUILD, FACTORS = "kv/rebuild", "kv/factors"


def hidden_size(shape: CacheShape, name: str) -> int:
    """Width d of the layers' inputs; InputError where the shape does not say."""
    if shape.hidden_size is None:
        raise InputError(f"KV policy {name} keeps what the layers read: the shape must give hidden_size")
    return shape.hidden_size


class Releasable(Protocol):
    """A part of a cache that holds memory."""

    @property
    def nbytes(self) -> int:
        """Bytes on the ledger."""

    def release(self) -> None:
        """Gives them back."""


Part = TypeVar("Part", bound=Releasable)


class Scratch:
    """Blocks of BLOCK_TOKENS float32 rows."""

    def __init__(self, arena: Arena, widths: Sequence[int]) -> None:
        self.arena, self.widths = arena, widths
        self._whole = arena.allocate(REBUILD, BLOCK_TOKENS * sum(widths), np.float32)
        ends = np.cumsum([BLOCK_TOKENS * width for width in widths])
        self.blocks = [part.reshape(BLOCK_TOKENS, -1) for part in np.split(self._whole, ends[:-1])]

    @staticmethod
    def predict(widths: Sequence[int]) -> int:
        return allocated_bytes(4 * BLOCK_TOKENS * sum(widths))

    @property
    def nbytes(self) -> int:
        return self.predict(self.widths)

    def release(self) -> None:
        self.arena.free(self._whole)


class Factors:
    """Float16 matrices that a cache multiplies with; forks of a cache share them."""

    def __init__(self, arena: Arena, arrays: Mapping[str, np.ndarray]) -> None:
        self.arena = arena
        self._users = 1
        self._held: list[np.ndarray] = []
        self.matrices: dict[str, Matrix] = {}
        try:
            for name, array in arrays.items():
                held = arena.allocate(FACTORS, array.shape, np.float16)
                self._held.append(held)
                np.copyto(held, array, casting="same_kind")
                packed = Packed(spec="float16", shape=array.shape, buffers={PLAIN_BUFFER: held})
                self.matrices[name] = kernels.matrix(packed)
        except BaseException:
            self.release()
            raise

    @property
    def nbytes(self) -> int:
        """Bytes on the ledger."""
        return sum(allocated_bytes(array.nbytes) for array in self._held)

    def share(self) -> Factors:
        self._users += 1
        return self

    def release(self) -> None:
        self._users -= 1
        if self._users == 0:
            self.matrices.clear()
            for array in self._held:
                self.arena.free(array)
            self._held = []


def factor_bytes(shapes: list[tuple[int, int]]) -> int:
    """Ledger bytes of `Factors` of these shapes."""
    return sum(allocated_bytes(2 * rows * cols) for rows, cols in shapes)


@dataclass(frozen=True, slots=True)
class Rebuild:
    """How one layer's latent rows become keys and values: products with these matrices, plus these vectors."""

    keys: Matrix
    values: Matrix
    key_bias: np.ndarray | None
    value_bias: np.ndarray | None
    key_norm: np.ndarray | None


@lru_cache(maxsize=512)
def projection_names(layer: int) -> tuple[str, str]:
    """The tensors W_K and W_V of a layer."""
    prefix = f"model.layers.{layer}.self_attn."
    return prefix + "k_proj.weight", prefix + "v_proj.weight"


def rebuild_with(model: CacheModel, layer: int, keys: Matrix, values: Matrix) -> Rebuild:
    """The given matrices, with the biases and the key norm that the model adds behind them."""
    prefix = f"model.layers.{layer}.self_attn."
    vector = model.weights.vectors.get
    return Rebuild(
        keys, values, vector(prefix + "k_proj.bias"), vector(prefix + "v_proj.bias"), vector(prefix + "k_norm.weight")
    )


def decoded(matrix: Matrix, rows: int, cols: int) -> np.ndarray:
    """A matrix of any form as float32 [rows, cols]."""
    return kernels.gather_rows(matrix, np.arange(rows), np.empty((rows, cols), np.float32))


Load = Callable[[int, int], tuple[np.ndarray, np.ndarray]]
"""(begin, end) -> latent rows of keys and of values of these tokens, float32, good until the next call."""


class BlockAttention:
    """Attends over latent rows through scratch of one block's keys and values."""

    def __init__(self, model: CacheModel, shape: CacheShape, arena: Arena, value_width: int) -> None:
        self.model, self.shape, self.arena, self.value_width = model, shape, arena, value_width
        sizes = [each * width for each, width in self._sizes(shape, value_width)]
        self._whole = arena.allocate(REBUILD, sum(sizes), np.float32)
        parts = np.split(self._whole, np.cumsum(sizes)[:-1])
        self._keys, self._values = (part.reshape(-1, shape.row_values) for part in parts[:2])
        self._sums = parts[2].reshape(-1, value_width)
        self.room = (self._keys, self._values, self._sums)

    @staticmethod
    def _sizes(shape: CacheShape, value_width: int) -> tuple[tuple[int, int], ...]:
        """Keys of a block; values, or what a token's heads sum up to (twice: before and after the product)."""
        rows = max(BLOCK_TOKENS, shape.num_heads)
        return (BLOCK_TOKENS, shape.row_values), (rows, shape.row_values), (rows, value_width)

    @staticmethod
    def predict(shape: CacheShape, value_width: int) -> int:
        """Ledger bytes of the scratch."""
        return allocated_bytes(4 * sum(rows * width for rows, width in BlockAttention._sizes(shape, value_width)))

    @property
    def nbytes(self) -> int:
        return self.predict(self.shape, self.value_width)

    def release(self) -> None:
        self.arena.free(self._whole)

    def add(
        self,
        layer: int,
        rebuild: Rebuild,
        load: Load,
        num_tokens: int,
        q: np.ndarray,
        first_position: int,
        out: np.ndarray,
        stats: np.ndarray,
        *,
        absorb: bool | None = None,
    ) -> None:
        """Merges the attention of q [T, H, D] over the first `num_tokens` tokens into out and stats (both final).

        absorb: whether weights are summed over latent rows, W_V applied afterwards; None: where it is less work.
        """
        window, num_rows = self.shape.window(layer), len(q) * self.shape.num_heads
        seen_from = seen_first(window, first_position)
        first = min(seen_from, num_tokens) // BLOCK_TOKENS * BLOCK_TOKENS
        if absorb is None:
            absorb = sums_rows(num_rows, seen_from, num_tokens) and num_rows <= len(self._values)
        if absorb:
            sums = self._sums[:num_rows].reshape(len(q), self.shape.num_heads, self.value_width)
            sums[:] = 0
            part_stats = np.zeros_like(stats)
        else:
            sums, part_stats = out, stats
            out *= stats[..., 1:]
        for begin in range(first, num_tokens, BLOCK_TOKENS):
            end = min(begin + BLOCK_TOKENS, num_tokens)
            key_rows, value_rows = load(begin, end)
            keys = self._rebuild_keys(rebuild, key_rows, begin)
            values = value_rows[:, None] if absorb else self._rebuild_values(rebuild, value_rows)
            first_key = -(1 << 40) if window is None else first_position - window + 1 - begin
            scale = self.shape.logit_scale
            latent.attend_block(q, keys, values, sums, part_stats, scale=scale, first_key=first_key)
        sums /= np.where(part_stats[..., 1:] > 0, part_stats[..., 1:], 1)
        if absorb:
            mixed = self._apply_values(rebuild, self._sums[:num_rows]).reshape(out.shape)
            _join(out, stats, mixed, part_stats)

    def _rebuild_keys(self, rebuild: Rebuild, rows: np.ndarray, first: int) -> np.ndarray:
        keys = self._keys[: len(rows)]
        kernels.linear(rows, [rebuild.keys], [keys], biases=[rebuild.key_bias])
        per_head = keys.reshape(len(rows), self.shape.num_kv_heads, self.shape.head_dim)
        if rebuild.key_norm is not None:
            flat = keys.reshape(-1, self.shape.head_dim)
            kernels.rms_norm(flat, rebuild.key_norm, self.model.config.rms_norm_eps, flat)
        return kernels.rope(per_head, *self.model.rotary.at(np.arange(first, first + len(rows))))

    def _rebuild_values(self, rebuild: Rebuild, rows: np.ndarray) -> np.ndarray:
        values = self._values[: len(rows)]
        kernels.linear(rows, [rebuild.values], [values], biases=[rebuild.value_bias])
        return values.reshape(len(rows), self.shape.num_kv_heads, self.shape.head_dim)

    def _apply_values(self, rebuild: Rebuild, sums: np.ndarray) -> np.ndarray:
        """Sums of latent rows [T * H, w] -> each head's own share of the product [T * H, D]."""
        mixed = self._values[: len(sums)]
        kernels.linear(sums, [rebuild.values], [mixed], biases=[rebuild.value_bias])
        heads, kv_heads = self.shape.num_heads, self.shape.num_kv_heads
        per_head = mixed.reshape(len(sums), kv_heads, self.shape.head_dim)
        own = np.arange(len(sums)) % heads // (heads // kv_heads)
        return per_head[np.arange(len(sums)), own]


def seen_first(window: int | None, position: int) -> int:
    """The first token that a query at this position sees."""
    return 0 if window is None else max(position - window + 1, 0)


def sums_rows(num_rows: int, seen_from: int, num_tokens: int) -> bool:
    """Whether so many query heads sum latent rows up: that costs a product for each of them, not for each token."""
    return num_rows <= num_tokens - min(seen_from, num_tokens) // BLOCK_TOKENS * BLOCK_TOKENS


def attend_rebuilt(
    parts: Sequence[latent.LatentPart], q: np.ndarray, places: np.ndarray, rotary: RotaryTable, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """Attention of one query each of several caches, q [n, H, D], over their latent rows, which they sum up: out
    [n, H, D] and stats [n, H, 2]. places: as in `kernels.latent.attend_parts`.
    """
    out, stats = np.empty_like(q), np.zeros((*q.shape[:2], 2), np.float32)
    begin, end = int(places[:, 3].min()) // BLOCK_POSITIONS * BLOCK_POSITIONS, int(places[:, 2].max())
    for first in range(begin, end, BLOCK_POSITIONS):
        latent.attend_parts(parts, q, places, stats, first, rotary.block(first), scale=scale)
    return latent.finish_parts(parts, stats, out), stats


def _join(out: np.ndarray, stats: np.ndarray, part: np.ndarray, part_stats: np.ndarray) -> None:
    """Joins another part's attention into out [T, H, D] and stats [T, H, 2]."""
    if len(out) == 1:  # as in decoding: without a dozen calls of NumPy
        join_pieces(np.concatenate([out, part]), np.concatenate([stats, part_stats]), np.array([2]), out, stats)
        return
    out[:], stats[:] = kernels.merge_partials([out, part], [stats, part_stats])


class LatentCache(KVCache):
    """What caches of latent rows share: their parts, their lengths, and attention.

    A subclass keeps its parts with `_keep`, and says in `_stores` which rows must have room for new tokens. It has
    scratch for a block of rows, `_scratch`, attends with `_attention`, and rebuilds layers by `_rebuilds`.
    """

    needs_model = True
    takes_inputs: ClassVar[bool] = True
    codes_prompt = True
    _scratch: Scratch
    _attention: BlockAttention
    _rebuilds: list[Rebuild]

    def __init__(self, shape: CacheShape, arena: Arena, capacity_tokens: int, model: CacheModel) -> None:
        super().__init__(shape, arena, capacity_tokens)
        self.model = model
        self._parts: list[Releasable] = []
        self._lengths = [0] * shape.num_layers
        self._new: tuple[np.ndarray, np.ndarray] | None = None
        self._layer_parts: list[latent.LatentPart] = []

    @classmethod
    def decode_together(cls, caches: Sequence[KVCache]) -> Decoding:
        from memwall.kv.latent_decoding import LatentDecoding

        return LatentDecoding(cast("Sequence[LatentCache]", caches))

    @property
    @abstractmethod
    def _stores(self) -> list[LatentStack]:
        """The latent rows; each holds those of all tokens."""

    @abstractmethod
    def rows_of(self, layer: int) -> tuple[LatentRows, LatentRows]:
        """What a layer's keys and values are rebuilt from; the same where both are from the same rows."""

    def make_ready(self, layer: int) -> None:
        """Before the rows of a layer's settled tokens are read."""

    def kept_whole(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """The newest settled tokens' keys (rotated) and values, where a cache keeps some: all rows that there is room
        for.
        """
        none = np.empty((0, self.shape.num_kv_heads, self.shape.head_dim), np.float32)
        return none, none

    def num_whole(self, layer: int) -> int:
        """How many of them there are now."""
        return 0

    def layer_parts(self) -> list[latent.LatentPart]:
        """The layers as kernels take them; the same ones as long as the cache lives."""
        if not self._layer_parts:
            self._layer_parts = [self._layer_part(layer) for layer in range(self.shape.num_layers)]
        return self._layer_parts

    def _layer_part(self, layer: int) -> latent.LatentPart:
        keys, values = self.rows_of(layer)
        room, rebuild = self._scratch.blocks, self._rebuilds[layer]
        return latent.latent_part(
            keys.store, values.store, (self.shape.num_heads, self.shape.num_kv_heads), rebuild.keys, rebuild.values,
            rebuild.key_bias, rebuild.value_bias, rebuild.key_norm, self.model.config.rms_norm_eps,
            room[0], room[0] if keys is values else room[1], *self._attention.room,
        )  # fmt: skip

    def place(self, layer: int) -> tuple[int, int, int, int]:
        """Of the next token: the settled tokens whose rows it sees, as in `kernels.latent.attend_parts`."""
        held = self._lengths[layer] - self.num_whole(layer)
        first = seen_first(self.shape.window(layer), self._lengths[layer])
        keys, values = self.rows_of(layer)
        return min(keys.coded, held), min(values.coded, held), held, first

    def _keep(self, part: Part) -> Part:
        self._parts.append(part)
        return part

    @property
    def length(self) -> int:
        return min(self._lengths)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self._parts)

    def release(self) -> None:
        self._layer_parts = []
        for part in self._parts:
            part.release()
        self._parts = []

    def append(self, layer: int, k: np.ndarray, v: np.ndarray, positions: np.ndarray) -> None:
        self._check_append(self._lengths[layer], len(k), positions)
        if self._stores[0].layers[layer].count != self._lengths[layer] + len(k):
            raise ValueError(f"layer {layer}: take_inputs must bring the inputs of the tokens that are appended")
        self._new = (k, v)

    def _make_room(self, layer: int, num_new: int, positions: np.ndarray) -> None:
        """Before the first layer's inputs, room for all layers': a refusal must come before any has changed."""
        if layer == 0:
            held = self._stores[0].layers[0].count
            self._check_append(held, num_new, positions)
            for store in self._stores:
                store.reserve(held + num_new)

    def attend(
        self, layer: int, q: np.ndarray, positions: np.ndarray, out: np.ndarray, stats: np.ndarray | None = None
    ) -> np.ndarray:
        first = int(positions[0])
        stats = self._attend_exact(layer, q, first, out, stats)
        place = self.place(layer)
        if not place[2]:
            return out
        self.make_ready(layer)
        if len(q) == 1 and sums_rows(self.shape.num_heads, place[3], place[2]):
            parts, scale = [self.layer_parts()[layer]], self.shape.logit_scale
            _join(out, stats, *attend_rebuilt(parts, q, np.array([place]), self.model.rotary, scale))
        else:
            self._attention.add(
                layer, self._rebuilds[layer], partial(self._load, layer), place[2], q, first, out, stats
            )
        return out

    def _load(self, layer: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        keys, values = self.rows_of(layer)
        rows = keys.read(begin, end, self._scratch.blocks[0])
        return rows, rows if keys is values else values.read(begin, end, self._scratch.blocks[1])

    def _attend_exact(
        self, layer: int, q: np.ndarray, first_position: int, out: np.ndarray, stats: np.ndarray | None
    ) -> np.ndarray:
        """Attention to the pass's own keys and values and to those kept as they came; gives the stats."""
        assert self._new is not None
        stats = np.empty((*q.shape[:2], 2), np.float32) if stats is None else stats
        start, count = self._lengths[layer], self.num_whole(layer)
        self._attend_rows(layer, q, first_position, self._new, start, out, stats)
        if count:
            keys, values = self.kept_whole(layer)
            part, part_stats = np.empty_like(out), np.empty_like(stats)
            whole = (keys[:count], values[:count])
            self._attend_rows(layer, q, first_position, whole, start - count, part, part_stats)
            _join(out, stats, part, part_stats)
        return stats

    def _attend_rows(
        self, layer: int, q: np.ndarray, first_position: int, rows: tuple[np.ndarray, np.ndarray], key_start: int,
        out: np.ndarray, stats: np.ndarray,
    ) -> None:  # fmt: skip
        scale, window = self.shape.logit_scale, self.shape.window(layer)
        kernels.attend_float(
            q, *rows, scale=scale, first_position=first_position, window=window, key_start=key_start, out=out,
            stats=stats,
        )  # fmt: skip

    def _settle_rows(self, layer: int) -> None:
        for store in self._stores:
            store.layers[layer].settle()
        self._lengths[layer] = self._stores[0].layers[layer].count
        self._new = None

"""Latent caches: what is kept is a projection of the layers' inputs, and keys and values are rebuilt from it.

`LatentForm` says how rows are kept (floats, or codes in groups along channels or along tokens with an exact tail),
`LatentRows` keeps one layer's; `BlockAttention` attends over what they hold, a block of tokens at a time: rebuild,
norm, rotate, attend, forget. Keys of no more than BLOCK_TOKENS tokens of one layer exist at any moment.

Values need no rebuilding while one token is decoded: with V = C M the sum over tokens p V is (p C) M, so the weights
are summed over the latent rows, and M is applied once a head instead of once a token. Keys are rotated after they are
rebuilt, which stands between q and the latent row, so that they have no such shortcut.

Shapes: n tokens, w numbers of a latent row, h = Hkv * D numbers of a rebuilt one, T queries, H query heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from memwall import kernels
from memwall.errors import InputError
from memwall.formats import Packed
from memwall.formats.base import PLAIN_BUFFER
from memwall.kernels import Matrix, latent
from memwall.kv.base import CacheModel, CacheShape
from memwall.memory.arena import ALIGNMENT_BYTES, SMALL_BYTES
from memwall.memory.pages import round_up

if TYPE_CHECKING:
    from memwall.memory import Arena

BLOCK_TOKENS = 128
"""Tokens rebuilt at once: what the decoder multiplies at once, so that the products' scratch is no larger."""
CODED_BITS = (2, 3, 4, 8)
FLOAT_BITS = (16, 32)
LATENTS, RECENT, REBUILD, FACTORS = "kv/latents", "kv/recent", "kv/rebuild", "kv/factors"


def allocated_bytes(nbytes: int) -> int:
    """What `Arena.allocate` puts on the ledger for an array of so many bytes."""
    return max(round_up(nbytes, ALIGNMENT_BYTES), ALIGNMENT_BYTES) if nbytes < SMALL_BYTES else round_up(nbytes)


def hidden_size(shape: CacheShape, name: str) -> int:
    """Width d of the layers' inputs; InputError where the shape does not say."""
    if shape.hidden_size is None:
        raise InputError(f"KV policy {name} keeps what the layers read: the shape must give hidden_size")
    return shape.hidden_size


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentForm:
    """How rows of `width` numbers are kept: in `bits` each, those of a `group` sharing a scale and a zero point.

    along_tokens: groups are `group` tokens of one channel, coded together once they are full; until then their rows
    wait in float16. zero_inside: see `kernels.latent`. 16 and 32 bits are plain floats.
    """

    width: int
    bits: int
    group: int = 128
    along_tokens: bool = False
    zero_inside: bool = False

    @property
    def coded(self) -> bool:
        """Whether rows are codes, not floats."""
        return self.bits in CODED_BITS

    @property
    def cycle(self) -> int:
        """Tokens that are coded together."""
        return self.group if self.coded and self.along_tokens else 1

    @property
    def record_bytes(self) -> int:
        """Bytes of `cycle` tokens."""
        if not self.coded:
            return self.width * self.bits // 8
        return latent.record_bytes(self.width, self.bits, self.group, along_tokens=self.along_tokens)

    @property
    def bits_per_number(self) -> float:
        """Scales and zero points included."""
        return 8 * self.record_bytes / (self.cycle * self.width)

    def nbytes(self, tokens: int) -> int:
        """Bytes of the records of so many tokens; those of a group that is not full wait elsewhere."""
        return tokens // self.cycle * self.record_bytes

    def tail_bytes(self) -> int:
        """Bytes of one layer's waiting rows."""
        return 2 * self.cycle * self.width if self.cycle > 1 else 0

    def encode(self, rows: np.ndarray, first: int, records: np.ndarray) -> None:
        """Float32 rows as tokens `first ..` (a multiple of `cycle`) of `records`."""
        at = self.nbytes(first)
        if not self.coded:
            records[at : at + self.nbytes(len(rows))].view(f"f{self.bits // 8}")[:] = rows.reshape(-1)
            return
        latent.encode_rows(rows, records[at:], **self._terms)

    def decode(self, records: np.ndarray, first: int, out: np.ndarray) -> None:
        """Tokens `first ..` into out [n, width] float32."""
        if self.coded:
            latent.decode_rows(records, first, out, **self._terms)
            return
        at = self.nbytes(first)
        out.reshape(-1)[:] = records[at : at + self.nbytes(len(out))].view(f"f{self.bits // 8}")

    @property
    def _terms(self) -> dict[str, Any]:
        return {
            "bits": self.bits,
            "group": self.group,
            "along_tokens": self.along_tokens,
            "zero_inside": self.zero_inside,
        }


class Releasable(Protocol):
    """A part of a cache that holds memory."""

    @property
    def nbytes(self) -> int:
        """Bytes on the ledger."""

    def release(self) -> None:
        """Gives them back."""


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


class LatentRows:
    """One layer's rows: records, and behind them the tail that waits for its group to fill.

    Rows are pushed while a layer runs and settle after its attention: until then `read` gives the tail exact, and
    `truncate` to the length before undoes the push. Groups that fill wholly with new rows are coded at once.
    """

    def __init__(
        self,
        arena: Arena,
        form: LatentForm,
        capacity: int,
        tail: np.ndarray | None = None,
        spill: np.ndarray | None = None,
        owner: str = LATENTS,
    ) -> None:
        """tail [cycle, width] float16, this layer's own; spill the same, shared by all layers; for forms whose rows
        wait.
        """
        self.form = form
        self.region = arena.reserve(owner, round_up(max(form.nbytes(round_up(capacity, form.cycle)), 1)))
        self.records = self.region.array(0, np.uint8)
        none = np.empty((0, form.width), np.float16)
        self.tail, self._spill = (none if rows is None else rows for rows in (tail, spill))
        self.coded = 0  # tokens in records, those spilled ahead left out
        self.waiting = 0
        self._spilled_groups = self._spilled = 0

    @property
    def count(self) -> int:
        """Tokens taken in, settled or not."""
        return self.coded + self.waiting + self._spilled_groups * self.form.cycle + self._spilled

    @property
    def nbytes(self) -> int:
        """Bytes of the records, in whole pages."""
        return self.region.committed_bytes

    def reserve(self, tokens: int) -> None:
        """Room for the records of so many tokens in all; BudgetExceeded before anything is touched."""
        nbytes = self.form.nbytes(tokens)
        if nbytes > len(self.records):
            self.region.commit(nbytes)
            self.records = self.region.array(self.region.committed_bytes, np.uint8)

    def push(self, rows: np.ndarray) -> None:
        """Takes rows [n, width] float32 behind those there are; room must have been reserved."""
        if self.form.cycle == 1:
            self.form.encode(rows, self.coded, self.records)
            self.coded += len(rows)
            return
        taken = min(len(rows), self.form.cycle - self.waiting)
        self.tail[self.waiting : self.waiting + taken] = rows[:taken]
        self.waiting += taken
        while taken < len(rows):
            part = rows[taken : taken + self.form.cycle - self._spilled]
            self._spill[self._spilled : self._spilled + len(part)] = part
            self._spilled += len(part)
            taken += len(part)
            if self._spilled == self.form.cycle:
                self._spilled_groups += 1
                at = self.coded + self._spilled_groups * self.form.cycle
                self.form.encode(self._spill.astype(np.float32), at, self.records)
                self._spilled = 0

    def settle(self) -> None:
        """The layer's attention is done: a full tail is coded, what spilled over is the new tail."""
        if self.form.cycle > 1 and self.waiting == self.form.cycle:
            self.form.encode(self.tail.astype(np.float32), self.coded, self.records)
            self.coded += (1 + self._spilled_groups) * self.form.cycle
            self.tail[: self._spilled] = self._spill[: self._spilled]
            self.waiting, self._spilled, self._spilled_groups = self._spilled, 0, 0

    def read(self, begin: int, end: int, out: np.ndarray) -> np.ndarray:
        """Rows [begin, end), which were there before the latest push, into the front of out; gives that part."""
        rows = out[: end - begin]
        coded = min(max(self.coded - begin, 0), len(rows))
        if coded:
            self.form.decode(self.records, begin, rows[:coded])
        if coded < len(rows):
            rows[coded:] = self.tail[begin + coded - self.coded : end - self.coded]
        return rows

    def write(self, begin: int, rows: np.ndarray) -> None:
        """Puts float32 rows at [begin, begin + n) of reserved room; for forms whose rows are coded singly."""
        self.form.encode(rows, begin, self.records)
        self.coded = max(self.coded, begin + len(rows))

    def truncate(self, length: int) -> None:
        """Forgets rows from `length` on; what is left of a coded group waits again, as it was decoded."""
        self._spilled = self._spilled_groups = 0
        if length < self.coded:
            whole = length - length % self.form.cycle
            if length > whole:
                rest = np.empty((length - whole, self.form.width), np.float32)
                self.form.decode(self.records, whole, rest)
                self.tail[: len(rest)] = rest
            self.coded = whole
        self.waiting = length - self.coded
        self.records = self.records[:0]
        self.region.shrink(self.form.nbytes(length))
        self.records = self.region.array(self.region.committed_bytes, np.uint8)

    def copy_from(self, other: LatentRows) -> None:
        """The same rows as another store's; BudgetExceeded when there is no room."""
        self.reserve(other.coded)
        size = self.form.nbytes(other.coded)
        self.records[:size] = other.records[:size]
        self.tail[:] = other.tail
        self.coded, self.waiting = other.coded, other.waiting

    def release(self) -> None:
        """Gives the records back."""
        self.records = self.records[:0]
        self.region.release()


class LatentStack:
    """The rows of all layers in one form, with their tails in one array."""

    def __init__(self, arena: Arena, forms: list[LatentForm], capacity: int) -> None:
        self.arena = arena
        cycle, width = max(form.cycle for form in forms), forms[0].width
        depth = len(forms) + 1 if cycle > 1 else 0  # one more: where rows of any layer go that its tail has no room for
        self._tails = arena.allocate(RECENT, (depth, cycle, width), np.float16)
        tails = list(self._tails) if depth else [None] * (len(forms) + 1)
        self.layers = [LatentRows(arena, form, capacity, tail, tails[-1]) for form, tail in zip(forms, tails)]

    @staticmethod
    def predict(forms: list[LatentForm], tokens: int) -> dict[str, int]:
        """Bytes per ledger owner with so many tokens held."""
        tail = max(form.tail_bytes() for form in forms)
        return {
            LATENTS: sum(round_up(form.nbytes(tokens)) for form in forms),
            RECENT: allocated_bytes((len(forms) + 1) * tail if tail else 0),
        }

    @staticmethod
    def read_bytes(forms: list[LatentForm], tokens: int) -> int:
        """Bytes that a decode step reads of them."""
        return sum(form.nbytes(tokens) + 2 * (tokens % form.cycle) * form.width for form in forms)

    @property
    def nbytes(self) -> int:
        """Bytes on the ledger."""
        return sum(layer.nbytes for layer in self.layers) + allocated_bytes(self._tails.nbytes)

    def reserve(self, tokens: int) -> None:
        for layer in self.layers:
            layer.reserve(tokens)

    def truncate(self, length: int) -> None:
        for layer in self.layers:
            layer.truncate(length)

    def copy_from(self, other: LatentStack) -> None:
        for mine, theirs in zip(self.layers, other.layers):
            mine.copy_from(theirs)

    def release(self) -> None:
        for layer in self.layers:
            layer.release()
        self.arena.free(self._tails)


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
    ) -> None:
        """Merges the attention of q [T, H, D] over the first `num_tokens` tokens into out and stats (both final)."""
        window = self.shape.window(layer)
        seen_from = 0 if window is None else max(first_position - window + 1, 0)
        num_rows = len(q) * self.shape.num_heads
        first = min(seen_from, num_tokens) // BLOCK_TOKENS * BLOCK_TOKENS
        # summing over latent rows costs a product for each row of out instead of one for each token
        absorb = num_rows <= min(len(self._values), num_tokens - first)
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
            out[:], stats[:] = kernels.merge_partials([out, mixed], [stats, part_stats])

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

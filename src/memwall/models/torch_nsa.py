"""Native sparse attention: compressed blocks, the blocks that those point to, and a sliding window, added by gates.

*Source*: "Native Sparse Attention" (Jingyang Yuan, 2025), arXiv 2502.11089, section 3.
*Idea*: three branches with keys and values of their own. (1) every `stride` tokens a learned map makes one key and one
value of the last `block` tokens (eq. 7); (2) the softmax over those, added over the query heads of a group (eq. 10),
says which `chosen` blocks of `selected` tokens are read token by token, the first block and the last two always; (3)
the last `window` tokens. Gates in (0, 1) from x weigh the branches (eq. 5). Trained as it runs: the same selection.
*Units and shapes*: as `torch_blocks`. The cache holds the compressed rows, the rows of branch 2, a ring of `window`
rows and a ring of `block` rows that are not compressed yet.
*Differs from the paper*: rows are compressed before they are turned, and their queries are not turned, so that one map
serves all positions; training masks dense products, where the paper has a kernel that skips them: same function.
*Cost*: a token keeps 2 g D (1 + 1 / stride) numbers; a step reads 2 g D (context / stride + chosen selected + window).
*Holds when*: the context is several times chosen * selected + window; below, it reads all and keeps more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from memwall.errors import InputError
from memwall.models.torch_blocks import Cache, Mixer, linear, rotary, rotated, scores_of

BRANCHES = ("compressed", "selected", "window")
FIRST_BLOCKS, LAST_BLOCKS = 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparse:
    """block, stride: of compression, in tokens. selected: tokens of a block that is read whole; chosen: how many."""

    heads: int
    kv_heads: int
    head_dim: int
    block: int = 16
    stride: int = 8
    selected: int = 16
    chosen: int = 4
    window: int = 32

    def __post_init__(self) -> None:
        if self.kv_heads < 1 or self.heads % self.kv_heads or self.head_dim % 2:
            raise InputError(f"{self.heads} heads of {self.head_dim} cannot share {self.kv_heads} key-value heads")
        if self.stride < 1 or self.block % self.stride or self.selected % self.stride:
            raise InputError(f"blocks of {self.block} and {self.selected} tokens: must be multiples of {self.stride}")
        if self.chosen <= FIRST_BLOCKS + LAST_BLOCKS or self.window < 1:
            raise InputError(f"chosen={self.chosen}: three blocks are always read, so choose more; window from 1")

    def build(self, width: int) -> SparseAttention:
        return SparseAttention(self, width)

    def num_compressed(self, tokens: int) -> int:
        """Blocks that are whole after so many tokens."""
        return max((tokens - self.block) // self.stride + 1, 0)

    def cached_values(self, context: int) -> int:
        rows = context + self.num_compressed(context) + min(context, self.window) + min(context, self.block)
        return 2 * self.kv_heads * self.head_dim * rows

    def read_values(self, context: int) -> int:
        """Numbers that a step with `context` tokens reads."""
        chosen = min(self.chosen * self.selected, context)
        rows = self.num_compressed(context) + chosen + min(context, self.window)
        return 2 * self.kv_heads * self.head_dim * rows


class SparseCache(Cache):
    """Rows of the three branches; each is a pair, keys and values, in one tensor [2, B, g, rows, D]."""

    def __init__(self, spec: Sparse, batch: int, capacity: int) -> None:
        self.spec, self.batch, self.capacity = spec, batch, capacity
        whole = -(-capacity // spec.selected) * spec.selected

        def room(rows: int) -> Tensor:
            return torch.empty(2, batch, spec.kv_heads, rows, spec.head_dim)

        self.compressed = room(max(spec.num_compressed(capacity), 1))
        # zeros: what lies behind the last token is read under a mask, and must be numbers
        self.selected = torch.zeros(2, batch, spec.kv_heads, whole, spec.head_dim)
        self.ring, self.waiting = room(spec.window), room(spec.block)

    def append(self, rows: dict[str, Tensor]) -> None:
        """rows: branch -> [2, B, g, T, D]; `compressed` as they are before compression."""
        count = rows["selected"].shape[-2]
        stop = self.length + count
        if stop > self.capacity:
            raise InputError(f"the cache holds {self.capacity} tokens; {stop} are wanted")
        self.selected[..., self.length : stop, :] = rows["selected"]
        for ring, name in ((self.ring, "window"), (self.waiting, "compressed")):
            size = ring.shape[-2]
            places = torch.arange(max(self.length, stop - size), stop)
            ring[..., places % size, :] = rows[name][..., places - self.length, :]
        self.length = stop

    @property
    def nbytes(self) -> int:
        return self.batch * self.spec.cached_values(self.length) * self.selected.element_size()

    def read_bytes(self) -> int:
        return self.batch * self.spec.read_values(self.length) * self.selected.element_size()

    def fill(self, num_tokens: int) -> None:
        begin, shape = self.spec.num_compressed(self.length), (*self.selected.shape[:3], num_tokens, self.spec.head_dim)
        self.append({name: torch.randn(shape) for name in BRANCHES})
        made = self.compressed[..., begin : self.spec.num_compressed(self.length), :]
        made.copy_(torch.randn(made.shape))


class Compress(nn.Module):
    """One row of D numbers from `block` rows: places are added, then two layers."""

    def __init__(self, block: int, size: int) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.zeros(block, size))
        self.into, self.out = linear(block * size, 2 * size), linear(2 * size, size)

    def forward(self, rows: Tensor) -> Tensor:
        """[..., block, D] -> [..., D]."""
        result: Tensor = self.out(functional.silu(self.into((rows + self.places).flatten(-2))))
        return result


class SparseAttention(Mixer):
    """See the module."""

    def __init__(self, spec: Sparse, width: int) -> None:
        super().__init__()
        self.spec, self.width = spec, width
        inner, shared = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        self.q_proj, self.o_proj = linear(width, inner), linear(inner, width)
        self.kv_proj = linear(width, len(BRANCHES) * 2 * shared)
        self.gate = nn.Linear(width, len(BRANCHES) * spec.heads)
        self.key_map, self.value_map = (Compress(spec.block, spec.head_dim) for _ in range(2))

    def cache(self, batch: int, capacity: int) -> SparseCache:
        return SparseCache(self.spec, batch, capacity)

    def forward(self, x: Tensor) -> Tensor:
        return self._whole(x, None)

    def prefill(self, x: Tensor, cache: SparseCache) -> Tensor:
        return self._whole(x, cache)

    def _whole(self, x: Tensor, cache: SparseCache | None) -> Tensor:
        spec, tokens = self.spec, x.shape[1]
        plain, turned, rows = self._parts(x, 0)
        made = self._compressed(rows["compressed"])
        if cache is not None:
            cache.append(rows)
            cache.compressed[..., : made.shape[-2], :] = made
        at = torch.arange(tokens)
        ends = torch.arange(made.shape[-2]) * spec.stride + spec.block
        first, share = self._over_blocks(plain, made, ends[None, :] <= at[:, None] + 1)
        chosen = self._choose(share, at)
        among = functional.one_hot(chosen, -(-tokens // spec.selected)).sum(-2) > 0  # [B, g, T, blocks]
        causal = at[None, :] <= at[:, None]
        second = self._over_rows(
            turned, rows["selected"], among.repeat_interleave(spec.selected, -1)[..., :tokens] & causal
        )
        near = causal & (at[:, None] - at[None, :] < spec.window)
        third = self._over_rows(turned, rows["window"], near[None, None])
        return self._out(x, [first, second, third])

    def step(self, x: Tensor, cache: SparseCache) -> Tensor:
        spec = self.spec
        plain, turned, rows = self._parts(x, cache.length)
        cache.append(rows)
        at, count = cache.length - 1, spec.num_compressed(cache.length)
        if count > spec.num_compressed(at):
            order = torch.arange(cache.length - spec.block, cache.length) % spec.block
            cache.compressed[..., count - 1 : count, :] = self._compressed(cache.waiting[..., order, :])
        first, share = self._over_blocks(
            plain, cache.compressed[..., :count, :], torch.ones(1, count, dtype=torch.bool)
        )
        chosen = self._choose(share, torch.tensor([at]))[:, :, 0]  # [B, g, n]
        index = chosen[None, ..., None, None].expand(2, -1, -1, -1, spec.selected, spec.head_dim)
        read = cache.selected.unflatten(-2, (-1, spec.selected)).gather(3, index).flatten(3, 4)
        places = (chosen[..., None] * spec.selected + torch.arange(spec.selected)).flatten(-2)
        second = self._over_rows(turned, read, (places <= at)[:, :, None])
        third = self._over_rows(turned, cache.ring[..., : min(cache.length, spec.window), :], None)
        return self._out(x, [first, second, third])

    def _parts(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Queries [B, H, T, D] as they are and turned; rows [2, B, g, T, D] of each branch, `compressed` not turned."""
        spec = self.spec
        tables = rotary(torch.arange(start, start + x.shape[1]), spec.head_dim)
        queries = self.q_proj(x).unflatten(-1, (spec.heads, -1)).transpose(1, 2)
        parts = self.kv_proj(x).unflatten(-1, (len(BRANCHES), 2, spec.kv_heads, -1)).permute(2, 3, 0, 4, 1, 5)
        rows = {
            name: pair if name == "compressed" else torch.stack([rotated(pair[0], tables), pair[1]])
            for name, pair in zip(BRANCHES, parts, strict=True)
        }
        return queries, rotated(queries, tables), rows

    def _compressed(self, rows: Tensor) -> Tensor:
        """[2, B, g, T, D] -> one row for each whole block."""
        spec = self.spec
        if rows.shape[-2] < spec.block:
            return rows[..., :0, :]
        blocks = rows.unfold(-2, spec.block, spec.stride).transpose(-1, -2)
        return torch.stack([self.key_map(blocks[0]), self.value_map(blocks[1])])

    def _over_blocks(self, queries: Tensor, rows: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Attention to compressed rows [2, B, g, N, D] under a mask [T, N], and its shares [B, g, H / g, T, N]. A token
        that sees no whole block gets zeros.
        """
        grouped = queries.unflatten(1, (self.spec.kv_heads, -1))
        # float32 from here on: what is chosen hangs on small differences
        scores = (grouped @ rows[0][:, :, None].transpose(-1, -2)).float() / math.sqrt(self.spec.head_dim)
        share = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1) * seen
        return (share @ rows[1][:, :, None]).flatten(1, 2), share

    def _over_rows(self, queries: Tensor, rows: Tensor, seen: Tensor | None) -> Tensor:
        """Attention to rows [2, B, g, S, D] under a mask [B, g, T, S]."""
        repeats = self.spec.heads // self.spec.kv_heads
        if queries.shape[2] == 1:  # a step: the queries of a group read their rows once
            grouped = queries.squeeze(2).unflatten(1, (self.spec.kv_heads, -1))
            scores = scores_of(grouped, rows[0]) / math.sqrt(self.spec.head_dim)
            scores = scores if seen is None else scores.masked_fill(~seen, -math.inf)
            return (scores.softmax(-1) @ rows[1]).flatten(1, 2)[:, :, None]
        keys, values = (part.repeat_interleave(repeats, 1) for part in rows)
        if seen is not None and seen.shape[1] > 1:
            seen = seen.repeat_interleave(repeats, 1)
        return functional.scaled_dot_product_attention(queries, keys, values, attn_mask=seen)

    def _choose(self, share: Tensor, at: Tensor) -> Tensor:
        """Blocks [B, g, T, n] that tokens at these places read. Where fewer have begun, later ones fill up (masked)."""
        spec = self.spec
        blocks, per_block = int(at[-1]) // spec.selected + 1, spec.selected // spec.stride
        # eq. 9: compressed block i gives to each of its chunks i to i + block / stride, and blocks sum their chunks
        last, given = spec.block // spec.stride - 1, share.detach().sum(2)
        chunks = torch.stack([functional.pad(given, (shift, last - shift)) for shift in range(last + 1)]).sum(0)
        chunks = functional.pad(chunks, (0, blocks * per_block - chunks.shape[-1]))
        importance = chunks.unflatten(-1, (blocks, per_block)).sum(-1)
        places, own = torch.arange(blocks)[None], (at // spec.selected)[:, None]
        always = (places < FIRST_BLOCKS) | (places > own - LAST_BLOCKS)
        importance = importance.masked_fill(always, math.inf).masked_fill(places > own, -math.inf)
        return importance.topk(min(spec.chosen, blocks), -1).indices

    def _out(self, x: Tensor, branches: list[Tensor]) -> Tensor:
        gates = self.gate(x).sigmoid().unflatten(-1, (len(BRANCHES), -1)).permute(2, 0, 3, 1)[..., None]
        mixed = sum(gate * branch for gate, branch in zip(gates, branches, strict=True))
        assert isinstance(mixed, Tensor)
        result: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(-2))
        return result

    def flop(self, context: int) -> float:
        spec, inner = self.spec, self.spec.heads * self.spec.head_dim
        shared = spec.kv_heads * spec.head_dim
        projected = self.width * (2 * inner + 2 * len(BRANCHES) * shared + len(BRANCHES) * spec.heads)
        compressed = 2 * spec.kv_heads * 2 * spec.head_dim * (spec.block + 1) * spec.head_dim / spec.stride
        rows = spec.read_values(context) / (2 * shared)
        return 2 * (projected + compressed) + 4 * inner * rows

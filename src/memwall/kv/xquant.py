"""XQuant: what a layer reads is kept in a few bits, and its keys and values are rebuilt from that at each step.

Source: XQuant: Breaking the Memory Wall for LLM Inference with KV Cache Rematerialization; 2025, arXiv 2508.10395; no
official code known.
Idea: keys and values are two linear images of one tensor X, the layer's input after its norm. X alone is half their
bytes, takes low bits better than keys do, and changes little from layer to layer (XQuant-CL keeps the changes), paid
for with products at each step. Where heads share keys (h < d) X would be larger than they are: kept are X U_K and
X U_V instead, U from the singular vectors of W_K and W_V, as many numbers as keys and values.
Units and shapes: X [n, d]; h = Hkv * D; latent rows of keys and of values [n, h] each, of deltas [n, d] or [n, 2h].
Differs from the paper (known from its abstract and first page): zero points are one byte and may lie outside the
codes; a latent row is (X W_K) B, B from the eigenvectors of W_K's Gram matrix, which is X U_K up to the scale of each
channel, so that U_K itself (d x h) need not be held; with `cl` and h < d the first layers keep X itself, for the sums
to start from, and both orientations of U_KV are held in float16; sums are float16. A decoded token's values are not
rebuilt: its weights are summed over the latent rows (see kv.latent), the same number with D times less work.
Cost: with b' = b + 24/group bits, resident layers * tokens * d * b' / 8 bytes (X, deltas) or 2 h for d (latents), and
for h < d matrices: 8 h^2 bytes a layer, with `cl` 8 h d. `cl`: sums of 2 d bytes a token, read twice and written once
per layer. A step multiplies d h (latents: h^2; `cl` and h < d: 3 h d) times per layer and token, so a long context is
bound by arithmetic on every machine of today: 2 d h FLOP for d b / 8 bytes read.
Holds when: the decoder hands over its inputs; dropping policies do not, so none works on top.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from memwall import kernels
from memwall.errors import InputError
from memwall.kv import latent
from memwall.kv.base import CacheModel, CacheShape
from memwall.kv.latent import BLOCK_TOKENS, BlockAttention, Factors, LatentCache, Rebuild, Scratch
from memwall.kv.latent_rows import CODED_BITS, LatentForm, LatentRows, LatentStack
from memwall.kv.policy import Policy, parse
from memwall.kv.xquant_factors import copies_bytes, factor_arrays, work_bytes
from memwall.memory.pages import round_up

if TYPE_CHECKING:
    from memwall.memory import Arena

SUMS = "kv/sums"
BITS = (*CODED_BITS, 16)
BASE_BITS = 4


SOLVER_BYTES = 1 << 20
"""Code and buffers of the linear algebra library that the first decomposition brings in (measured: 0.3 to 0.9 MB)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class XQuantSettings:
    """bits per code; numbers per scale (tokens, for the latent rows of keys); cl: 1 keeps deltas between layers, from
    layer `base` on; keep: what is kept, `inputs` or `latents` (auto: latents where h < d).
    """

    bits: int = 4
    group: int = 128
    cl: int = 0
    base: int = 3
    keep: str = "auto"

    @classmethod
    @lru_cache(maxsize=256)
    def from_policy(cls, policy: Policy, shape: CacheShape) -> XQuantSettings:
        """Settings of a policy string, checked against the model's shape."""
        texts = dict(policy.settings)
        keep = texts.pop("keep", "auto")
        width = latent.hidden_size(shape, policy.name)
        numbers = Policy(policy.name, texts).integers({"bits": 4, "group": 128, "cl": 0, "base": 3})
        if keep == "auto":
            few = shape.row_values < width and (not numbers["cl"] or 2 * shape.row_values <= width)
            keep = "latents" if few else "inputs"
        settings = cls(**numbers, keep=keep)
        if settings.bits not in BITS:
            raise InputError(f"policy {policy}: {settings.bits} bits; must be one of {', '.join(map(str, BITS))}")
        if not 8 <= settings.group <= 1024:
            raise InputError(f"policy {policy}: group {settings.group}; must be 8 to 1024")
        if keep not in ("inputs", "latents"):
            raise InputError(f"policy {policy}: keep={keep}; must be inputs, latents or auto")
        if settings.cl not in (0, 1):
            raise InputError(f"policy {policy}: cl={settings.cl}; 1 keeps deltas between layers, 0 does not")
        if settings.cl and not 1 <= settings.base < shape.num_layers:
            raise InputError(f"policy {policy}: base={settings.base}; must be 1 to {shape.num_layers - 1} layers here")
        if settings.latents and (2 if settings.cl else 1) * shape.row_values > width:
            raise InputError(f"policy {policy}: latents of keys and values have more numbers than X; use keep=inputs")
        return settings

    @property
    def latents(self) -> bool:
        return self.keep == "latents"

    def stacks(self, shape: CacheShape) -> list[list[LatentForm]]:
        """Forms per layer: of one stack (inputs, deltas), or of keys' and values' latent rows."""
        d, h, n = latent.hidden_size(shape, "xquant"), shape.row_values, shape.num_layers
        if self.latents and not self.cl:
            keys = LatentForm(width=h, bits=self.bits, group=self.group, along_tokens=True)
            return [[keys] * n, [LatentForm(width=h, bits=self.bits, group=min(self.group, h))] * n]
        if not self.cl:
            return [[LatentForm(width=d, bits=self.bits, group=min(self.group, d))] * n]
        width = 2 * h if self.latents else d
        first = LatentForm(width=d, bits=max(BASE_BITS, self.bits), group=min(self.group, d))
        deltas = LatentForm(width=width, bits=self.bits, group=min(self.group, width))
        return [[first] * self.base + [deltas] * (n - self.base)]

    def factor_shapes(self, shape: CacheShape) -> list[tuple[int, int]]:
        """Of all matrices that stay resident."""
        d, h = latent.hidden_size(shape, "xquant"), shape.row_values
        if not self.latents:
            return []
        if self.cl:
            return [(d, 2 * h), (2 * h, d)] * (shape.num_layers - self.base)
        return [(h, h)] * (4 * shape.num_layers)

    def factors(self, model: CacheModel, shape: CacheShape, arena: Arena) -> dict[str, np.ndarray]:
        """The matrices themselves."""
        if not self.latents:
            return {}
        return factor_arrays(model, shape, arena, first=self.base if self.cl else 0, joint=bool(self.cl))

    def value_width(self, shape: CacheShape) -> int:
        """Width of the rows that values are rebuilt from."""
        own = self.latents and not self.cl
        return shape.row_values if own else latent.hidden_size(shape, "xquant")

    def scratch_widths(self, shape: CacheShape) -> tuple[int, ...]:
        """Widths of the blocks that latent rows are decoded into."""
        d, h = latent.hidden_size(shape, "xquant"), shape.row_values
        if self.latents and not self.cl:
            return (h, h)
        return (d, 2 * h if self.latents else d) if self.cl else (d,)


class XQuantCache(LatentCache):
    """See the module's text."""

    def __init__(
        self,
        policy: Policy,
        shape: CacheShape,
        arena: Arena,
        capacity_tokens: int,
        model: CacheModel | None = None,
        factors: Factors | None = None,
    ) -> None:
        assert model is not None
        super().__init__(shape, arena, capacity_tokens, model)
        self.settings = settings = XQuantSettings.from_policy(policy, shape)
        self.factors = self._keep(factors or Factors(arena, settings.factors(model, shape, arena)))
        try:
            forms = settings.stacks(shape)
            self._stacks = [self._keep(LatentStack(arena, each, capacity_tokens)) for each in forms]
            widths = settings.scratch_widths(shape)
            self._scratch = self._keep(Scratch(arena, widths))
            self._attention = self._keep(BlockAttention(model, shape, arena, settings.value_width(shape)))
            self._sums: LatentRows | None = None
            if settings.cl:
                form = LatentForm(width=widths[0], bits=16)
                self._sums = self._keep(LatentRows(arena, form, capacity_tokens, owner=SUMS))
        except BaseException:
            self.release()
            raise
        self._rebuilds = [self._rebuild_of(layer) for layer in range(shape.num_layers)]
        layers = range(shape.num_layers if self._pairs else 0)
        self._inward = [[self.factors.matrices[f"{layer}.{which}.in"] for which in "kv"] for layer in layers]
        self._summed = -1  # the layer whose X' the sums of settled tokens are

    @staticmethod
    def predict(
        policy: Policy, shape: CacheShape, num_tokens: int, prefill_tokens: int, capacity_tokens: int
    ) -> dict[str, int]:
        """Bytes per ledger owner once `num_tokens` are held."""
        settings = XQuantSettings.from_policy(policy, shape)
        widths = settings.scratch_widths(shape)
        owners = {
            latent.FACTORS: latent.factor_bytes(settings.factor_shapes(shape)),
            latent.REBUILD: BlockAttention.predict(shape, settings.value_width(shape)) + Scratch.predict(widths),
            SUMS: round_up(2 * widths[0] * num_tokens) if settings.cl else 0,
        }
        for forms in settings.stacks(shape):
            for owner, size in LatentStack.predict(forms, num_tokens).items():
                owners[owner] = owners.get(owner, 0) + size
        return owners

    @staticmethod
    def building_bytes(policy: Policy, shape: CacheShape) -> int:
        """The matrices before they are copied, and at the first use one layer's in double."""
        settings = XQuantSettings.from_policy(policy, shape)
        if not settings.latents:
            return 0
        joint = bool(settings.cl)
        work = work_bytes(shape, joint=joint) + SOLVER_BYTES
        return copies_bytes(shape, first=settings.base if joint else 0, joint=joint) + work

    @staticmethod
    def read_bytes(policy: Policy, shape: CacheShape, num_tokens: int) -> int:
        """Bytes that one decode step moves: latent rows, matrices, and with `cl` the sums, again for each layer."""
        settings = XQuantSettings.from_policy(policy, shape)
        rows = sum(LatentStack.read_bytes(forms, num_tokens) for forms in settings.stacks(shape))
        moved = 0
        if settings.cl:
            moved = (shape.num_layers - settings.base) * 3 * 2 * num_tokens * settings.scratch_widths(shape)[0]
        return rows + moved + sum(2 * a * b for a, b in settings.factor_shapes(shape))

    @staticmethod
    def step_macs(policy: Policy, shape: CacheShape, num_tokens: int) -> int:
        """Multiply-adds of one decode step that rebuild keys and apply W_V to summed rows."""
        settings = XQuantSettings.from_policy(policy, shape)
        d, h = latent.hidden_size(shape, policy.name), shape.row_values
        width = h if settings.latents and not settings.cl else d
        total = 0
        for layer in range(shape.num_layers):
            seen = min(num_tokens, shape.window(layer) or num_tokens)
            values = min(seen * h * width, shape.num_heads * width * (seen + h))
            total += seen * h * width + values
            if settings.cl and layer >= settings.base:
                total += num_tokens * d * (2 * h if settings.latents else 1)
        return total

    @property
    def policy(self) -> str:
        s = self.settings
        deltas = f",cl=1,base={s.base}" if s.cl else ""
        return f"xquant(bits={s.bits},group={s.group}{deltas},keep={s.keep})"

    @property
    def _stores(self) -> list[LatentStack]:
        return self._stacks

    @property
    def _pairs(self) -> bool:
        """Whether keys and values have latent rows of their own."""
        return len(self._stacks) == 2

    def take_inputs(self, layer: int, x: np.ndarray, positions: np.ndarray) -> None:
        self._make_room(layer, len(x), positions)
        if layer == 0 and self._sums is not None:
            self._sums.reserve(self._stacks[0].layers[0].count + len(x))
        for begin in range(0, len(x), BLOCK_TOKENS):
            rows = x[begin : begin + BLOCK_TOKENS]
            if self._pairs:
                self._push_latents(layer, rows)
            elif self.settings.cl:
                self._push_delta(layer, rows)
            else:
                self._stacks[0].layers[layer].push(rows)

    def rows_of(self, layer: int) -> tuple[LatentRows, LatentRows]:
        if self._sums is not None and layer >= self.settings.base:
            return self._sums, self._sums
        return self._stacks[0].layers[layer], self._stacks[-1].layers[layer]

    def make_ready(self, layer: int) -> None:
        if self.settings.cl and layer >= self.settings.base:
            self._sum_up(layer, self._lengths[layer])

    def settle(self, layer: int) -> None:
        self._settle_rows(layer)
        if layer == self.shape.num_layers - 1:
            self._summed = -1

    def truncate(self, length: int) -> None:
        self._check_truncate(length)
        for stack in self._stacks:
            stack.truncate(length)
        if self._sums is not None:
            self._sums.truncate(length)
        self._summed, self._new = -1, None
        self._lengths = [length] * self.shape.num_layers

    def fork(self) -> XQuantCache:
        factors = self.factors.share()
        other = XQuantCache(parse(self.policy), self.shape, self.arena, self.capacity_tokens, self.model, factors)
        try:
            for mine, theirs in zip(self._stacks, other._stacks):
                theirs.copy_from(mine)
            if self._sums is not None and other._sums is not None:
                other._sums.copy_from(self._sums)
        except BaseException:
            other.release()
            raise
        other._lengths = list(self._lengths)
        return other

    def _rebuild_of(self, layer: int) -> Rebuild:
        if self._pairs:
            keys, values = (self.factors.matrices[f"{layer}.{which}.out"] for which in "kv")
        else:
            keys, values = (self.model.weights.matrices[name] for name in latent.projection_names(layer))
        return latent.rebuild_with(self.model, layer, keys, values)

    def _push_latents(self, layer: int, x: np.ndarray) -> None:
        """(X W) B for keys and values; in float arithmetic, since B stretches small directions."""
        held = self.model.weights.matrices
        projected, rows = (block[: len(x)] for block in self._scratch.blocks)
        for stack, name, factor in zip(self._stacks, latent.projection_names(layer), self._inward[layer]):
            kernels.linear(x, [held[name]], [projected], exact=True)
            kernels.linear(projected, [factor], [rows])
            stack.layers[layer].push(rows)

    def _push_delta(self, layer: int, x: np.ndarray) -> None:
        """X itself in the first layers; then what the sum of all before lacks, coded, and the sum as it will be read.

        The sum is that of decoded numbers, so that no error is carried on to later layers unseen.
        """
        rows, base, sums = self._stacks[0].layers[layer], self.settings.base, self._sums
        assert sums is not None
        begin = rows.count
        total, part = (block[: len(x)] for block in self._scratch.blocks)
        if layer < base:
            rows.push(x)
            if layer == base - 1:
                rows.read(begin, begin + len(x), total)
                sums.write(begin, total)
            return
        sums.read(begin, begin + len(x), total)
        if self.settings.latents:
            kernels.linear(np.subtract(x, total, out=total), [self.factors.matrices[f"{layer}.in"]], [part])
            rows.push(part)
        else:
            rows.push(np.subtract(x, total, out=part))
        self._add_delta(layer, begin, begin + len(x))

    def _add_delta(self, layer: int, begin: int, end: int) -> None:
        """sums += the layer's decoded delta; the blocks hold both afterwards."""
        assert self._sums is not None
        total, part = (block[: end - begin] for block in self._scratch.blocks)
        if layer == self.settings.base and begin < self._lengths[layer]:
            self._stacks[0].layers[layer - 1].read(begin, end, total)
            total[:] = total.astype(np.float16)  # as the sums held it when this layer's delta was taken
        else:
            self._sums.read(begin, end, total)
        self._stacks[0].layers[layer].read(begin, end, part)
        if self.settings.latents:
            kernels.linear(part, [self.factors.matrices[f"{layer}.out"]], [total], accumulate=True)
        else:
            total += part
        self._sums.write(begin, total)

    def _sum_up(self, layer: int, held: int) -> None:
        """Brings the sums of settled tokens to this layer: by one delta, when the layers come in turn."""
        if self._summed == layer:
            return
        first = self._summed + 1 if self.settings.base <= self._summed < layer else self.settings.base
        for each in range(first, layer + 1):
            for begin in range(0, held, BLOCK_TOKENS):
                self._add_delta(each, begin, min(begin + BLOCK_TOKENS, held))
        self._summed = layer

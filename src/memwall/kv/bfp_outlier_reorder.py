"""Block floating point cache whose key channels are sorted by size, so that outliers share few blocks.

Source: Accurate Block Quantization in LLMs with Outliers; N. Trukhanov and I. Soloveychik, 2024, arXiv 2403.20137; no
official code known.
Idea: one exponent for n neighbouring channels is cheap, but an outlier channel forces a coarse step on its neighbours.
Keys have their outliers in the same channels for every token, and the order of channels inside a head is free as long
as queries have it too. Sorted by the norms of the rows of W_K that make them, channels of one size come together.
Units and shapes: keys and values [tokens, Hkv, D]; a block is n channels of one head of one token (values: or n tokens
of one channel); p bits a mantissa, sign included, and an exponent of 8 bits a block: p + 8/n bits a number.
Differs from the paper: the order is not folded into W_Q and W_K but taken up where keys are coded and where a query is
brought into blocks, each of which touches every channel anyway. That costs no pass of its own, needs no other weights
or rotary tables, and works for any rotation, biases and norms of heads (Qwen 3), which folding does not. What is sorted
is pairs of channels that rotate into each other (c, c + D/2), by the root of the sum of both norms squared: a rotation
keeps the size of a pair. `order=sorted` is the paper's order, `calibrated` the same by the mean square of real keys.
The default, `placed`, is ours: sorting puts an outlier together with the next largest channels, which it spoils and
which matter most where blocks are few; placing fills its block with those that lose least by it (see `placed_order`).
Queries are brought into blocks of 8-bit mantissas. Exponents below -100 count as zeros, a block of zeros has -128.
Cost: resident 2 * layers * tokens * Hkv * D * (p + 8/n) / 8 bytes, and a prompt's staging of one layer; the order is 2
bytes a channel. A decode step reads all of it once, and multiplies keys as integers.
Holds when: 32 divides D, and n does. With n = D every order is the same, and nothing is gained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from memwall.errors import InputError
from memwall.formats import codec
from memwall.kernels import bfp
from memwall.kernels.parts import CachePart, bfp_part
from memwall.kv import fitted
from memwall.kv.base import CacheModel, CacheShape
from memwall.kv.coded_cache import CodedCache
from memwall.kv.coded_state import SLACK_TOKENS, predict_coded, read_bytes_coded
from memwall.kv.policy import Policy
from memwall.memory.arena import allocated_bytes
from memwall.models.checkpoint import Checkpoint
from memwall.models.config import ModelConfig

if TYPE_CHECKING:
    from memwall.memory import Arena

ORDER = "kv/order"
ORDERS = ("placed", "sorted", "calibrated", "plain")
DEFAULT_BLOCK = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class BfpSettings:
    """bits, values: mantissas of keys and of values; block: numbers that share an exponent; axis: direction of the
    values' blocks, channels or tokens; order: of key channels; top: what becomes of a largest number that rounds up out
    of range; residual: newest tokens that stay exact, in the type `exact`.
    """

    bits: int = 4
    values: int = 4
    block: int = DEFAULT_BLOCK
    axis: str = "channels"
    order: str = "placed"
    top: str = "clamp"
    residual: int = 0
    exact: str = "float16"

    @classmethod
    @lru_cache(maxsize=256)
    def from_policy(cls, policy: Policy, head_dim: int) -> BfpSettings:
        """Settings of a policy string, checked against the model's head dimension."""
        words = {name: policy.settings.get(name, default) for name, (default, _) in _WORDS.items()}
        for name, (_, allowed) in _WORDS.items():
            if words[name] not in allowed:
                raise InputError(f"policy {policy}: {name}={words[name]}; must be one of {', '.join(allowed)}")
        if head_dim % 32:
            raise InputError(f"bfp needs a head dimension that 32 divides, not {head_dim}; use kivi or float16")
        blocks = [block for block in bfp.BLOCKS if head_dim % block == 0]
        own, defaults = Policy(policy.name, policy.settings), {"bits": 4, "values": 0, "block": DEFAULT_BLOCK}
        numbers = own.integers({**defaults, "residual": 0}, words=_WORDS)
        numbers["values"] = numbers["values"] or numbers["bits"]
        for name in ("bits", "values"):
            if numbers[name] not in bfp.BITS:
                raise InputError(
                    f"policy {policy}: {name}={numbers[name]}; must be one of {', '.join(map(str, bfp.BITS))}"
                )
        if numbers["block"] not in blocks:
            raise InputError(
                f"policy {policy}: block {numbers['block']} does not work for a head dimension of {head_dim}; must be "
                f"one of {', '.join(map(str, blocks))}"
            )
        return cls(
            bits=numbers["bits"],
            values=numbers["values"],
            block=numbers["block"],
            residual=numbers["residual"],
            axis=words["axis"],
            order=words["order"],
            top=words["top"],
            exact=words["exact"],
        )

    def form(self) -> bfp.BfpForm:
        """The same, as the kernels take it."""
        return bfp.BfpForm(
            bits=self.bits,
            value_bits=self.values,
            block=self.block,
            by_token=self.axis == "channels",
            raise_top=self.top == "raise",
        )

    @property
    def units(self) -> tuple[int, int]:
        """Keys are coded token by token, values too unless their blocks run along tokens."""
        return 1, 1 if self.axis == "channels" else self.block

    @property
    def bits_per_value(self) -> tuple[float, float]:
        """Mantissa, and its share of the exponent."""
        return self.bits + 8 / self.block, self.values + 8 / self.block

    def key_bytes(self, shape: CacheShape, tokens: int, key_dim: int | None = None) -> int:
        """Bytes of a layer's coded keys, as whole as they lie."""
        return -(-tokens // bfp.TOKENS) * shape.num_kv_heads * self.form().key_bytes(key_dim or shape.head_dim)

    def value_bytes(self, shape: CacheShape, tokens: int) -> int:
        """Bytes of a layer's coded values."""
        form = self.form()
        return -(-tokens // form.value_tokens) * shape.num_kv_heads * form.value_bytes(shape.head_dim)

    def recent_rows(self, capacity_tokens: int) -> tuple[int, int]:
        """Rows for the exact ones: the residual, what waits for a unit to be full, the token that has just come."""
        return (
            min(self.residual + SLACK_TOKENS, capacity_tokens),
            min(self.residual + self.units[1] + SLACK_TOKENS, capacity_tokens),
        )

    def to_code(self, num_keys: int, num_values: int) -> tuple[int, int]:
        """All that left the residual, values as far as they fill units."""
        values = max(num_values - self.residual, 0)
        return max(num_keys - self.residual, 0), values - values % self.units[1]


_WORDS = {
    "axis": ("channels", ("channels", "tokens")),
    "order": ("placed", ORDERS),
    "top": ("clamp", ("clamp", "raise")),
    "exact": ("float16", ("float16", "float32", "bfloat16")),
}


def pair_order(sizes: np.ndarray) -> np.ndarray:
    """Channels [Hkv, D] int16 from the largest pair to the smallest, members of a pair side by side.

    sizes [Hkv, D]: of each channel; c and c + D/2 are a pair.
    """
    return _members(np.argsort(-_pairs(sizes), axis=1, kind="stable"))


def placed_order(keys: np.ndarray, queries: np.ndarray, bits: int, block: int) -> np.ndarray:
    """As `pair_order`, with blocks chosen for the least expected error of logits.

    keys, queries [Hkv, D]: sizes of their channels. A block's largest pair sets its step; what shares the step loses
    at most itself, times the query. So block by block: the m largest pairs that are left and, to fill it, those that
    lose least by it, for the m of least error, the others sorted behind.
    """
    heads, pairs = keys.shape[0], keys.shape[1] // 2
    own, asked = _pairs(keys), _pairs(queries)
    found = np.empty((heads, pairs), np.intp)
    for head in range(heads):
        size, ask, fill = own[head], asked[head], block // 2
        # a block's largest number is some 2.5 times the root mean square, its step 3/4 of the next power of two
        share = (1.9 / 2 ** (bits - 2)) ** 2 / 12
        left, placed = np.argsort(-size, kind="stable"), []
        while len(left) > fill:
            by_loss = left[np.argsort((size * ask)[left], kind="stable")]
            options = []
            for m in range(1, fill + 1):
                filling = by_loss[~np.isin(by_loss, left[:m])][: fill - m]
                first = np.concatenate([left[:m], filling])
                options.append(np.concatenate([first, left[~np.isin(left, first)]]))
            blocks = np.stack(options).reshape(len(options), -1, fill)
            step = size[blocks].max(axis=2, keepdims=True) * share
            errors = (np.minimum(step, size[blocks]) * ask[blocks]).sum(axis=(1, 2))
            best = options[int(np.argmin(errors))]
            placed.append(best[:fill])
            left = best[fill:]
        found[head] = np.concatenate([*placed, left])
    return _members(found)


def _pairs(sizes: np.ndarray) -> np.ndarray:
    """Sums of squares of both members, [Hkv, D / 2]."""
    squares = sizes.astype(np.float64) ** 2
    half = sizes.shape[1] // 2
    return squares[:, :half] + squares[:, half:]


def _members(pairs: np.ndarray) -> np.ndarray:
    half = pairs.shape[1]
    return np.stack([pairs, pairs + half], axis=2).reshape(len(pairs), 2 * half).astype(np.int16)


def row_norms(directory: Path, config: ModelConfig, layer: int, which: str = "k") -> np.ndarray:
    """Norms [Hkv, D] of the rows of a layer's W_K (or W_Q, which "q": of all heads that share a key) as the checkpoint
    has them: the proxy for the sizes of channels.

    Where heads are normed afterwards (Qwen 3) all rows count alike, and the norm's own weights decide.
    """
    prefix = f"model.layers.{layer}.self_attn.{which}_"
    shape = (config.num_kv_heads, config.head_dim)
    with Checkpoint(directory, config) as checkpoint:
        if f"{prefix}norm.weight" in checkpoint.names():
            return np.broadcast_to(np.abs(checkpoint.tensor(f"{prefix}norm.weight").astype(np.float32)), shape)
        packed = checkpoint.packed(f"{prefix}proj.weight")
        rows = codec(packed.spec).decode(packed) if packed is not None else checkpoint.alone(f"{prefix}proj.weight")
        heads = np.array_split(rows, len(rows) // config.head_dim)  # one float copy at a time
        squares = np.stack([np.square(head.astype(np.float32)).sum(axis=1) for head in heads])
        return np.sqrt(squares.reshape(config.num_kv_heads, -1, config.head_dim).sum(axis=1))


class BfpCache(CodedCache):
    """See the module's text."""

    codes_prompt = True
    saves = True
    plain_rows = True
    needs_model = True
    fits = True

    def __init__(
        self,
        policy: Policy,
        shape: CacheShape,
        arena: Arena,
        capacity_tokens: int,
        model: CacheModel | None = None,
    ) -> None:
        self.settings = BfpSettings.from_policy(policy, shape.head_dim)
        self._form = self.settings.form()
        orders = self._ordered(policy, model) if self.settings.order != "plain" else None
        super().__init__(policy, self.settings, shape, arena, capacity_tokens)
        self._orders = self._kept(orders)

    @staticmethod
    def predict(
        policy: Policy, shape: CacheShape, num_tokens: int, prefill_tokens: int, capacity_tokens: int
    ) -> dict[str, int]:
        """Bytes per ledger owner once `num_tokens` are held, and of the staging of `prefill_tokens` at once."""
        settings = BfpSettings.from_policy(policy, shape.head_dim)
        found = predict_coded(settings, shape, (num_tokens, prefill_tokens, capacity_tokens))
        if settings.order != "plain":
            found[ORDER] = allocated_bytes(2 * shape.num_layers * shape.row_values)
        return found

    @staticmethod
    def read_bytes(policy: Policy, shape: CacheShape, num_tokens: int) -> int:
        """Bytes that one decode step reads with `num_tokens` held."""
        return read_bytes_coded(BfpSettings.from_policy(policy, shape.head_dim), shape, num_tokens)

    @staticmethod
    def building_bytes(policy: Policy, shape: CacheShape) -> int:
        """One layer's W_K or W_Q while its rows are measured, with a float copy of one head's."""
        order = BfpSettings.from_policy(policy, shape.head_dim).order
        rows = {"sorted": shape.row_values, "placed": shape.num_heads * shape.head_dim}.get(order, 0)
        return (4 * rows + 8 * shape.head_dim if rows else 0) * (shape.hidden_size or 0)

    @classmethod
    def must_have_model(cls, policy: Policy) -> bool:
        return policy.settings.get("order") != "plain"

    @classmethod
    def timed(cls, policy: Policy) -> Policy:
        """Without an order, which costs next to nothing."""
        return replace(policy, settings={**policy.settings, "order": "plain"})

    @classmethod
    def fit_key(cls, policy: Policy) -> str:
        return "bfp key sizes"

    @classmethod
    def must_fit(cls, policy: Policy) -> bool:
        return policy.settings.get("order") == "calibrated"

    @classmethod
    def fit(
        cls,
        policy: Policy,
        directory: Path,
        text: str | None,
        threads: int | None,
        progress: Callable[[str, int, int], None] | None,
    ) -> dict[str, np.ndarray]:
        """Root mean squares [layers, Hkv, D] of the keys of a few thousand tokens."""
        from memwall.kv.key_sizes import key_sizes

        return {"sizes": key_sizes(directory, text, threads, progress)}

    @property
    def policy(self) -> str:
        s, plain = self.settings, BfpSettings()
        shown = [f"bits={s.bits}"] + ([f"values={s.values}"] if s.values != s.bits else []) + [f"block={s.block}"]
        for name in ("axis", "order", "top", "residual", "exact"):
            if getattr(s, name) != getattr(plain, name):
                shown.append(f"{name}={getattr(s, name)}")
        return f"bfp({','.join(shown)})"

    @property
    def nbytes(self) -> int:
        return super().nbytes + (allocated_bytes(self._orders.nbytes) if self._orders is not None else 0)

    def attend(
        self, layer: int, q: np.ndarray, positions: np.ndarray, out: np.ndarray, stats: np.ndarray | None = None
    ) -> np.ndarray:
        state = self._layers[layer]
        keys, values = self._exact(layer)
        return bfp.attend_bfp(
            q,
            state.key_blocks.bytes,
            state.value_blocks.bytes,
            keys,
            values,
            form=self._form,
            order=self._order(layer),
            coded_keys=state.coded_keys,
            coded_values=state.coded_values,
            scale=self.shape.logit_scale,
            first_position=int(positions[0]),
            window=self.shape.window(layer),
            out=out,
            stats=stats,
        )

    def _part(self, layer: int) -> CachePart:
        state = self._layers[layer]
        blocks = (state.key_blocks.capacity(), state.value_blocks.capacity())
        return bfp_part((state.keys.buffer, state.values.buffer), blocks, self._form, self._order(layer))

    def release(self) -> None:
        super().release()
        if self._orders is not None:
            self.arena.free(self._orders)
            self._orders = None

    def _ordered(self, policy: Policy, model: CacheModel | None) -> np.ndarray:
        """The order of every layer's key channels, [layers, Hkv, D]."""
        if model is None:
            raise InputError(f"KV policy {policy} sorts by the model's own weights; none is given here")
        settings, place = self.settings, (model.directory, model.config)
        if settings.order == "calibrated":
            return np.stack([pair_order(sizes) for sizes in fitted.load(model, policy, self.fit_key(policy))["sizes"]])
        found = []
        for layer in range(model.config.num_layers):
            sizes = row_norms(*place, layer)
            if settings.order == "sorted":
                found.append(pair_order(sizes))
            else:
                found.append(placed_order(sizes, row_norms(*place, layer, "q"), settings.bits, settings.block))
        return np.stack(found)

    def _kept(self, orders: np.ndarray | None) -> np.ndarray | None:
        """A copy on the ledger."""
        if orders is None:
            return None
        try:
            kept = self.arena.allocate(ORDER, orders.shape, np.int16)
        except BaseException:
            super().release()
            raise
        kept[:] = orders
        return kept

    def _order(self, layer: int) -> np.ndarray | None:
        return self._orders[layer] if self._orders is not None else None

    def _empty(self) -> BfpCache:
        other = BfpCache(self.timed(self._policy), self.shape, self.arena, self.capacity_tokens)
        other._policy, other.settings, other.form = self._policy, self.settings, self.settings
        other._orders = other._kept(self._orders)
        return other

    def _encode_keys(self, layer: int, keys: np.ndarray, first: int) -> None:
        bfp.encode_keys(keys, first, self._layers[layer].key_blocks.bytes, self._form, self._order(layer))

    def _decode_keys(self, layer: int, first: int, out: np.ndarray) -> None:
        bfp.decode_keys(self._layers[layer].key_blocks.bytes, first, out, self._form, self._order(layer))

    def _encode_values(self, layer: int, values: np.ndarray, first: int) -> None:
        bfp.encode_values(values, first, self._layers[layer].value_blocks.bytes, self._form)

    def _decode_values(self, layer: int, first: int, out: np.ndarray) -> None:
        bfp.decode_values(self._layers[layer].value_blocks.bytes, first, out, self._form)

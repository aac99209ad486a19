"""CSKV: keys and values in a narrower joint channel space, found by SVD and a short training; the newest stay whole.

Source: CSKV: Training-Efficient Channel Shrinking for KV Cache in Long-Context Scenarios; 2024, arXiv 2409.10593;
official code github.com/wln20/CSKV.
Idea: the singular values of keys and values fall fast, so W_K ~ A_K B_K of rank r_K: features X A_K are kept, before
rotation, and keys are rebuilt as (X A_K) B_K when they are read; values likewise. The factors are repaired by training
them alone, layer by layer, against the layer's own keys and values; the last window of tokens is kept as it is.
Units and shapes: X [n, d], features [n, r], rebuilt rows [n, h], h = Hkv * D; a density of a head's D channels gives
the rank r = Hkv * floor(density * D), over all heads together.
Differs from the paper: originals in the window are kept rotated; groups of values' codes span as many heads' shares as
make about 32 numbers; a group's range is widened to hold zero, so that nothing is clipped (clip=1 rounds as the paper's
code does: see `ClippedForm`); a coded feature of a value is coded at once, not when its window is full, which gives the
same code; init=pca takes the principal directions of the keys and values themselves; a rank is never above d, where a
model's keys are wider than its inputs. Values are not rebuilt for a decoded token: p V = (p C_V) B_V.
Cost: resident layers * tokens * (r_K + r_V) * b / 8 bytes and scales, the window's rows, and the factors,
2 r (d + h) bytes a layer each for keys and values. A step multiplies r_K h times per layer and token, and r_V per
query head.
Holds when: it was fitted to the model (`memwall fit`), and the decoder hands over its inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from memwall import kernels
from memwall.errors import InputError
from memwall.kv import fitted, latent
from memwall.kv.base import CacheModel, CacheShape
from memwall.kv.latent import BLOCK_TOKENS, BlockAttention, Factors, LatentCache, Scratch
from memwall.kv.latent_rows import CODED_BITS, RECENT, LatentForm, LatentRows, LatentStack, allocated_bytes
from memwall.kv.policy import AMOUNT, Policy, parse

if TYPE_CHECKING:
    from memwall.memory import Arena

BITS = (*CODED_BITS, 16)
INITS = ("asvd", "svd", "pca")
VALUE_GROUP = 32
FACTOR_NAMES = ("k.in", "k.out", "v.in", "v.out")


class ClippedForm(LatentForm):
    """Codes as the paper's code makes them: a step is a share of the group's own range, its zero point a code clamped.

    So what lies further from zero than its group's range is wide is clipped there.
    """

    __slots__ = ()

    def encode(self, rows: np.ndarray, first: int, records: np.ndarray) -> None:
        if self.coded and len(rows):
            grouped = rows.reshape(-1, self.group, self.width) if self.along_tokens else rows[None]
            axis, starts = (1, [0]) if self.along_tokens else (2, list(range(0, self.width, self.group)))
            sizes = np.diff([*starts, grouped.shape[axis]])
            ends = [f.reduceat(grouped, starts, axis=axis).repeat(sizes, axis) for f in (np.minimum, np.maximum)]
            reach = ends[1] - ends[0]
            rows = np.minimum(grouped, np.where(ends[0] > 0, reach, np.inf))
            rows = np.maximum(rows, np.where(ends[1] < 0, -reach, -np.inf)).reshape(-1, self.width)
        LatentForm.encode(self, np.ascontiguousarray(rows, np.float32), first, records)


@dataclass(frozen=True, slots=True, kw_only=True)
class CskvSettings:
    """density of keys' and of values' channels; window: newest tokens kept whole; bits of a feature, 16 for floats.

    sliding: 1 keeps exactly the last `window` tokens, 0 those since the last full window. init and train say how the
    factors are found. clip: 1 takes `ClippedForm` for codes.
    """

    k: float
    v: float
    bits: int = 16
    window: int = 32
    sliding: int = 0
    init: str = "asvd"
    train: int = 1
    clip: int = 0

    @classmethod
    def from_policy(cls, policy: Policy) -> CskvSettings:
        """Settings of a policy string: `cskv(0.2)` is a density of 0.2 for both; k= and v= set them apart."""
        init = policy.settings.get("init", "asvd")
        defaults = {AMOUNT: 0.2, "k": -1.0, "v": -1.0, "bits": 16, "window": 32, "sliding": 0, "train": 1, "clip": 0}
        numbers = Policy(policy.name, policy.settings).numbers(defaults, words=("init",))
        both = numbers.pop(AMOUNT)
        densities = {name: both if numbers[name] < 0 else numbers[name] for name in "kv"}
        whole = {name: int(numbers[name]) for name in ("bits", "window", "sliding", "train", "clip")}
        settings = cls(
            k=densities["k"], v=densities["v"], bits=whole["bits"], window=whole["window"], sliding=whole["sliding"],
            train=whole["train"], init=init, clip=whole["clip"],
        )  # fmt: skip
        for name, density in densities.items():
            if not 0 < density <= 1:
                raise InputError(f"policy {policy}: density {name}={density:g}; must be above 0 and at most 1")
        if settings.bits not in BITS:
            raise InputError(f"policy {policy}: {settings.bits} bits; must be one of {', '.join(map(str, BITS))}")
        if init not in INITS:
            raise InputError(f"policy {policy}: init={init}; must be one of {', '.join(INITS)}")
        if settings.window > 4096:
            raise InputError(f"policy {policy}: window={settings.window}; must be at most 4096 tokens")
        for name in ("sliding", "train", "clip"):
            if whole[name] not in (0, 1):
                raise InputError(f"policy {policy}: {name}={whole[name]}; must be 0 or 1")
        return settings

    @property
    def block(self) -> int:
        """Tokens of a group of keys' codes: a window."""
        return self.window or 32

    def ranks(self, shape: CacheShape) -> tuple[int, int]:
        """(r_K, r_V)."""
        k, v = (max(math.floor(density * shape.head_dim + 1e-9), 1) for density in (self.k, self.v))
        most = latent.hidden_size(shape, "cskv")
        return min(shape.num_kv_heads * k, most), min(shape.num_kv_heads * v, most)

    def forms(self, shape: CacheShape) -> tuple[LatentForm, LatentForm]:
        """How features of keys and of values are kept."""
        k, v = self.ranks(shape)
        share, form = max(v // shape.num_kv_heads, 1), ClippedForm if self.clip else LatentForm
        group = min(share * max(VALUE_GROUP // share, 1), v)
        keys = form(width=k, bits=self.bits, group=self.block, along_tokens=True, zero_inside=True)
        return keys, form(width=v, bits=self.bits, group=group, zero_inside=True)

    def factor_shapes(self, shape: CacheShape) -> dict[str, tuple[int, int]]:
        """Of one layer: A transposed and B transposed, as products take them."""
        (k, v), d, h = self.ranks(shape), latent.hidden_size(shape, "cskv"), shape.row_values
        return dict(zip(FACTOR_NAMES, ((k, d), (h, k), (v, d), (h, v))))

    def window_bytes(self, shape: CacheShape) -> int:
        """Of the whole rows of all layers."""
        return 2 * 2 * shape.num_layers * self.window * shape.row_values

    def whole_rows(self, length: int) -> int:
        """Tokens kept whole among `length`."""
        if not self.window:
            return 0
        return min(length, self.window) if self.sliding else length % self.window


class _Whole:
    """One layer's newest tokens as they came: k, v [rows, Hkv, D] float16, `count` of them."""

    def __init__(self, buffer: np.ndarray) -> None:
        self.buffer = buffer  # [2, window, Hkv, D]
        self.count = 0

    def take(self, k: np.ndarray, v: np.ndarray, keep: int) -> None:
        """The last `keep` tokens of those held and the new ones stay."""
        keep = min(keep, self.count + len(k))
        old = max(keep - len(k), 0)
        for rows, new in zip(self.buffer, (k, v)):
            if old and old < self.count:
                rows[:old] = rows[self.count - old : self.count].copy()
            rows[old:keep] = new[len(new) - (keep - old) :]
        self.count = keep


class CskvCache(LatentCache):
    """See the module's text."""

    fits = True

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
        self.settings = settings = CskvSettings.from_policy(policy)
        self.factors = self._keep(factors or Factors(arena, _load(model, policy, settings, shape)))
        try:
            forms = settings.forms(shape)
            stacks = [LatentStack(arena, [form] * shape.num_layers, capacity_tokens) for form in forms]
            self._keys, self._values = (self._keep(stack) for stack in stacks)
            self._scratch = self._keep(Scratch(arena, [form.width for form in forms]))
            self._attention = self._keep(BlockAttention(model, shape, arena, forms[1].width))
            sizes = (shape.num_layers, 2, settings.window, shape.num_kv_heads, shape.head_dim)
            self._windows = arena.allocate(RECENT, sizes, np.float16)
        except BaseException:
            self.release()
            raise
        self._whole = [_Whole(buffer) for buffer in self._windows]
        matrices = self.factors.matrices
        self._rebuilds = [
            latent.rebuild_with(model, layer, matrices[f"{layer}.k.out"], matrices[f"{layer}.v.out"])
            for layer in range(shape.num_layers)
        ]

    @staticmethod
    def predict(
        policy: Policy, shape: CacheShape, num_tokens: int, prefill_tokens: int, capacity_tokens: int
    ) -> dict[str, int]:
        """Bytes per ledger owner once `num_tokens` are held."""
        settings = CskvSettings.from_policy(policy)
        forms = settings.forms(shape)
        owners = {
            latent.FACTORS: shape.num_layers * latent.factor_bytes(list(settings.factor_shapes(shape).values())),
            latent.REBUILD: Scratch.predict([form.width for form in forms])
            + BlockAttention.predict(shape, forms[1].width),
            RECENT: allocated_bytes(settings.window_bytes(shape)),
        }
        for form in forms:
            for owner, size in LatentStack.predict([form] * shape.num_layers, num_tokens).items():
                owners[owner] = owners.get(owner, 0) + size
        return owners

    @staticmethod
    def read_bytes(policy: Policy, shape: CacheShape, num_tokens: int) -> int:
        """Bytes that one decode step reads: features, whole rows, factors."""
        settings = CskvSettings.from_policy(policy)
        rows = sum(LatentStack.read_bytes([form] * shape.num_layers, num_tokens) for form in settings.forms(shape))
        whole = 4 * shape.num_layers * settings.whole_rows(num_tokens) * shape.row_values
        return rows + whole + shape.num_layers * sum(2 * a * b for a, b in settings.factor_shapes(shape).values())

    @staticmethod
    def step_macs(policy: Policy, shape: CacheShape, num_tokens: int) -> int:
        """Multiply-adds of one decode step that rebuild keys and apply B_V to summed features."""
        k, v = CskvSettings.from_policy(policy).ranks(shape)
        total = 0
        for layer in range(shape.num_layers):
            seen = min(num_tokens, shape.window(layer) or num_tokens)
            total += seen * k * shape.row_values + shape.num_heads * v * (seen + shape.row_values)
        return total

    @classmethod
    def fit_key(cls, policy: Policy) -> str:
        """Without the model's shape, which the fingerprint stands for: densities, not ranks."""
        settings = CskvSettings.from_policy(policy)
        coded = settings.train and settings.bits < 16
        trained = f" bits={settings.bits} block={settings.block}{' clip' * settings.clip}" if coded else ""
        return f"cskv k={settings.k:g} v={settings.v:g} init={settings.init} train={settings.train}{trained}"

    @classmethod
    def fit(
        cls,
        policy: Policy,
        directory: Path,
        text: str | None,
        threads: int | None,
        progress: Callable[[str, int, int], None] | None,
    ) -> dict[str, np.ndarray]:
        from memwall.kv.cskv_fit import fit_factors

        return fit_factors(CskvSettings.from_policy(policy), directory, text, threads, progress)

    @property
    def policy(self) -> str:
        s = self.settings
        return (
            f"cskv(k={s.k:g},v={s.v:g},bits={s.bits},window={s.window},sliding={s.sliding},init={s.init},"
            f"train={s.train}{',clip=1' * s.clip})"
        )

    @property
    def _stores(self) -> list[LatentStack]:
        return [self._keys, self._values]

    @property
    def nbytes(self) -> int:
        return super().nbytes + allocated_bytes(self._windows.nbytes)

    def take_inputs(self, layer: int, x: np.ndarray, positions: np.ndarray) -> None:
        self._make_room(layer, len(x), positions)
        matrices = [self.factors.matrices[f"{layer}.{name}.in"] for name in "kv"]
        for begin in range(0, len(x), BLOCK_TOKENS):
            rows = x[begin : begin + BLOCK_TOKENS]
            features = [block[: len(rows)] for block in self._scratch.blocks]
            kernels.linear(rows, matrices, features)
            self._keys.layers[layer].push(features[0])
            self._values.layers[layer].push(features[1])

    def rows_of(self, layer: int) -> tuple[LatentRows, LatentRows]:
        return self._keys.layers[layer], self._values.layers[layer]

    def kept_whole(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        keys, values = self._whole[layer].buffer
        return keys, values

    def num_whole(self, layer: int) -> int:
        return self._whole[layer].count

    def settle(self, layer: int) -> None:
        assert self._new is not None
        length = self._lengths[layer] + len(self._new[0])
        self._whole[layer].take(*self._new, self.settings.whole_rows(length))
        self._settle_rows(layer)

    def truncate(self, length: int) -> None:
        self._check_truncate(length)
        for stack in (self._keys, self._values):
            stack.truncate(length)
        for layer, whole in enumerate(self._whole):
            begin = self._lengths[layer] - whole.count  # those kept whole that are left stay so
            whole.count = max(length - begin, 0)
            self._lengths[layer] = length
        self._new = None

    def fork(self) -> CskvCache:
        factors = self.factors.share()
        other = CskvCache(parse(self.policy), self.shape, self.arena, self.capacity_tokens, self.model, factors)
        try:
            other._keys.copy_from(self._keys)
            other._values.copy_from(self._values)
        except BaseException:
            other.release()
            raise
        other._windows[:] = self._windows
        for mine, theirs in zip(self._whole, other._whole):
            theirs.count = mine.count
        other._lengths = list(self._lengths)
        return other

    def release(self) -> None:
        super().release()
        if hasattr(self, "_windows"):
            self.arena.free(self._windows)
            del self._windows


def _load(model: CacheModel, policy: Policy, settings: CskvSettings, shape: CacheShape) -> dict[str, np.ndarray]:
    arrays = fitted.load(model, policy, CskvCache.fit_key(policy))
    wanted = {f"{i}.{name}": s for i in range(shape.num_layers) for name, s in settings.factor_shapes(shape).items()}
    if {name: array.shape for name, array in arrays.items()} != wanted:
        raise InputError(f"KV policy {policy}: what was fitted has other shapes than this model; fit it again")
    return arrays

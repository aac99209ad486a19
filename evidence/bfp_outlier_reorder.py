"""K-sort's claims: block floating point keys with and without their channels sorted by size.

A toy of 128 channels shows the error by block size. Quality is measured on a model with heads of 128 channels
(`models/wide-heads`) with outliers planted in the checkpoint: in every head three pairs of channels that rotate into
each other, six of 128 as in the toy, are made s times larger in W_K and smaller in W_Q, which is the same model.
Held-out tokens are decoded four at a time through the cache after an exact prompt; values have 8 bits throughout, so
that what is compared are keys. Then bytes, and time per decode step on a 1B model's shape, caches in random turns.

A finding, which is two claims that fail: on this model sorted keys lose more than unsorted ones (a try on 192 tokens, s
= 16, n = 32: KL 0.33 against 0.25, perplexity +38 % against +20 %, error of logits 0.40 against 0.34). Sorting fills
the outliers' block, a quarter of the head, with the next largest channels, and here these carry almost everything: the
first quarter by W_K's norms has 94 % of the sum of |q|^2 |k|^2. That comes of how the model was grown (one frequency in
four is laid out with 0.7 of the logit of four), and the sizes of keys and queries go together, too (correlation of
their logarithms 0.98). In the demo model, trained as it is, that quarter has 33 % and the correlation is 0.8; there,
with heads of 32 and n = 16, sorting closed 38, 22 and 19 % of the perplexity gap (s = 4, 16, 64; the claim wants half).
The order `placed` fills the block with what costs least, and closes most of it on both.

Where the fault might lie was looked for and not found. Channel by channel the model's keys do err less when they are
sorted, as in the toy (s = 16, n = 32: mean relative error 0.62 unsorted, 0.26 sorted; s = 64: 0.76 and 0.31), and that
claim holds: blocks, pairs and heads are as they should be. Sorting by the sizes of real keys instead of W_K's norms
does the same for channels (0.25, 0.30) and no more for logits (0.42; by norms 0.40, unsorted 0.34), so it is not the
statistic; queries left in floats change nothing (0.40), so it is not their blocks of 8 bits. On the demo model it is
alike: channels 0.60 to 0.38, logits 0.465 to 0.468. What sorting cannot know is the query: a logit weighs a channel's
error by it, and the channels that it puts beside the outlier are those that queries ask for most.

Text: `--data` a UTF-8 file; the held-out text that ships with the planner otherwise.
"""

from __future__ import annotations

import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from memwall import kv
from memwall.claims import Claim, Progress, main
from memwall.cli.evidence import load_experiment
from memwall.formats.safetensors_file import SafetensorsWriter
from memwall.kernels import bfp
from memwall.kv.bfp_outlier_reorder import BfpCache, pair_order, row_norms
from memwall.kv.key_sizes import key_sizes
from memwall.kv.policy import parse
from memwall.memory import Arena, Ledger
from memwall.models import Checkpoint, ModelConfig, model_directory
from memwall.models.rope import rope_tables
from memwall.systems import find_system, wide_heads

kivi: Any = load_experiment(find_system("kivi"))
FULL = kivi.Sizes(windows=6, step_tokens=4, recall_tries=1, rounds=15)
QUICK = kivi.Sizes(windows=3, step_tokens=8, recall_tries=1, rounds=7, decoded_tokens=256)
FACTORS = (4, 16, 64)
BLOCKS = (32, 64, 128)
CELLS = (
    *((4, block, order) for block in BLOCKS for order in ("plain", "sorted")),
    (4, 32, "placed"),
    (8, 32, "plain"),
)
"""Bits of keys, block, order."""
PAIRS = 3
"""Pairs of channels that are outliers, of each head's 64: six channels of 128, as in the toy."""
CONTEXT_TOKENS = 2048
ONE_B = kv.CacheShape(num_layers=4, num_heads=32, num_kv_heads=8, head_dim=64)


# ---- the planted model -----------------------------------------------------------------------------------------------


def plant(source: Path, to: Path, factor: float) -> None:
    """The model in float32 with `PAIRS` pairs of key channels in every head `factor` times larger."""
    config = ModelConfig.from_directory(source)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        if (source / name).is_file():
            shutil.copy(source / name, to / name)
    half, rng = config.head_dim // 2, np.random.default_rng(0)
    repeat = config.num_heads // config.num_kv_heads
    pairs = rng.permuted(np.tile(np.arange(half), (config.num_layers, config.num_kv_heads, 1)), axis=2)[..., :PAIRS]
    with Checkpoint(source, config) as checkpoint:
        names = [tensor.name for tensor in config.tensors()]
        specs = [(name, np.dtype(np.float32), checkpoint.tensor(name).shape) for name in names]
        with SafetensorsWriter(to / "model.safetensors", specs, {}) as writer:
            for name in names:
                rows = checkpoint.tensor(name).astype(np.float32)
                if ".q_proj." in name or ".k_proj." in name:
                    heads = rows.reshape(-1, config.head_dim, *rows.shape[1:])
                    for head in range(len(heads)):
                        kv_head = head if ".k_proj." in name else head // repeat
                        own = pairs[int(name.split(".")[2]), kv_head]
                        heads[head, [*own, *own + half]] *= factor if ".k_proj." in name else 1 / factor
                writer.write(name, rows)


class FolderDemo(kivi.Demo):  # type: ignore[misc]
    """The model of a folder in float32."""

    def __init__(self, directory: Path, data: Path | None, sizes: Any) -> None:
        kivi.Demo.__init__(self, data, sizes, directory, form="float32", context_tokens=CONTEXT_TOKENS)

    def logits(self, cache: kv.KVCache) -> np.ndarray:
        """Of the token after one prompt, and of one decoded behind it."""
        window = next(self.windows())
        self.decoder.forward(window[:-1], cache)
        return self.decoder.forward(window[-1:], cache).copy()


class Taken(kivi.OutlierCache):  # type: ignore[misc]
    """A float32 cache that keeps a prompt's keys and its last queries, per layer."""

    def __init__(self, inner: kv.KVCache) -> None:
        super().__init__(inner, 1.0)
        self.keys: dict[int, np.ndarray] = {}
        self.queries: dict[int, np.ndarray] = {}

    def append(self, layer: int, k: np.ndarray, v: np.ndarray, positions: np.ndarray) -> None:
        self.keys[layer] = k.copy()
        super().append(layer, k, v, positions)

    def attend(self, layer: int, q: np.ndarray, positions: np.ndarray, out: np.ndarray) -> np.ndarray:
        self.queries[layer] = q[-32:].copy()
        return super().attend(layer, q, positions, out)  # type: ignore[no-any-return]


Errors = dict[tuple[int, int, str], float]


def key_errors(demo: FolderDemo) -> tuple[Errors, Errors]:
    """Of a prompt's keys k read back as k', by cell: mean over heads of || q (k' - k)^T || / || q k^T ||, and mean over
    all channels c of || (k' - k)_c || / || k_c ||.
    """
    taken, found, channels = Taken(demo.cache("float32")), {}, {}
    demo.decoder.forward(next(demo.windows())[: demo.sizes.prompt_tokens], taken)
    taken.release()
    for cell in CELLS:
        cache, errors, apart = demo.cache(keys(*cell)), [], []
        assert isinstance(cache, BfpCache)
        for layer, k in taken.keys.items():
            coded = np.zeros(-(-len(k) // bfp.TOKENS) * k.shape[1] * cache._form.key_bytes(k.shape[2]), np.uint8)
            bfp.encode_keys(k, 0, coded, cache._form, cache._order(layer))
            lost = bfp.decode_keys(coded, 0, np.empty_like(k), cache._form, cache._order(layer)) - k
            apart.append(np.linalg.norm(lost, axis=0) / np.linalg.norm(k, axis=0))
            q = taken.queries[layer].reshape(-1, k.shape[1], demo.shape.num_heads // k.shape[1], k.shape[2])
            errors += [
                np.linalg.norm(q[:, head] @ lost[:, head].T) / np.linalg.norm(q[:, head] @ k[:, head].T)
                for head in range(k.shape[1])
            ]
        cache.release()
        found[cell], channels[cell] = float(np.mean(errors)), float(np.mean(apart))
    return found, channels


class SortedFloats(kivi.OutlierCache):  # type: ignore[misc]
    """Float32 keys and queries in the sorted order: what reordering does without any coding."""

    def __init__(self, inner: kv.KVCache, orders: np.ndarray) -> None:
        kv.KVCache.__init__(self, inner.shape, inner.arena, inner.capacity_tokens)
        self.inner, self.orders = inner, orders.astype(np.intp)

    def append(self, layer: int, k: np.ndarray, v: np.ndarray, positions: np.ndarray) -> None:
        self.inner.append(layer, _placed(k, self.orders[layer]), v, positions)

    def attend(self, layer: int, q: np.ndarray, positions: np.ndarray, out: np.ndarray) -> np.ndarray:
        repeat = q.shape[1] // self.orders.shape[1]
        return self.inner.attend(layer, _placed(q, self.orders[layer].repeat(repeat, 0)), positions, out)


def _placed(rows: np.ndarray, order: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.take_along_axis(rows, np.broadcast_to(order, rows.shape), axis=2))


# ---- exactness -------------------------------------------------------------------------------------------------------


def folded_difference(*, interleaved: bool) -> float:
    """Largest difference of logits when pairs are sorted in W_Q, W_K and their biases, against weights as they are.

    Grouped queries (4 heads on 2), biases, positions up to 1,000. The folded form has pairs side by side and rotates
    with frequencies in the order of its pairs.
    """
    rng = np.random.default_rng(1)
    heads, kv_heads, dim, width, tokens = 4, 2, 64, 96, 40
    config = ModelConfig.from_directory(model_directory("demo"))
    positions = np.sort(rng.integers(0, 1000, tokens))
    x = rng.normal(size=(tokens, width)).astype(np.float32)
    weights = {n: rng.normal(size=(n_heads, dim, width)) * np.exp(rng.normal(size=(n_heads, dim, 1)))
               for n, n_heads in (("q", heads), ("k", kv_heads))}  # fmt: skip
    weights = {n: (w / np.sqrt(width)).astype(np.float32) for n, w in weights.items()}
    biases = {n: rng.normal(size=w.shape[:2]).astype(np.float32) for n, w in weights.items()}
    cos, sin = rope_tables(config.rope, dim, positions)
    first, second = (
        (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(0, dim // 2), slice(dim // 2, None))
    )

    def rotated(rows: np.ndarray, one: slice, other: slice, order: np.ndarray | None) -> np.ndarray:
        c, s = (t[:, None] if order is None else t[:, order] for t in (cos, sin))
        out = np.empty_like(rows)
        out[..., one] = rows[..., one] * c - rows[..., other] * s
        out[..., other] = rows[..., other] * c + rows[..., one] * s
        return out

    def logits(w: dict, b: dict, one: slice, other: slice, pairs: np.ndarray | None) -> np.ndarray:
        made = {}
        for name in ("q", "k"):
            rows = np.einsum("hdw,tw->thd", w[name], x) + b[name]
            own = None if pairs is None else (pairs if name == "k" else pairs.repeat(heads // kv_heads, 0))
            made[name] = rotated(rows, one, other, own)
        return np.einsum("qhd,khd->hqk", made["q"], made["k"].repeat(heads // kv_heads, 1)) * dim**-0.5

    norms = np.sqrt(np.square(weights["k"]).sum(2))
    pairs = np.argsort(-(norms[:, first] ** 2 + norms[:, second] ** 2), axis=1)
    folded_w, folded_b = {}, {}
    for name in ("q", "k"):
        own = pairs if name == "k" else pairs.repeat(heads // kv_heads, 0)
        members = np.stack([np.arange(dim)[first][own], np.arange(dim)[second][own]], axis=2).reshape(len(own), dim)
        folded_w[name] = np.take_along_axis(weights[name], members[..., None], 1)
        folded_b[name] = np.take_along_axis(biases[name], members, 1)
    plain = logits(weights, biases, first, second, None)
    return float(np.abs(plain - logits(folded_w, folded_b, slice(0, None, 2), slice(1, None, 2), pairs)).max())


def exactness_claims(demo: FolderDemo) -> Iterator[Claim]:
    orders = np.stack(
        [pair_order(row_norms(demo.directory, demo.config, layer)) for layer in range(demo.config.num_layers)]
    )
    plain = demo.logits(demo.cache("float32"))
    by_cache = float(np.abs(plain - demo.logits(SortedFloats(demo.cache("float32"), orders))).max())
    halves, neighbours = folded_difference(interleaved=False), folded_difference(interleaved=True)
    yield Claim(
        claim="sorting changes nothing by itself: the planted model's logits with keys and queries in the sorted "
        "order, and attention logits of weights with the order folded into them (grouped queries, biases, both "
        "layouts of rotation)",
        measured=f"largest differences {by_cache:.1e}; folded {halves:.1e} (halves), {neighbours:.1e} (neighbours)",
        required="below 1e-4",
        passed=max(by_cache, halves, neighbours) < 1e-4,
    )


# ---- the toy ---------------------------------------------------------------------------------------------------------


def toy_claims() -> Iterator[Claim]:
    """128 channels of normal numbers, six of them 16 times larger; mean over channels of the relative error."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2048, 1, 128)).astype(np.float32)
    x[:, :, rng.choice(128, 6, replace=False)] *= 16
    sizes = np.sqrt(np.square(x).mean(0))
    order = np.argsort(-sizes, axis=1).astype(np.int16)

    def error(block: int, own: np.ndarray | None) -> float:
        form = bfp.BfpForm(bits=4, block=block)
        coded = np.zeros(len(x) // bfp.TOKENS * form.key_bytes(128), np.uint8)
        bfp.encode_keys(x, 0, coded, form, own)
        back = bfp.decode_keys(coded, 0, np.empty_like(x), form, own)
        return float((np.sqrt(np.square(back - x).mean(0)) / sizes).mean())

    found = {block: (error(block, None), error(block, order)) for block in (128, 64, 32)}
    shown = "; ".join(f"n={block}: {plain:.3f} -> {best:.3f}" for block, (plain, best) in found.items())
    yield Claim(
        claim="with one block a head (n = d) the order makes no difference",
        measured=f"128 channels, 4-bit mantissas, error as it is -> sorted: {shown}",
        required="equal at n = 128",
        passed=found[128][0] == found[128][1],
    )
    yield Claim(
        claim="sorted, the error falls with the block: n = 32 below 64 below 128, and below the unsorted one",
        measured=shown,
        required="sorted 32 < 64 < 128; sorted below unsorted at 64 and 32",
        passed=found[32][1] < found[64][1] < found[128][1]
        and all(found[block][1] < found[block][0] for block in (64, 32)),
    )


# ---- quality ---------------------------------------------------------------------------------------------------------


def keys(bits: int, block: int, order: str) -> str:
    return f"bfp(bits={bits},values=8,block={block},order={order})"


@dataclass(frozen=True, slots=True)
class Quality:
    """Scores on one planted model by (bits, block, order); perplexity gaps are to the float32 cache."""

    factor: int
    exact: Any
    scores: dict[tuple[int, int, str], Any]
    others: dict[str, Any]
    ratio: float
    logits: Errors
    channels: Errors

    def gap(self, *key: Any) -> float:
        return float(self.scores[key].gap(self.exact))

    def nats(self, *key: Any) -> float:
        return float(self.scores[key].divergence)

    def closed(self, order: str, block: int = 32) -> tuple[float, float]:
        """Share of the perplexity gap between unsorted BFP12 and BFP16 that an order closes; its standard error."""
        plain, other = self.gap(4, block, "plain"), self.gap(8, 32, "plain")
        share = (plain - self.gap(4, block, order)) / (plain - other)
        plain_losses = self.scores[4, block, "plain"].losses
        rest = plain_losses - self.scores[4, block, order].losses
        whole = plain_losses - self.scores[8, 32, "plain"].losses
        return share, float((rest - share * whole).std() / math.sqrt(len(whole)) / abs(whole.mean()))


def quality(factor: int, data: Path | None, sizes: Any, tick: Callable[[str], None]) -> tuple[Quality, Claim | None]:
    with tempfile.TemporaryDirectory() as folder:
        plant(wide_heads(), Path(folder), factor)
        demo = FolderDemo(Path(folder), data, sizes)
        tick(f"outliers of {factor}")
        exact = demo.score(demo.cache("float32"))
        scores = {}
        for bits, block, order in CELLS:
            tick(f"outliers of {factor}, {keys(bits, block, order)}")
            scores[bits, block, order] = demo.score(demo.cache(keys(bits, block, order)))
        others = {
            "4 bits with scale and minimum per token": kivi.AxesCache(demo.shape, 4, 32, False, False),
            "KIVI 4 bits": demo.cache("kivi(4bit,residual=32)"),
            "KIVI 2 bits": demo.cache("kivi(2bit,residual=32)"),
        }
        measured = {name: demo.score(cache) for name, cache in others.items()}
        rms = key_sizes(Path(folder), None if data is None else data.read_text(encoding="utf-8"))
        ratio = float(np.median(rms.max(-1) / np.median(rms, axis=-1)))
        exactness = next(exactness_claims(demo)) if factor == 16 else None
        return Quality(factor, exact, scores, measured, ratio, *key_errors(demo)), exactness


def quality_claims(found: list[Quality]) -> Iterator[Claim]:
    def shown(q: Quality, *cells: tuple[int, int, str]) -> str:
        return f"s={q.factor} (largest over median channel {q.ratio:.1f}): " + ", ".join(
            f"{'BFP12' if cell[0] == 4 else 'BFP16'} n={cell[1]} {cell[2]} logits {q.logits[cell]:.3f}, "
            f"KL {q.nats(*cell):.4f}, perplexity {q.gap(*cell):+.2%}"
            for cell in cells
        )

    def closed(order: str, block: int = 32) -> str:
        shares = ((q.factor, *q.closed(order, block)) for q in found)
        return f"n={block} {order} " + ", ".join(f"s={s}: {share:.0%} +- {error:.0%}" for s, share, error in shares)

    tokens = len(found[0].exact.losses)
    yield Claim(
        claim="on the model too the order makes no difference at n = d = 128",
        measured="; ".join(shown(q, (4, 128, "plain"), (4, 128, "sorted")) for q in found) + f"; {tokens:,} tokens",
        required="the same loss to the last bit",
        passed=all((q.scores[4, 128, "plain"].losses == q.scores[4, 128, "sorted"].losses).all() for q in found),
    )
    yield Claim(
        claim="channel by channel the model's keys err less sorted, as in the toy",
        measured="; ".join(
            f"s={q.factor}: "
            + ", ".join(f"n={n} {q.channels[4, n, 'plain']:.3f} -> {q.channels[4, n, 'sorted']:.3f}" for n in BLOCKS)
            for q in found
        ),
        required="mean relative error, sorted: n = 32 < 64 < 128; sorted below unsorted at 64 and 32, for every s",
        passed=all(
            q.channels[4, 32, "sorted"] < q.channels[4, 64, "sorted"] < q.channels[4, 128, "sorted"]
            and all(q.channels[4, n, "sorted"] < q.channels[4, n, "plain"] for n in (32, 64))
            for q in found
        ),
    )
    ordered = [
        measure(4, 32, "sorted") < measure(4, 64, "sorted") < measure(4, 128, "sorted")
        and all(measure(4, block, "sorted") < measure(4, block, "plain") for block in (32, 64))
        for q in found
        for measure in (lambda *cell, q=q: q.logits[cell], q.nats, q.gap)
    ]
    yield Claim(
        claim="sorted keys lose less the smaller the block, and at 32 and 64 less than unsorted ones",
        measured="; ".join(shown(q, *((4, n, order) for n in BLOCKS for order in ("sorted", "plain"))) for q in found),
        required="error of logits, KL and perplexity gap: n = 32 < 64 < 128 sorted, sorted < unsorted, for every s",
        passed=all(ordered),
    )
    beside = "; ".join(
        f"s={q.factor}: " + ", ".join(f"{name} {score.gap(q.exact):+.2%}" for name, score in q.others.items())
        for q in found
    )
    yield Claim(
        claim="sorted BFP12 closes more than half of the perplexity gap between unsorted BFP12 and BFP16",
        measured=f"{closed('sorted')}; {closed('sorted', 64)}; "
        + "; ".join(shown(q, (8, 32, "plain")) for q in found)
        + f"; beside them: {beside}",
        required="above 50 % at n = 32 for every s",
        passed=all(q.closed("sorted")[0] > 0.5 for q in found),
    )
    yield Claim(
        claim="placed by what a block's step costs the logits (our order), keys lose less than sorted and unsorted",
        measured="; ".join(shown(q, (4, 32, "placed")) for q in found) + f"; {closed('placed')} of the gap closed",
        required="KL below both for every s",
        passed=all(q.nats(4, 32, "placed") < min(q.nats(4, 32, "sorted"), q.nats(4, 32, "plain")) for q in found),
    )


# ---- bytes and time --------------------------------------------------------------------------------------------------


def bytes_claims() -> Iterator[Claim]:
    rows = kivi.random_rows(ONE_B, 256)
    held, kept = {}, True
    for bits in bfp.BITS:
        for block in (16, 32, 64):
            cache = kv.build(f"bfp({bits}bit,block={block},order=plain)", ONE_B, Arena(1 << 40, Ledger()), 1024)
            kivi.fill(cache, rows, 256)
            arrays, _ = cache.dump()
            before = {name: array.copy() for name, array in arrays.items() if "blocks" in name}
            coded = sum(array.nbytes for name, array in before.items())
            held[bits, block] = 8 * coded / (2 * ONE_B.num_layers * ONE_B.row_values * 256)
            for layer in range(ONE_B.num_layers):
                cache.append(layer, rows[:1], rows[:1], np.array([256]))
                cache.settle(layer)
            after, _ = cache.dump()
            kept = kept and all((after[name][: len(array)] == array).all() for name, array in before.items())
            cache.release()
    yield Claim(
        claim="buffers hold p + 8/n bits a number, and a token's codes change nothing of those before",
        measured=", ".join(f"p={bits} n={block}: {value:g}" for (bits, block), value in held.items())
        + f"; earlier bytes {'unchanged' if kept else 'changed'}",
        required="exactly",
        passed=kept and all(value == bits + 8 / block for (bits, block), value in held.items()),
    )


class OrderedCache(BfpCache):
    """Key channels in any order, without a model that asks for it."""

    def __init__(self, shape: kv.CacheShape, capacity_tokens: int) -> None:
        super().__init__(parse("bfp(4bit,order=plain)"), shape, Arena(1 << 40, Ledger()), capacity_tokens)
        rng, heads = np.random.default_rng(2), shape.num_layers * shape.num_kv_heads
        orders = np.stack([rng.permutation(shape.head_dim) for _ in range(heads)]).astype(np.int16)
        self.given = orders.reshape(shape.num_layers, shape.num_kv_heads, shape.head_dim)

    def _order(self, layer: int) -> np.ndarray:
        return self.given[layer]


def speed_claims(sizes: Any, tick: Callable[[str], None]) -> Iterator[Claim]:
    rows = kivi.random_rows(ONE_B)
    q = np.random.default_rng(2).standard_normal((1, 32, 64), np.float32)
    out = np.empty_like(q)
    ratios = {}
    for length in (1024, 8192, 32768):
        tick(f"time at {length:,} tokens")
        caches = [
            kv.build(policy, ONE_B, Arena(1 << 40, Ledger()), length)
            for policy in (
                "float16",
                "bfp(4bit,order=plain)",
                "bfp(4bit,order=plain)",
                "kivi(4bit)",
            )
        ]
        caches.insert(2, OrderedCache(ONE_B, length))
        for cache in caches:
            kivi.fill(cache, rows, length)
        seconds = np.empty((sizes.rounds + 1, len(caches)))
        steps = max(16384 // length, 1)  # short ones are too quick for the clock one by one
        chance = np.random.default_rng(3)
        for turn in seconds:
            # what ran before leaves the processor's caches full of its own: each follows each in turn
            for index in chance.permutation(len(caches)):
                cache, began = caches[index], time.perf_counter()
                for _ in range(steps):
                    for layer in range(ONE_B.num_layers):
                        cache.attend(layer, q, np.array([length - 1]), out)
                turn[index] = (time.perf_counter() - began) / steps
        for cache in caches:
            cache.release()
        seconds = seconds[1:]
        ratios[length] = {
            "ordered": float(np.median(seconds[:, 2] / seconds[:, 1])),
            "again": float(np.median(seconds[:, 3] / seconds[:, 1])),
            "float16": float(np.median(seconds[:, 0] / seconds[:, 2])),
            "kivi": float(np.median(seconds[:, 4] / seconds[:, 2])),
            "ms": 1e3 * float(np.median(seconds[:, 2])),
        }
    shown = "; ".join(
        f"{length:,} tokens: {r['ms']:.2f} ms, ordered/plain {r['ordered']:.3f}, plain/plain {r['again']:.3f}"
        for length, r in ratios.items()
    )
    yield Claim(
        claim="the order costs no time in a decode step",
        measured=shown,
        required="a step with an order within 5 % of one without, at every length",
        passed=all(abs(r["ordered"] - 1) <= 0.05 for r in ratios.values()),
    )
    yield Claim(
        claim="fewer bytes are less time: a step over 4-bit blocks is faster than over float16 out of the cache memory",
        measured="; ".join(
            f"{length:,} tokens: {r['float16']:.2f} times float16's speed, {r['kivi']:.2f} times KIVI's at 4 bits"
            for length, r in ratios.items()
        ),
        required="faster than float16 at 32,768 tokens",
        passed=ratios[32768]["float16"] > 1,
    )


def run(quick: bool, data: Path | None, progress: Progress | None = None) -> list[Claim]:
    """All claims; quick: fewer tokens."""
    sizes, done, steps = (QUICK if quick else FULL), 0, (len(CELLS) + 1) * len(FACTORS) + 3

    def tick(what: str) -> None:
        nonlocal done
        if progress is not None:
            progress(min(done, steps), steps, what)
        done += 1

    claims, found = list(toy_claims()), []
    for factor in FACTORS:
        scores, exactness = quality(factor, data, sizes, tick)
        found.append(scores)
        claims += [exactness] if exactness is not None else []
    return [*claims, *quality_claims(found), *bytes_claims(), *speed_claims(sizes, tick)]


if __name__ == "__main__":
    sys.exit(main("bfp-outlier-reorder", sys.modules[__name__]))

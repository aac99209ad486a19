"""Rates of this machine's kernels, measured once in a few seconds and kept: what the speed model multiplies bytes with.

- matvec: bytes per second of one-token products, per weight format and for working sets inside and outside the last-
level cache, since
  a small model lives in the cache and a large one streams;
- prefill: multiply-adds per second of a block of tokens, per weight format;
- attend: seconds of one decode step's attention over a cache, per policy and head shape, at several lengths;
- overheads: seconds per layer and per token that do not depend on sizes, from a decoder too small to have any work.

Rates are medians of rounds, and of two passes the better: what a run will meet is the machine as it usually is, its
neighbours on a shared host included, while a pass in which something else held a processor says nothing. Attention is
timed in single steps, of which the slower half are those that found a thread asleep.
"""

from __future__ import annotations

import math
import platform
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from memwall import __version__, kernels, kv
from memwall.engine.loading import cache_shape
from memwall.engine.sampling import Sampler, Sampling
from memwall.formats import Packed, codec
from memwall.memory import Arena, Ledger
from memwall.models.config import EMBEDDING, HEAD, ModelConfig
from memwall.models.decoder import Decoder
from memwall.models.precision import MATRIX_ROLES, aligned, tensor_bytes
from memwall.models.weights import Weights
from memwall.plan import store

#: working sets in bytes: inside a second-level cache or two, inside a last-level cache, and so far outside that what it
#: still holds of them counts for little; close together where a cache of usual size ends: rates halve within a
#: few megabytes
WORKING_SETS_BYTES = (
    1_500_000,
    8_000_000,
    12_000_000,
    17_000_000,
    24_000_000,
    36_000_000,
    96_000_000,
    256_000_000,
)
PREFILL_TOKENS = 128
ATTEND_TOKENS = (64, 1024)
#: layers that attention is measured over in turn, with so many bytes of weights between two of them: in all a working
#: set inside a last-level cache, and one outside any
ATTEND_LAYERS = (2, 24)
BETWEEN_BYTES = 4_000_000
_ATTEND_SAMPLES = 96
#: a prompt's last queries, by which some caches choose what they keep of it
_PROMPT_QUERIES = 64
#: layers that overheads are measured on: one too small to have any work, one whose products are cut over the threads
TINY = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64}
WIDE = {
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
_SPEC = "int4-g64"
#: columns that products are measured with: short rows take longer a byte, as each ends in adding up lanes
COLUMNS = (256, 1024)
_MATRIX_WEIGHTS = 1 << 20
_MATRICES_PER_CALL = 4
#: what the figures are measured on; figures of another recipe are not comparable and are measured anew
_RECIPE = (WORKING_SETS_BYTES, COLUMNS, PREFILL_TOKENS, ATTEND_TOKENS, ATTEND_LAYERS, TINY, WIDE)
RECIPE = zlib.crc32(repr(_RECIPE).encode())
_SECONDS_PER_FIGURE = 0.03
_ROUNDS = 9


@dataclass(slots=True)
class KernelProfile:
    """Measured figures of one machine, thread count and instruction set; filled as they are asked for.

    key: what the figures hold for. figures: name -> number, or list of numbers, exactly as kept in the cache file.
    """

    key: str
    figures: dict[str, Any] = field(default_factory=dict)
    measure: bool = True
    _fresh: dict[str, Any] = field(default_factory=dict)

    def get(self, name: str, measured: Callable[[], Any]) -> Any:
        """The figure of this name, measuring it when absent; None when absent and not to be measured."""
        if name not in self.figures and self.measure:
            self.figures[name] = self._fresh[name] = measured()
        return self.figures.get(name)

    def matvec_bytes_per_s(self, spec: str, cols: int) -> list[float] | None:
        """One rate per working set, of matrices with about so many columns (the nearest of COLUMNS)."""
        cols = min(COLUMNS, key=lambda each: abs(math.log(each / cols)))
        return self.get(
            f"matvec {spec} x{cols}",
            lambda: _twice(max, lambda: [_matvec(spec, size, cols) for size in WORKING_SETS_BYTES]),
        )

    def prefill_macs_per_s(self, spec: str) -> float | None:
        """Multiply-adds per second of a block of PREFILL_TOKENS tokens."""
        return self.get(f"prefill {spec}", lambda: _prefill(spec))

    def attend_seconds(self, policy: str, shape: tuple[int, int, int]) -> list[float] | None:
        """Seconds of append, attention and settling of one token in one layer at each of ATTEND_TOKENS; shape is
        (heads, kv heads, size).
        """
        heads, kv_heads, head_dim = shape
        return self.get(
            f"attend {policy} {heads}x{kv_heads}x{head_dim}",
            lambda: _twice(min, lambda: _attend(policy, heads, kv_heads, head_dim)),
        )

    def overhead_seconds(self) -> list[float] | None:
        """[per tiny layer, per wide layer, per token, of a layer's share the cache's]."""
        return self.get("overhead", lambda: _twice(min, _overheads))

    def save(self) -> None:
        """Keep what was measured."""
        if self._fresh:
            kept = store.read("kernels").get(self.key)
            store.update("kernels", {self.key: (kept if isinstance(kept, dict) else {}) | self._fresh})
            self._fresh = {}


def load_profile(*, threads: int, measure: bool = True) -> KernelProfile:
    """The kept figures for this machine and `threads`; sets the thread count of the kernels when it may measure."""
    key = f"{__version__} {platform.node()} {platform.machine()} {kernels.isa()} {threads} threads {RECIPE:08x}"
    if measure:
        kernels.set_num_threads(threads)
    kept = store.read("kernels").get(key)
    figures = {name: value for name, value in kept.items() if _is_figure(value)} if isinstance(kept, dict) else {}
    return KernelProfile(key=key, figures=figures, measure=measure)


def _is_figure(value: Any) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return bool(numbers) and all(isinstance(one, int | float) and 0 <= one < float("inf") for one in numbers)


def _seconds(work: Callable[[], None], *, at_least: float = _SECONDS_PER_FIGURE) -> float:
    """Seconds of one call: enough calls per round to be timed, the median of the rounds."""
    work()
    began = time.perf_counter()
    work()
    once = max(time.perf_counter() - began, 1e-7)
    calls = max(1, int(at_least / _ROUNDS / once))
    rounds = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        for _ in range(calls):
            work()
        rounds.append((time.perf_counter() - began) / calls)
    return float(np.median(rounds))


def _twice(better: Callable[[float, float], float], measured: Callable[[], list[float]]) -> list[float]:
    """The better of two passes, figure by figure: now and then both threads share a processor for a whole pass."""
    return [better(one, other) for one, other in zip(measured(), measured(), strict=True)]


def random_packed(spec: str, shape: tuple[int, int], pool: np.ndarray, random: np.random.Generator) -> Packed:
    """A matrix of arbitrary content in the form of `spec`, laid into the first bytes of `pool` as a loader would."""
    buffers: dict[str, np.ndarray] = {}
    begin = 0
    for name, (extent, dtype) in codec(spec).buffers(shape).items():
        nbytes = int(np.prod(extent)) * dtype.itemsize
        buffer = pool[begin : begin + nbytes].view(dtype).reshape(extent)
        begin += aligned(nbytes)
        if dtype == np.uint8 and name == "codes":
            buffer[...] = random.integers(0, 256, extent, np.uint8)
        elif name == "wide":  # a form is timed with activations of 4 bits everywhere
            buffer[...] = 0
        elif name == "order":
            buffer[...] = random.permutation(len(buffer))
        elif name == "statistics":  # two levels of scales, which at random would not be numbers
            buffer[...] = codec(spec).encode(random.standard_normal((16, 16), np.float32)).buffers[name][0, 0]
        elif dtype == np.uint32:  # indices of vectors, of which any bits name one
            buffer[...] = random.integers(0, 1 << 32, extent, np.uint32)
        elif dtype == np.uint8:  # powers of two near one, which leave every sum a plain number; or codes of scales
            buffer[...] = random.integers(120, 128, extent, np.uint8)
        else:
            buffer[...] = (random.random(extent, np.float32) * 0.02 - 0.01).astype(dtype)
        buffers[name] = buffer
    return Packed(spec=spec, shape=shape, buffers=buffers)


def _matrices(
    spec: str, working_set_bytes: int, arena: Arena, cols: int = COLUMNS[-1]
) -> tuple[list[kernels.Matrix], np.ndarray]:
    """So many matrices of _MATRIX_WEIGHTS that together they are the working set, and the memory they lie in."""
    shape = (_MATRIX_WEIGHTS // cols, cols)
    each = sum(aligned(math.prod(s) * d.itemsize) for s, d in codec(spec).buffers(shape).values())
    count = max(1, round(working_set_bytes / each))
    pool = arena.allocate("profile", count * each, np.uint8)
    packed = random_packed(spec, shape, pool, np.random.default_rng(0))
    for index in range(1, count):
        # copies: the time does not depend on the values, and drawing them anew would take longer than the measurement
        pool[index * each : (index + 1) * each] = pool[:each]
    matrices = []
    for index in range(count):
        offset = index * each
        buffers = {}
        for name, array in packed.buffers.items():
            start = offset + array.ctypes.data - pool.ctypes.data
            buffers[name] = pool[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        matrices.append(kernels.matrix(Packed(spec=spec, shape=shape, buffers=buffers)))
    return matrices, pool


def _matvec(spec: str, working_set_bytes: int, cols: int) -> float:
    arena = Arena(1 << 62, Ledger())
    matrices, pool = _matrices(spec, working_set_bytes, arena, cols)
    rows = _MATRIX_WEIGHTS // cols
    x = np.random.default_rng(1).standard_normal((1, cols), np.float32)
    outs = [np.empty((1, rows), np.float32) for _ in range(_MATRICES_PER_CALL)]
    # several at once, as a layer does: the cost of a call is in the overheads and not wanted here
    calls = [matrices[begin : begin + _MATRICES_PER_CALL] for begin in range(0, len(matrices), _MATRICES_PER_CALL)]

    def sweep() -> None:
        for group in calls:
            kernels.linear(x, group, outs[: len(group)])

    nbytes = sum(matrix.nbytes for matrix in matrices)
    rate = nbytes / _seconds(sweep)
    arena.free(pool)
    return rate


def _prefill(spec: str) -> float:
    arena = Arena(1 << 62, Ledger())
    matrices, pool = _matrices(spec, 2_000_000, arena)
    cols = COLUMNS[-1]
    rows = _MATRIX_WEIGHTS // cols
    x = np.random.default_rng(1).standard_normal((PREFILL_TOKENS, cols), np.float32)
    outs = [np.empty((PREFILL_TOKENS, rows), np.float32) for _ in matrices]
    seconds = _seconds(lambda: kernels.linear(x, matrices, outs))
    arena.free(pool)
    return len(matrices) * PREFILL_TOKENS * rows * cols / seconds


def _attend(policy: str, heads: int, kv_heads: int, head_dim: int) -> list[float]:
    """Single decode steps over several layers' caches in turn, each after a product that reads BETWEEN_BYTES.

    The products do to the processor's caches what the weights do between two visits of a layer, and keep the threads
    awake. With few layers a cache is found again in the last-level cache, with many it is not.
    """
    arena = Arena(1 << 62, Ledger())
    cols = COLUMNS[-1]
    rows = _MATRIX_WEIGHTS // cols
    x = np.ones((1, cols), np.float32)
    seconds = []
    for num_layers in ATTEND_LAYERS:
        matrices, pool = _matrices("int8-g64", num_layers * BETWEEN_BYTES, arena)
        share = -(-len(matrices) // num_layers)
        outs = [np.empty((1, rows), np.float32) for _ in range(share)]
        for length in ATTEND_TOKENS:
            samples = []
            with _cache_steps(policy, heads, kv_heads, head_dim, length, num_layers) as steps:
                for index in range(_ATTEND_SAMPLES):
                    layer = index % num_layers
                    between = matrices[layer * share : (layer + 1) * share]
                    kernels.linear(x, between, outs[: len(between)])
                    began = time.perf_counter()
                    steps[layer]()
                    samples.append(time.perf_counter() - began)
            # the mean of the better half of those after the first round, which finds nothing where it belongs
            kept = sorted(samples[num_layers:])
            seconds.append(float(np.mean(kept[: len(kept) // 2])))
        arena.free(pool)
    return seconds


@contextmanager
def _cache_steps(
    policy: str, heads: int, kv_heads: int, head_dim: int, length: int, num_layers: int
) -> Iterator[list[Callable[[], None]]]:
    """Of each layer, to be called in turn; `length` tokens are in the cache already.

    Each layer has a cache of its own, but for those with processes beside them, which serve all layers of a sequence.
    """
    shape = kv.CacheShape(num_layers=1, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim)
    together = kv.processes(policy, shape) > 0
    caches: list[kv.KVCache] = []
    try:
        for _ in range(1 if together else num_layers):
            caches.append(_empty_cache(policy, replace(shape, num_layers=num_layers if together else 1), length))
        yield [_cache_step(cache, layer, length) for cache in caches for layer in range(cache.shape.num_layers)]
    finally:
        for cache in caches:
            cache.release()


def _empty_cache(policy: str, shape: kv.CacheShape, length: int) -> kv.KVCache:
    return kv.build(policy, shape, Arena(1 << 62, Ledger()), 4 * length + 4096)


def _cache_step(cache: kv.KVCache, layer: int, length: int) -> Callable[[], None]:
    random = np.random.default_rng(0)
    heads, kv_heads, head_dim = cache.shape.num_heads, cache.shape.num_kv_heads, cache.shape.head_dim
    keys = random.standard_normal((length, kv_heads, head_dim), np.float32)
    last = random.standard_normal((min(_PROMPT_QUERIES, length), heads, head_dim), np.float32)
    cache.append(layer, keys, keys.copy(), np.arange(length))
    cache.attend(layer, last, np.arange(length - len(last), length), np.empty_like(last))
    cache.settle(layer)
    query = random.standard_normal((1, heads, head_dim), np.float32)
    out = np.empty_like(query)
    new_key, new_value = keys[:1].copy(), keys[:1].copy()

    def step() -> None:
        position = np.asarray([cache.length])
        cache.append(layer, new_key, new_value, position)
        cache.attend(layer, query, position, out)
        cache.settle(layer)

    return step


def _overheads() -> list[float]:
    """Per layer (tiny and wide), per token, and the cache's part of a layer: differences of decoders of two depths.

    A wide layer's products are cut over the threads, which costs what no rate shows; its bytes over the rate are taken
    off. A layer includes one cache step with next to nothing in the cache, given apart so that the speed model can put
    the real attention in its place.
    """
    few, many = (_seconds(_decode_step(TINY, num_layers)) for num_layers in (2, 10))
    tiny = max((many - few) / 8, 1e-6)
    one, three = (_seconds(_decode_step(WIDE, num_layers)) for num_layers in (1, 3))
    # three layers' worth: what the deeper of the two sweeps over
    nbytes = layer_weights(WIDE) * codec(_SPEC).nbytes((16, 64)) / (16 * 64)
    reading = nbytes / _matvec(_SPEC, int(3 * nbytes), WIDE["hidden_size"])
    wide = max((three - one) / 2 - reading, tiny)
    with _cache_steps("float16", 1, 1, 64, 16, 1) as steps:
        cache_step = _seconds(steps[0], at_least=0.01)
    return [tiny, wide, max(few - 2 * tiny, 1e-6), min(cache_step, tiny)]


def layer_weights(sizes: Mapping[str, int]) -> int:
    """Weights in the matrices of one layer of these sizes."""
    hidden, head_dim = sizes["hidden_size"], sizes["head_dim"]
    heads = 2 * sizes["num_attention_heads"] + 2 * sizes["num_key_value_heads"]
    return hidden * (heads * head_dim + 3 * sizes["intermediate_size"])


def _decode_step(sizes: Mapping[str, int], num_layers: int) -> Callable[[], None]:
    config = ModelConfig.from_dict(
        {
            "architectures": ["LlamaForCausalLM"],
            "num_hidden_layers": num_layers,
            "vocab_size": 64,
            "max_position_embeddings": 1 << 16,
            "tie_word_embeddings": True,
            **sizes,
        },
        "profile",
    )
    random = np.random.default_rng(0)
    arena = Arena(1 << 62, Ledger())
    weights = Weights(matrices={}, vectors={}, specs={})
    for tensor in config.tensors():
        if tensor.role in MATRIX_ROLES:
            pool = arena.allocate("profile", tensor_bytes(tensor, _SPEC), np.uint8)
            packed = random_packed(_SPEC, (tensor.shape[0], tensor.shape[1]), pool, random)
            weights.matrices[tensor.name] = kernels.matrix(packed)
        else:
            weights.vectors[tensor.name] = np.ones(tensor.shape, np.float32)
    weights.matrices[HEAD] = weights.matrices[EMBEDDING]
    decoder = Decoder(config, weights, arena, segment_tokens=1)
    cache = kv.build("float16", cache_shape(config), arena, 1 << 16)
    sampler = Sampler(Sampling())
    token = 1

    def step() -> None:
        nonlocal token
        if cache.length > 32:
            cache.truncate(1)
        token = sampler.pick(decoder.forward(np.asarray([token]), cache))

    return step

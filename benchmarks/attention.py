"""Time of a decode step's attention and of a prompt's, over full-precision caches and KIVI's, beside torch.

    python benchmarks/attention.py [--threads 2] [--heads 32 --kv-heads 8 --head-dim 64] [--lengths 4096 32768]

All contenders take turns inside each round; medians of the rounds and of their ratios are printed, then one JSON line.
torch's scaled_dot_product_attention (float32 and bfloat16) is left out where torch is not installed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from datetime import date

import numpy as np

from memwall import kernels, kv
from memwall.claims import describe_machine
from memwall.memory import Arena, Ledger

POLICIES = ("float32", "float16", "bfloat16", "kivi(8bit)", "kivi(4bit)", "kivi(3bit)", "kivi(2bit)")


def filled(policy: str, shape: kv.CacheShape, length: int) -> kv.KVCache:
    cache = kv.build(policy, shape, Arena(1 << 40, Ledger()), length)
    rows = np.random.default_rng(0).standard_normal((length, shape.num_kv_heads, shape.head_dim), np.float32)
    for layer in range(shape.num_layers):
        cache.append(layer, rows, rows, np.arange(length))
        cache.settle(layer)
    return cache


def over_layers(cache: kv.KVCache, q: np.ndarray, first: int) -> Callable[[], None]:
    positions, out = np.arange(first, first + len(q)), np.empty_like(q)

    def step() -> None:
        for layer in range(cache.shape.num_layers):
            cache.attend(layer, q, positions, out)

    return step


TORCH_TYPES = ("float32", "bfloat16")


def torch_step(shape: kv.CacheShape, length: int, q: np.ndarray, threads: int, dtype: str) -> Callable[[], None] | None:
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(threads)
    kind = getattr(torch, dtype)
    rows = torch.randn(shape.num_layers, 1, shape.num_kv_heads, length, shape.head_dim).to(kind)
    query = torch.from_numpy(q).transpose(0, 1)[None].contiguous().to(kind)
    attend = torch.nn.functional.scaled_dot_product_attention

    def step() -> None:
        for layer in rows:
            attend(query, layer, layer, is_causal=len(q) > 1, enable_gqa=True)

    return step


def measure(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, dict[str, float]]:
    seconds = np.empty((rounds + 1, len(steps)))
    for turn in seconds:
        for index, step in enumerate(steps.values()):
            began = time.perf_counter()
            step()
            turn[index] = time.perf_counter() - began
    half = list(steps).index("float16")
    return {
        name: {
            "milliseconds": round(1e3 * float(np.median(seconds[1:, i])), 4),
            "times_faster_than_float16": round(float(np.median(seconds[1:, half] / seconds[1:, i])), 3),
        }
        for i, name in enumerate(steps)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("threads", 2),
        ("layers", 4),
        ("heads", 32),
        ("kv-heads", 8),
        ("head-dim", 64),
        ("rounds", 9),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 8192, 32768])
    parser.add_argument("--prompt", type=int, default=512)
    options = parser.parse_args()
    kernels.set_num_threads(options.threads)
    shape = kv.CacheShape(
        num_layers=options.layers, num_heads=options.heads, num_kv_heads=options.kv_heads, head_dim=options.head_dim
    )
    results = {}
    for num_queries, length in [(1, length) for length in options.lengths] + [(options.prompt, options.prompt)]:
        q = np.random.default_rng(1).standard_normal((num_queries, options.heads, options.head_dim), np.float32)
        caches = {
            policy: filled(policy, shape, length) for policy in POLICIES if num_queries == 1 or "kivi" not in policy
        }
        steps = {policy: over_layers(cache, q, length - num_queries) for policy, cache in caches.items()}
        for dtype in TORCH_TYPES:
            peer = torch_step(shape, length, q, options.threads, dtype)
            if peer is not None:
                steps[f"torch {dtype}"] = peer
        name = f"decode at {length}" if num_queries == 1 else f"prompt of {length}"
        results[name] = measure(steps, options.rounds)
        for contender, figures in results[name].items():
            print(f"{name:>16}  {contender:14} {figures['milliseconds']:9.3f} ms  "
                  f"{figures['times_faster_than_float16']:6.2f} x float16")  # fmt: skip
        for cache in caches.values():
            cache.release()
    print(json.dumps({
        "machine": describe_machine(), "isa": kernels.isa(), "date": date.today().isoformat(), **vars(options),
        "results": results,
    }))  # fmt: skip


if __name__ == "__main__":
    main()

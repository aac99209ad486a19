"""KV caches: what a model remembers of a sequence, and in how many bytes.

base: the seam (`KVCache`, `CacheShape`); policy: policy strings; float_store: full precision; kivi: 2 to 8 bits per
number. `build` makes the cache that a policy string names; `predict` and `read_bytes` say beforehand what it will hold
and read.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from memwall.errors import InputError
from memwall.kv.base import CacheShape, KVCache
from memwall.kv.policy import Policy, parse

if TYPE_CHECKING:
    from memwall.memory import Arena

__all__ = ["POLICIES", "CacheShape", "KVCache", "Policy", "build", "codes_prompt", "parse", "predict", "read_bytes"]

POLICIES = {
    "float32": "memwall.kv.float_store:FloatCache",
    "float16": "memwall.kv.float_store:FloatCache",
    "bfloat16": "memwall.kv.float_store:FloatCache",
    "kivi": "memwall.kv.kivi:KiviCache",
}
"""Policy name -> "module:Class", loaded on demand."""


def build(policy: str, shape: CacheShape, arena: Arena, capacity_tokens: int) -> KVCache:
    """An empty cache for one sequence of up to `capacity_tokens`. It takes memory from the arena as tokens come."""
    parsed = parse(policy)
    cache: KVCache = _technique(parsed)(parsed, shape, arena, capacity_tokens)
    return cache


def predict(
    policy: str, shape: CacheShape, num_tokens: int, prefill_tokens: int = 0, capacity_tokens: int | None = None
) -> dict[str, int]:
    """Exact bytes per ledger owner of a cache that holds `num_tokens`, and of the prompt's staging beside it.

    num_tokens: the tokens it holds.
    prefill_tokens: the most tokens appended at once; their staging (`kv/staging`) goes when the last layer settles.
    capacity_tokens: what the cache is built for, `num_tokens` unless given.
    """
    parsed = parse(policy)
    sizes: dict[str, int] = _technique(parsed).predict(
        parsed, shape, num_tokens, prefill_tokens, capacity_tokens or max(num_tokens, 1)
    )
    return sizes


def codes_prompt(policy: str) -> bool:
    """Whether a prompt must be fed in one segment for its tokens to attend to each other exactly."""
    return bool(_technique(parse(policy)).codes_prompt)


def read_bytes(policy: str, shape: CacheShape, num_tokens: int) -> int:
    """Bytes that one decode step reads from a cache of `num_tokens`."""
    parsed = parse(policy)
    return int(_technique(parsed).read_bytes(parsed, shape, num_tokens))


def _technique(policy: Policy) -> Any:
    if policy.name not in POLICIES:
        raise InputError(f"unknown KV policy {policy.name!r}; known: {', '.join(POLICIES)}")
    module, name = POLICIES[policy.name].split(":")
    return getattr(import_module(module), name)

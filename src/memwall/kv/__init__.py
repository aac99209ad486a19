"""KV caches: what a model remembers of a sequence, and in how many bytes.

base: the seam (`KVCache`, `CacheShape`, `CacheModel`); policy: policy strings; table: which policy is which class, and
how they nest; float_store: full precision; then one file per technique (virtual_cache: one sequence in vattention's
store). `build` makes the cache that a policy string
names; `predict` and `read_bytes` say beforehand what it will hold and read, `savings` what each part of it is good for.
"""

from __future__ import annotations

from memwall.kv.base import CacheModel, CacheShape, KVCache, StateShape
from memwall.kv.policy import Policy, parse
from memwall.kv.savings import Savings, held_bytes, savings
from memwall.kv.table import (
    POLICIES,
    STATE,
    build,
    building_bytes,
    codes_prompt,
    needs_model,
    packs_positions,
    predict,
    processes,
    read_bytes,
    resolve,
    seen_tokens,
    step_macs,
    tiers,
    timed,
)

__all__ = [
    "POLICIES",
    "STATE",
    "CacheModel",
    "CacheShape",
    "KVCache",
    "Policy",
    "Savings",
    "StateShape",
    "build",
    "building_bytes",
    "codes_prompt",
    "held_bytes",
    "needs_model",
    "packs_positions",
    "parse",
    "predict",
    "processes",
    "read_bytes",
    "resolve",
    "savings",
    "seen_tokens",
    "step_macs",
    "tiers",
    "timed",
]

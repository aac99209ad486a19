"""The table of cache policies, and how a policy string becomes a cache.

A string may join policies of different roles: one that chooses tokens, one that chooses channels, one that stores. They
are nested in that order whatever order they are written in; the outer one holds the inner and hands it what it keeps.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from memwall.errors import InputError
from memwall.kv.base import ROLES, CacheModel, CacheShape, KVCache
from memwall.kv.policy import AMOUNT, Policy, parse, stacked

if TYPE_CHECKING:
    from memwall.memory import Arena

POLICIES = {
    "float32": "memwall.kv.float_store:FloatCache",
    "float16": "memwall.kv.float_store:FloatCache",
    "bfloat16": "memwall.kv.float_store:FloatCache",
    "int8": "memwall.kv.float_store:FloatCache",
    "int4": "memwall.kv.int4_store:Int4Cache",
    "kivi": "memwall.kv.kivi:KiviCache",
    "kv4": "memwall.kv.kv4:Kv4Cache",
    "bfp": "memwall.kv.bfp_outlier_reorder:BfpCache",
    "snapkv": "memwall.kv.snapkv:SnapCache",
    "think": "memwall.kv.think:ThinkCache",
    "vattention": "memwall.kv.virtual_cache:VirtualCache",
    "xquant": "memwall.kv.xquant:XQuantCache",
    "cskv": "memwall.kv.cskv:CskvCache",
    "locret": "memwall.kv.locret:LocretCache",
    "epicache": "memwall.kv.epicache:EpiCache",
    "instinfer": "memwall.kv.instinfer:InstInferCache",
    "lambda": "memwall.kv.lambda_shaped:LambdaCache",
}
"""Policy name -> "module:Class", loaded on demand."""

CODECS = {
    "cachegen": "memwall.kv.cachegen_file:CacheGenFile",
}
"""Codec of saved caches -> "module:Class", loaded on demand."""

LEARNERS = {**CODECS, "cache-craft": "memwall.kv.cache_craft_fit:CacheCraftFit"}
"""What is no cache policy but learns from a model -> "module:Class"."""

_DOES = {
    "tokens": "choose the tokens that stay",
    "channels": "choose the channels that stay",
    "store": "store the rows",
}

BUDGET = "budget"

DEFAULT_STORE = Policy("float16")
"""What keeps the rows where a policy string names no store."""

STATE = "state"
"""The one policy of models without attention; it is no choice for others."""
_PLACES = {**POLICIES, STATE: "memwall.kv.ssm_state:StateCache"}
_PLAIN = ("float32", "float16", "bfloat16", STATE)


def technique(name: str) -> type[KVCache]:
    """The class behind a policy's name."""
    if name not in _PLACES:
        raise InputError(f"unknown KV policy {name!r}; known: {', '.join(POLICIES)}")
    return _loaded(_PLACES[name])


@lru_cache(maxsize=64)
def _loaded(place: str) -> type[KVCache]:
    module, class_name = place.split(":")
    found: type[KVCache] = getattr(import_module(module), class_name)
    return found


def codec(name: str) -> Any:
    """The class behind the name of a codec of saved caches."""
    if name not in CODECS:
        raise InputError(f"unknown codec of saved caches {name!r}; known: exact, {', '.join(CODECS)}")
    return learner(name)


def learner(name: str) -> Any:
    """The class behind a name of LEARNERS."""
    module, class_name = LEARNERS[name].split(":")
    return getattr(import_module(module), class_name)


def resolve(policy: str | Policy) -> Policy:
    """A policy whose parts are known, go together, are nested by role and end in a store.

    InputError for unknown names and for parts that cannot work on top of each other, saying why.
    """
    return _read(policy) if isinstance(policy, str) else _resolved(policy, str(policy))


@lru_cache(maxsize=256)
def _read(policy: str) -> Policy:
    """Of a string, which is asked for at every token where memory is predicted."""
    return _resolved(parse(policy), policy)


@lru_cache(maxsize=256)
def _resolved(policy: Policy, text: str) -> Policy:
    """text: how it was written, as settings are told in the order that they came in."""
    parts = policy.parts
    kinds = {part.name: technique(part.name) for part in parts}
    parts = tuple(_with_budget(part) if kinds[part.name].role == "tokens" else part for part in parts)
    ordered = sorted(parts, key=lambda part: ROLES.index(kinds[part.name].role))
    for outer, inner in itertools.pairwise(ordered):
        if kinds[outer.name].role == kinds[inner.name].role:
            raise InputError(
                f"KV policy {policy}: {outer.name} and {inner.name} both {_DOES[kinds[outer.name].role]}; name one"
            )
    if kinds[ordered[-1].name].role != "store":
        ordered.append(DEFAULT_STORE)
        kinds[DEFAULT_STORE.name] = technique(DEFAULT_STORE.name)
    for place, outer in enumerate(ordered):
        for inner in ordered[place + 1 :]:
            if kinds[inner.name].takes_inputs:
                raise InputError(
                    f"KV policy {policy}: {outer.name} does not work on top of {inner.name}, which keeps what whole "
                    f"layers read, of all tokens; use {inner.name} alone"
                )
            reason = kinds[outer.name].refuses.get(inner.name)
            if reason is not None:
                raise InputError(f"KV policy {policy}: {outer.name} does not work on top of {inner.name}: {reason}")
    return stacked(tuple(ordered))


def resolve_for(policy: str | Policy, shape: CacheShape) -> Policy:
    """The same for one model: with a state in place of keys and values, a type of floats means that state."""
    resolved = resolve(policy)
    if shape.state is None:
        if STATE in (part.name for part in resolved.parts):
            raise InputError(f"KV policy {policy}: this model keeps keys and values; use {', '.join(POLICIES)}")
        return resolved
    if resolved.inner is not None or resolved.name not in _PLAIN:
        raise InputError(
            f"KV policy {policy}: this model keeps a state of fixed size and no keys and values; use --kv {STATE}"
        )
    return Policy(STATE, resolved.settings)


def _with_budget(part: Policy) -> Policy:
    """`budget=0.25` is the long form of the bare number of a policy that chooses tokens: the share that stays."""
    if BUDGET not in part.settings:
        return part
    if AMOUNT in part.settings:
        raise InputError(f"policy {part}: a bare number and {BUDGET}= say the same thing; give one")
    settings = {AMOUNT if key == BUDGET else key: value for key, value in part.settings.items()}
    return replace(part, settings=settings)


def build(
    policy: str | Policy, shape: CacheShape, arena: Arena, capacity_tokens: int, model: CacheModel | None = None
) -> KVCache:
    """An empty cache for one sequence of up to `capacity_tokens`. It takes memory from the arena as tokens come.

    model: the model whose keys and values it will hold, for policies that look into it (`KVCache.needs_model`).
    """
    resolved = resolve_for(policy, shape)
    for part in resolved.parts:
        if technique(part.name).must_have_model(part) and model is None:
            raise InputError(f"KV policy {part.name} works with a loaded model's own weights; none is given here")
    make: Callable[..., KVCache] = technique(resolved.name)
    return make(resolved, shape, arena, capacity_tokens, model)


def predict(
    policy: str | Policy,
    shape: CacheShape,
    num_tokens: int,
    prefill_tokens: int = 0,
    capacity_tokens: int | None = None,
) -> dict[str, int]:
    """Exact bytes per ledger owner of a cache that holds `num_tokens`, and of the prompt's staging beside it.

    num_tokens: the tokens taken in.
    prefill_tokens: those of the prompt, which come at once; their staging (`kv/staging`) goes when all layers settled.
    A cache that drops prompt tokens drops none where this is 0.
    capacity_tokens: what the cache is built for, `num_tokens` unless given.
    """
    resolved = resolve_for(policy, shape)
    return technique(resolved.name).predict(
        resolved, shape, num_tokens, prefill_tokens, capacity_tokens or max(num_tokens, 1)
    )


def codes_prompt(policy: str) -> bool:
    """Whether a prompt must be fed in one segment for its tokens to attend to each other exactly."""
    kinds = [technique(part.name) for part in resolve(policy).parts]
    return any(kind.codes_prompt for kind in kinds) and not any(kind.streams_prompt for kind in kinds)


def needs_model(policy: str) -> bool:
    """Whether a part of the policy looks into the model, so that its cache can't be tried without one."""
    return any(technique(part.name).must_have_model(part) for part in resolve(policy).parts)


def timed(policy: str) -> str:
    """The policy that stands for this one where steps are timed without a model: its own, or one of the same work;
    else the default store, since rebuilt rows are attended to as plain ones.
    """
    parts = [technique(part.name).timed(part) for part in resolve(policy).parts]
    known = tuple(part for part in parts if part is not None)
    return str(stacked(known)) if len(known) == len(parts) else str(DEFAULT_STORE)


def packs_positions(policy: str) -> bool:
    """Whether the tokens kept are numbered anew, so that a sequence may outgrow the positions that the model knows."""
    return any(technique(part.name).packs_positions for part in resolve(policy).parts)


def read_bytes(policy: str | Policy, shape: CacheShape, num_tokens: int) -> int:
    """Bytes that one decode step reads from a cache of `num_tokens`, which came as one prompt where that matters."""
    resolved = resolve_for(policy, shape)
    return technique(resolved.name).read_bytes(resolved, shape, num_tokens)


def tiers(policy: str | Policy) -> dict[str, str]:
    """Ledger owners of a policy's cache that are not on the tier of the cache itself, and where they are."""
    return {owner: tier for part in resolve(policy).parts for owner, tier in technique(part.name).tiers.items()}


def processes(policy: str | Policy, shape: CacheShape) -> int:
    """Processes that a policy's cache starts beside this one."""
    return sum(technique(part.name).processes(part, shape) for part in resolve_for(policy, shape).parts)


def building_bytes(policy: str | Policy, shape: CacheShape) -> int:
    """The most that making an empty cache holds for a moment beyond it."""
    return max(technique(part.name).building_bytes(part, shape) for part in resolve_for(policy, shape).parts)


def seen_tokens(policy: str | Policy, shape: CacheShape, num_tokens: int) -> int:
    """Tokens that one decode step attends to with `num_tokens` taken in."""
    resolved = resolve(policy)
    return technique(resolved.name).seen_tokens(resolved, shape, num_tokens)


def step_macs(policy: str | Policy, shape: CacheShape, num_tokens: int) -> int:
    """Multiply-adds that one decode step spends on a cache of `num_tokens` beyond attention itself."""
    resolved = resolve_for(policy, shape)
    return technique(resolved.name).step_macs(resolved, shape, num_tokens)

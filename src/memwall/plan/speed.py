"""Tokens per second before anything runs: bytes over measured rates, plus overheads.

A decode step reads every weight it uses once and the whole cache once, so

    seconds = sum over matrices of bytes / rate(format, working set)
            + layers x attention(policy, heads, context)
            + layers x layer overhead + token overhead

where the working set is all that one step reads: below the size of the last-level cache rates are those of the cache.
Several sequences share one reading of the weights, until their multiply-adds take longer (`simulate.marlin`).
A cache that rebuilds its keys multiplies for them besides; that part of a step takes the longer of reading and
arithmetic, max(bytes / rate, multiply-adds / rate), and attention then finds its rows near.
A prompt costs multiply-adds over the prefill rate of each format, and attention for half the prompt on average.
Another machine than this one has no measured kernels: there the rate is the bandwidth of its preset times the share
of it that kernels reach (EFFICIENCY, a model figure).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from memwall import kv
from memwall.engine.loading import cache_shape
from memwall.formats import codec
from memwall.hardware.machine import Machine
from memwall.models.config import ModelConfig, TensorSpec
from memwall.models.precision import is_matrix, tensor_bytes
from memwall.plan.base import Choice
from memwall.plan.profile import (
    ATTEND_LAYERS,
    ATTEND_TOKENS,
    BETWEEN_BYTES,
    PREFILL_TOKENS,
    TINY,
    WIDE,
    WORKING_SETS_BYTES,
    KernelProfile,
    layer_weights,
)
from memwall.simulate import marlin

#: share of a machine's nominal bandwidth and arithmetic that decoding and prefill reach (model figures; survey of
#: published runs: 0.5-0.85)
EFFICIENCY = 0.65

#: working sets that attention is measured in
ATTEND_BYTES = tuple(layers * BETWEEN_BYTES for layers in ATTEND_LAYERS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Predicted tokens per second: decode at the end of the context and with an empty cache, and prefill."""

    decode_tokens_per_s: float
    decode_tokens_per_s_at_start: float
    prefill_tokens_per_s: float


def used_share(config: ModelConfig, tensor: TensorSpec) -> float:
    """Which part of a matrix one token reads: one row of the embedding, the routed experts, otherwise all."""
    if tensor.role == "embedding" and not config.tie_word_embeddings:
        return 1 / tensor.shape[0]
    if tensor.role == "expert":
        return config.num_experts_per_token / config.num_experts
    return 1.0


def typical_columns(config: ModelConfig) -> int:
    """Columns of the model's matrices, a mean over their weights."""
    read = [
        (used_share(config, tensor) * tensor.size, tensor.shape[1]) for tensor in config.tensors() if is_matrix(tensor)
    ]
    return round(sum(size * cols for size, cols in read) / sum(size for size, _ in read))


def step_bytes(config: ModelConfig, specs: Mapping[str, str]) -> dict[str, float]:
    """Weight bytes one decode step reads, per format that is timed."""
    totals: dict[str, float] = {}
    for tensor in config.tensors():
        if is_matrix(tensor):
            spec = codec(specs[tensor.name]).timed
            read = used_share(config, tensor) * tensor_bytes(tensor, specs[tensor.name])
            totals[spec] = totals.get(spec, 0.0) + read
    return totals


def step_macs(config: ModelConfig, specs: Mapping[str, str]) -> dict[str, float]:
    """Multiply-adds per token inside the layers, per timed format; the head runs once per prompt and is left out."""
    totals: dict[str, float] = {}
    for tensor in config.tensors():
        if tensor.role in ("linear", "expert"):
            spec = codec(specs[tensor.name]).timed
            totals[spec] = totals.get(spec, 0.0) + used_share(config, tensor) * tensor.size
    return totals


def predict_here(
    config: ModelConfig, specs: Mapping[str, str], choice: Choice, cache_bytes: int, profile: KernelProfile
) -> Speed | None:
    """From rates measured on this machine; None when a figure is missing and may not be measured.

    cache_bytes: bytes of the cache of one sequence at the end of the context.
    """
    weights, macs = step_bytes(config, specs), step_macs(config, specs)
    heads = (config.num_heads, config.num_kv_heads, config.head_dim)
    cols = typical_columns(config)
    rates = {spec: profile.matvec_bytes_per_s(spec, cols) for spec in weights}
    blocks = {spec: profile.prefill_macs_per_s(spec) for spec in macs}
    if config.ssm is None:
        attend, state_bytes = profile.attend_seconds(kv.timed(choice.kv), heads), 0
    else:  # no attention; the state is read and written as weights are read
        attend, state_bytes = [0.0] * 4, kv.read_bytes(choice.kv, cache_shape(config), 1)
    overhead = profile.overhead_seconds()
    if attend is None or overhead is None or None in rates.values() or None in blocks.values():
        return None
    rebuild_rate = min((rate for rate in blocks.values() if rate), default=math.inf)
    tiny, wide, per_token, cache_step = overhead
    # the format most of a step is spent on tells which part of it comes from far
    widest = rates[max(weights, key=lambda spec: weights[spec])] or []
    per_layer = _between(step_macs(config, specs), config.num_layers, tiny, wide)

    def step_seconds(context: float, held_bytes: float) -> float:
        working_set = sum(weights.values()) + held_bytes * choice.batch
        matrices = 0.0
        for spec, size in weights.items():
            rate, work = _at(working_set, rates[spec] or []), macs.get(spec, 0.0) * choice.batch
            # a batch of one is what was timed; more tokens are worked on by the kernels that prompts take
            alone = choice.batch == 1
            matrices += size / rate if alone else marlin.step_seconds(size, rate, work, blocks.get(spec) or math.inf)
        rebuilt = _rebuilding(config, choice.kv, context)
        far = 0.0 if rebuilt is not None else _share_from_far(working_set, widest)
        steps = (_attention(seen, far, attend) for seen in _seen(config, choice.kv, context))
        attention = sum(max(step - cache_step, 0.0) for step in steps) * choice.batch
        if rebuilt is not None:
            reading = rebuilt.read_bytes / max(_at(working_set, rate or [math.inf]) for rate in rates.values())
            attention += max(reading, rebuilt.macs / rebuild_rate) * choice.batch
        states = choice.batch * state_bytes / max(_at(working_set, widest or [math.inf]), 1.0)
        return matrices + attention + states + config.num_layers * per_layer + per_token

    prompt = min(choice.segment_tokens, choice.context)
    block = sum(size / (blocks[spec] or math.inf) for spec, size in macs.items())
    # per token of a block the overheads are shared by the block; attention over half the prompt, several rows at a time
    shared = (config.num_layers * per_layer + per_token) / min(prompt, PREFILL_TOKENS)
    # rows of a block share what they read, so the cache counts as near
    near = (_attention(seen, 0, attend) - _attention(0, 0, attend) for seen in _seen(config, choice.kv, prompt / 2))
    prefill = block + shared + sum(max(step, 0.0) for step in near)
    return Speed(
        decode_tokens_per_s=choice.batch / step_seconds(choice.context, cache_bytes),
        decode_tokens_per_s_at_start=choice.batch / step_seconds(0, 0),
        prefill_tokens_per_s=1 / prefill,
    )


def predict_elsewhere(
    config: ModelConfig, specs: Mapping[str, str], choice: Choice, cache_bytes: int, machine: Machine, tier: str
) -> Speed:
    """Roofline on another machine's description; tier holds weights and cache."""
    bandwidth = machine.tier(tier).read_bytes_per_s * EFFICIENCY
    weights = sum(step_bytes(config, specs).values())
    macs = sum(step_macs(config, specs).values())
    peak = _peak_flop_per_s(machine, tier) * EFFICIENCY
    rebuilt = _rebuilding(config, choice.kv, choice.context)
    moved, more_macs = (cache_bytes, 0) if rebuilt is None else (rebuilt.read_bytes, rebuilt.macs)
    at_end = max((weights + moved * choice.batch) / bandwidth, 2 * (macs + more_macs) * choice.batch / peak)
    at_start = max(weights / bandwidth, 2 * macs * choice.batch / peak)
    prompt = min(choice.segment_tokens, choice.context)
    prefill = max(2 * macs / peak, weights / bandwidth / prompt)
    return Speed(
        decode_tokens_per_s=choice.batch / at_end,
        decode_tokens_per_s_at_start=choice.batch / at_start,
        prefill_tokens_per_s=1 / prefill,
    )


@dataclass(frozen=True, slots=True)
class Rebuilding:
    """What one decode step spends on rebuilding keys from the cache."""

    read_bytes: int
    macs: int


def _rebuilding(config: ModelConfig, policy: str, context: float) -> Rebuilding | None:
    """None for a cache that rebuilds nothing."""
    shape, tokens = cache_shape(config), int(context)
    macs = kv.step_macs(policy, shape, max(tokens, 1))
    if not macs:
        return None
    return Rebuilding(kv.read_bytes(policy, shape, tokens), macs) if tokens else Rebuilding(0, 0)


def arithmetic_here(config: ModelConfig, specs: Mapping[str, str], choice: Choice, profile: KernelProfile) -> str:
    """A sentence when arithmetic bounds the cache's part of a step on this machine; empty when not, or not known."""
    cols = typical_columns(config)
    rates = [rate for spec in step_bytes(config, specs) if (rate := profile.matvec_bytes_per_s(spec, cols))]
    blocks = [macs for spec in step_macs(config, specs) if (macs := profile.prefill_macs_per_s(spec))]
    if not rates or not blocks:
        return ""
    return _arithmetic(config, choice, max(rate[-1] for rate in rates), 2 * min(blocks))


def arithmetic_elsewhere(config: ModelConfig, choice: Choice, machine: Machine, tier: str) -> str:
    """The same for another machine."""
    return _arithmetic(config, choice, machine.tier(tier).read_bytes_per_s, _peak_flop_per_s(machine, tier))


def batching_here(config: ModelConfig, specs: Mapping[str, str], choice: Choice, profile: KernelProfile) -> str:
    """A sentence on what the batch costs on this machine; empty for one sequence, or where kernels are not known."""
    cols, weights, macs = typical_columns(config), step_bytes(config, specs), step_macs(config, specs)
    rates = {spec: profile.matvec_bytes_per_s(spec, cols) for spec in weights}
    blocks = {spec: profile.prefill_macs_per_s(spec) for spec in macs}
    if choice.batch == 1 or not all(rates.values()) or not all(blocks.values()):
        return ""
    working_set = sum(weights.values())
    reading = sum(size / _at(working_set, rates[spec] or []) for spec, size in weights.items())
    return _batching(choice.batch, reading, sum(work / (blocks[spec] or math.inf) for spec, work in macs.items()))


def batching_elsewhere(
    config: ModelConfig, specs: Mapping[str, str], choice: Choice, machine: Machine, tier: str
) -> str:
    """The same for another machine, from its description."""
    if choice.batch == 1:
        return ""
    reading = sum(step_bytes(config, specs).values()) / machine.tier(tier).read_bytes_per_s
    return _batching(
        choice.batch, reading, 2 * sum(step_macs(config, specs).values()) / _peak_flop_per_s(machine, tier)
    )


def _batching(batch: int, reading_s: float, token_s: float) -> str:
    """reading_s: of all weights once; token_s: the multiply-adds of one token."""
    if not token_s:
        return ""
    knee = reading_s / token_s
    if batch <= knee:
        return f" Up to {knee:.0f} sequences share one reading of the weights at no cost; {batch} are below that."
    return (
        f" From {max(knee, 1):.0f} sequences on a step is bound by arithmetic: with {batch} the weights' part takes "
        f"{batch * token_s / reading_s:.1f} times as long as with one."
    )


def _arithmetic(config: ModelConfig, choice: Choice, bytes_per_s: float, flop_per_s: float) -> str:
    rebuilt = _rebuilding(config, choice.kv, choice.context)
    if rebuilt is None or 2 * rebuilt.macs / flop_per_s <= rebuilt.read_bytes / bytes_per_s:
        return ""
    per_byte, balance = 2 * rebuilt.macs / rebuilt.read_bytes, flop_per_s / bytes_per_s
    return (
        f" With the {choice.kv} cache a step at {choice.context} tokens is bound by arithmetic: rebuilding keys takes "
        f"{per_byte:.0f} FLOP for each byte read, where the machine does {balance:.0f} in that time; it saves memory, "
        "not time."
    )


def _between(macs: Mapping[str, float], num_layers: int, tiny: float, wide: float) -> float:
    """Overhead of a layer of this model's size: between the two measured ones over the logarithm of its weights."""
    low, high = layer_weights(TINY), layer_weights(WIDE)
    share = math.log(max(sum(macs.values()) / num_layers, 1) / low) / math.log(high / low)
    return tiny + (wide - tiny) * min(max(share, 0.0), 1.0)


def _seen(config: ModelConfig, policy: str, context: float) -> list[float]:
    """Tokens each layer attends to at a context: no more than its sliding window, nor than the cache shows."""
    context = min(context, kv.seen_tokens(policy, cache_shape(config), math.ceil(context)))
    return [min(context, window or context) for window in config.sliding_windows]


def _peak_flop_per_s(machine: Machine, tier: str) -> float:
    """The best rate of a unit working on this tier in a number type that products of activations can use."""
    usable = ("float32", "tfloat32", "bfloat16", "float16", "int8")
    rates = [
        rate
        for unit in machine.compute
        if unit.tier == tier
        for dtype, rate in unit.flop_per_s.items()
        if dtype in usable
    ]
    return max(rates, default=math.inf)


def _at(working_set_bytes: float, rates: list[float]) -> float:
    """Rate at a working set between the measured ones: linear in seconds per byte over the logarithm of the size."""
    sizes = WORKING_SETS_BYTES
    if working_set_bytes <= sizes[0]:
        return rates[0]
    for (low, high), (slow_low, slow_high) in zip(itertools.pairwise(sizes), itertools.pairwise(rates)):
        if working_set_bytes <= high:
            share = math.log(working_set_bytes / low) / math.log(high / low)
            return 1 / ((1 - share) / slow_low + share / slow_high)
    return rates[-1]


def _share_from_far(working_set_bytes: float, rates: list[float]) -> float:
    """Where attention's time lies between that of its two measured working sets: where that of products does."""
    near, here, far = (1 / _at(size, rates) for size in (ATTEND_BYTES[0], working_set_bytes, ATTEND_BYTES[1]))
    return min(max((here - near) / (far - near), 0.0), 1.0) if far > near else 0.0


def _attention(tokens: float, far_share: float, seconds: list[float]) -> float:
    """One layer's attention step: between a cache read from near and one read from far."""
    near, far = _line(tokens, seconds[:2]), _line(tokens, seconds[2:])
    return near + (far - near) * far_share


def _line(tokens: float, seconds: list[float]) -> float:
    """Attention seconds at a context: the line through the two measured lengths."""
    (short, long), (low, high) = ATTEND_TOKENS, seconds
    return low + (high - low) * (tokens - short) / (long - short)

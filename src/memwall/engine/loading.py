"""Bring a model into memory: settings, the budget's cap, weights and decoder, but no cache.

Settings are what a plan (or a user) has fixed. One conversation (`session`) and a server (`serving`) start here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from memwall import _native, kernels, kv
from memwall.engine.sampling import Sampler, Sampling
from memwall.errors import BudgetExceeded, InputError
from memwall.hardware import available_memory_bytes
from memwall.memory import Arena, Budget, Ledger, measure_runtime
from memwall.models.checkpoint import Checkpoint
from memwall.models.config import ModelConfig, RopeConfig
from memwall.models.decoder import Decoder
from memwall.models.precision import level_formats, resolve
from memwall.models.rope import rope_tables
from memwall.models.ssm_decoder import SsmDecoder
from memwall.models.weights import Progress, Weights, load_weights

# The interpreter's own heap moves a little while a session runs (strings, token lists, thread stacks); the arena leaves
# it this much below the budget, so that the process as a whole stays under.
RUNTIME_HEADROOM_BYTES = 2 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a session is built from.

    weights: a choice of `models.precision`; kv: a policy of `memwall.kv`; context_tokens: most tokens the cache will
    hold; segment_tokens: prompt tokens worked at once (a prompt up to this long is attended in full precision);
    threads: None keeps the number in use; exact: float arithmetic on packed weights.
    """

    weights: str
    kv: str = "float16"
    context_tokens: int = 1024
    segment_tokens: int = 512
    logit_rows: int = 1
    threads: int | None = None
    exact: bool = False
    window: int | None = None
    """Tokens whose neurons stay in memory, of a model that streams them; None: `llm_in_a_flash.DEFAULT_WINDOW`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedDecoder:
    """A model ready to run, without a cache. runtime_bytes: what the process held before any of it."""

    config: ModelConfig
    weights: Weights
    decoder: Decoder
    arena: Arena
    ledger: Ledger
    runtime_bytes: int


def load_decoder(
    model: Path,
    settings: Settings,
    *,
    budget: Budget | None = None,
    progress: Progress | None = None,
    beside: Arena | None = None,
    sequences: int = 1,
    shared: bool = False,
    headroom_bytes: int = RUNTIME_HEADROOM_BYTES,
) -> LoadedDecoder:
    """What a session and a server have in common.

    beside: an arena of this process that is shared, and its budget with it. sequences: most of them that
    `Decoder.batch` will work together; shared: they may go on from shared prefixes. Raises as `session.load` does.
    """
    if settings.threads is not None:
        kernels.set_num_threads(settings.threads)
    config = ModelConfig.from_directory(model)
    if config.ssm is not None and shared:
        raise InputError(
            f"{model}: a {config.family} model has no keys and values that requests could share; add --scheduler fcfs"
        )
    with Checkpoint(model, config) as checkpoint:
        checkpoint.verify_once()
        specs = resolve(config, settings.weights, checkpoint)
        runtime_bytes = 0
        if beside is None:
            ledger = Ledger()
            warm_up(specs)
            runtime_bytes = measure_runtime(ledger).nbytes
            elsewhere = budget.tiers if budget is not None else None
            arena = Arena(_cap(budget, runtime_bytes, headroom_bytes), ledger, other_caps=elsewhere)
        else:
            ledger, arena = beside.ledger, beside
        weights = load_weights(config, checkpoint, specs, arena, progress=progress)
    try:
        decoder = _decoder(config, weights, arena, settings, sequences, shared=shared)
        if config.neurons is not None:
            from memwall.engine.llm_in_a_flash import DEFAULT_WINDOW, NeuronStream

            decoder.feed_forward = NeuronStream(
                config, weights, model, arena, window=settings.window or DEFAULT_WINDOW,
                segment_tokens=settings.segment_tokens,
            )  # fmt: skip
    except BaseException:
        weights.release()
        raise
    return LoadedDecoder(
        config=config, weights=weights, decoder=decoder, arena=arena, ledger=ledger, runtime_bytes=runtime_bytes
    )


def _decoder(
    config: ModelConfig, weights: Weights, arena: Arena, settings: Settings, sequences: int, *, shared: bool
) -> Decoder:
    sizes = {"segment_tokens": settings.segment_tokens, "logit_rows": settings.logit_rows}
    if config.ssm is None:
        return Decoder(config, weights, arena, **sizes, exact=settings.exact, sequences=sequences, shared=shared)
    # it has what sessions and requests with memories of their own call, and no more
    return cast(Decoder, SsmDecoder(config, weights, arena, **sizes, exact=settings.exact))


def warm_up(specs: Mapping[str, str]) -> None:
    """Bring in what every run needs before the runtime row is measured: code pages, threads, a tidy heap.

    A library's code comes in as it lies in the system's file cache: where that holds it in pieces of 2 MiB, the first
    call of a function may add as much.
    """
    kernels.num_threads()
    Sampler(Sampling(temperature=1.0, top_k=8, top_p=0.5)).pick(np.arange(64, dtype=np.float32))
    rope_tables(RopeConfig(), 64, np.arange(2))
    weight = np.ones((64, 128), np.float32)
    x, out = np.ones((2, 128), np.float32), np.empty((2, 64), np.float32)
    for spec in ("float32", "int4-g64", *level_formats(specs)):
        held = kernels.matrix(kernels.encode(spec, weight))
        kernels.linear(x, [held], [out])
        kernels.linear(x[:1], [held], [out[:1]])
    _native.give_back_freed_memory()


def cache_shape(config: ModelConfig) -> kv.CacheShape:
    """What a KV cache must know of a model."""
    ssm = config.ssm
    state = None
    if ssm is not None:
        state = kv.StateShape(
            state_size=ssm.state_size,
            conv_taps=ssm.conv_taps,
            conv_size=ssm.conv_size,
            static_layers=tuple(ssm.is_static(layer) for layer in range(config.num_layers)),
            static_states=ssm.quantized is not None and ssm.quantized.state == "int8",
        )
    return kv.CacheShape(
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        windows=config.sliding_windows,
        hidden_size=config.hidden_size,
        state=state,
    )


def _cap(budget: Budget | None, runtime_bytes: int, headroom_bytes: int) -> int:
    if budget is None or budget.ram is None:
        # refuse what the machine does not have, rather than be killed for taking it
        return max(available_memory_bytes() - headroom_bytes, 1)
    cap = budget.ram - runtime_bytes - headroom_bytes
    if cap <= 0:
        raise BudgetExceeded("runtime", runtime_bytes + headroom_bytes, budget.ram, budget.ram)
    return cap

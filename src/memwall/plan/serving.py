"""What a server runs with: weights and context chosen so that requests have room beside them.

A plan for one conversation gives the weights all that its cache leaves; a server shares its cache among many requests.
So the plan is made for a few contexts at once, and for fewer where that does not fit.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from memwall.engine.adapters import OWNER
from memwall.engine.loading import RUNTIME_HEADROOM_BYTES
from memwall.engine.serving import MOST_LOGIT_ROWS, ServingSettings
from memwall.engine.serving_parts import LORA_SCRATCH, lora_scratch_bytes
from memwall.engine.workers import OWNER as WORKERS
from memwall.errors import DoesNotFit
from memwall.hardware.units import MIB
from memwall.memory import Budget, resident_bytes
from memwall.models.config import ModelConfig
from memwall.plan.choose import make_plan
from memwall.plan.predict import RUNTIME, activations, measured_runtime_bytes, sampling_bytes
from memwall.plan.search import is_open

CONTEXTS_AT_ONCE = (4, 2, 1)
PROCESS_BYTES = 6 * MIB
"""What a forked process comes to hold for itself besides activations (measured: 4 to 5 MB with the demo model)."""


def choose(model: Path, budget: Budget | None, settings: ServingSettings) -> ServingSettings:
    """The settings with weights and context filled in. Call it with the server's libraries loaded: they count."""
    if not is_open(settings.weights):
        return settings  # the context is then what fits
    config = ModelConfig.from_directory(model)
    rows = min(settings.max_sequences, MOST_LOGIT_ROWS)
    grown = max(resident_bytes(exact=True) - measured_runtime_bytes(model), 0)
    extra = {
        RUNTIME: grown + settings.headroom_bytes - RUNTIME_HEADROOM_BYTES,
        "activations/logits": rows * config.vocab_size * np.dtype(np.float32).itemsize,
        **sampling_bytes(config),
    }
    if settings.lora is not None:
        extra[OWNER] = settings.lora.room_bytes
        extra[LORA_SCRATCH] = lora_scratch_bytes(settings)
    if settings.phases is not None:
        computing = 4 if settings.phases.fresh else 2  # with room for new workers before the old ones go
        extra[WORKERS] = computing * activations(config, settings.token_budget) + (1 + computing) * PROCESS_BYTES
    memories = settings.phases.memories if settings.phases is not None else 1
    refused: DoesNotFit | None = None
    for batch in CONTEXTS_AT_ONCE:
        if batch < memories:  # a request of the whole context must fit each
            continue
        try:
            plan = make_plan(
                model,
                budget=budget,
                weights=settings.weights,
                kv=settings.kv,
                context=settings.context_tokens,
                batch=batch,
                prompt_tokens=settings.token_budget,
                threads=settings.threads,
                measure=False,
                profile=False,
                extra_bytes=extra,
            )
        except DoesNotFit as error:
            refused = error
            continue
        return replace(settings, weights=plan.choice.weights, context_tokens=plan.choice.context)
    assert refused is not None
    raise refused

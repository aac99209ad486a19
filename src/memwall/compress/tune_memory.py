"""What fine-tuning will hold, by owner, known before a weight is read."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from memwall.compress.adamw import OWNER as OPTIMIZER
from memwall.compress.adamw import moment_bytes
from memwall.compress.tuning import TuneMethod
from memwall.memory.arena import allocated_bytes
from memwall.memory.pages import round_up
from memwall.models.config import ModelConfig
from memwall.models.decoder import scratch_bytes
from memwall.models.precision import weight_bytes

ACTIVATIONS, SCRATCH = "activations", "scratch"
LOGIT_VALUES = 1 << 20
"""Logits that are made at once."""
SLAB_BYTES = 1 << 20
"""What decodes a packed matrix on the way back."""


def tune_bytes(
    config: ModelConfig, specs: Mapping[str, str], method: TuneMethod, *, paged: bool, held_out: bool = True
) -> dict[str, int]:
    """Bytes of each ledger owner while steps are worked; `runtime` is not among them."""
    sizes = _sizes(method.trained_shapes(config))
    trained = _allocated(sizes)
    found = {owner: round_up(size) for owner, size in weight_bytes(config, specs).items()}
    if method.makes_adapter:
        held = [shape for each in method.shapes(config).values() for shape in method.held_shapes(each)]
        found["adapters/weights"] = trained + _allocated(_sizes(held * config.num_layers))
    found[f"{method.owner}/gradients"] = trained
    if method.keep_best and held_out:
        found[f"{method.owner}/best"] = trained
    found[OPTIMIZER] = moment_bytes(sizes, paged=paged)
    tokens = method.micro_batch * (method.context - 1)
    found[SCRATCH] = SLAB_BYTES + scratch_bytes(config, specs, tokens, exact=True)
    found[ACTIVATIONS] = activation_bytes(config, method)
    return found


def _sizes(shapes: list[tuple[int, ...]]) -> list[int]:
    return [int(np.prod(shape, dtype=np.int64)) for shape in shapes]


def _allocated(sizes: list[int]) -> int:
    return sum(allocated_bytes(4 * size) for size in sizes)


def activation_bytes(config: ModelConfig, method: TuneMethod) -> int:
    """The most that a step holds beside what has an owner: hidden states between layers, the insides of one, logits.

    Counted from the torch form: what its operations keep for the way back, and the gradients that are alive with them.
    Attention keeps no scores: its kernel makes them again.
    """
    hidden, wide = config.hidden_size, config.intermediate_size * max(config.num_experts_per_token, 1)
    heads = config.query_size + 2 * config.kv_size
    length = method.context - 1
    tokens = method.micro_batch * length
    between = 4 * tokens * hidden * (config.num_layers - method.first_layer(config) + 2)
    logits = 4 * 4 * max(LOGIT_VALUES, config.vocab_size)
    if method.makes_adapter:
        targets = method.shapes(config).values()
        # dropout keeps its input scaled, and a byte of mask each; without it an adapter keeps its input itself
        kept = sum(inputs for inputs, _ in targets) * (5 if method.dropout else 1)
        kept += 4 * sum(method.kept_values(each) for each in targets)
        gradient = 0
    else:  # products keep their inputs, and a gradient is made whole before it is added
        kept = 4 * (2 * hidden + config.query_size + wide)
        gradient = 4 * max(_sizes(method.trained_shapes(config)))
    inside = tokens * (4 * (12 * hidden + 6 * heads + 7 * wide) + kept)
    return between + gradient + max(inside, logits + 4 * 3 * tokens * hidden)


def logit_rows(config: ModelConfig) -> int:
    """Rows of logits made at once."""
    return max(LOGIT_VALUES // config.vocab_size, 1)

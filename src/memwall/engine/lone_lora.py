"""One adapter for one conversation: in memory of its own, added to every product of the decoder.

The weights stay as they are, packed or not; nothing is merged, so a compressed base takes an adapter that was trained
for the float model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from memwall.errors import InputError
from memwall.kernels.lora import MOST_TOGETHER, LoraBatch, LoraRoom
from memwall.models.config import ModelConfig
from memwall.models.decoder import BLOCK_ROWS
from memwall.models.dora import row_bytes, row_changes
from memwall.models.lora import LoraWeights

if TYPE_CHECKING:
    from memwall.engine.session import Session

UNITS_PER_BLOCK = 32
OWNER, SCRATCH, ROWS = "adapters/pages", "adapters/scratch", "adapters/rows"


def lone_bytes(weights: LoraWeights, config: ModelConfig, segment_tokens: int = BLOCK_ROWS) -> Mapping[str, int]:
    """Bytes that `wear` will hold, by owner; for plans."""
    room = _room(config)
    scratch = np.dtype(np.float32).itemsize * int(np.prod(_scratch_shape(weights, segment_tokens)))
    rows = row_bytes(weights, config)
    return {OWNER: weights.paged(room).num_pages * room.page_bytes, SCRATCH: scratch, **({ROWS: rows} if rows else {})}


def wear(session: Session, weights: LoraWeights) -> None:
    """From now on the session's model is the base with this adapter.

    InputError for a cache that makes keys and values again from the base's weights alone; BudgetExceeded where there is
    no room.
    """
    if session.cache.takes_inputs or session.settings.kv.startswith(("cskv", "xquant")):
        raise InputError(
            f"--kv {session.settings.kv} makes keys and values again with the base's weights, without the adapter; "
            "take float16, kivi or another cache that keeps them"
        )
    room, arena, segment = _room(session.config), session.arena, session.settings.segment_tokens
    paged = weights.paged(room)
    pool = arena.allocate(OWNER, (paged.num_pages, room.page_bytes), np.uint8)
    scratch = arena.allocate(SCRATCH, _scratch_shape(weights, segment), np.float32)
    if weights.dora:
        arena.charge(ROWS, row_bytes(weights, session.config))
        for target, rows in row_changes(weights, session.decoder.weights, session.config).items():
            paged.lengthen(target, rows)
    paged.place(range(paged.num_pages))
    weights.fetch(paged, pool)
    batch = LoraBatch(room, scratch)
    batch.assign(pool, [(0, segment, paged)])
    session.decoder.adapt(batch)


def _room(config: ModelConfig) -> LoraRoom:
    return LoraRoom(num_layers=config.num_layers, unit_bytes=2 * config.kv_size, units_per_block=UNITS_PER_BLOCK)


def _scratch_shape(weights: LoraWeights, segment_tokens: int) -> tuple[int, int]:
    return min(segment_tokens, BLOCK_ROWS), MOST_TOGETHER * weights.rank

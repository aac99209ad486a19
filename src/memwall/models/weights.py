"""Load a checkpoint into an arena, tensor by tensor, compressing on the way.

The source is memory-mapped; a few rows at a time are read, encoded and written to their final place, and the source's
pages are given back at once. So the peak while loading is the compressed model plus one piece (`PIECE_BYTES`), not the
float model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from memwall import kernels
from memwall.formats import Packed, codec
from memwall.formats.base import PLAIN_BUFFER
from memwall.kernels import Matrix
from memwall.memory import Arena, Region
from memwall.memory.pages import HUGE_PAGE_BYTES, round_up
from memwall.models.checkpoint import Checkpoint
from memwall.models.config import EMBEDDING, HEAD, ModelConfig, TensorSpec
from memwall.models.precision import aligned, weight_bytes

# Source bytes read between two encodes. Large enough to keep all threads busy, small beside any budget.
PIECE_BYTES = 2 << 20
ROW_TILE = 16

Progress = Callable[[int, int], None]


@dataclass(slots=True)
class Weights:
    """A model's tensors in memory: matrices in whatever format they were given, the rest as float32 vectors."""

    matrices: dict[str, Matrix]
    vectors: dict[str, np.ndarray]
    specs: Mapping[str, str]

    def replace(self, name: str, packed: Packed) -> None:
        """Put another form of one matrix in place (calibration swaps compressed layers in; not in the arena)."""
        self.matrices[name] = kernels.matrix(packed)


class _Pool:
    """One region per ledger owner, filled front to back."""

    def __init__(self, arena: Arena, sizes: Mapping[str, int]) -> None:
        self._regions = {owner: arena.reserve(owner, nbytes) for owner, nbytes in sizes.items() if nbytes}
        self._used = dict.fromkeys(self._regions, 0)

    def take(self, owner: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        region: Region = self._regions[owner]
        offset = self._used[owner]
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        self._used[owner] = offset + aligned(nbytes)
        # whole huge pages at a time: one that is committed in two parts stays cut into small pages
        region.commit(min(round_up(self._used[owner], HUGE_PAGE_BYTES), region.capacity_bytes))
        return region.array(shape, dtype, offset)

    def release(self) -> None:
        for region in self._regions.values():
            region.release()


def load_weights(
    config: ModelConfig,
    checkpoint: Checkpoint,
    specs: Mapping[str, str],
    arena: Arena,
    *,
    progress: Progress | None = None,
) -> Weights:
    """Read every tensor that `config` expects, in the formats of `specs`.

    progress(done_bytes, total_bytes) counts source bytes. Raises BudgetExceeded before the arena's cap is crossed
    (nothing stays allocated then) and InputError for a damaged checkpoint.
    """
    pool = _Pool(arena, weight_bytes(config, specs))
    weights = Weights(matrices={}, vectors={}, specs=specs)
    tensors = config.tensors()
    total = sum(checkpoint.stored_bytes(tensor.name) for tensor in tensors)
    done = 0
    try:
        for tensor in tensors:
            spec = specs[tensor.name]
            if len(tensor.shape) == 2:
                weights.matrices[tensor.name] = kernels.matrix(_load_matrix(tensor, spec, checkpoint, pool))
            else:
                vector = pool.take(f"weights/{spec}", tensor.shape, np.dtype(np.float32))
                vector[...] = checkpoint.tensor(tensor.name).astype(np.float32)
                weights.vectors[tensor.name] = vector
            checkpoint.drop(tensor.name)
            done += checkpoint.stored_bytes(tensor.name)
            if progress is not None:
                progress(done, total)
    except BaseException:
        weights.matrices.clear()
        weights.vectors.clear()
        pool.release()
        raise
    if config.tie_word_embeddings:
        weights.matrices[HEAD] = weights.matrices[EMBEDDING]
    return weights


def _load_matrix(tensor: TensorSpec, spec: str, checkpoint: Checkpoint, pool: _Pool) -> Packed:
    buffers = {
        name: pool.take(f"weights/{spec}", shape, dtype)
        for name, (shape, dtype) in codec(spec).buffers(tensor.shape).items()
    }
    packed = checkpoint.packed(tensor.name)
    if packed is not None and packed.spec == spec:
        for name, buffer in buffers.items():
            np.copyto(buffer, packed.buffers[name])
        return Packed(spec=spec, shape=tensor.shape, buffers=buffers)
    source = checkpoint.tensor(tensor.name)
    num_rows, row_bytes = source.shape[0], max(source[0].nbytes, 1)
    piece_rows = max(PIECE_BYTES // row_bytes // ROW_TILE, 1) * ROW_TILE
    for start in range(0, num_rows, piece_rows):
        piece = source[start : start + piece_rows]
        # tiles stack along the first axis as rows do, so whole tiles of rows land in one slice of each buffer
        tile = 1 if PLAIN_BUFFER in buffers else ROW_TILE
        slices = {name: part[start // tile : -(-(start + len(piece)) // tile)] for name, part in buffers.items()}
        if tile == 1 and slices[PLAIN_BUFFER].dtype in (piece.dtype, np.float32):
            np.copyto(slices[PLAIN_BUFFER], piece, casting="same_kind")  # loses nothing, so nothing to check
        else:
            kernels.encode(spec, piece.astype(np.float32) if piece.dtype == np.float64 else piece, out=slices)
        checkpoint.drop(tensor.name)
    return Packed(spec=spec, shape=tensor.shape, buffers=buffers)

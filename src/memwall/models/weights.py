"""Load a checkpoint into an arena, tensor by tensor, compressing on the way.

The source is memory-mapped a few rows at a time; they are encoded, written to their final place, and unmapped. So the
peak while loading is the compressed model plus one piece (`PIECE_BYTES`), not the float model, and the piece is on the
ledger too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from memwall import kernels
from memwall.formats import Packed, codec
from memwall.formats.base import PLAIN_BUFFER
from memwall.formats.bitstack import BitStackCodec
from memwall.formats.static8 import StaticCodec
from memwall.kernels import Matrix
from memwall.kernels.scan import StaticMatrix
from memwall.memory import Arena, Region
from memwall.memory.pages import HUGE_PAGE_BYTES, PAGE_BYTES, round_up
from memwall.models.block_stack import BlockStack
from memwall.models.checkpoint import Checkpoint
from memwall.models.config import EMBEDDING, HEAD, ModelConfig, TensorSpec
from memwall.models.precision import aligned, tensor_bytes, weight_bytes, weight_owner
from memwall.models.stack_index import StackIndex

# Source bytes read between two encodes. Large enough to keep all threads busy, small beside any budget.
PIECE_BYTES = 2 << 20
ROW_TILE = 16
LOADING = "loading"
"""Ledger owner of the mapped piece."""

Progress = Callable[[int, int], None]


@dataclass(slots=True)
class Weights:
    """A model's tensors in memory: matrices in whatever format they were given, the rest as float32 vectors."""

    matrices: dict[str, Matrix]
    vectors: dict[str, np.ndarray]
    specs: Mapping[str, str]
    generation: int = 0
    """Counts replacements: what was recorded of older matrices (`models.decode`) no longer holds."""
    regions: tuple[Region, ...] = ()
    """Where they lie, if the loader put them there."""
    stack: BlockStack | None = None
    """Blocks beside the first of each matrix, of a model that has them (BitStack)."""
    static: dict[str, StaticMatrix] = field(default_factory=dict)
    """Matrices whose products take 8-bit inputs on fixed scales (Quamba2)."""
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    """The numbers of float32 matrices, for training them where they lie."""

    def keep(self, name: str, packed: Packed) -> None:
        """Make a matrix of its packed form, of the kind that its products take."""
        if isinstance(codec(packed.spec), StaticCodec):
            self.static[name] = StaticMatrix(packed)
        else:
            self.matrices[name] = kernels.matrix(packed)
            if packed.spec == "float32":
                self.arrays[name] = packed.buffers[PLAIN_BUFFER]

    def release(self) -> None:
        """Gives the memory back; the tensors are of no more use."""
        self.matrices.clear()
        self.static.clear()
        self.arrays.clear()
        self.vectors.clear()
        for region in self.regions:
            region.release()
        if self.stack is not None:
            self.stack.release()

    def replace(self, name: str, packed: Packed) -> None:
        """Put another form of one matrix in place (calibration swaps compressed layers in; not in the arena)."""
        self.matrices[name] = kernels.matrix(packed)
        self.generation += 1


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
        region.commit(min(_committed(self._used[owner], region.capacity_bytes), region.capacity_bytes))
        return region.array(shape, dtype, offset)

    @property
    def regions(self) -> tuple[Region, ...]:
        return tuple(self._regions.values())


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
    index = StackIndex.of(checkpoint)
    num_blocks = index.length(specs) if index is not None else 0
    specs = {**specs, **(index.specs(0) if index is not None else {})}
    pool = _Pool(arena, weight_bytes(config, specs))
    weights = Weights(matrices={}, vectors={}, specs=specs, regions=pool.regions)
    tensors = config.tensors()
    total = sum(checkpoint.stored_bytes(tensor.name) for tensor in tensors)
    done = 0
    first: dict[str, np.ndarray] = {}
    source = arena.charge(LOADING, 0)
    try:
        for tensor in tensors:
            buffers = {
                name: pool.take(weight_owner(specs[tensor.name]), shape, dtype)
                for name, (shape, dtype) in codec(specs[tensor.name]).buffers(tensor.shape).items()
            }
            source.resize(_piece_bytes(tensor, checkpoint.stored_bytes(tensor.name)))
            _fill(tensor, specs[tensor.name], checkpoint, buffers)
            if index is not None and tensor.name in index.tensors:
                first[tensor.name] = buffers["block0"]
            elif len(tensor.shape) == 2 and tensor.role != "other":
                packed = Packed(spec=specs[tensor.name], shape=tensor.shape, buffers=buffers)
                weights.keep(tensor.name, packed)
            else:
                weights.vectors[tensor.name] = buffers[PLAIN_BUFFER]
            done += checkpoint.stored_bytes(tensor.name)
            if progress is not None:
                progress(done, total)
        if index is not None:
            weights.stack = BlockStack(index, checkpoint, arena, weights, first)
            weights.stack.resize(num_blocks)
    except BaseException:
        weights.release()
        raise
    finally:
        source.release()
    if config.tie_word_embeddings:
        weights.matrices[HEAD] = weights.matrices[EMBEDDING]
    return weights


def loading_bytes(config: ModelConfig, specs: Mapping[str, str], source_itemsize: int) -> int:
    """The most that loading holds beyond the finished weights: the piece of the source that is being encoded.

    Tensors come one after another, so an early piece, however large, lies where later weights will.
    source_itemsize: bytes per number in the checkpoint.
    """
    sizes = weight_bytes(config, specs)
    used = dict.fromkeys(sizes, 0)
    most = 0
    for tensor in config.tensors():
        owner = weight_owner(specs[tensor.name])
        used[owner] += tensor_bytes(tensor, specs[tensor.name])
        held = sum(_committed(used[each], sizes[each]) for each in sizes)
        form = codec(specs[tensor.name])
        # of a stack, first blocks come in pieces and the others straight to their place
        blocks = form.nbytes(tensor.shape) // form.blocks if isinstance(form, BitStackCodec) else None
        most = max(most, held + _piece_bytes(tensor, tensor.size * source_itemsize if blocks is None else blocks))
    return most - sum(round_up(size) for size in sizes.values())


def _committed(used: int, capacity: int) -> int:
    """Whole huge pages at a time: one that is committed in two parts stays cut into small pages."""
    return min(round_up(used, HUGE_PAGE_BYTES), round_up(capacity))


def _piece_bytes(tensor: TensorSpec, stored_bytes: int) -> int:
    """Resident bytes of the largest piece of a tensor's source: whole pages, and one for a start amid a page."""
    tile_bytes = ROW_TILE * (stored_bytes // max(tensor.shape[0], 1))
    return round_up(min(stored_bytes, max(PIECE_BYTES, tile_bytes))) + PAGE_BYTES


def _rows(part: np.ndarray, rows: int, start: int, stop: int) -> np.ndarray:
    """Where rows [start, stop) lie in a buffer: they stack along its first axis one by one, or by whole tiles."""
    tile = 1 if len(part) == rows else ROW_TILE
    return part[start // tile : -(-stop // tile)]


def _fill(tensor: TensorSpec, spec: str, checkpoint: Checkpoint, buffers: dict[str, np.ndarray]) -> None:
    """Read a tensor piece by piece into its final buffers, encoding on the way where it is stored otherwise."""
    packed = checkpoint.packed(tensor.name)
    if packed is not None and (packed.spec == spec or set(packed.buffers) > set(buffers)):
        for name, first, rows in checkpoint.packed_pieces(tensor.name, PIECE_BYTES, tuple(buffers)):
            np.copyto(buffers[name][first : first + len(rows)], rows)
        return
    plain = buffers.get(PLAIN_BUFFER)
    for start, piece in checkpoint.pieces(tensor.name, PIECE_BYTES, ROW_TILE):
        slices = {name: _rows(part, tensor.shape[0], start, start + len(piece)) for name, part in buffers.items()}
        if len(tensor.shape) == 1 or tensor.role == "other":
            slices[PLAIN_BUFFER][...] = piece.astype(np.float32)
        elif plain is not None and plain.dtype in (piece.dtype, np.float32):
            np.copyto(slices[PLAIN_BUFFER], piece, casting="same_kind")  # loses nothing, so nothing to check
        else:
            kernels.encode(spec, piece.astype(np.float32) if piece.dtype == np.float64 else piece, out=slices)

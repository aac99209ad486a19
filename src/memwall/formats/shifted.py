"""NormalFloat whose blocks are shifted before they are coded, by what makes their codes tell the most: `irnf4`.

Source: "Accurate LoRA-Finetuning Quantization of LLMs via Information Retention" (Haotong Qin, 2024, arXiv 2402.05445),
section 3.2 (information calibration); official code: htqin/IR-QLoRA, utils.py.

Idea: what a block of 4-bit codes tells is at most their entropy. Trained weights lean to one side in most blocks of 64,
so some codes are seldom used. Each block is shifted by the constant near its median under which the code frequencies
are most even: tau0 + f * (largest distance from the median tau0), 201 values of f within 0.1 * 0.5411 on either side.
Units and shapes: value = scale * level + shift; matrices in tiles, groups of 64 along the columns. Scales are quantized
twice as in `nf4-dq`; a shift is one 8-bit dynamic code of the largest magnitude among 256 (16 rows by 16 groups).
Differs from the paper: the 256 blocks that share a float32 are those of a tile, not consecutive ones. Of shifts with
equal entropy the nearest to the median is taken. A short last block is filled, for the search, with its own numbers.
Cost: 4.127 + 0.127 bits per weight; 201 codings of each block to encode. Products add one sum of activations a block.
Holds when: weights are finite.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from memwall.errors import InputError
from memwall.formats.base import Packed, real_numbers
from memwall.formats.bitpack import TILE_ROWS, matrix_shape, pack_tiles
from memwall.formats.leveled import LevelCodec, Scales
from memwall.formats.levels import dynamic8, nf4
from memwall.formats.scales import NESTED_BLOCK, inverse_scale

BLOCK = 64
SPREAD = 0.5411
"""Standard deviation of a normal variable's part within one largest magnitude, of the paper's search range."""
CANDIDATES = 201
SPEC = "irnf4"
_GROUPS = NESTED_BLOCK // TILE_ROWS
_SLAB_BLOCKS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class ShiftedCodec(LevelCodec):
    """NF4 with twice quantized scales and shifts."""

    examples: ClassVar[tuple[str, ...]] = (SPEC,)
    encodes_natively: ClassVar[bool] = False

    @classmethod
    def parse(cls, spec: str) -> LevelCodec:
        if spec != SPEC:
            raise InputError(f"unknown number format {spec!r}; shifted NormalFloat is {SPEC}, in blocks of {BLOCK}")
        return cls(name="nf4", group=BLOCK, scale="dq", layout="tiles")

    @property
    def spec(self) -> str:
        return SPEC

    def buffers(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        found = LevelCodec.buffers(self, shape)
        return {**found, "shifts": found["scales"], "shift_peaks": found["nested"]}

    def quantize(self, groups: np.ndarray, scales: Scales) -> np.ndarray:
        return LevelCodec.quantize(self, groups - scales[1][..., None], scales)

    def dequantize(self, codes: np.ndarray, scales: Scales) -> np.ndarray:
        shifted: np.ndarray = LevelCodec.dequantize(self, codes, scales) + scales[1][..., None]
        return shifted

    def _scales_of_tiles(self, buffers: Mapping[str, np.ndarray], num_rows: int) -> Scales:
        return (*LevelCodec._scales_of_tiles(self, buffers, num_rows), _shifts_of(buffers, num_rows))

    def encode(self, x: Any) -> Packed:
        x = real_numbers(self.spec, x)
        shape = tuple(x.shape)
        rows, columns = matrix_shape(self.spec, shape)
        buffers = {name: np.zeros(s, d) for name, (s, d) in self.buffers(shape).items()}
        for start, stop in self.slabs(rows, columns) if columns else ():
            blocks = self.blocks(np.asarray(x[start:stop], np.float32))
            tiles = slice(start // TILE_ROWS, -(-stop // TILE_ROWS))
            shifts = best_shifts(blocks).reshape(stop - start, -1)
            for name, held in self.encode_slab(np.asarray(x[start:stop], np.float32), shifts).items():
                buffers[name][tiles] = held
        return Packed(spec=self.spec, shape=shape, buffers=buffers)

    def blocks(self, values: np.ndarray) -> np.ndarray:
        """[rows, columns] float32 -> [rows * groups, 64], to look for shifts in. InputError for what is not finite."""
        if not np.isfinite(values).all():
            raise InputError(f"{self.spec} cannot hold NaN or infinite values")
        columns = values.shape[1]
        short = columns % BLOCK
        if short:
            values = np.concatenate(
                [values, np.resize(values[:, columns - short :].T, (BLOCK - short, len(values))).T], 1
            )
        return np.ascontiguousarray(values.reshape(-1, BLOCK))

    def encode_slab(self, values: np.ndarray, shifts: np.ndarray) -> dict[str, np.ndarray]:
        """Buffers of whole tiles of rows. values: float32 [rows, columns]; shifts: [rows, groups], not rounded yet."""
        columns = values.shape[1]
        stored = _store(shifts)
        kept = _shifts_of(stored, len(values))
        groups = self._grouped(values)
        moved = groups - kept[..., None]
        if columns % BLOCK:
            moved[:, -1, columns % BLOCK :] = 0  # padding counts for no scale
        scales = np.abs(moved).max(axis=-1)
        codes = self._ungrouped(self.levels.encode(moved * inverse_scale(scales)[..., None]), columns)
        padded = np.full((len(stored["shifts"]) * TILE_ROWS, groups.shape[1] * BLOCK), self.zero_code, np.uint8)
        padded[: len(values), :columns] = codes
        return {"codes": pack_tiles(padded, self.bits, BLOCK), **self.store.to_tiles(scales), **stored}


def _store(shifts: np.ndarray) -> dict[str, np.ndarray]:
    """float32 [rows, groups] -> codes [tiles, groups, 16] and largest magnitudes [tiles, blocks]."""
    rows, groups = shifts.shape
    tiles, blocks = -(-rows // TILE_ROWS), -(-groups // _GROUPS)
    held = np.zeros((tiles * TILE_ROWS, blocks * _GROUPS), np.float32)
    held[:rows, :groups] = shifts
    parts = held.reshape(tiles, TILE_ROWS, blocks * _GROUPS).transpose(0, 2, 1).reshape(tiles, blocks, NESTED_BLOCK)
    peaks = np.abs(parts).max(axis=-1, initial=0)
    codes = dynamic8().encode(parts * inverse_scale(peaks)[..., None]).reshape(tiles, -1, TILE_ROWS)[:, :groups]
    return {"shifts": np.ascontiguousarray(codes), "shift_peaks": peaks}


def _shifts_of(buffers: Mapping[str, np.ndarray], num_rows: int) -> np.ndarray:
    codes = buffers["shifts"]
    peaks = np.repeat(buffers["shift_peaks"], _GROUPS, axis=1)[:, : codes.shape[1], None]
    found = dynamic8().decode(codes) * peaks
    rows: np.ndarray = found.transpose(0, 2, 1).reshape(-1, codes.shape[1])[:num_rows]
    return rows


@lru_cache(maxsize=4)
def search_steps(candidates: int = CANDIDATES) -> np.ndarray:
    """The values of f, float32, in the order in which they are preferred: the nearest to zero first."""
    steps = np.linspace(-0.1 * SPREAD, 0.1 * SPREAD, candidates) if candidates > 1 else np.zeros(1)
    return steps[np.argsort(np.abs(steps), kind="stable")].astype(np.float32)


@lru_cache(maxsize=1)
def information_weights() -> np.ndarray:
    """int64 [65]: n log2(n) by how often a code comes. Their sum tells entropies apart exactly, in whatever order it is
    taken: the less it is, the more the codes tell.
    """
    counts = np.arange(BLOCK + 1, dtype=np.float64)
    return np.rint(counts * np.log2(np.maximum(counts, 1)) * 2.0**40).astype(np.int64)


def best_shifts(blocks: np.ndarray, candidates: int = CANDIDATES) -> np.ndarray:
    """float32 [n] for blocks [n, 64]; `kernels.encode` has the same in compiled code."""
    centre = np.median(blocks, axis=1).astype(np.float32)
    reach = np.abs(blocks - centre[:, None]).max(axis=1)
    least, chosen = np.full(len(blocks), np.iinfo(np.int64).max), centre.copy()
    for step in search_steps(candidates):
        shifts = centre + step * reach
        for start in range(0, len(blocks), _SLAB_BLOCKS):
            part = slice(start, start + _SLAB_BLOCKS)
            moved = blocks[part] - shifts[part, None]
            scales = np.maximum(np.abs(moved).max(axis=1), np.float32(1e-30))
            found = information_weights()[code_counts(nf4().encode(moved / scales[:, None]))].sum(axis=1)
            better = found < least[part]
            least[part][better], chosen[part][better] = found[better], shifts[part][better]
    return chosen


def code_counts(codes: np.ndarray) -> np.ndarray:
    """How often each of 16 codes comes in each block: [blocks, 64] -> int64 [blocks, 16]."""
    offsets = np.arange(len(codes))[:, None] * 16
    found: np.ndarray = np.bincount((codes + offsets).reshape(-1), minlength=16 * len(codes)).reshape(-1, 16)
    return found


def entropies(codes: np.ndarray) -> np.ndarray:
    """Bits per code of each block [blocks, n] of 4-bit codes."""
    shares = code_counts(codes) / codes.shape[1]
    logs: np.ndarray = np.log2(shares, where=shares > 0, out=np.zeros_like(shares))
    found: np.ndarray = -(shares * logs).sum(axis=1)
    return found

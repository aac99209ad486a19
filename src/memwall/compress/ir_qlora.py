"""IR-QLoRA: adapters with an elastic connection over a NormalFloat base, and codes calibrated for the most information.

Source: "Accurate LoRA-Finetuning Quantization of LLMs via Information Retention" (Haotong Qin, 2024, arXiv 2402.05445),
sections 3.2 and 3.3; settings as in "How Good Are Low-bit Quantized LLaMA3 Models?" (Wei Huang, 2024, arXiv
2404.14047); official code: htqin/IR-QLoRA, irlora.py, utils.py.

Idea: (a) what a block of 4-bit codes tells is at most their entropy, so each block of 64 weights is shifted, before it
is coded, by the constant near its median that makes the code frequencies most even. (b) A low-rank path passes r
numbers; a connection without weights of its own goes along it: the mean of each of r parts of the input is added to
what A gives, each of the r numbers, repeated, to what B gives, with one trained factor each.
Units and shapes: y = W^ x + (alpha / rank) (B + b2 R) (A + b1 P) dropout(x); P [rank, in] averages consecutive inputs,
R [out, rank] repeats; b1, b2 scalars that start at 0. `calibrate`: weight [rows, cols] float -> NF4 codes and shifts.
Differs from the paper: both connections are linear, so they are trained as above and written merged into A and B: the
result is a plain adapter. Where rank does not divide a width, parts differ by one. The method trains on the base
`nf4-dq`: no product reads shifted codes yet, so `calibrate` stands for itself.
Cost: two numbers per product more than QLoRA, and A and B once more while a layer is worked. Shifts: 8 bits per 64
weights and a float32 per 256 blocks, 0.127 bits per weight. Calibration: 201 codings of each block.
Holds when: rank is at most the narrowest width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from memwall.compress.qlora import QLora
from memwall.errors import InputError
from memwall.formats import levels
from memwall.formats.levels import dynamic8

if TYPE_CHECKING:
    from torch import Tensor, nn

    from memwall.models.torch_lora import LoraLinear, Place

BLOCK = 64
SHIFT_BLOCK = 256
"""Blocks whose shifts share one float32."""
SPREAD = 0.5411
"""Standard deviation of a normal variable's part within one largest magnitude, of the paper's search range."""
CANDIDATES = 201
_SLAB_BLOCKS = 512


@dataclass(frozen=True, kw_only=True)
class IrQLora(QLora):
    """QLoRA's settings with the elastic connection."""

    name: ClassVar[str] = "ir-qlora"

    def linear(self, base: nn.Module, shape: tuple[int, int], place: Place) -> LoraLinear:
        if self.rank > min(shape):
            raise InputError(f"setting rank={self.rank}: the elastic connection wants at most {min(shape)} here")
        return _elastic_linear()(base, shape, self.rank, self.scale, self.dropout, place)

    def extra_shapes(self, shape: tuple[int, int]) -> list[tuple[int, ...]]:
        return [(1,), (1,)]


def _elastic_linear() -> type[LoraLinear]:
    """The class below needs torch, which only training imports."""
    import torch
    from torch import nn

    from memwall.models.torch_lora import LoraLinear

    class ElasticLora(LoraLinear):
        """An adapter whose factors have the connections added."""

        def __init__(
            self, base: nn.Module, shape: tuple[int, int], rank: int, scale: float, dropout: float, place: Place
        ) -> None:
            super().__init__(base, shape, rank, scale, dropout, place)
            self.beta_in, self.beta_out = nn.Parameter(place((1,))), nn.Parameter(place((1,)))

        def factors(self) -> tuple[Tensor, Tensor]:
            """A + b1 P and B + b2 R."""
            rank, inputs = self.lora_A.shape
            means = torch.from_numpy(averaging(rank, inputs))
            repeats = torch.from_numpy(parts(rank, len(self.lora_B))).T
            return self.lora_A + self.beta_in * means, self.lora_B + self.beta_out * repeats

        def low_rank(self, x: Tensor) -> Tensor:
            a, b = self.factors()
            return (x @ a.T) @ b.T

        def merged(self) -> tuple[Tensor, Tensor]:
            a, b = self.factors()
            return a.detach(), b.detach().contiguous()

    return ElasticLora


def parts(rank: int, width: int) -> np.ndarray:
    """float32 [rank, width], 1 where a column lies in the part of that row: consecutive, as equal as can be."""
    found = np.zeros((rank, width), np.float32)
    found[np.arange(width) * rank // width, np.arange(width)] = 1
    return found


def averaging(rank: int, width: int) -> np.ndarray:
    """float32 [rank, width]: the mean of each part."""
    found = parts(rank, width)
    found /= found.sum(axis=1, keepdims=True)
    return found


# -- information calibration -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """Blocks of 64 numbers, value = scale * level + shift. codes uint8 [blocks, 64]; scales float32 [blocks]; shifts as
    kept: uint8 codes [blocks], float32 [blocks / 256] largest magnitudes. entropy: bits per code, mean over blocks.
    """

    shape: tuple[int, ...]
    codes: np.ndarray
    scales: np.ndarray
    shift_codes: np.ndarray
    shift_peaks: np.ndarray
    entropy: float

    def shifts(self) -> np.ndarray:
        """float32 [blocks]."""
        peaks = np.repeat(self.shift_peaks, SHIFT_BLOCK)[: len(self.shift_codes)]
        found: np.ndarray = dynamic8().decode(self.shift_codes) * peaks
        return found

    def decode(self) -> np.ndarray:
        """float32 of `shape`."""
        values = self.scales[:, None] * levels.nf4().decode(self.codes) + self.shifts()[:, None]
        return values.reshape(-1)[: int(np.prod(self.shape))].reshape(self.shape)


def calibrate(weight: np.ndarray, candidates: int = CANDIDATES) -> Calibrated:
    """Each block's shift among `candidates` (1: none but zero), rounded as it is kept, with codes made after that."""
    values = np.asarray(weight, np.float32).reshape(-1)
    if not np.isfinite(values).all():
        raise InputError("calibration of NF4 codes: the weight holds NaN or infinite values")
    blocks = np.pad(values, (0, -len(values) % BLOCK)).reshape(-1, BLOCK)
    shifts = np.concatenate([_best_shifts(slab, candidates) for slab in _slabs(blocks)])
    padded = np.pad(shifts, (0, -len(shifts) % SHIFT_BLOCK)).reshape(-1, SHIFT_BLOCK)
    peaks = np.abs(padded).max(axis=1)
    codes = dynamic8().encode(padded / np.maximum(peaks, 1e-30)[:, None]).reshape(-1)[: len(shifts)]
    kept = dynamic8().decode(codes) * np.repeat(peaks, SHIFT_BLOCK)[: len(shifts)]
    coded = [_coded(slab - kept[at : at + len(slab), None]) for at, slab in _numbered(blocks)]
    made = np.concatenate([each[0] for each in coded])
    return Calibrated(
        shape=weight.shape,
        codes=made,
        scales=np.concatenate([each[1] for each in coded]),
        shift_codes=codes,
        shift_peaks=peaks.astype(np.float32),
        entropy=float(entropies(made).mean()),
    )


def entropies(codes: np.ndarray) -> np.ndarray:
    """Bits per code of each block [blocks, 64] of 4-bit codes."""
    offsets = np.arange(len(codes))[:, None] * 16
    counts = np.bincount((codes + offsets).reshape(-1), minlength=16 * len(codes)).reshape(-1, 16)
    shares = counts / codes.shape[1]
    logs: np.ndarray = np.log2(shares, where=shares > 0, out=np.zeros_like(shares))
    found: np.ndarray = -(shares * logs).sum(axis=1)
    return found


def _best_shifts(blocks: np.ndarray, candidates: int) -> np.ndarray:
    """tau0 + f * m: the median, and parts of the largest distance from it; of equal entropies the nearest to tau0."""
    if candidates == 1:
        return np.zeros(len(blocks), np.float32)
    centre = np.median(blocks, axis=1).astype(np.float32)
    reach = np.abs(blocks - centre[:, None]).max(axis=1)
    steps = np.linspace(-0.1 * SPREAD, 0.1 * SPREAD, candidates)
    best, chosen = np.full(len(blocks), -1.0), centre.copy()
    for step in steps[np.argsort(np.abs(steps), kind="stable")]:
        shift = centre + np.float32(step) * reach
        found = entropies(_coded(blocks - shift[:, None])[0])
        better = found > best
        best[better], chosen[better] = found[better], shift[better]
    return chosen


def _coded(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scales = np.abs(blocks).max(axis=1)
    return levels.nf4().encode(blocks / np.maximum(scales, 1e-30)[:, None]), scales


def _numbered(blocks: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    return ((at, blocks[at : at + _SLAB_BLOCKS]) for at in range(0, len(blocks), _SLAB_BLOCKS))


def _slabs(blocks: np.ndarray) -> Iterator[np.ndarray]:
    return (slab for _, slab in _numbered(blocks))

"""Two bits a weight whose meaning depends on row and block: a sign, and a mask that says which kind the weight is of.

Sources: BiLLM (Wei Huang, 2024, arXiv 2402.04291), section 3, and PB-LLM (Yuzhang Shang, 2023, arXiv 2310.00034),
section 3; `compress.billm` and `compress.pb_llm` find what is stored here.

Idea: binary weights with a mask cost one bit for the sign and one for the mask. Both stand in the same 2-bit tiles that
integer products read, code = sign + 2 * mask, and what a code means is worked out once per row and block of 128
columns: value = A + B sign + C mask + D sign mask, so a block's product is three dot products of bits with the
activations, and their sum.

- `billm`: per block some columns are salient and stand first. Salient columns have two signs (the mask bit is the
  second): mean +- first +- second. Others are concentrated (mask 0) or sparse (mask 1): mean +- scale of their set.
- `pbllm-s100`: 100 of 1000 weights are salient (mask 1) and have 8 bits, of which the sign bit is the highest; the
  other seven lie apart, in a byte each (8-bit products want them so), in the order of the tiles' bytes. Other
  weights are mean +- scale.

Units and shapes: weights [rows, cols], row tiles of 16, blocks of 128 columns.

    codes      uint8 [row tiles, blocks, 4, 128]: 2-bit tiles as `bitpack` has them, columns in stored order
    params     float16 [row tiles, blocks, 7 or 2, 16]: per row (billm) mean and scale of the concentrated, of the
               sparse, then mean, first and second scale of salient columns; (pbllm) mean and scale
    salient    uint8 [blocks]; order uint16 or uint32 [cols]: stored place -> column (billm)
    steps      float32 [row tiles, 2, 16]: step and zero of the 8-bit codes, value = step (code - zero) (pbllm)
    starts     uint32 [row tiles, blocks]: where a block's low bits start; rest uint8 [salient weights + 64] (pbllm)

Differs from the papers: they count 1.1 and 1.7 bits, without masks and scales; here every byte counts. Means of the two
salient signs are one number.
Cost: billm 2 + 7 * 16 / 128 = 2.875 bits per weight, and the order; pbllm 2 + 2 * 16 / 128 + 8 * share.
Holds when: columns and rows fill blocks (what is missing is padded).
"""

from __future__ import annotations

import re
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from memwall.errors import InputError
from memwall.formats.base import Codec, Packed, real_float32
from memwall.formats.bitpack import TILE_ROWS, matrix_shape, pack_tiles, unpack_tiles

BLOCK = 128
PAD = 64
"""Bytes behind the low bits, so that vectors may read past the last."""
MOST_SALIENT = 50
_NARROW_COLUMNS = 1 << 16
_MASKS_IN = np.array([(byte & 0xAA).bit_count() for byte in range(256)], np.uint8)
"""By byte of codes: how many of its four have the mask."""

Shapes = dict[str, tuple[tuple[int, ...], np.dtype[Any]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bits:
    """What both forms consist of, in stored order: signs, masks bool [rows, cols]; params float [rows, blocks, n]."""

    signs: np.ndarray
    masks: np.ndarray
    params: np.ndarray


class SignMaskCodec(Codec):
    """What the two forms share. bits: of a code."""

    bits: ClassVar[int] = 2
    group: ClassVar[int] = BLOCK
    num_params: ClassVar[int]

    def blocks(self, columns: int) -> list[slice]:
        """Column ranges of the blocks."""
        return [slice(start, min(start + BLOCK, columns)) for start in range(0, columns, BLOCK)]

    def buffers(self, shape: tuple[int, ...]) -> Shapes:
        rows, columns = matrix_shape(self.spec, shape)
        tiles, blocks = -(-rows // TILE_ROWS), -(-columns // BLOCK)
        return {
            "codes": ((tiles, blocks, 4, 64 * self.bits), np.dtype(np.uint8)),
            "params": ((tiles, blocks, self.num_params, TILE_ROWS), np.dtype(np.float16)),
        }

    @abstractmethod
    def levels(self, packed: Packed) -> np.ndarray:
        """What the codes of a matrix stand for: float32 [rows, cols] in stored order."""

    def encode(self, x: Any) -> Packed:
        """Every block on its own, columns of equal weight. What calibration adds is up to the methods."""
        values = real_float32(self.spec, x)
        matrix_shape(self.spec, values.shape)
        if not np.isfinite(values).all():
            raise InputError(f"{self.spec} cannot hold NaN or infinite values")
        if values.size == 0:
            empty = {name: np.zeros(shape, dtype) for name, (shape, dtype) in self.buffers(values.shape).items()}
            return Packed(spec=self.spec, shape=values.shape, buffers=empty)
        return self._encoded(values)

    @abstractmethod
    def _encoded(self, values: np.ndarray) -> Packed:
        """`encode` of numbers that may be encoded."""

    def pack_bits(self, bits: Bits) -> dict[str, np.ndarray]:
        """The buffers of codes and parameters."""
        rows, columns = bits.signs.shape
        sizes = SignMaskCodec.buffers(self, (rows, columns))
        tiles, blocks = sizes["codes"][0][:2]
        codes = np.zeros((tiles * TILE_ROWS, blocks * BLOCK), np.uint8)
        codes[:rows, :columns] = bits.signs + 2 * bits.masks.astype(np.uint8)
        params = np.zeros((tiles * TILE_ROWS, blocks, self.num_params), np.float16)
        params[:rows] = as_half(bits.params, self.spec)
        by_tile = params.reshape(tiles, TILE_ROWS, blocks, self.num_params).transpose(0, 2, 3, 1)
        return {"codes": pack_tiles(codes, self.bits, BLOCK), "params": np.ascontiguousarray(by_tile)}

    def unpack_bits(self, packed: Packed) -> Bits:
        """Inverse of `pack_bits`; params float32."""
        rows, columns = packed.shape
        codes = unpack_tiles(packed.buffers["codes"], self.bits, BLOCK)[:rows, :columns]
        params = packed.buffers["params"].transpose(0, 3, 1, 2).reshape(-1, -(-columns // BLOCK), self.num_params)
        return Bits(signs=codes & 1 == 1, masks=codes >> 1 == 1, params=params[:rows].astype(np.float32))


def as_half(values: np.ndarray, spec: str) -> np.ndarray:
    """float16, refused where numbers are too large for it."""
    with np.errstate(over="ignore"):
        halves = values.astype(np.float16) + np.float16(0)  # no negative zeros: equal numbers are equal bytes
    if not np.isfinite(halves).all():
        raise InputError(f"{spec}: a mean or scale of {np.abs(values).max():g} overflows float16 (65504)")
    return halves


def binarized(values: np.ndarray, mask: np.ndarray, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Mean and mean deviation [rows] float32 of the masked values [rows, n], as float16 keeps them.

    weights [n]: what a squared error of a column costs; None: all alike.
    """
    shares = mask.astype(np.float32) if weights is None else np.where(mask, weights, np.float32(0)).astype(np.float32)
    total = shares.sum(axis=1)
    total[total == 0] = 1
    mean = _kept((shares * values).sum(axis=1) / total)
    return mean, _kept((shares * np.abs(values - mean[:, None])).sum(axis=1) / total)


def _kept(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32)


# -- BiLLM -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class BillmCodec(SignMaskCodec):
    """Salient columns by two signs, others by a sign in one of two sets."""

    examples: ClassVar[tuple[str, ...]] = ("billm",)
    method: ClassVar[str] = "billm"
    num_params: ClassVar[int] = 7

    @classmethod
    def parse(cls, spec: str) -> BillmCodec:
        if spec != "billm":
            raise InputError(f"unknown format {spec!r}; BiLLM's is called billm")
        return cls()

    @property
    def spec(self) -> str:
        return "billm"

    def buffers(self, shape: tuple[int, ...]) -> Shapes:
        index = np.dtype(np.uint16 if shape[-1:] <= (_NARROW_COLUMNS,) else np.uint32)
        found = SignMaskCodec.buffers(self, shape)
        return {**found, "salient": (found["codes"][0][1:2], np.dtype(np.uint8)), "order": (shape[1:], index)}

    def pack(self, bits: Bits, salient: np.ndarray, order: np.ndarray) -> Packed:
        """salient [blocks]: how many columns of each block, the first ones; order [cols]: the column at each place."""
        shape = bits.signs.shape
        buffers = self.pack_bits(bits)
        sizes = self.buffers(shape)
        buffers |= {"salient": salient.astype(np.uint8), "order": order.astype(sizes["order"][1])}
        return Packed(spec=self.spec, shape=shape, buffers=buffers)

    def levels(self, packed: Packed) -> np.ndarray:
        bits, values = self.unpack_bits(packed), np.empty(packed.shape, np.float32)
        for index, block in enumerate(self.blocks(packed.shape[1])):
            signs, masks = bits.signs[:, block], bits.masks[:, block]
            split = int(packed.buffers["salient"][index])
            values[:, block] = billm_values(signs, masks, bits.params[:, index], np.arange(signs.shape[1]) < split)
        return values

    def decode(self, packed: Packed) -> np.ndarray:
        values = np.empty(packed.shape, np.float32)
        if packed.size:
            values[:, packed.buffers["order"].astype(np.int64)] = self.levels(packed)
        return values

    def _encoded(self, values: np.ndarray) -> Packed:
        from memwall.formats import sign_mask_fit as fit

        found = [
            fit.billm_block(values[:, block], np.ones(_width(block), np.float32))
            for block in self.blocks(values.shape[1])
        ]
        return fit.billm_pack(self, found, np.arange(values.shape[1]))


def billm_values(signs: np.ndarray, masks: np.ndarray, params: np.ndarray, salient: np.ndarray) -> np.ndarray:
    """One block: signs, masks [rows, n], params [rows, 7], salient [n] -> float32 [rows, n], as kernels have it."""
    mean, scale, far_mean, far_scale, middle, first, second = params.T[:, :, None]
    others = np.where(masks, _around(far_mean, far_scale, signs), _around(mean, scale, signs))
    return np.where(salient, _around(_around(middle, first, signs), second, masks), others)


def _around(mean: np.ndarray, scale: np.ndarray, above: np.ndarray) -> np.ndarray:
    return np.where(above, mean + scale, mean - scale)


# -- PB-LLM ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class PbLlmCodec(SignMaskCodec):
    """permille: how many of 1000 weights have 8 bits. Of a block these are round(rows n permille / 1000)."""

    examples: ClassVar[tuple[str, ...]] = ("pbllm-s100", "pbllm-s143", "pbllm-s0", "pbllm-s1000")
    method: ClassVar[str] = "pb-llm"
    num_params: ClassVar[int] = 2

    permille: int

    @classmethod
    def parse(cls, spec: str) -> PbLlmCodec:
        match = re.fullmatch(r"pbllm-s([0-9]{1,4})", spec)
        if match is None or int(match[1]) > 1000:
            raise InputError(f"unknown format {spec!r}; write how many of 1000 weights are salient, such as pbllm-s100")
        return cls(permille=int(match[1]))

    @property
    def spec(self) -> str:
        return f"pbllm-s{self.permille}"

    def num_salient(self, rows: int, columns: int) -> int:
        """Salient weights of one block."""
        return (rows * columns * self.permille + 500) // 1000

    def buffers(self, shape: tuple[int, ...]) -> Shapes:
        found = SignMaskCodec.buffers(self, shape)
        tiles, blocks = found["codes"][0][:2]
        count = sum(self.num_salient(shape[0], _width(block)) for block in self.blocks(shape[1]))
        return {
            **found,
            "steps": ((tiles, 2, TILE_ROWS), np.dtype(np.float32)),
            "starts": ((tiles, blocks), np.dtype(np.uint32)),
            "rest": ((count + PAD,), np.dtype(np.uint8)),
        }

    def pack(self, bits: Bits, codes: np.ndarray, steps: np.ndarray) -> Packed:
        """codes uint8 [rows, cols]: 8-bit codes where `masks`; steps float32 [rows, 2]: step and zero."""
        rows, columns = bits.signs.shape
        buffers = self.pack_bits(
            Bits(signs=np.where(bits.masks, codes >> 7, bits.signs) == 1, masks=bits.masks, params=bits.params)
        )
        tiles, blocks = buffers["codes"].shape[:2]
        buffers["steps"] = np.zeros((tiles * TILE_ROWS, 2), np.float32)
        buffers["steps"][:rows] = steps
        buffers["steps"] = np.ascontiguousarray(buffers["steps"].reshape(tiles, TILE_ROWS, 2).transpose(0, 2, 1))
        masks, low = (_by_bytes(each, tiles, blocks) for each in (bits.masks, codes & 127))
        counts = masks.reshape(tiles, blocks, -1).sum(axis=2).reshape(-1)
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.uint32)
        buffers |= {"starts": starts.reshape(tiles, blocks), "rest": np.append(low[masks], np.zeros(PAD, np.uint8))}
        return Packed(spec=self.spec, shape=(rows, columns), buffers=buffers)

    def codes(self, packed: Packed) -> np.ndarray:
        """8-bit codes uint8 [rows, cols], 0 where the mask is not set."""
        (rows, columns), bits = packed.shape, self.unpack_bits(packed)
        tiles, blocks = packed.buffers["codes"].shape[:2]
        masks = _by_bytes(bits.masks, tiles, blocks)
        low = np.zeros(masks.shape, np.uint8)
        low[masks] = packed.buffers["rest"][:-PAD]
        return np.where(bits.masks, _by_rows(low, rows, columns) | (bits.signs.astype(np.uint8) << 7), 0).astype(
            np.uint8
        )

    def levels(self, packed: Packed) -> np.ndarray:
        bits, values = self.unpack_bits(packed), np.empty(packed.shape, np.float32)
        steps = packed.buffers["steps"].transpose(0, 2, 1).reshape(-1, 2)[: packed.shape[0]]
        wide = steps[:, :1] * (self.codes(packed).astype(np.float32) - steps[:, 1:])
        for index, block in enumerate(self.blocks(packed.shape[1])):
            mean, scale = bits.params[:, index].T[:, :, None]
            values[:, block] = np.where(
                bits.masks[:, block], wide[:, block], _around(mean, scale, bits.signs[:, block])
            )
        return values

    def decode(self, packed: Packed) -> np.ndarray:
        return self.levels(packed) if packed.size else np.empty(packed.shape, np.float32)

    def _encoded(self, values: np.ndarray) -> Packed:
        from memwall.formats import sign_mask_fit as fit

        steps = fit.row_steps(values)
        found = [
            fit.pb_block(self, values[:, block], np.abs(values[:, block])) for block in self.blocks(values.shape[1])
        ]
        masks, params = (
            np.concatenate([mask for mask, _ in found], axis=1),
            np.stack([each for _, each in found], axis=1),
        )
        means = np.repeat(params[:, :, 0], [_width(block) for block in self.blocks(values.shape[1])], axis=1)
        return self.pack(Bits(signs=values >= means, masks=masks, params=params), fit.byte_codes(values, steps), steps)


def _width(block: slice) -> int:
    return int(block.stop - block.start)


def _by_bytes(numbers: np.ndarray, tiles: int, blocks: int) -> np.ndarray:
    """[rows, cols] in the order of the bytes of unpacked tiles: by tile, block, four columns, row, column."""
    padded = np.zeros((tiles * TILE_ROWS, blocks * BLOCK), numbers.dtype)
    padded[: len(numbers), : numbers.shape[1]] = numbers
    return padded.reshape(tiles, TILE_ROWS, blocks * BLOCK // 4, 4).transpose(0, 2, 1, 3)


def _by_rows(numbers: np.ndarray, rows: int, columns: int) -> np.ndarray:
    tiles, fours = numbers.shape[:2]
    return numbers.transpose(0, 2, 1, 3).reshape(tiles * TILE_ROWS, fours * 4)[:rows, :columns]


def check(packed: Packed) -> None:
    """InputError where indices point outside: kernels follow them without a look."""
    form, (rows, columns) = packed.spec, packed.shape
    buffers = packed.buffers
    if "order" in buffers:
        if not np.array_equal(np.sort(buffers["order"]), np.arange(columns)):
            raise InputError(f"{form} of shape {[rows, columns]}: `order` does not name each column once")
        if buffers["salient"].max(initial=0) > BLOCK:
            raise InputError(f"{form} of shape {[rows, columns]}: `salient` names more columns than a block has")
    else:
        tiles = (_MASKS_IN[tile].reshape(len(tile), -1).sum(axis=1, dtype=np.int64) for tile in buffers["codes"])
        starts = np.cumsum([0, *(count for tile in tiles for count in tile)])
        if not np.array_equal(starts[:-1], buffers["starts"].reshape(-1)) or starts[-1] + PAD != len(buffers["rest"]):
            raise InputError(
                f"{form} of shape {[rows, columns]}: `starts` or `rest` do not go with the mask in `codes`"
            )

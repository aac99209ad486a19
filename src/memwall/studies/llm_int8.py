"""LLM.int8(): weights in bytes with one scale per row, activations rounded per token, outlier columns left as they are.

*Source*: LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale (Dettmers, 2022, arXiv 2208.07339), sections
2.1 and 3. A column of the activations is an outlier if any of its numbers in the batch is 6 or more; the rest is
rounded to x = s_x * q_x with s_x = max|x| / 127 of the token, weights to w = s_w * q_w with s_w = max|w| / 127 of the
row, and

    y = s_x s_w (sum over plain columns of q_x q_w) + s_w (sum over outlier columns of x q_w)

*Differs*: both sums run in one pass over the weights: integers stay integers in float32 while sums are below 2^24, and
outliers ride along as x / s_x. The weights lie as `int8-g128` tiles (`int8-g64` where rows would be padded) whose group
scales are one; the scales of the rows are float32 beside them. Outliers are multiplied in float32, not in float16.
*Cost*: 8 + 16/128 + 32/columns bits per weight.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from memwall import kernels
from memwall.errors import InputError
from memwall.formats import Packed, codec
from memwall.formats.bitpack import TILE_ROWS, pack_tiles
from memwall.memory import Arena
from memwall.models import Checkpoint, ModelConfig
from memwall.models.config import EMBEDDING, HEAD
from memwall.models.decode import DecodeStep
from memwall.models.decoder import Decoder
from memwall.models.ssm_decoder import SsmDecoder
from memwall.models.weights import Weights

NAME = "llm-int8"
THRESHOLD = 6.0
LARGEST = 127
ZERO_CODE = 128


def spec_of(columns: int) -> str:
    """The tiles that hold a matrix: the wider group unless it would pad a row."""
    return "int8-g64" if columns % 128 else "int8-g128"


def round_rows(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weight [rows, columns] -> int8 of the same shape and float32 scales [rows]. InputError for NaN or infinity."""
    if not np.isfinite(weight).all():
        raise InputError(f"{NAME} cannot hold NaN or infinite values")
    peaks = np.abs(weight).max(axis=1).astype(np.float32)
    factors = np.divide(LARGEST, peaks, out=np.zeros_like(peaks), where=peaks > 0)
    codes = np.rint(weight * factors[:, None]).astype(np.int8)
    return codes, peaks / np.float32(LARGEST)


class Int8Matrix:
    """One weight matrix; buffers come from the arena under `weights/llm-int8`."""

    def __init__(self, weight: np.ndarray, arena: Arena) -> None:
        rows, columns = self.shape = weight.shape
        codes, scales = round_rows(weight)
        spec, group = spec_of(columns), 64 if columns % 128 else 128
        tiles, groups = -(-rows // TILE_ROWS), -(-columns // group)
        padded = np.full((tiles * TILE_ROWS, groups * group), ZERO_CODE, np.uint8)
        padded[:rows, :columns] = codes.astype(np.int16) + ZERO_CODE
        buffers = {}
        for name, (shape, dtype) in codec(spec).buffers(weight.shape).items():
            buffers[name] = arena.allocate(f"weights/{NAME}", shape, dtype)
        np.copyto(buffers["codes"], pack_tiles(padded, 8, group))
        buffers["scales"][...] = 1
        self.scales = arena.allocate(f"weights/{NAME}", (rows,), np.float32)
        self.scales[...] = scales
        self.nbytes = sum(buffer.nbytes for buffer in buffers.values()) + self.scales.nbytes
        self.held = (*buffers.values(), self.scales)
        self.matrix = kernels.matrix(Packed(spec=spec, shape=weight.shape, buffers=buffers))

    def product(self, rounded: np.ndarray, scales: np.ndarray, out: np.ndarray) -> None:
        """out = the product of activations as `round_activations` gives them."""
        kernels.linear(rounded, [self.matrix], [out], exact=True)
        out *= self.scales
        out *= scales


def round_activations(x: np.ndarray, threshold: float = THRESHOLD) -> tuple[np.ndarray, np.ndarray, int]:
    """x [tokens, columns] -> (integers, or x over its token's scale in outlier columns; scales [tokens, 1]; outliers).

    threshold 0 looks for no outliers.
    """
    sizes = np.abs(x)
    columns = np.flatnonzero((sizes >= threshold).any(axis=0)) if threshold else np.empty(0, np.int64)
    if len(columns):
        sizes[:, columns] = 0
    peaks = sizes.max(axis=1, keepdims=True)
    scales = np.where(peaks > 0, peaks / np.float32(LARGEST), np.float32(1))
    over = x / scales
    rounded = np.rint(over)
    if len(columns):
        rounded[:, columns] = over[:, columns]
    return rounded, scales, len(columns)


class Int8Products:
    """The products of a decoder whose linear layers but the head are `Int8Matrix`; counts the outlier columns that it
    meets.
    """

    def __init__(self, linears: dict[str, Int8Matrix], arena: Arena) -> None:
        self.linears = linears
        self.held = [buffer for matrix in linears.values() for buffer in matrix.held]
        self.threshold = THRESHOLD
        self.columns_seen = self.outliers_seen = 0
        self._arena = arena

    def multiply(
        self,
        x: np.ndarray,
        names: list[str],
        outs: list[np.ndarray],
        biases: list[np.ndarray | None] | None,
        accumulate: bool,
    ) -> None:
        """One input's products with some of the matrices."""
        rounded, scales, outliers = round_activations(x, self.threshold)
        self.columns_seen += x.shape[1]
        self.outliers_seen += outliers
        for name, out, bias in zip(names, outs, biases or [None] * len(names), strict=True):
            target = np.empty_like(out) if accumulate else out
            self.linears[name].product(rounded, scales, target)
            if bias is not None:
                target += bias
            if accumulate:
                out += target

    def release(self) -> None:
        """Gives the matrices back, and what else is `held`."""
        for buffer in self.held:
            self._arena.free(buffer)
        self.held.clear()
        self.linears.clear()


class Int8Decoder(Decoder):
    """With attention."""

    def __init__(
        self, config: ModelConfig, weights: Weights, products: Int8Products, arena: Arena, *, segment_tokens: int
    ) -> None:
        super().__init__(config, weights, arena, segment_tokens=segment_tokens, exact=True)
        self.products = products

    def _decode_step(self, num_rows: int = 1) -> DecodeStep | None:
        return None  # a recorded step knows plain products only

    def _linear(
        self,
        x: np.ndarray,
        names: list[str],
        outs: list[np.ndarray],
        biases: list[np.ndarray | None] | None = None,
        accumulate: bool = False,
    ) -> None:
        if all(name in self.products.linears for name in names):
            self.products.multiply(x, names, outs, biases, accumulate)
        else:
            super()._linear(x, names, outs, biases, accumulate)

    def release(self) -> None:
        super().release()
        self.products.release()


class Int8SsmDecoder(SsmDecoder):
    """Without attention: Mamba models."""

    def __init__(
        self, config: ModelConfig, weights: Weights, products: Int8Products, arena: Arena, *, segment_tokens: int
    ) -> None:
        super().__init__(config, weights, arena, segment_tokens=segment_tokens, exact=True)
        self.products = products

    def _linear(
        self, name: str, x: np.ndarray, out: np.ndarray, bias: np.ndarray | None = None, *, accumulate: bool = False
    ) -> None:
        if name in self.products.linears:
            self.products.multiply(x, [name], [out], [bias], accumulate)
        else:
            super()._linear(name, x, out, bias, accumulate=accumulate)

    def release(self) -> None:
        super().release()
        self.products.release()


def load(directory: Path, config: ModelConfig, arena: Arena, *, segment_tokens: int) -> Int8Decoder | Int8SsmDecoder:
    """The model with embedding and head in bfloat16, vectors in float32 and all other matrices as above."""
    weights = Weights(matrices={}, vectors={}, specs={})
    linears: dict[str, Int8Matrix] = {}
    specs: dict[str, str] = {}
    loose: list[np.ndarray] = []
    with Checkpoint(directory, config) as checkpoint:
        for tensor in config.tensors():
            values = np.asarray(checkpoint.tensor(tensor.name)).astype(np.float32)
            if tensor.role in ("linear", "expert"):
                linears[tensor.name], specs[tensor.name] = Int8Matrix(values, arena), spec_of(values.shape[1])
                checkpoint.drop(tensor.name)
                continue
            spec = specs[tensor.name] = "bfloat16" if tensor.role in ("embedding", "head") else "float32"
            packed = codec(spec).encode(values)
            buffers = {}
            for name, buffer in packed.buffers.items():
                buffers[name] = arena.allocate(f"weights/{spec}", buffer.shape, buffer.dtype)
                np.copyto(buffers[name], buffer)
            loose += buffers.values()
            if values.ndim == 2 and tensor.role != "other":
                weights.matrices[tensor.name] = kernels.matrix(Packed(spec=spec, shape=values.shape, buffers=buffers))
            else:
                weights.vectors[tensor.name] = next(iter(buffers.values()))
            checkpoint.drop(tensor.name)
    if config.tie_word_embeddings:
        weights.matrices[HEAD] = weights.matrices[EMBEDDING]
    weights.specs = specs
    products = Int8Products(linears, arena)
    kind = Int8Decoder if config.ssm is None else Int8SsmDecoder
    decoder = kind(config, weights, products, arena, segment_tokens=segment_tokens)
    products.held += loose
    return decoder

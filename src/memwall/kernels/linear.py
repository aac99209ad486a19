"""Products with weight matrices in any form: dense floats, packed integers, or packed codes of any level format."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from memwall import _native
from memwall._native import Matrix
from memwall.errors import InputError
from memwall.formats import Codec, Packed, codec
from memwall.formats.apmm_bipolar_int import BitPlaneCodec
from memwall.formats.base import PLAIN_BUFFER
from memwall.formats.bitstack import BitStackCodec
from memwall.formats.comet import CometCodec
from memwall.formats.comet import check as check_mixed
from memwall.formats.integer import IntegerCodec
from memwall.formats.leveled import LevelCodec
from memwall.formats.ordered import OrderedCodec
from memwall.formats.ordered import check as check_order
from memwall.formats.quip import QuipCodec
from memwall.formats.sign_mask import SignMaskCodec
from memwall.formats.sign_mask import check as check_masks
from memwall.formats.sparse import SparseCodec
from memwall.formats.sparse import check as check_pairs
from memwall.formats.spqr import GROUP, SpqrCodec
from memwall.formats.spqr import check as check_bilevel
from memwall.formats.vptq import VptqCodec
from memwall.formats.vptq import check as check_codebooks
from memwall.kernels.level_tables import native_levels

MIXED = 1000
"""Beside the group: activations that are rounded by block to 4 or 8 bits (the bytes of 8 are what they may take), or to
8 with their columns in the order of a matrix: they lie apart from those that all matrices of that group read."""

__all__ = ["Matrix", "gather_rows", "linear", "matrix", "predict_scratch_bytes", "roundings", "scratch_bytes"]


def matrix(packed: Packed) -> Matrix:
    """Matrix over the buffers of `packed`, which are neither copied nor changed and live as long as the matrix.

    Takes what the codecs `float32`, `float16`, `bfloat16`, `w{1..8}a{1..8}`, `spqr{2..8}`, `vptq`, `billm`,
    `pbllm-s{n}`, `quip{n}`, `bitstack`, `sparse{2..8}`, `comet`, `ordered-int{2..8}` and, in tiles, `int{2..8}` and all
    level formats make of [rows, cols].
    """
    if len(packed.shape) != 2:
        raise InputError(f"a matrix has two dimensions, got shape {list(packed.shape)}")
    form = codec(packed.spec)
    if isinstance(form, IntegerCodec | LevelCodec):
        if form.layout != "tiles":
            raise InputError(
                f"{packed.spec}: kernels read the tile layout; encode with {re.sub('-(rows|flat)$', '', form.spec)}"
            )
        if isinstance(form, LevelCodec):
            return _level_matrix(form, packed)
        return _tile_matrix(packed, form.bits, form.group)
    if isinstance(form, OrderedCodec):
        check_order(packed)
        return _tile_matrix(packed, form.bits, form.group)
    if isinstance(form, BitPlaneCodec):
        words, scales = (np.ascontiguousarray(packed.buffers[name]) for name in ("words", "scales"))
        scales = scales.view(np.uint16) if form.grouped else scales
        return _native.plane_matrix(form.spec, packed.shape[1], form.activation_bits, words, scales)
    if isinstance(form, SpqrCodec):
        check_bilevel(packed)
        halves = {name: _as_read(buffer) for name, buffer in packed.buffers.items()}
        outliers = [halves.get(name) for name in ("row_offsets", "outlier_columns", "outlier_values")]
        return _native.bilevel_matrix(
            form.spec, *packed.shape, form.bits, halves["codes"], halves["statistics"], halves.get("order"), *outliers
        )
    if isinstance(form, VptqCodec):
        return _codebook_matrix(form, packed)
    if isinstance(form, QuipCodec):
        return _turned_matrix(form, packed)
    if isinstance(form, SignMaskCodec):
        check_masks(packed)
        return _native.masked_matrix(form.spec, *packed.shape, **{n: _as_read(b) for n, b in packed.buffers.items()})
    if isinstance(form, SparseCodec):
        check_pairs(packed)
        held = {name: _as_read(buffer) for name, buffer in packed.buffers.items()}
        return _native.sparse_matrix(form.spec, *packed.shape, form.bits, form.group, **held)
    if isinstance(form, CometCodec):
        check_mixed(packed)
        held = {name: _as_read(buffer) for name, buffer in packed.buffers.items()}
        return _native.mixed_matrix(
            form.spec, *packed.shape, form.group, held["codes"], held["scales"], held["wide"], held.get("order")
        )
    if isinstance(form, BitStackCodec):
        blocks = [np.ascontiguousarray(block) for block in packed.buffers.values()]
        return _native.stacked_matrix(form.spec, *packed.shape, form.rank, blocks)
    values = np.ascontiguousarray(packed.buffers[PLAIN_BUFFER])
    return _native.dense_matrix(form.spec, values if values.itemsize == 4 else values.view(np.uint16))


def _tile_matrix(packed: Packed, bits: int, group: int) -> Matrix:
    held = {name: _as_read(buffer) for name, buffer in packed.buffers.items()}
    return _native.tile_matrix(
        packed.spec, *packed.shape, bits, group, held["codes"], held["scales"], held.get("mins"), held.get("order")
    )


def _level_matrix(form: LevelCodec, packed: Packed) -> Matrix:
    halves = {name: _as_read(buffer) for name, buffer in packed.buffers.items()}
    extra = [halves[name] for name in ("second", "nested", "offsets", "shifts", "shift_peaks") if name in halves]
    return _native.level_matrix(
        form.spec,
        *packed.shape,
        form.bits,
        form.group,
        halves["codes"],
        native_levels(form),
        form.scale,
        halves["scales"],
        extra,
    )


def _codebook_matrix(form: VptqCodec, packed: Packed) -> Matrix:
    check_codebooks(packed)
    outliers, rest = form.parts(packed.shape[1])
    held = {name: _as_read(buffer) for name, buffer in packed.buffers.items()}
    sizes = [
        (p.vector, p.main_bits, p.residual_bits, p.groups, p.block) if p is not None else () for p in (rest, outliers)
    ]
    return _native.codebook_matrix(
        form.spec,
        *packed.shape,
        sizes[0],
        held["indices"],
        held["centroids"],
        held.get("residuals"),
        0 if outliers is None else outliers.columns,
        sizes[1],
        held.get("outlier_indices"),
        held.get("outlier_centroids"),
        held.get("order"),
        held.get("scale_and_offset"),
    )


def _turned_matrix(form: QuipCodec, packed: Packed) -> Matrix:
    buffers = {name: _as_read(buffer) for name, buffer in packed.buffers.items()}
    rows, cols = form.turns(packed.shape, int(buffers["seed"][0]))
    return _native.turned_matrix(
        form.spec,
        *packed.shape,
        form.bits,
        buffers["codes"],
        native_levels(form.inner),
        (cols.order, cols.left, np.ascontiguousarray(cols.right.T)),
        (rows.order, np.ascontiguousarray(rows.left.T), rows.right),
        buffers["columns"],
        float(buffers["scale"][0]),
    )


def _as_read(buffer: np.ndarray) -> np.ndarray:
    """Contiguous, and float16 as the integers the binding knows."""
    buffer = np.ascontiguousarray(buffer)
    return buffer.view(np.uint16) if buffer.dtype == np.float16 else buffer


def linear(
    x: np.ndarray,
    matrices: Sequence[Matrix],
    outs: Sequence[np.ndarray],
    *,
    exact: bool = False,
    accumulate: bool = False,
    biases: Sequence[np.ndarray | None] | None = None,
) -> None:
    """outs[i] = x @ matrices[i].T (+ biases[i]); with `accumulate` the result is added to what `outs` hold.

    x [tokens, cols] and outs[i] [tokens, rows_i] are C-contiguous float32. All matrices are worked on in one parallel
    region, and over packed tiles x is rounded once, to 8-bit integers with one scale per group of the weights, and
    levels to integers of 16 bits at most (`level_tables`); `exact` keeps x in float32 and decodes the weights instead
    (slower, differs from the decoded product by rounding only).
    """
    _native.linear(x, matrices, outs, exact=exact, accumulate=accumulate, biases=biases)


def gather_rows(matrix: Matrix, ids: np.ndarray, out: np.ndarray) -> np.ndarray:
    """out[i] = row ids[i] of a matrix of any form, decoded to float32 (the embedding lookup). Returns `out`."""
    _native.gather_rows(matrix, np.ascontiguousarray(ids, dtype=np.int64), out)
    return out


def scratch_bytes() -> int:
    """Bytes that products hold between calls: rounded activations and one panel per thread. For the byte ledger."""
    return int(_native.linear_scratch_bytes())


def roundings(spec: str, *, exact: bool = False) -> tuple[int, ...]:
    """What products with weights in this format do to activations, as `predict_scratch_bytes` takes it for `group`."""
    form = codec(spec)
    if isinstance(form, SpqrCodec):
        return (() if exact else (GROUP,)) + ((1,) if form.ordered else ())
    if isinstance(form, VptqCodec):
        return (1,) if form.ordered or form.norm else ()
    if isinstance(form, QuipCodec):
        return (4 if exact else 3,)
    if isinstance(form, SignMaskCodec):
        return (() if exact else (2,)) + ((1,) if "order" in form.buffers((1, 1)) else ())
    if isinstance(form, BitStackCodec):
        return ()
    if isinstance(form, CometCodec | OrderedCodec):
        gathers = isinstance(form, OrderedCodec) or form.gather
        return (() if exact else (MIXED + form.group,)) + ((1,) if exact and gathers else ())
    return () if exact else (_rounding(form),)


def _rounding(form: Codec) -> int:
    if isinstance(form, BitPlaneCodec):
        return -form.activation_bits - (8 if form.grouped else 0)
    return getattr(form, "group", 0)


def predict_scratch_bytes(tokens: int, cols: int, *, group: int = 64, threads: int | None = None) -> int:
    """What `scratch_bytes` will be once `tokens` tokens of `cols` columns have been multiplied; for plans.

    group: of the weights; -m for bit planes with activations of m bits, -m - 8 where both have scales by groups; 0 for
    dense weights and for exact products, which round no activations; 16 for bilevel weights; `MIXED` and the group for
    mixed activations; 2 for signs and masks; 3 (exact: 4) for turned weights; 1 where columns are put in order or
    scaled. Weights of several groups keep one piece each; the widest input and the largest number of tokens of a run
    count. threads: None for those in use.
    """
    return int(_native.linear_scratch_bytes_for(tokens, cols, group, threads or _native.num_threads()))

"""Native encoding of weight matrices, for compressing while loading: the bytes of the codecs, many times faster."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np

from memwall import _native
from memwall.errors import InputError
from memwall.formats import Packed, codec
from memwall.formats.apmm_bipolar_int import BitPlaneCodec
from memwall.formats.bitpack import TILE_ROWS
from memwall.formats.integer import IntegerCodec
from memwall.formats.leveled import LevelCodec
from memwall.formats.scales import inverse_scale
from memwall.formats.shifted import ShiftedCodec, information_weights, search_steps

__all__ = ["encode"]

_SLAB_VALUES = 1 << 16


def encode(spec: str, values: np.ndarray, *, out: Mapping[str, np.ndarray] | None = None) -> Packed:
    """What `codec(spec).encode(values)` gives, from the compiled code where it has one.

    values: [rows, cols] of float32, float16, bfloat16 (ml_dtypes), or uint16 that holds bfloat16.
    out: the arrays to write to, with the names, shapes and types of `codec(spec).buffers(values.shape)`; new ones by
    default. Row slabs of a matrix (multiples of 16 rows) can be encoded one by one into slices of its tile buffers.
    """
    form = codec(spec)
    values = values.view(ml_dtypes.bfloat16) if values.dtype == np.uint16 else values
    expected = form.buffers(values.shape)
    if out is None:
        native = isinstance(form, BitPlaneCodec) or (
            isinstance(form, IntegerCodec | LevelCodec) and form.layout == "tiles"
        )
        out = {name: np.empty(shape, dtype) for name, (shape, dtype) in expected.items()} if native else None
    elif {name: (array.shape, array.dtype) for name, array in out.items()} != expected:
        wanted = ", ".join(f"{name} {shape} {dtype}" for name, (shape, dtype) in expected.items())
        raise InputError(f"the buffers of {spec} for shape {list(values.shape)} must be: {wanted}")
    if out is None or not _encode_native(form, values, out):
        # the codec encodes what has no native form, and names what is wrong with numbers that cannot be encoded
        packed = form.encode(values)
        if out is None:
            return packed
        for name, array in out.items():
            array[...] = packed.buffers[name]
    return Packed(spec=form.spec, shape=values.shape, buffers=dict(out))


def _encode_native(form: object, values: np.ndarray, out: Mapping[str, np.ndarray]) -> bool:
    """Fill `out` by compiled code; False where that has no way or the numbers cannot be encoded."""
    name = values.dtype.name
    if isinstance(form, BitPlaneCodec):
        return not form.grouped and _encode_planes(values, out)
    if isinstance(form, ShiftedCodec):
        return _encode_shifted(form, values, out)
    if isinstance(form, LevelCodec) and not form.encodes_natively:
        return False
    if isinstance(form, LevelCodec):
        return _encode_levels(form, values, out)
    if not isinstance(form, IntegerCodec) or form.layout != "tiles" or name not in ("float32", "float16", "bfloat16"):
        return False
    if not all(array.flags.c_contiguous for array in out.values()):
        return False
    values = np.ascontiguousarray(values)
    source = _native.dense_matrix(name, values if name == "float32" else values.view(np.uint16))
    mins = None if form.symmetric else out["mins"].view(np.uint16)
    return bool(_native.encode_tiles(source, form.bits, form.group, out["codes"], out["scales"].view(np.uint16), mins))


def _encode_planes(values: np.ndarray, out: Mapping[str, np.ndarray]) -> bool:
    """A slab of rows at a time: float32 copies of a few rows are all it takes."""
    words, scales = out["words"], out["scales"]
    if not (words.flags.c_contiguous and scales.flags.c_contiguous):
        return False
    slab = max(1, _SLAB_VALUES // max(values.shape[1], 1))
    parts = (slice(row, row + slab) for row in range(0, len(values), slab))
    return all(_native.pack_planes(values[rows].astype(np.float32), words[rows], scales[rows]) for rows in parts)


def _encode_shifted(form: ShiftedCodec, values: np.ndarray, out: Mapping[str, np.ndarray]) -> bool:
    """Shifts in compiled code, a slab of rows at a time; the rest in NumPy."""
    rows, columns = values.shape
    for start, stop in form.slabs(rows, columns) if columns else ():
        slab = np.ascontiguousarray(values[start:stop], np.float32)
        blocks = form.blocks(slab)
        shifts = np.empty(len(blocks), np.float32)
        _native.best_shifts(blocks, search_steps(), form.levels.thresholds, information_weights(), shifts)
        tiles = slice(start // TILE_ROWS, -(-stop // TILE_ROWS))
        for name, held in form.encode_slab(slab, shifts.reshape(stop - start, -1)).items():
            out[name][tiles] = held
    return True


def _encode_levels(form: LevelCodec, values: np.ndarray, out: Mapping[str, np.ndarray]) -> bool:
    """Scales in NumPy, a slab of rows at a time; codes in compiled code."""
    if form.layout != "tiles" or not out["codes"].flags.c_contiguous:
        return False
    rows, columns = values.shape
    for start, stop in form.slabs(rows, columns) if columns else ():
        slab = np.ascontiguousarray(values[start:stop], np.float32)
        scales = form.statistics(slab)
        tiles = slice(start // TILE_ROWS, -(-stop // TILE_ROWS))
        for name, held in form.scale_tiles(scales).items():
            out[name][tiles] = held
        levels = form.levels
        _native.encode_levels(
            _native.dense_matrix("float32", slab),
            form.bits,
            form.group,
            inverse_scale(scales[0]),
            levels.thresholds,
            levels.codes,
            form.zero_code,
            out["codes"][tiles],
        )
    return True

"""Folders whose weights are already quantized in GPTQ's, AWQ's or MARLIN's published form, as integers of our own.

The first two hold, for a matrix X of [out, in]: `X.qweight` and `X.qzeros` (codes and zero points in 32-bit words) and
`X.scales` (float16 [groups, out]); a value is scale * (code - zero). GPTQ packs codes along `in`, AWQ along `out` in
the order 0, 2, 4, 6, 1, 3, 5, 7. Codes and scales carry over as they are; where all zero points lie in the middle the
form is symmetric and exact, else the minimum -scale * zero is rounded to half precision once.

MARLIN's hold `X.B`, 4-bit codes in the order of tensor cores, and `X.s` (`kernels.marlin`): symmetric, so exact. Their
configuration says `marlin`, or `gptq` with that as its checkpoint format.

Where a family's files hold several of our matrices as one (`models.fused`), its rows are dealt out.

GPTQ's activation order gives neighbouring columns to different groups (`g_idx`). Where all groups have their full size
such a matrix is stored with columns sorted by group (`formats.ordered`), number for number as above; where they have
not, which no known writer does, it is rounded anew to 8 bits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from memwall.errors import InputError
from memwall.formats import Packed, checked_json, codec
from memwall.formats.bitpack import unpack_rows
from memwall.formats.checked_json import Fields, shown
from memwall.formats.integer import IntegerCodec
from memwall.formats.ordered import PREFIX, OrderedCodec
from memwall.formats.safetensors_file import SafetensorsFile
from memwall.kernels import marlin
from memwall.models.checkpoint import INDEX_NAME, SINGLE_NAME, stored_tensors
from memwall.models.config import ModelConfig, TensorSpec

METHODS = ("gptq", "awq", "marlin")
GPTQ_BITS = (2, 3, 4, 8)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
TILE_GROUPS = (128, 64, 32)
REROUNDED = "int8-g32"


def is_prequantized(folder: Path) -> bool:
    """Whether the configuration tells of quantized weights."""
    path = folder / "config.json"
    return path.is_file() and Fields(checked_json.read(path), str(path)).has("quantization_config")


class Prequantized:
    """One folder. config: its `config.json` without the quantization. Tensors are given one at a time."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        values = checked_json.read(folder / "config.json")
        told = Fields(
            Fields(values, str(folder / "config.json")).mapping("quantization_config"), f"{folder}: quantization"
        )
        self.method = told.text("quant_method", None, METHODS)
        if self.method == "gptq" and "marlin" in told.text("checkpoint_format", "gptq"):
            self.method = "marlin"
        self.bits = told.integer("bits", 2, 8)
        self.group = told.integer("group_size", -1, 1 << 20)
        if self.bits not in (GPTQ_BITS if self.method == "gptq" else (4,)):
            raise InputError(f"{folder}: {self.method} with {self.bits} bits is not read")
        if self.method == "awq" and told.text("version", "gemm").lower() != "gemm":
            raise InputError(f"{folder}: AWQ's packing {shown(told.values['version'])} is not read; 'gemm' is")
        # the first form of GPTQ's files keeps zero points less one
        self._zero_offset = int(self.method == "gptq" and told.text("checkpoint_format", "gptq") != "gptq_v2")
        self.config = {name: value for name, value in values.items() if name != "quantization_config"}
        self._codes_name = "B" if self.method == "marlin" else "qweight"
        self._stored: dict[str, tuple[str, int, np.ndarray | None]] = {}
        self._files = _open_all(folder)
        self._place = {name: file for file in self._files for name in file.names()}

    def form(self, tensor: TensorSpec) -> str:
        """The codec spec that the tensor gets."""
        name, _, rows = self._place_of(tensor)
        stem = name.removesuffix(".weight")
        if not self._is_coded(stem):
            info = self._file(name).info(name)
            return {"F16": "float16", "BF16": "bfloat16"}.get(info.dtype, "float32")
        order = self._order(stem, tensor.shape[1])
        if order is None:
            return REROUNDED
        group, bits = self._tile_group(tensor), self.bits
        if self.method == "marlin":
            return f"int4-g{group}"
        form = (
            f"int{bits}-g{group}" if self._is_symmetric(_taken(self._zeros(stem), rows)) else f"int{bits}-g{group}-asym"
        )
        return form if _in_place(order) else PREFIX + form

    def is_exact(self, tensor: TensorSpec) -> bool:
        """Whether codes carry over as they are."""
        stem = self._place_of(tensor)[0].removesuffix(".weight")
        return not self._is_coded(stem) or self._order(stem, tensor.shape[1]) is not None

    def packed(self, tensor: TensorSpec) -> Packed:
        """The tensor in its form; its pages leave with it."""
        name, count, rows = self._place_of(tensor)
        stem, form = name.removesuffix(".weight"), codec(self.form(tensor))
        if not self._is_coded(stem):
            return form.encode(_taken(self._file(name).alone(name), rows))
        inner = form.inner if isinstance(form, OrderedCodec) else form
        assert isinstance(inner, IntegerCodec)
        if self.method == "marlin":
            words, stored = self._alone(f"{stem}.B"), self._alone(f"{stem}.s")
            return marlin.to_packed(marlin.MarlinWeight(words, stored, self._group_of(tensor.shape[1])))
        codes, zeros = _taken(self._codes(stem, (count, tensor.shape[1])), rows), _taken(self._zeros(stem), rows)
        scales = _taken(self._alone(f"{stem}.scales").T, rows).astype(np.float32)  # [out, groups]
        order = self._order(stem, tensor.shape[1])
        if order is None:
            groups = self._alone(f"{stem}.g_idx").astype(np.int64)
            return form.encode(scales[:, groups] * (codes.astype(np.float32) - zeros[:, groups]))
        repeats = tensor.shape[1] // (inner.group * scales.shape[1])
        whole = np.repeat(scales, repeats, 1).astype(np.float16)
        mins = None if inner.symmetric else np.repeat(0.0 - scales * zeros, repeats, 1).astype(np.float16)
        if not isinstance(form, OrderedCodec):
            return inner.pack(codes, whole, mins)
        return form.around(inner.pack(np.ascontiguousarray(codes[:, order]), whole, mins), order)

    def check(self, config: ModelConfig) -> None:
        """All tensors are there, and nothing of unknown shape."""
        if config.ssm is not None or (config.falcon is not None and self.method == "marlin"):
            raise InputError(
                f"{self.path}: a {config.family} model in {self.method.upper()}'s form is not read; compress the float "
                "model: memwall compress MODEL OUT"
            )
        for stored in stored_tensors(config):
            for name, rows in stored.parts.items():
                self._stored[name] = stored.name, stored.shape[0], None if rows is None else rows.indices()
            stem = stored.name.removesuffix(".weight")
            if self._is_coded(stem):
                self._check_shapes(stem, stored.shape)
                continue
            shape = self._file(stored.name).info(stored.name).shape
            if shape != stored.shape:
                wanted = list(stored.shape)
                raise InputError(f"{self.path}: {stored.name} has shape {list(shape)}; the configuration says {wanted}")

    def close(self) -> None:
        for file in self._files:
            file.close()

    def _place_of(self, tensor: TensorSpec) -> tuple[str, int, np.ndarray | None]:
        """The stored tensor, its rows, and which of them are ours (None: all)."""
        return self._stored[tensor.name]

    def _check_shapes(self, stem: str, shape: tuple[int, ...]) -> None:
        out, columns = shape
        groups, word = columns // self._group_of(columns), 32
        if self.method == "marlin":
            self._check_marlin(stem, out, columns, groups)
            return
        packed_in = self.method == "gptq"
        wanted = {
            "qweight": (columns * self.bits // word, out) if packed_in else (columns, out * self.bits // word),
            "qzeros": (groups, out * self.bits // word),
            "scales": (groups, out),
        }
        for part, shape in wanted.items():
            found = self._file(f"{stem}.{part}").info(f"{stem}.{part}").shape
            if found != shape:
                raise InputError(f"{self.path}: {stem}.{part} has shape {list(found)}; {list(shape)} would be right")

    def _is_coded(self, stem: str) -> bool:
        return f"{stem}.{self._codes_name}" in self._place

    def _check_marlin(self, stem: str, out: int, columns: int, groups: int) -> None:
        if columns % marlin.TILE or out % marlin.FRAGMENT_COLUMNS:
            raise InputError(f"{self.path}: {stem} of [{out}, {columns}] has no place in MARLIN's tiles")
        for part, shape in (("B", (columns // marlin.TILE, 2 * out)), ("s", (groups, out))):
            found = self._file(f"{stem}.{part}").info(f"{stem}.{part}").shape
            if found != shape:
                raise InputError(f"{self.path}: {stem}.{part} has shape {list(found)}; {list(shape)} would be right")

    def _group_of(self, columns: int) -> int:
        group = columns if self.group == -1 else self.group
        if columns % group or not any(group % tile == 0 for tile in TILE_GROUPS):
            raise InputError(
                f"{self.path}: groups of {group} of {columns} columns; multiples of 32 that divide are read"
            )
        return group

    def _tile_group(self, tensor: TensorSpec) -> int:
        group = self._group_of(tensor.shape[1])
        return next(tile for tile in TILE_GROUPS if group % tile == 0)

    def _codes(self, stem: str, shape: tuple[int, ...]) -> np.ndarray:
        """uint8 [out, in]."""
        words = self._alone(f"{stem}.qweight")
        if self.method == "gptq":
            stream = np.ascontiguousarray(words.T).view(np.uint8)  # codes run on over the ends of words
            return np.asarray(unpack_rows(stream, shape[1], self.bits))
        return np.ascontiguousarray(_awq_columns(words).T)

    def _zeros(self, stem: str) -> np.ndarray:
        """float32 zero points [out, groups]."""
        words = self._alone(f"{stem}.qzeros")
        if self.method == "awq":
            return _awq_columns(words).T.astype(np.float32)
        stream = np.ascontiguousarray(words).view(np.uint8)
        zeros = np.asarray(unpack_rows(stream, words.shape[1] * 32 // self.bits, self.bits))
        return zeros.T.astype(np.float32) + self._zero_offset

    def _is_symmetric(self, zeros: np.ndarray) -> bool:
        return bool((zeros == 1 << (self.bits - 1)).all())

    def _order(self, stem: str, columns: int) -> np.ndarray | None:
        """The column at each place once they are sorted by group; None where groups are not all of the full size."""
        name = f"{stem}.g_idx"
        if name not in self._place:
            return np.arange(columns)
        groups = self._alone(name)
        if groups.shape != (columns,):
            raise InputError(f"{self.path}: {name} has shape {list(groups.shape)}; {[columns]} would be right")
        group = self._group_of(columns)
        if not 0 <= groups.min() <= groups.max() < columns // group:
            raise InputError(f"{self.path}: {name} names groups outside of 0 to {columns // group - 1}")
        sizes = np.bincount(groups, minlength=columns // group)
        return np.argsort(groups, kind="stable") if bool((sizes == group).all()) else None

    def _file(self, name: str) -> SafetensorsFile:
        try:
            return self._place[name]
        except KeyError:
            raise InputError(f"{self.path}: holds no tensor {shown(name)}") from None

    def _alone(self, name: str) -> np.ndarray:
        return self._file(name).alone(name)


def _taken(values: np.ndarray, rows: np.ndarray | None) -> np.ndarray:
    return values if rows is None else np.ascontiguousarray(values[rows])


def _in_place(order: np.ndarray) -> bool:
    return bool((order == np.arange(len(order))).all())


def _awq_columns(words: np.ndarray) -> np.ndarray:
    """int32 [rows, n] -> uint8 [rows, 8 n]: eight codes of a word, the even columns first."""
    found = np.empty((*words.shape, 8), np.uint8)
    for place, column in enumerate(AWQ_ORDER):
        found[..., column] = words >> 4 * place & 15
    return found.reshape(words.shape[0], -1)


def _open_all(folder: Path) -> list[SafetensorsFile]:
    index = folder / INDEX_NAME
    if (folder / SINGLE_NAME).is_file():
        names: list[Any] = [SINGLE_NAME]
    elif index.is_file():
        weight_map = Fields(checked_json.read(index), str(index)).mapping("weight_map")
        names = sorted({json.dumps(name) for name in weight_map.values()})
        names = [checked_json.file_name(json.loads(name), str(index)) for name in names]
    else:
        raise InputError(f"{folder}: no {SINGLE_NAME} and no {INDEX_NAME}")
    return [SafetensorsFile(folder / name) for name in names]

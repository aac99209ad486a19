"""Models of random weights made straight in their packed form: seconds, where encoding a billion weights takes minutes.

Some rows of each width of matrix are drawn and encoded (or, for types that the `gguf` package only reads, drawn as
blocks of random codes with small scales), and repeated until the matrix is full: what a step reads is as large and as
spread out as of any model, and what it computes stays finite. Embedding and head never have less than four bits, in
neither engine.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from random_models import (
    Shape,
    _add_gguf_settings,
    _config,
    _gguf_name,
    _write_json,
    file_type_of,
    narrow,
    tensor_shapes,
    widen,
)

if TYPE_CHECKING:
    from memwall.formats import Packed

DRAWN_WEIGHTS = 1 << 21
_DTYPES = {"uint8": "U8", "uint16": "U16", "uint64": "U64", "float16": "F16", "float32": "F32", "int8": "I8"}
#: types of llama.cpp whose embedding and head are of another one: those of fewer than four bits
FEW_BITS = ("Q1_0", "TQ1_0", "TQ2_0", "Q2_K", "Q3_K")
EMBEDDING_KIND = "Q4_K"
#: where a block of a type that `gguf` cannot pack holds its float16 scales
_SCALES_AT = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,)}


def drawn(rows: int, cols: int, seed: int) -> np.ndarray:
    """float32 [rows, cols] of the size that weights with so many inputs have."""
    return cols**-0.5 * np.random.default_rng([seed, cols]).standard_normal((rows, cols), dtype=np.float32)


def draw_directory(shape: Shape, folder: Path, form: str) -> Path:
    """A folder as `memwall compress --method rtn --bits FORM` makes one; of `bfloat16`, a plain Hugging Face folder."""
    from memwall.formats.manifest import FileEntry, Manifest, PackedEntry, buffer_tensor_name
    from memwall.models.config import ModelConfig
    from memwall.models.precision import is_matrix, resolve

    folder, settings = Path(folder), _config(shape)
    folder.mkdir(parents=True, exist_ok=True)
    config = ModelConfig.from_dict(settings)
    specs = resolve(config, form)
    arrays: dict[str, Repeated] = {}
    entries: dict[str, PackedEntry] = {}
    cache: dict[Any, Any] = {}
    for tensor in config.tensors():
        if not is_matrix(tensor) or form == "bfloat16":
            arrays[tensor.name] = _plain(tensor.shape, cache)
            continue
        found = _repeated(specs[tensor.name], tensor.shape, cache)
        entries[tensor.name] = PackedEntry(spec=specs[tensor.name], shape=tensor.shape, buffers=tuple(found))
        arrays |= {buffer_tensor_name(tensor.name, name): array for name, array in found.items()}
    _write_json(folder / "config.json", settings)
    written = _write_safetensors(folder / "model.safetensors", arrays)
    if form != "bfloat16":
        manifest = Manifest(model_config=settings, files={"model.safetensors": FileEntry(**written)}, tensors=entries)
        (folder / "memwall.json").write_text(manifest.to_json(), encoding="utf-8")
    return folder


def _plain(dims: tuple[int, ...], cache: dict[Any, Any]) -> Repeated:
    """bfloat16 as uint16: ones, or weights."""
    if dims[1:] not in cache:
        rows = np.ones(1, np.float32) if len(dims) == 1 else drawn(DRAWN_WEIGHTS // dims[1], dims[1], 0)
        cache[dims[1:]] = narrow(rows)
    return Repeated(cache[dims[1:]], dims)


class Repeated:
    """An array as large as `shape` that repeats `part`, made piece by piece where it is written."""

    def __init__(self, part: np.ndarray, shape: tuple[int, ...]) -> None:
        self.part, self.shape, self.dtype = np.ascontiguousarray(part).reshape(-1), shape, part.dtype

    def pieces(self) -> Iterator[np.ndarray]:
        left = int(np.prod(self.shape))
        while left > 0:
            yield self.part[:left]
            left -= len(self.part)


def draw_matrix(spec: str, dims: tuple[int, int]) -> Packed:
    """A matrix [rows, cols] in memory."""
    from memwall.formats import Packed

    buffers = {name: np.resize(each.part, each.shape) for name, each in _repeated(spec, dims, {}).items()}
    return Packed(spec=spec, shape=dims, buffers=buffers)


def _repeated(spec: str, dims: tuple[int, ...], cache: dict[Any, Any]) -> dict[str, Repeated]:
    """Buffers of a matrix: rows stack along their first axes, so that repeating flat numbers repeats rows."""
    from memwall import kernels
    from memwall.formats import codec

    form, cols = codec(spec), dims[1]
    if (spec, cols) not in cache:
        rows = max(16, DRAWN_WEIGHTS // cols // 16 * 16)
        out = {name: np.zeros(shape, dtype) for name, (shape, dtype) in form.buffers((rows, cols)).items()}
        kernels.encode(spec, drawn(rows, cols, 0), out=out)
        cache[spec, cols] = out
    wanted = form.buffers(dims)
    return {name: Repeated(part, wanted[name][0]) for name, part in cache[spec, cols].items()}


def _write_safetensors(path: Path, arrays: dict[str, Repeated]) -> dict[str, Any]:
    """Writes name -> what `Repeated` gives; returns bytes and digest of the file."""
    header, offset = {}, 0
    for name, array in arrays.items():
        nbytes = int(np.prod(array.shape)) * array.dtype.itemsize
        kind = "BF16" if "::" not in name else _DTYPES[array.dtype.name]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    digest, part = hashlib.sha256(), path.with_name(path.name + ".part")
    with part.open("wb") as file:

        def put(data: Any) -> None:
            digest.update(data)
            file.write(data)

        put(len(encoded).to_bytes(8, "little") + encoded)
        for array in arrays.values():
            for piece in array.pieces():
                put(piece.view(np.uint8).data)
        nbytes = file.tell()
    os.replace(part, path)
    return {"bytes": nbytes, "sha256": digest.hexdigest()}


def gguf_kinds(shape: Shape, kind: str) -> dict[str, str]:
    """Type of each matrix in a file that is mostly of `kind`."""
    ends = EMBEDDING_KIND if kind in FEW_BITS else kind
    return {name: ends if "embed" in name else kind for name, dims in tensor_shapes(shape).items() if len(dims) == 2}


def draw_gguf(shape: Shape, path: Path, kind: str) -> float:
    """Writes the file unless it is there; returns its mean bits per weight of matrices. Needs the `gguf` package."""
    import gguf
    from gguf.quants import quant_shape_to_byte_shape

    kinds, sizes = gguf_kinds(shape, kind), gguf.GGML_QUANT_SIZES
    path, shapes = Path(path), tensor_shapes(shape)
    bits = 0.0
    for name, each in kinds.items():
        numbers, nbytes = sizes[gguf.GGMLQuantizationType[each]]
        bits += 8 * nbytes / numbers * np.prod(shapes[name])
    bits /= sum(float(np.prod(shapes[name])) for name in kinds)
    if path.exists():
        return float(bits)
    writer = gguf.GGUFWriter(part := path.with_name(path.name + ".part"), "llama")
    _add_gguf_settings(writer, shape, file_type=int(file_type_of(gguf, kind)))
    writer.add_tokenizer_model("none")
    for name, dims in shapes.items():
        if len(dims) == 1:
            writer.add_tensor_info(_gguf_name(name), dims, np.dtype(np.float32), 4 * dims[0])
        else:
            packing = gguf.GGMLQuantizationType[kinds[name]]
            packed = quant_shape_to_byte_shape(dims, packing)
            writer.add_tensor_info(_gguf_name(name), packed, np.dtype(np.uint8), int(np.prod(packed)), packing)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    blocks: dict[tuple[str, int], np.ndarray] = {}
    for name, dims in shapes.items():
        if len(dims) == 1:
            writer.write_tensor_data(np.ones(dims, np.float32))
            continue
        key = kinds[name], dims[1]
        if key not in blocks:
            blocks[key] = _gguf_rows(gguf, *key)
        packed = quant_shape_to_byte_shape(dims, gguf.GGMLQuantizationType[kinds[name]])
        writer.write_tensor_data(np.resize(blocks[key], packed))
    writer.close()
    os.replace(part, path)
    return float(bits)


def _gguf_rows(gguf: Any, kind: str, cols: int) -> np.ndarray:
    """Some packed rows, bytes."""
    rows, packing = max(1, (DRAWN_WEIGHTS >> 2) // cols), gguf.GGMLQuantizationType[kind]
    if kind not in _SCALES_AT:
        values = drawn(rows, cols, 0)
        return gguf.quants.quantize(widen(narrow(values)), packing)
    numbers, nbytes = gguf.GGML_QUANT_SIZES[packing]
    blocks = np.random.default_rng(0).integers(0, 256, (rows * cols // numbers, nbytes), dtype=np.uint8)
    small = np.full(1, cols**-0.5 / 512, np.float16).view(np.uint8)
    for at in _SCALES_AT[kind]:
        blocks[:, at : at + 2] = small
    return blocks.reshape(rows, -1)

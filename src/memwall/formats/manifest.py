"""`memwall.json`, the manifest of a compressed model: which file holds what, in which codec, with sizes and digests.

    {"format": "memwall", "version": 1,
     "model_config": {...},                                                     the original config.json
     "files": {"model.safetensors": {"bytes": 123, "sha256": "..."}},
     "tensors": {"lm_head.weight": {"spec": "int4-g64", "shape": [4096, 256], "buffers": ["codes", "scales"]}},
     "info": {...}}                                                             optional: how it was made

The buffer `codes` of the tensor `lm_head.weight` is the safetensors tensor `lm_head.weight::codes`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memwall.errors import InputError
from memwall.formats import checked_json
from memwall.formats.checked_json import Fields, shown

MANIFEST_NAME = "memwall.json"
FORMAT = "memwall"
VERSION = 1
MAX_MANIFEST_BYTES = 64_000_000
_DIGEST = re.compile(r"[0-9a-f]{64}")
_WORD = re.compile(r"[a-z0-9][a-z0-9_.=,()-]{0,63}")


def buffer_tensor_name(tensor: str, buffer: str) -> str:
    """Name in the safetensors file of one packed buffer of a tensor."""
    return f"{tensor}::{buffer}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """Size and SHA-256 of one file of the folder."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedEntry:
    """Codec spec, logical shape and buffer names of one packed tensor."""

    spec: str
    shape: tuple[int, ...]
    buffers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The whole manifest, checked."""

    model_config: Mapping[str, Any]
    files: Mapping[str, FileEntry]
    tensors: Mapping[str, PackedEntry]
    info: Mapping[str, Any] = field(default_factory=dict)
    version: int = VERSION

    @staticmethod
    def load(directory: Path) -> Manifest:
        path = Path(directory) / MANIFEST_NAME
        return Manifest.from_dict(checked_json.read(path, max_bytes=MAX_MANIFEST_BYTES), str(path))

    @staticmethod
    def from_bytes(data: bytes, source: str = MANIFEST_NAME) -> Manifest:
        return Manifest.from_dict(checked_json.parse(data, source), source)

    @staticmethod
    def from_dict(values: Mapping[str, Any], source: str = MANIFEST_NAME) -> Manifest:
        top = Fields(values, source)
        if top.values.get("format") != FORMAT:
            raise InputError(f"{source}: not a memwall manifest (format is {shown(top.values.get('format'))})")
        version = top.integer("version", 1, 2**31)
        if version != VERSION:
            raise InputError(
                f"{source}: manifest version {version}; this memwall reads version {VERSION}: update memwall"
            )
        top.only("format", "version", "model_config", "files", "tensors", "info")
        files = {name: _file_entry(name, entry, source) for name, entry in top.mapping("files").items()}
        tensors = {name: _packed_entry(name, entry, source) for name, entry in top.mapping("tensors").items()}
        return Manifest(
            model_config=top.mapping("model_config"), files=files, tensors=tensors, info=top.mapping("info", {})
        )

    def to_json(self) -> str:
        files = {name: {"bytes": entry.bytes, "sha256": entry.sha256} for name, entry in self.files.items()}
        tensors = {
            name: {"spec": entry.spec, "shape": list(entry.shape), "buffers": list(entry.buffers)}
            for name, entry in self.tensors.items()
        }
        document = {
            "format": FORMAT,
            "version": self.version,
            "model_config": dict(self.model_config),
            "files": files,
            "tensors": tensors,
            "info": dict(self.info),
        }
        return json.dumps(document, indent=1) + "\n"


def _entry(name: str, entry: Any, source: str) -> Fields:
    place = f"{source}: {shown(name)}"
    if not isinstance(entry, Mapping):
        raise InputError(f"{place}: expected an object")
    return Fields(entry, place)


def _file_entry(name: str, entry: Any, source: str) -> FileEntry:
    checked_json.file_name(name, source)
    fields = _entry(name, entry, source)
    fields.only("bytes", "sha256")
    digest = fields.text("sha256")
    if not _DIGEST.fullmatch(digest):
        raise fields.error("sha256", digest, "64 hexadecimal digits")
    return FileEntry(bytes=fields.integer("bytes", 0, 2**60), sha256=digest)


def _packed_entry(name: str, entry: Any, source: str) -> PackedEntry:
    fields = _entry(name, entry, source)
    fields.only("spec", "shape", "buffers")
    spec = fields.text("spec")
    if not _WORD.fullmatch(spec):
        raise fields.error("spec", spec, "a codec spec such as int4-g64")
    buffers = fields.items("buffers", 16)
    if not buffers or len({str(buffer) for buffer in buffers}) != len(buffers):
        raise fields.error("buffers", buffers, "a list of different buffer names")
    for buffer in buffers:
        if not isinstance(buffer, str) or not _WORD.fullmatch(buffer):
            raise fields.error("buffers", buffer, "a list of plain names")
    return PackedEntry(spec=spec, shape=fields.shape("shape"), buffers=tuple(buffers))

"""A compressed folder of a size that was asked for: all its files together, to the byte, before any is written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memwall.compress.parts import Part
from memwall.compress.saved import COPIED_NAMES
from memwall.errors import InputError
from memwall.formats import Packed, codec
from memwall.formats.manifest import FileEntry, Manifest, PackedEntry
from memwall.formats.safetensors_file import build_header
from memwall.hardware.units import format_bytes
from memwall.models.precision import is_matrix

LEAST_SHARE = 0.99
"""How near a size is hit: from here on, and never above."""
_LONG = 1 << 46
_DIGEST = "0" * 64


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderSize:
    """nbytes: asked for. source: folder of the model, whose small files are copied; model_config: its configuration."""

    nbytes: int
    source: Path
    model_config: Mapping[str, Any]

    def __str__(self) -> str:
        return format_bytes(self.nbytes)

    def small_files_bytes(self, files: Iterable[str], tensors: Mapping[str, Packed], info: Mapping[str, Any]) -> int:
        """At most what the manifest and the files that are copied will take.

        files: names of the weight files; tensors: forms of the packed ones, with or without buffers.
        """
        copied = [self.source / name for name in COPIED_NAMES]
        sizes = {path.name: path.stat().st_size for path in copied if path.is_file()}
        entries = {name: FileEntry(bytes=_LONG, sha256=_DIGEST) for name in (*files, *sizes)}
        packed = {
            name: PackedEntry(spec=form.spec, shape=form.shape, buffers=tuple(codec(form.spec).buffers(form.shape)))
            for name, form in tensors.items()
        }
        manifest = Manifest(model_config=self.model_config, files=entries, tensors=packed, info=info)
        return len(manifest.to_json().encode()) + sum(sizes.values())

    def overhead_bytes(
        self, files: Sequence[str], parts: Sequence[Part], forms: Sequence[Mapping[str, str]], info: Mapping[str, Any]
    ) -> int:
        """At most what such a folder holds beside matrices: headers, manifest, vectors, files that are copied.

        forms: of each part's tensors; for matrices the longest spec that they may get.
        """
        tensors = [tensor for part in parts for tensor in part.tensors]
        specs = {name: spec for part in forms for name, spec in part.items()}
        shaped = [{t.name: (specs[t.name], t.shape) for t in part.tensors} for part in parts]
        packed = {t.name: Packed(spec=specs[t.name], shape=t.shape, buffers={}) for t in tensors}
        vectors = sum(codec(specs[t.name]).nbytes(t.shape) for t in tensors if not is_matrix(t))
        return self.small_files_bytes(files, packed, info) + sum(map(head_bytes, shaped)) + vectors

    def check(self, reached_bytes: int, what: str) -> None:
        """InputError where the most that there is to store stays far below what was asked."""
        if reached_bytes < LEAST_SHARE * self.nbytes:
            raise InputError(
                f"size {self}: {what} of this model take {reached_bytes:,} bytes in all; try --size {reached_bytes}"
            )


def head_bytes(forms: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    """Bytes of the header of a part with these tensors: name -> (spec, shape)."""
    names = [
        (f"{name}::{buffer}", dtype, size)
        for name, (spec, shape) in forms.items()
        for buffer, (size, dtype) in codec(spec).buffers(shape).items()
    ]
    described = {name: {"spec": spec, "shape": list(shape)} for name, (spec, shape) in forms.items()}
    return len(build_header(names, {"format": "memwall", "tensors": json.dumps(described, sort_keys=True)})[0])

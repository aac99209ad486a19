"""The last step of a run whose method trains what it has made: new buffers for some tensors, put into the parts.

Training needs all parts and is long; putting its result into them is short, part by part, and may be cut off. So the
result is first kept whole beside the parts; a run that is taken up finds it there and only puts it in again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from memwall.compress.base import Trained, WeightMethod
from memwall.compress.saved import TUNED_NAME, WorkDirectory, read_part
from memwall.formats import Packed
from memwall.formats.base import tensor_name
from memwall.formats.safetensors_file import SafetensorsFile, SafetensorsWriter


def tune_parts(work: WorkDirectory, method: WeightMethod, source: Path, progress: Trained) -> None:
    """Train what the parts hold, or take up a result that is there, and rewrite the parts that it changes."""
    path = work.path / TUNED_NAME
    if not path.is_file():
        made: dict[str, Packed] = {}
        for part in work.parts:
            made |= read_part(work.path / part.file)
        _keep(path, method.train(source, made, progress), made)
    with SafetensorsFile(path) as file:
        buffers = {name: np.array(file.tensor(name)) for name in file.names()}
    for part in list(work.parts):
        held = read_part(work.path / part.file)
        changed = {name: _changed(name, packed, buffers) for name, packed in held.items()}
        if any(changed[name] is not packed for name, packed in held.items()):
            with work.writer(part.file, {name: (each.spec, each.shape) for name, each in changed.items()}) as writer:
                for name, packed in changed.items():
                    writer.write(name, packed)


def _keep(path: Path, tuned: Mapping[str, Packed], made: Mapping[str, Packed]) -> None:
    """The buffers that training has changed, in a file of their own."""
    kept = {
        tensor_name(name, buffer): array
        for name, packed in tuned.items()
        for buffer, array in packed.buffers.items()
        if not np.array_equal(array, made[name].buffers[buffer])
    }
    with SafetensorsWriter(path, [(n, a.dtype, a.shape) for n, a in kept.items()], {"format": "memwall"}) as writer:
        for name, array in kept.items():
            writer.write(name, array)


def _changed(name: str, packed: Packed, buffers: Mapping[str, np.ndarray]) -> Packed:
    found = {buffer: buffers.get(tensor_name(name, buffer)) for buffer in packed.buffers}
    new = {buffer: array for buffer, array in found.items() if array is not None}
    return replace(packed, buffers={**packed.buffers, **new}) if new else packed

"""The last step of a run whose method trains what it has made: some tensors of the same forms, put into the parts.

Training needs all parts and is long; putting its result into them is short, part by part, and may be cut off. So the
result is first kept beside the parts; a run that is taken up finds it there and only puts it in again. Tensors are kept
with all their buffers: a part that was cut off is made anew, on the output of parts that are trained already, so that
its codes may differ from those that were trained.
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
from memwall.models.checkpoint import Checkpoint


def tune_parts(
    work: WorkDirectory, method: WeightMethod, checkpoint: Checkpoint, tokens: np.ndarray, progress: Trained
) -> None:
    """Train what the parts hold, or take up a result that is there, and rewrite the parts that it changes."""
    path = work.path / TUNED_NAME
    if not path.is_file():
        made: dict[str, Packed] = {}
        for part in work.parts:
            made |= read_part(work.path / part.file)
        _keep(path, method.train(checkpoint, tokens, made, progress))
    with SafetensorsFile(path) as file:
        buffers = {name: np.array(file.tensor(name)) for name in file.names()}
    for part in list(work.parts):
        held = read_part(work.path / part.file)
        changed = {name: _changed(name, packed, buffers) for name, packed in held.items()}
        if any(changed[name] is not packed for name, packed in held.items()):
            with work.writer(part.file, {name: (each.spec, each.shape) for name, each in changed.items()}) as writer:
                for name, packed in changed.items():
                    writer.write(name, packed)


def _keep(path: Path, trained: Mapping[str, Packed]) -> None:
    """The trained tensors in a file of their own."""
    kept = {key: array for name, packed in trained.items() for key, array in packed.to_tensors(name).items()}
    with SafetensorsWriter(path, [(n, a.dtype, a.shape) for n, a in kept.items()], {"format": "memwall"}) as writer:
        for name, array in kept.items():
            writer.write(name, array)


def _changed(name: str, packed: Packed, buffers: Mapping[str, np.ndarray]) -> Packed:
    keys = {buffer: tensor_name(name, buffer) for buffer in packed.buffers}
    if not buffers.keys() >= set(keys.values()):
        return packed
    return replace(packed, buffers={buffer: buffers[key] for buffer, key in keys.items()})

"""What fine-tuning reads and writes: the text as windows of tokens, progress that a killed run goes on from, and the
result.

A run works in `OUT.partial` (see `saved.WorkDirectory`): one safetensors file holds everything that the next step
depends on, each newer one written whole before the older one goes. At the end the folder is an adapter in PEFT's form.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from memwall.compress.calibration import read_text
from memwall.compress.saved import COPIED_NAMES, Part, WorkDirectory, disk_errors
from memwall.errors import InputError
from memwall.formats import checked_json
from memwall.formats.safetensors_file import SafetensorsFile, SafetensorsWriter
from memwall.hardware.system import write_whole
from memwall.models.checkpoint import Checkpoint, stored_tensors
from memwall.models.config import ModelConfig
from memwall.models.fused import Stored, joined
from memwall.models.lora import CONFIG, write_lora
from memwall.models.tokenizer import Tokenizer

MOMENTS_NAME, TEACHER_NAME = "moments.bin", "teacher.bin"
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """tokens: int64 [windows, context], each begun as a text is begun; the first num_train are trained on."""

    tokens: np.ndarray
    num_train: int

    @property
    def held_out(self) -> range:
        """Windows that are only measured."""
        return range(self.num_train, len(self.tokens))

    @staticmethod
    def read(path: Path, tokenizer: Tokenizer, config: ModelConfig, context: int, held_out: float) -> Windows:
        """InputError for a text that cannot be used; what is left after the last whole window is not read."""
        if context > config.max_position:
            raise InputError(f"setting context={context}: the model knows at most {config.max_position} positions")
        ids = tokenizer.encode(read_text(path, "text"), add_bos=False)
        begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        length = context - len(begin)
        num_windows = len(ids) // length
        if num_windows < 1 + (held_out > 0):
            raise InputError(
                f"text {path} has {len(ids)} tokens, less than {1 + (held_out > 0)} windows of {context}: give more "
                f"text, or --set context={max(len(ids) // 2, 2)}"
            )
        body = np.array(ids[: num_windows * length], np.int64).reshape(num_windows, length)
        start = np.broadcast_to(np.array(begin, np.int64), (num_windows, len(begin)))
        measured = max(int(num_windows * held_out), 1) if held_out else 0
        return Windows(tokens=np.concatenate([start, body], axis=1), num_train=num_windows - measured)


class TuneWork(WorkDirectory):
    """The folder of one run, locked while it is open."""

    mark: ClassVar[str] = CONFIG
    what: ClassVar[str] = "adapter"

    def _kept_names(self) -> set[str]:
        # a teacher's answers stay good for a run with the same settings, even where no step was saved yet
        return set() if self.started_over else {TEACHER_NAME}

    def _read_journal(self, force: bool) -> dict[str, Any]:
        journal = super()._read_journal(force)
        self.started_over = journal.get("settings") != self._settings
        return journal

    def save(
        self, step: int, tensors: Mapping[str, np.ndarray], told: Mapping[str, Any], done: Callable[[str], None]
    ) -> None:
        """Everything that the rest of the run depends on. told: plain data; done(name): a tensor is written."""
        file = f"step-{step}.safetensors"
        specs = [(name, array.dtype, array.shape) for name, array in tensors.items()]
        with disk_errors(self.path):
            with SafetensorsWriter(self.path / file, specs, {"told": json.dumps(dict(told))}) as writer:
                for name, array in tensors.items():
                    writer.write(name, array)
                    done(name)
            assert writer.sha256 is not None
            older, self.parts = self.parts, [Part(file=file, bytes=writer.nbytes, sha256=writer.sha256)]
            self._write_journal()
            for part in older:
                if part.file != file:
                    (self.path / part.file).unlink(missing_ok=True)

    def restore(self, tensors: Mapping[str, np.ndarray], done: Callable[[str], None]) -> dict[str, Any] | None:
        """Copy the last saved numbers into `tensors` and give what was told; None where nothing was saved."""
        if not self.parts:
            return None
        with SafetensorsFile(self.path / self.parts[-1].file) as file:
            for name, array in tensors.items():
                np.copyto(array, file.tensor(name).reshape(array.shape))
                file.drop_pages(name)
                done(name)
            told = checked_json.parse(file.metadata["told"].encode(), str(file.path))
            assert isinstance(told, dict)
            return told

    def finish_adapter(self, factors: Mapping[str, np.ndarray], **told: Any) -> int:
        """Write the adapter, drop what was kept for going on, give the folder its name; bytes of the adapter."""
        with disk_errors(self.path):
            write_lora(self.path, factors, **told)
            for name in (MOMENTS_NAME, TEACHER_NAME, *(part.file for part in self.parts)):
                (self.path / name).unlink(missing_ok=True)
        self._rename()
        return sum(array.nbytes for array in factors.values())


class ModelWork(TuneWork):
    """The folder of a run that ends in a model."""

    mark: ClassVar[str] = "memwall_tune.json"
    what: ClassVar[str] = "model that was tuned here"

    def finish_model(self, source: Checkpoint, trained: Mapping[str, np.ndarray], told: Mapping[str, Any]) -> int:
        """Write the model `source` with some tensors as they are now, each in the numbers that it had; bytes."""
        files = stored_tensors(source.config)
        dtypes = {each.name: np.dtype(source.source_dtype(next(iter(each.parts)))) for each in files}
        specs = [(each.name, dtypes[each.name], each.shape) for each in files]
        with disk_errors(self.path):
            with SafetensorsWriter(self.path / "model.safetensors", specs, {"format": "pt"}) as writer:
                for each in files:
                    for rows in _rows(each, source, trained):
                        writer.write(each.name, np.ascontiguousarray(rows.astype(dtypes[each.name], copy=False)))
            for name in COPIED_NAMES:
                if (source.directory / name).is_file():
                    write_whole(self.path / name, (source.directory / name).read_bytes())
            write_whole(self.path / self.mark, json.dumps(dict(told), indent=1).encode())
            for name in (MOMENTS_NAME, *(part.file for part in self.parts)):
                (self.path / name).unlink(missing_ok=True)
        self._rename()
        return writer.nbytes


def _rows(stored: Stored, source: Checkpoint, trained: Mapping[str, np.ndarray]) -> Iterator[np.ndarray]:
    """A tensor of the file some rows at a time, trained or as it was."""
    name = next(iter(stored.parts))
    if len(stored.parts) > 1:
        parts = {part: trained[part] if part in trained else source.alone(part) for part in stored.parts}
        yield from _row_blocks(joined(stored, parts))
    elif name in trained:
        yield from _row_blocks(trained[name])
    else:
        yield from (piece for _, piece in source.pieces(name, _PIECE_BYTES))


def _row_blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    step = max(_PIECE_BYTES // max(array[:1].nbytes, 1), 1)
    return (array[start : start + step] for start in range(0, len(array), step))

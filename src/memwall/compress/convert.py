"""Models that others have quantized, written as compressed models of our own: GGUF files, GPTQ's and AWQ's folders.

Codes are carried over, not rounded again, wherever a form of ours holds them (`formats.gguf_blocks`,
`models.prequantized`); the report says how many weights were. One tensor at a time is in memory.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from memwall.compress.saved import WorkDirectory, check_disk, check_output
from memwall.errors import InputError
from memwall.formats import Packed, codec
from memwall.formats.gguf_blocks import packed as packed_blocks
from memwall.formats.gguf_file import GgufFields, GgufFile
from memwall.memory import peak_resident_bytes
from memwall.models.config import ModelConfig, TensorSpec
from memwall.models.gguf import model_config, row_order, source_name, tokenizer_files
from memwall.models.precision import bits_of, is_matrix
from memwall.models.prequantized import Prequantized, is_prequantized
from memwall.models.tokenizer import Tokenizer

Progress = Callable[[int, int], None]
"""progress(done, total): weights."""


class Source(Protocol):
    """What is converted. form: the codec spec that a tensor gets; exact: whether its numbers stay what they are."""

    path: Path
    config: dict[str, Any]

    def check(self, config: ModelConfig) -> None: ...

    def form(self, tensor: TensorSpec) -> str: ...

    def is_exact(self, tensor: TensorSpec) -> bool: ...

    def packed(self, tensor: TensorSpec) -> Packed: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertReport:
    """rounded_weights: those whose codes could not be carried over and were rounded anew."""

    directory: str
    source: str
    bits_per_weight: float
    source_bytes: int
    file_bytes: int
    specs: Mapping[str, str]
    weights: int
    rounded_weights: int
    peak_resident_bytes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class GgufSource:
    """A GGUF file as a source."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = GgufFile(path)
        self.config = model_config(self.file)
        self._architecture = GgufFields(self.file.metadata, str(path)).architecture
        self._config = ModelConfig.from_dict(self.config, str(path))

    def check(self, config: ModelConfig) -> None:
        """All tensors are there in their shapes."""
        for tensor in config.tensors():
            name, expert = source_name(tensor.name)
            shape = self.file.info(name).shape
            shape = shape if expert is None else shape[1:]
            if shape != tensor.shape:
                wanted = list(tensor.shape)
                raise InputError(f"{self.path}: {name} has shape {list(shape)}; the configuration says {wanted}")

    def form(self, tensor: TensorSpec) -> str:
        spec = self.file.info(source_name(tensor.name)[0]).block.spec
        return spec if is_matrix(tensor) else "float32"

    def is_exact(self, tensor: TensorSpec) -> bool:
        return self.file.info(source_name(tensor.name)[0]).block.codes is not None or not self._is_coded(tensor)

    def packed(self, tensor: TensorSpec) -> Packed:
        """The tensor in its form; the file's pages leave with it."""
        name, expert = source_name(tensor.name)
        block, raw = self.file.info(name).block, self.file.raw(name)
        if expert is not None:
            raw = raw[expert]
        order = row_order(tensor.name, self._config, self._architecture)
        if order is not None and len(tensor.shape) == 1:  # a bias: one row of many values
            found = codec("float32").encode(block.decode(raw[None])[0].astype(np.float32)[order])
        elif not self._is_coded(tensor):
            rows = raw[None] if len(tensor.shape) == 1 else raw
            rows = rows if order is None else rows[order]
            found = codec(self.form(tensor)).encode(block.decode(rows).reshape(tensor.shape))
        else:
            found = packed_blocks(block, raw if order is None else raw[order])
        self.file.drop_pages()
        return found

    def _is_coded(self, tensor: TensorSpec) -> bool:
        return is_matrix(tensor) and self.file.info(source_name(tensor.name)[0]).block.values > 1

    def close(self) -> None:
        self.file.close()


def convert(
    source: str | Path,
    out_directory: str | Path,
    *,
    tokenizer: Path | None = None,
    progress: Progress | None = None,
    force: bool = False,
) -> ConvertReport:
    """Write the model to a new folder. tokenizer: a folder that has one, where the source's own cannot be read.

    Raises InputError and DoesNotFit (disk). The same call takes an unfinished run up again.
    """
    began, path, out = time.perf_counter(), Path(source), Path(out_directory)
    check_output(out, force=force)
    if tokenizer is not None:
        Tokenizer.from_directory(tokenizer)
    found = _source(path)
    try:
        config = ModelConfig.from_dict(found.config, str(path))
        found.check(config)
        with tempfile.TemporaryDirectory() as folder:
            _small_files(found, tokenizer, Path(folder))
            Tokenizer.from_directory(folder, config.vocab_size)
            return _write(found, config, Path(folder), out, began, progress, force=force)
    finally:
        found.close()


def _source(path: Path) -> Source:
    if path.suffix == ".gguf" or path.is_file():
        return GgufSource(path)
    if path.is_dir() and is_prequantized(path):
        return Prequantized(path)
    why = "its weights are not quantized: use memwall compress" if path.is_dir() else "there is no such file or folder"
    raise InputError(f"{path}: {why}; a GGUF file or a folder in GPTQ's or AWQ's form can be converted")


def _small_files(source: Source, tokenizer: Path | None, folder: Path) -> None:
    """Tokenizer and configuration, as a model folder has them."""
    others = [tokenizer] if tokenizer is not None else [source.path] if source.path.is_dir() else []
    for other in others:
        for item in other.iterdir():
            if (
                item.is_file()
                and item.suffix in (".json", ".jinja", ".txt", ".model")
                and item.stat().st_size < 1 << 28
            ):
                shutil.copyfile(item, folder / item.name)
    if isinstance(source, GgufSource) and tokenizer is None:
        for name, text in tokenizer_files(source.file).items():
            (folder / name).write_text(text, encoding="utf-8")
    for name in ("config.json", "model.safetensors.index.json", "quantize_config.json"):
        (folder / name).unlink(missing_ok=True)


def _write(
    source: Source, config: ModelConfig, files: Path, out: Path, began: float, progress: Progress | None, *, force: bool
) -> ConvertReport:
    tensors = config.tensors()
    specs = {tensor.name: source.form(tensor) for tensor in tensors}
    layers = sorted({tensor.layer for tensor in tensors if tensor.layer is not None})
    parts = [[t for t in tensors if t.layer == layer] for layer in layers]
    parts.append([tensor for tensor in tensors if tensor.layer is None])
    total, done = sum(tensor.size for tensor in tensors), 0
    status = source.path.stat()
    settings = {"source": str(source.path.resolve()), "bytes": status.st_size, "modified": status.st_mtime_ns}
    with WorkDirectory(out, settings, force=force) as work:
        work.set_specs(specs)
        left = [tensor for part in parts[len(work.parts) :] for tensor in part]
        check_disk(work.path, sum(codec(specs[tensor.name]).nbytes(tensor.shape) for tensor in left))
        for index, part in enumerate(parts):
            name = f"model-{index + 1:05d}-of-{len(parts):05d}.safetensors"
            if index >= len(work.parts):
                with work.writer(name, {t.name: (specs[t.name], t.shape) for t in part}) as writer:
                    for tensor in part:
                        writer.write(tensor.name, source.packed(tensor))
            done += sum(tensor.size for tensor in part)
            if progress is not None:
                progress(done, total)
        bits = bits_of(config, specs)
        work.finish(files, source.config, {"bits_per_weight": bits, "method": "converted", "source": source.path.name})
    rounded = sum(tensor.size for tensor in tensors if not source.is_exact(tensor))
    return ConvertReport(
        directory=str(out), source=str(source.path), bits_per_weight=bits, specs=specs, weights=total,
        rounded_weights=rounded, source_bytes=_bytes_of(source.path), file_bytes=sum(part.bytes for part in work.parts),
        peak_resident_bytes=peak_resident_bytes(), seconds=time.perf_counter() - began,
    )  # fmt: skip


def _bytes_of(path: Path) -> int:
    files = [path] if path.is_file() else path.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)

"""The weights of a model folder, by name, through a memory map: Hugging Face safetensors (one file or shards) and
memwall's own.

Opening reads headers only. It checks that every tensor of the configuration is there in its shape, and nothing unknown;
it never follows a name out of the folder. A compressed folder (`memwall.json`) also gives tensors in packed form.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from memwall.errors import InputError
from memwall.formats import Packed, checked_json, codec
from memwall.formats.checked_json import shown
from memwall.formats.manifest import MANIFEST_NAME, Manifest, PackedEntry, buffer_tensor_name
from memwall.formats.safetensors_file import SafetensorsFile
from memwall.hardware.system import cache_directory
from memwall.models.config import EMBEDDING, HEAD, ModelConfig, check_attention, checked_directory
from memwall.models.fused import FusedFile, Stored

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_SHARDS = 10_000
FLOAT_DTYPES = ("F16", "BF16", "F32", "F64")
SAMPLE_BYTES = 4096
NUM_SAMPLES = 16
_READ_BYTES = 1 << 20

Progress = Callable[[str, int, int], None]


def has_weights(directory: Path) -> bool:
    """Whether there is any file that tells of weights, whole or not."""
    return any(directory.glob("*.safetensors")) or any((directory / n).exists() for n in (INDEX_NAME, MANIFEST_NAME))


def stored_tensors(config: ModelConfig) -> list[Stored]:
    """The tensors of a file in Hugging Face's form that holds a model with attention."""
    check_attention(config)
    shapes = {tensor.name: tensor.shape for tensor in config.tensors()}
    if config.falcon is not None:
        return config.falcon.stored(shapes)
    return [Stored(name=name, shape=shape, parts={name: None}) for name, shape in shapes.items()]


class Checkpoint:
    """Tensors of one model folder. Arrays are read-only views on the map; `drop` gives their pages back after use."""

    def __init__(self, directory: str | Path, config: ModelConfig | None = None) -> None:
        self.directory = checked_directory(directory)
        self.config = config or ModelConfig.from_directory(self.directory)
        has_manifest = (self.directory / MANIFEST_NAME).is_file()
        self.manifest = Manifest.load(self.directory) if has_manifest else None
        # a compressed folder has the names of this house already
        self._names = None if has_manifest else self.config.stored_names()
        self._files: dict[str, SafetensorsFile] = {}
        try:
            self._place = self._open_files()
            self._check_tensors()
        except BaseException:
            self.close()
            raise

    def names(self) -> list[str]:
        """Names of the tensors of the model, packed ones included."""
        return [spec.name for spec in self.config.tensors()]

    def tensor(self, name: str) -> np.ndarray:
        """Read-only float array of the source dtype. A tied `lm_head.weight` is the embedding."""
        name = self._float_name(name)
        return self._checked(name, self._file_of(name).tensor(name))

    def alone(self, name: str) -> np.ndarray:
        """The same on a map of its own, whose pages leave with the array: see `SafetensorsFile.alone`."""
        name = self._float_name(name)
        return self._checked(name, self._file_of(name).alone(name))

    def packed(self, name: str) -> Packed | None:
        """The packed form of a tensor of a compressed folder (views on the map); None where it is stored as floats."""
        name = self._resolve(name)
        entry = self._packed_entry(name)
        if entry is None:
            return None
        parts = {buffer: buffer_tensor_name(name, buffer) for buffer in entry.buffers}
        buffers = {buffer: self._file_of(part).tensor(part) for buffer, part in parts.items()}
        return Packed(spec=entry.spec, shape=entry.shape, buffers=buffers)

    def pieces(self, name: str, most_bytes: int, multiple: int = 1) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, rows) of a float tensor, a few rows resident at a time: see `SafetensorsFile.pieces`."""
        name = self._float_name(name)
        for first, rows in self._file_of(name).pieces(name, most_bytes, multiple):
            yield first, self._checked(name, rows)

    def _checked(self, name: str, values: np.ndarray) -> np.ndarray:
        """Vectors must be numbers: one NaN in a norm spoils every output. Matrices are not read for it; what they are
        encoded to, or the outputs, will show it.
        """
        if values.ndim == 1 and not np.isfinite(values).all():
            raise InputError(f"{self._file_of(name).path}: {name} holds NaN or infinite values: the file is damaged")
        return values

    def place_of(self, name: str, buffer: str) -> tuple[Path, int]:
        """The file that holds a buffer of a packed tensor, and the byte at which it begins there."""
        part = buffer_tensor_name(self._resolve(name), buffer)
        file = self._file_of(part)
        return file.path, file.info(part).start

    def packed_pieces(
        self, name: str, most_bytes: int, buffers: Sequence[str] | None = None
    ) -> Iterator[tuple[str, int, np.ndarray]]:
        """(buffer, first row, rows) over all buffers of a packed tensor, or some, a few rows resident at a time."""
        entry = self._packed_entry(self._resolve(name))
        if entry is None:
            raise InputError(f"{self.directory}: {name} is not stored packed")
        for buffer in entry.buffers if buffers is None else buffers:
            part = buffer_tensor_name(self._resolve(name), buffer)
            for first, rows in self._file_of(part).pieces(part, most_bytes):
                yield buffer, first, rows

    def drop(self, name: str) -> None:
        """Takes the pages of a tensor out of resident memory; they are read again from the file when touched."""
        for part in self._parts(self._resolve(name)):
            self._file_of(part).drop_pages(part)

    def drop_all(self) -> None:
        """Takes all pages of all files out of resident memory."""
        for file in self._files.values():
            file.drop_pages()

    def source_dtype(self, name: str) -> str:
        """How the file stores a tensor: `float32`, `float16`, `bfloat16`, `float64`, or the codec's spec."""
        name = self._resolve(name)
        entry = self._packed_entry(name)
        return entry.spec if entry is not None else self._file_of(name).info(name).numpy_dtype.name

    def stored_bytes(self, name: str) -> int:
        """Bytes of a tensor in its file, all buffers of a packed one."""
        return sum(self._file_of(part).info(part).nbytes for part in self._parts(self._resolve(name)))

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files."""
        return sum(file.nbytes for file in self._files.values())

    def fingerprint(self) -> str:
        """A cheap hash for caches: configuration, headers, sizes and bytes sampled over each file."""
        digest = hashlib.sha256(json.dumps(self.config.source, sort_keys=True, default=str).encode())
        for name in sorted(self._files):
            file = self._files[name]
            digest.update(f"{name} {file.nbytes} {file.header_sha256} ".encode())
            with open(file.path, "rb") as stream:
                for sample in range(NUM_SAMPLES):
                    span = max(file.nbytes - file.data_start - SAMPLE_BYTES, 0)
                    position = file.data_start + span * sample // (NUM_SAMPLES - 1)
                    digest.update(os.pread(stream.fileno(), SAMPLE_BYTES, position))
        return digest.hexdigest()

    def verify(self, *, digests: bool = False, progress: Progress | None = None) -> None:
        """Checks the files of a compressed folder against its manifest: sizes, and on request SHA-256.

        `progress(file name, bytes done, bytes in all)` is called while hashing. A folder without manifest was checked
        on opening.
        """
        if self.manifest is None:
            return
        self._check_sizes(self.manifest)
        if not digests:
            return
        total = sum(entry.bytes for entry in self.manifest.files.values())
        done = 0
        for name, entry in self.manifest.files.items():
            digest = hashlib.sha256()
            with open(self.directory / name, "rb") as stream:
                while block := stream.read(_READ_BYTES):
                    digest.update(block)
                    done += len(block)
                    if progress is not None:
                        progress(name, done, total)
            if digest.hexdigest() != entry.sha256:
                raise InputError(f"{self.directory / name}: altered or damaged (SHA-256 differs from {MANIFEST_NAME})")

    def verify_once(self, progress: Progress | None = None) -> None:
        """`verify(digests=True)`, unless these very files passed before.

        A file is known by device, inode, size, time of change and digest; an empty marker under the user's cache folder
        says that it passed. So a start does not hash gigabytes again, and a changed file is always hashed.
        """
        if self.manifest is None:
            return
        digest = hashlib.sha256()
        for name, entry in sorted(self.manifest.files.items()):
            status = (self.directory / name).stat()
            identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            digest.update(repr((name, entry.sha256, *identity)).encode())
        marker = cache_directory() / "verified" / digest.hexdigest()
        if marker.is_file():
            return
        self.verify(digests=True, progress=progress)
        with contextlib.suppress(OSError):  # a cache that can't be written only costs the next start its hashing
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close()

    def _open_files(self) -> dict[str, str]:
        """Opens all weight files; gives tensor name -> file name."""
        index_path = self.directory / INDEX_NAME
        if self.manifest is not None:
            self._check_sizes(self.manifest)
            return self._open([name for name in self.manifest.files if name.endswith(".safetensors")])
        if (self.directory / SINGLE_NAME).is_file():
            return self._open([SINGLE_NAME])
        if index_path.is_file():
            return self._open_shards(index_path)
        others = [item.name for item in self.directory.iterdir() if item.suffix in (".bin", ".pt", ".pth", ".gguf")]
        how = (
            "memwall convert makes a model of it"
            if others and others[0].endswith(".gguf")
            else "save it as safetensors"
        )
        hint = f"; {others[0]} is not read: {how}" if others else ""
        raise InputError(f"{self.directory}: no {SINGLE_NAME} and no {INDEX_NAME}{hint}")

    def _open_shards(self, index_path: Path) -> dict[str, str]:
        weight_map = checked_json.Fields(checked_json.read(index_path), str(index_path)).mapping("weight_map")
        if self._names is not None:
            weight_map = {ours: shard for name, shard in weight_map.items() for ours in self._names(name)}
        shards = sorted({checked_json.file_name(name, str(index_path)) for name in weight_map.values()})
        if len(shards) > MAX_SHARDS:
            raise InputError(f"{index_path}: names {len(shards)} files; the most allowed is {MAX_SHARDS}")
        place = self._open(shards)
        for tensor, shard in weight_map.items():
            if place.get(tensor) != shard:
                raise InputError(f"{index_path}: says that {shown(tensor)} is in {shard}, but it is not there")
        return place

    def _open(self, names: Iterable[str]) -> dict[str, str]:
        place: dict[str, str] = {}
        for name in names:
            path = self.directory / name
            if not path.is_file():
                raise InputError(f"{path}: this weight file is missing")
            file = SafetensorsFile(path) if self._names is None else FusedFile(path, self._names)
            self._files[name] = file
            for tensor in file.names():
                if tensor in place:
                    raise InputError(f"{path}: tensor {shown(tensor)} is also in {place[tensor]}")
                place[tensor] = name
        return place

    def _check_sizes(self, manifest: Manifest) -> None:
        for name, entry in manifest.files.items():
            path = self.directory / name
            if not path.is_file():
                raise InputError(f"{path}: named in {MANIFEST_NAME}, but missing")
            size = path.stat().st_size
            if size != entry.bytes:
                fault = "truncated" if size < entry.bytes else "altered"
                raise InputError(f"{path}: {fault}: {size:,} bytes instead of {entry.bytes:,}")

    def _check_tensors(self) -> None:
        specs = {spec.name: spec for spec in self.config.tensors()}
        expected: set[str] = set()
        missing: list[str] = []
        for name, spec in specs.items():
            parts = self._parts(name)
            expected.update(parts)
            absent = [part for part in parts if part not in self._place]
            missing += absent
            entry = self._packed_entry(name)
            if absent:
                continue
            shape = entry.shape if entry is not None else self._file_of(name).info(name).shape
            if shape != spec.shape:
                wanted = list(spec.shape)
                raise InputError(f"{self.directory}: {name} has shape {list(shape)}; the configuration says {wanted}")
            if entry is not None:
                self._check_packed(name, entry)
            elif self._file_of(name).info(name).dtype not in FLOAT_DTYPES:
                raise InputError(f"{self.directory}: {name} is stored as {self.source_dtype(name)}, not as floats")
        if missing:
            raise InputError(f"{self.directory}: {_listed('missing tensors', missing)}")
        packed = self.manifest.tensors if self.manifest is not None else {}
        unknown = [name for name in self._place if name not in expected and not self._is_harmless(name)]
        unknown += [name for name in packed if name not in specs]
        if unknown:
            raise InputError(f"{self.directory}: {_listed('tensors that the configuration does not know', unknown)}")

    def _check_packed(self, name: str, entry: PackedEntry) -> None:
        """The buffers must be exactly those that the codec makes: kernels rely on their shapes."""
        wanted = codec(entry.spec).buffers(entry.shape)
        if set(wanted) != set(entry.buffers):
            known = ", ".join(wanted)
            raise InputError(f"{self.directory}: {name} has other buffers than its form {entry.spec} ({known})")
        for buffer, (shape, dtype) in wanted.items():
            part = buffer_tensor_name(name, buffer)
            info = self._file_of(part).info(part)
            if info.shape != shape or info.numpy_dtype != dtype:
                got = f"{info.dtype} {list(info.shape)}"
                raise InputError(f"{self.directory}: {part} is {got}; {entry.spec} needs {dtype} {list(shape)}")

    def _is_harmless(self, name: str) -> bool:
        """Older files carry the rotary table, and some tied models a copy of the embedding: both are ignored."""
        return name.endswith("rotary_emb.inv_freq") or (name == HEAD and self.config.tie_word_embeddings)

    def _resolve(self, name: str) -> str:
        return EMBEDDING if name == HEAD and self.config.tie_word_embeddings else name

    def _float_name(self, name: str) -> str:
        name = self._resolve(name)
        if self._packed_entry(name) is not None:
            raise InputError(
                f"{self.directory}: {name} is stored packed and has no float form: --weights saved takes it as it is"
            )
        return name

    def _packed_entry(self, name: str) -> PackedEntry | None:
        return self.manifest.tensors.get(name) if self.manifest is not None else None

    def _parts(self, name: str) -> list[str]:
        entry = self._packed_entry(name)
        return [name] if entry is None else [buffer_tensor_name(name, buffer) for buffer in entry.buffers]

    def _file_of(self, name: str) -> SafetensorsFile:
        try:
            return self._files[self._place[name]]
        except KeyError:
            raise InputError(f"{self.directory}: holds no tensor {shown(name)}") from None


def _listed(what: str, names: Sequence[str]) -> str:
    first = ", ".join(shown(name) for name in names[:3])
    return f"{what}: {first}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")

"""Compressed models on disk, written so that nothing is lost and nothing half-done is left.

A run writes into `OUT.partial`: one finished safetensors file per part (a layer, the embedding, the head), each under
a temporary name until it is whole, and a journal (`progress.json`) of the run's settings and of the parts that are
done, with their digests. A run that was killed is taken up after the last good part; one with other settings is
refused. At the end the folder gets its manifest and appears under its final name by one rename.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from memwall.errors import DoesNotFit, InputError
from memwall.formats import Packed, checked_json, codec
from memwall.formats.base import tensor_name
from memwall.formats.manifest import MANIFEST_NAME, FileEntry, Manifest, PackedEntry
from memwall.formats.safetensors_file import SafetensorsFile, SafetensorsWriter
from memwall.hardware.system import write_whole

JOURNAL_NAME = "progress.json"
LOCK_NAME = "lock"
TUNED_NAME = "tuned.safetensors"
"""What training has changed, until every part has it."""
# the files of a model folder that a reader of the compressed one needs too
COPIED_NAMES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
)
_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One finished file of the run."""

    file: str
    bytes: int
    sha256: str


class WorkDirectory:
    """The folder `OUT.partial` of one run. Use it as a context manager: it is locked against a second run meanwhile."""

    mark: ClassVar[str] = MANIFEST_NAME
    """The file that a finished folder has, and without which none is replaced."""
    what: ClassVar[str] = "compressed model"

    def __init__(self, out: Path, settings: Mapping[str, Any], *, force: bool = False) -> None:
        self.out = out
        self.path = out.with_name(out.name + ".partial")
        self._settings = json.loads(json.dumps(settings))
        check_output(out, force=force, mark=self.mark, what=self.what)
        self._lock = self._take_lock(force)
        try:
            journal = self._read_journal(force)
            self.specs: dict[str, str] | None = journal.get("specs")
            self.notes: dict[str, Any] = journal.get("notes") or {}
            self.parts = self._good_parts(journal.get("parts", []))
            self.num_resumed = len(self.parts)
            self._remove_leftovers()
            self._write_journal()
        except BaseException:
            self.close()
            raise

    def set_specs(self, specs: Mapping[str, str]) -> None:
        """Remember which tensor gets which codec."""
        self.specs = dict(specs)
        self._write_journal()

    def note(self, name: str, value: Any) -> None:
        """Remember something that was measured, as JSON, for a run that takes this one up."""
        self.notes[name] = value
        self._write_journal()

    def keep(self, files: Sequence[str]) -> None:
        """Forget all parts but those in `files`: they were steps on the way."""
        dropped = [part for part in self.parts if part.file not in files]
        self.parts = [part for part in self.parts if part.file in files]
        self._write_journal()
        for part in dropped:
            (self.path / part.file).unlink(missing_ok=True)

    def writer(self, file: str, forms: Mapping[str, tuple[str, tuple[int, ...]]]) -> PartWriter:
        """Writer of the next part; forms: tensor -> (codec spec, shape)."""
        return PartWriter(self, file, forms)

    def add(self, part: Part) -> None:
        """A part is done, or done anew."""
        names = [each.file for each in self.parts]
        if part.file in names:
            self.parts[names.index(part.file)] = part
        else:
            self.parts.append(part)
        self._write_journal()

    def finish(self, source: Path, model_config: Mapping[str, Any], info: Mapping[str, Any]) -> None:
        """Copy the small files of `source`, write the manifest, give the folder its final name."""
        files = {part.file: FileEntry(bytes=part.bytes, sha256=part.sha256) for part in self.parts}
        tensors: dict[str, PackedEntry] = {}
        for part in self.parts:
            with SafetensorsFile(self.path / part.file) as file:
                tensors.update(_packed_entries(file))
        with disk_errors(self.path):
            for name in COPIED_NAMES:
                if (source / name).is_file():
                    data = (source / name).read_bytes()
                    write_whole(self.path / name, data)
                    files[name] = FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
            manifest = Manifest(model_config=model_config, files=files, tensors=tensors, info=info)
            write_whole(self.path / MANIFEST_NAME, manifest.to_json().encode())
        self._rename()

    def close(self) -> None:
        """Unlock; the folder stays, to be taken up again, unless the run is finished."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None and not (self.parts or self.notes or self._kept_names()):
            shutil.rmtree(self.path, ignore_errors=True)  # nothing is done that a later run could take up
        self.close()

    def _take_lock(self, force: bool) -> int:
        if self.path.is_file() or (self.path.is_dir() and not self._is_ours() and any(self.path.iterdir())):
            raise InputError(f"{self.path}: is in the way and no work of memwall; move it or choose another name")
        with disk_errors(self.path):
            self.path.mkdir(exist_ok=True)
            lock = os.open(self.path / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass  # no such locks on this system; two runs at once are then the user's to avoid
        except OSError:
            os.close(lock)
            raise InputError(f"{self.path}: another run is writing here") from None
        return lock

    def _is_ours(self) -> bool:
        return (self.path / JOURNAL_NAME).is_file() or [item.name for item in self.path.iterdir()] == [LOCK_NAME]

    def _read_journal(self, force: bool) -> dict[str, Any]:
        path = self.path / JOURNAL_NAME
        if not path.is_file():
            return {}
        try:
            journal = checked_json.read(path)
        except InputError:
            if force:
                return {}
            raise
        held = journal.get("settings")
        held = held if isinstance(held, dict) else {}
        if held == self._settings:
            return journal
        if force:
            return {}
        keys = sorted({*held, *self._settings})
        changed = [key for key in keys if held.get(key) != self._settings.get(key)]
        shown = "; ".join(f"{key}: {held.get(key)!r} then, {self._settings.get(key)!r} now" for key in changed)
        raise InputError(
            f"{self.path}: holds an unfinished run with other settings ({shown[:400]}); "
            "repeat that command to finish it, or pass --force to start over"
        )

    def _good_parts(self, entries: Any) -> list[Part]:
        """Finished parts whose bytes are what the journal says, up to the first that is not."""
        good: list[Part] = []
        for entry in entries if isinstance(entries, list) else []:
            try:
                part = Part(**entry)
                name = checked_json.file_name(part.file, str(self.path / JOURNAL_NAME))
            except (TypeError, InputError):
                break
            path = self.path / name
            if not path.is_file() or path.stat().st_size != part.bytes or file_sha256(path) != part.sha256:
                break
            good.append(part)
        return good

    def _remove_leftovers(self) -> None:
        """Files of a killed run that its journal does not know: a half-written part, or parts after a damaged one."""
        known = {JOURNAL_NAME, LOCK_NAME, TUNED_NAME, *self._kept_names(), *(part.file for part in self.parts)}
        for item in self.path.iterdir():
            if item.name not in known and item.is_file():
                item.unlink()

    def _kept_names(self) -> set[str]:
        """Files that stay although the journal does not know them."""
        return set()

    def _write_journal(self) -> None:
        parts = [{"file": part.file, "bytes": part.bytes, "sha256": part.sha256} for part in self.parts]
        document = {"settings": self._settings, "specs": self.specs, "notes": self.notes, "parts": parts}
        with disk_errors(self.path):
            write_whole(self.path / JOURNAL_NAME, json.dumps(document, indent=1).encode())

    def _rename(self) -> None:
        old = self.out.with_name(f"{self.out.name}.replaced")
        if self.out.exists():
            if old.exists():
                shutil.rmtree(old)
            os.rename(self.out, old)
        os.rename(self.path, self.out)
        _sync_folder(self.out.parent)
        # only now: were they removed before, a crash in between would leave a folder that nobody can take up
        (self.out / JOURNAL_NAME).unlink(missing_ok=True)
        (self.out / LOCK_NAME).unlink(missing_ok=True)
        (self.out / TUNED_NAME).unlink(missing_ok=True)
        if old.exists():
            shutil.rmtree(old)


class PartWriter:
    """Writes the tensors of one part as they become ready; the part counts when the block ends without an error."""

    def __init__(self, work: WorkDirectory, file: str, forms: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        self._work = work
        self._file = file
        names = [
            (tensor_name(name, buffer), dtype, size)
            for name, (spec, shape) in forms.items()
            for buffer, (size, dtype) in codec(spec).buffers(shape).items()
        ]
        # the specs and shapes travel with the part, so that the manifest can be made from the parts alone
        described = {name: {"spec": spec, "shape": list(shape)} for name, (spec, shape) in forms.items()}
        metadata = {"format": "memwall", "tensors": json.dumps(described, sort_keys=True)}
        self._writer = SafetensorsWriter(work.path / file, names, metadata)

    def write(self, name: str, packed: Packed) -> None:
        """One tensor, all buffers."""
        for key, array in packed.to_tensors(name).items():
            self._writer.write(key, array)

    def __enter__(self) -> PartWriter:
        self._writer.__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._writer.__exit__(kind, error, trace)
        if kind is None and self._writer.sha256 is not None:
            self._work.add(Part(file=self._file, bytes=self._writer.nbytes, sha256=self._writer.sha256))


def read_part(path: Path) -> dict[str, Packed]:
    """The tensors of a finished part as views on the file's map."""
    with SafetensorsFile(path) as file:
        described = checked_json.parse(file.metadata.get("tensors", "{}").encode(), str(path))
        tensors = {name: file.tensor(name) for name in file.names()}
    return {
        name: codec(entry["spec"]).from_tensors(name, tuple(entry["shape"]), tensors)
        for name, entry in described.items()
    }


def check_output(out: Path, *, force: bool, mark: str = MANIFEST_NAME, what: str = "compressed model") -> None:
    """Refuses an output folder that exists (with `force`: one that is no `what` of ours, which has the file `mark`)."""
    if not out.name:
        raise InputError(f"{out}: give the name of a folder to be made")
    if not out.parent.is_dir():
        raise InputError(f"{out.parent}: there is no such folder to put {out.name} in")
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"{out}: is a file; give the name of a folder to be made")
    if not force:
        raise InputError(f"{out}: exists already; choose another name, or pass --force to replace it")
    if any(out.iterdir()) and not (out / mark).is_file():
        raise InputError(f"{out}: is not a {what}, so --force does not replace it; choose another name")


def check_disk(folder: Path, needed_bytes: int) -> None:
    """Refuses before the work begins when the disk has too little room for its result."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise DoesNotFit(
            f"{folder}: needs {needed_bytes:,} bytes of disk, only {free_bytes:,} are free; nothing written"
        )


def file_sha256(path: Path) -> str:
    """Digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _packed_entries(file: SafetensorsFile) -> Iterable[tuple[str, PackedEntry]]:
    """Manifest entries of the packed tensors of a part (plain floats need none)."""
    described = checked_json.parse(file.metadata.get("tensors", "{}").encode(), str(file.path))
    for name, entry in described.items():
        shape = tuple(entry["shape"])
        buffers = tuple(codec(entry["spec"]).buffers(shape))
        if name not in file:
            yield name, PackedEntry(spec=entry["spec"], shape=shape, buffers=buffers)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Errors of the system while writing, in words."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DoesNotFit(f"{path}: the disk is full; free some room and repeat the command to go on") from None
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

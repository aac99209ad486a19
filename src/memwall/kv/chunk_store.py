"""Kept chunks on their tiers: a folder of files, some of them in memory as well; the least valuable leave first.

Each use of a variant adds to its score, more when little had to be repaired; scores fade with every request. A chunk
has a bounded number of variants, the store a bounded number of chunks and bytes. The memory tier takes what is loaded
from disk when it is worth more than what it would push out; `preload` tells it before a request what that will need. A
rate below the disk's own emulates a slower tier; what is measured through it must say so.

Units: scores in uses; the clock counts requests; rates in bytes a second.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from memwall.errors import BudgetExceeded, DoesNotFit, InputError
from memwall.formats import checked_json
from memwall.formats.checked_json import Fields
from memwall.kv.base import CacheShape
from memwall.kv.cache_craft import Context, CraftSettings, decayed, worth
from memwall.kv.chunk_file import ROWS, SUFFIX, ChunkFile, ChunkWriter
from memwall.kv.link import Throttle, Trace
from memwall.kv.saved import Origin

if TYPE_CHECKING:
    from memwall.memory import Arena

OWNER = "chunks"
STATE = "scores.json"
STATE_FORMAT = "memwall-chunks"
STATE_BYTES, STATE_SPARE = 256, 4096
"""What an entry of the scores takes at most; those that may be there of files that are gone."""
LOCK = ".lock"
FIRST_WORTH = 1.0
"""Score of a new variant: computing it was one use."""
MOST_CLOCK = 2**53
SMOOTHING = 0.5
"""Weight of the newest measurement of a speed."""


@dataclass(slots=True, eq=False)
class Variant:
    """A kept chunk: its file, its score at request `scored`, and its rows [L, 2, T, Hkv, D] where memory holds them."""

    file: ChunkFile
    score: float = FIRST_WORTH
    scored: int = 0
    used: int = 0
    rows: np.ndarray | None = None
    layers_there: int = 0
    pins: int = 0

    @property
    def context(self) -> Context:
        return self.file.context

    @property
    def resident(self) -> bool:
        """Whether memory holds all of it."""
        return self.rows is not None and self.layers_there == len(self.rows)


class ChunkStore:
    """See the module's text. One run at a time uses a folder."""

    def __init__(
        self,
        folder: Path,
        origin: Origin,
        shape: CacheShape,
        arena: Arena,
        settings: CraftSettings,
        *,
        ram_bytes: int = 0,
        disk_bytes: int | None = None,
        rate_bytes_per_s: float | None = None,
        by_value: bool = True,
    ) -> None:
        """Opens or makes the folder; InputError for one that cannot be written, that another run uses, or that holds a
        chunk that is damaged or foreign. by_value: False lets the least recently used leave first, to compare with.
        """
        self.folder, self.origin, self.shape, self.arena, self.settings = folder, origin, shape, arena, settings
        self.ram_bytes, self.disk_bytes, self.by_value = ram_bytes, disk_bytes, by_value
        self.clock = 0
        self.load_bytes_per_s: float | None = None
        self.layer_seconds_per_token: float | None = None
        self.notes: list[str] = []
        self._throttle = Throttle(Trace((rate_bytes_per_s,))) if rate_bytes_per_s else None
        self._lock = threading.RLock()
        self._by_name: dict[str, Variant] = {}
        self._by_chunk: dict[str, dict[str, Variant]] = {}
        self._preloader: threading.Thread | None = None
        self._preloading: list[Variant] = []
        self._lock_file = _locked(folder)
        try:
            for path in sorted(folder.glob(f"*{SUFFIX}")):
                self._enter(Variant(ChunkFile(path, origin, shape)))
            self._read_state()
        except BaseException:
            os.close(self._lock_file)
            raise

    def __len__(self) -> int:
        return len(self._by_name)

    @property
    def disk_used_bytes(self) -> int:
        """Bytes of the files."""
        return sum(variant.file.nbytes for variant in self._by_name.values())

    @property
    def ram_used_bytes(self) -> int:
        """Bytes of the memory tier."""
        return sum(variant.rows.nbytes for variant in self._by_name.values() if variant.rows is not None)

    def variants(self, chunk: str) -> dict[str, Context]:
        """Contexts in which a chunk was kept, by the variant's name."""
        return {name: variant.context for name, variant in self._by_chunk.get(chunk, {}).items()}

    def __getitem__(self, name: str) -> Variant:
        return self._by_name[name]

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    # ---- value ---------------------------------------------------------------------------------------------------

    def begin_request(self) -> None:
        """A request comes: all scores fade a little."""
        self.clock += 1

    def use(self, name: str, overhead: float) -> Variant:
        """A variant serves a request at the price of this CFO. It stays until `unpin`."""
        variant = self._by_name[name]
        variant.score = self.score(variant) + worth(overhead)
        variant.scored = variant.used = self.clock
        variant.pins += 1
        return variant

    def unpin(self, variant: Variant) -> None:
        """The request is done with it."""
        variant.pins -= 1
        if not variant.pins:
            variant.file.close()

    def score(self, variant: Variant) -> float:
        """What it is worth now."""
        return decayed(variant.score, self.clock - variant.scored)

    def _rank(self, variant: Variant) -> tuple[float, str]:
        value = self.score(variant) if self.by_value else float(variant.used)
        return value, variant.file.name

    def _least(self, among: Sequence[Variant]) -> Variant | None:
        return min((variant for variant in among if not variant.pins), key=self._rank, default=None)

    # ---- the disk tier -------------------------------------------------------------------------------------------

    def writer(self, tokens: np.ndarray, predecessors: Sequence[str], lengths: Sequence[int]) -> ChunkWriter | None:
        """Takes a new variant's rows; None, with a note, when the disk has no room or it is larger than the store."""
        writer = None
        try:
            writer = ChunkWriter(self.folder, self.origin, self.shape, tokens, predecessors, lengths)
            if self.disk_bytes is not None and writer.nbytes > self.disk_bytes:
                raise DoesNotFit(f"a chunk of {writer.nbytes:,} bytes, the store may have {self.disk_bytes:,}")
        except DoesNotFit as refused:
            if writer is not None:
                writer.abort()
            self.notes.append(f"a chunk was not kept: {refused}")
            return None
        return writer

    def add(self, path: Path) -> Variant:
        """Takes a finished file in; the least valuable leave until all bounds hold."""
        variant = Variant(ChunkFile(path, self.origin, self.shape), FIRST_WORTH, self.clock, self.clock)
        if variant.file.name in self._by_name:
            self._forget(self._by_name[variant.file.name])
        self._enter(variant)
        variant.pins += 1  # the new one is not judged against itself
        try:
            siblings = self._by_chunk[variant.file.chunk]
            self._shrink(lambda: len(siblings) > self.settings.variants, siblings)
            self._shrink(lambda: len(self) > self.settings.chunks * self.settings.variants, self._by_name)
            if self.disk_bytes is not None:
                most = self.disk_bytes
                self._shrink(lambda: self.disk_used_bytes > most, self._by_name)
        finally:
            variant.pins -= 1
        return variant

    def _shrink(self, over: Callable[[], bool], among: dict[str, Variant]) -> None:
        while over():
            least = self._least(list(among.values()))
            if least is None:
                return  # all are in use; the next insertion tries again
            self.remove(least)

    def remove(self, variant: Variant) -> None:
        """Deletes a variant, its file too."""
        self._forget(variant)
        variant.file.path.unlink(missing_ok=True)

    def _enter(self, variant: Variant) -> None:
        self._by_name[variant.file.name] = variant
        self._by_chunk.setdefault(variant.file.chunk, {})[variant.file.name] = variant

    def _forget(self, variant: Variant) -> None:
        self._drop_rows(variant)
        variant.file.close()
        del self._by_name[variant.file.name]
        siblings = self._by_chunk[variant.file.chunk]
        del siblings[variant.file.name]
        if not siblings:
            del self._by_chunk[variant.file.chunk]

    # ---- loading, and the memory tier ----------------------------------------------------------------------------

    def read_layer(self, variant: Variant, layer: int, keys: np.ndarray, values: np.ndarray) -> None:
        """One layer's rows from memory or disk into keys, values [T, Hkv, D] float16; from disk they are checked."""
        if variant.rows is not None and layer < variant.layers_there:
            keys[:], values[:] = variant.rows[layer]
            return
        began = time.perf_counter()
        variant.file.read_layer(layer, keys, values)
        if self._throttle is not None:
            self._throttle.wait(keys.nbytes + values.nbytes)
        rate = (keys.nbytes + values.nbytes) / max(time.perf_counter() - began, 1e-9)
        self.load_bytes_per_s = _smoothed(self.load_bytes_per_s, rate)
        if variant.rows is not None and layer == variant.layers_there:
            variant.rows[layer] = keys, values
            variant.layers_there += 1

    def admit(self, variant: Variant) -> bool:
        """Makes room in memory for rows about to be loaded, if they are worth more than those that must go for it."""
        with self._lock:
            if variant.rows is not None:
                return True
            nbytes = variant.file.layer_bytes * self.shape.num_layers
            if nbytes > self.ram_bytes:
                return False
            leaving, freed = [], self.ram_bytes - self.ram_used_bytes
            held = sorted((v for v in self._by_name.values() if v.rows is not None and not v.pins), key=self._rank)
            for other in held:
                if freed >= nbytes or self._rank(other) >= self._rank(variant):
                    break
                leaving.append(other)
                freed += variant.file.layer_bytes * self.shape.num_layers if other.rows is None else other.rows.nbytes
            if freed < nbytes:
                return False
            for other in leaving:
                self._drop_rows(other)
            form = (self.shape.num_layers, 2, variant.context.num_tokens, self.shape.num_kv_heads, self.shape.head_dim)
            try:
                variant.rows = self.arena.allocate(f"{OWNER}/ram", form, ROWS)
            except BudgetExceeded:
                return False
            variant.layers_there = 0
            return True

    def _drop_rows(self, variant: Variant) -> None:
        if variant.rows is not None:
            self.arena.free(variant.rows)
            variant.rows, variant.layers_there = None, 0

    def preload(self, names: Sequence[str]) -> None:
        """Begins to bring variants into memory, in the background, for a request that waits in the queue."""
        self.wait_preload()
        wanted = [self._by_name[name] for name in names if name in self._by_name]
        wanted = [variant for variant in wanted if not variant.resident and self.admit(variant)]
        for variant in wanted:
            variant.pins += 1
        self._preloading = wanted
        if wanted:
            self._preloader = threading.Thread(target=self._preload, args=(wanted,), daemon=True)
            self._preloader.start()

    def _preload(self, wanted: Sequence[Variant]) -> None:
        for variant in wanted:
            keys = np.empty((variant.context.num_tokens, self.shape.num_kv_heads, self.shape.head_dim), ROWS)
            values = np.empty_like(keys)
            try:
                for layer in range(variant.layers_there, self.shape.num_layers):
                    self.read_layer(variant, layer, keys, values)
            except InputError as error:
                self.notes.append(str(error))  # the request itself will meet it again, and say so
                return

    def wait_preload(self) -> None:
        """Until what `preload` began is there."""
        if self._preloader is None:
            return
        self._preloader.join()
        self._preloader = None
        for variant in self._preloading:
            self.unpin(variant)
        self._preloading = []

    # ---- what outlives a run -------------------------------------------------------------------------------------

    def measured(self, layer_seconds_per_token: float) -> None:
        """How long a layer took for each token that ran through it: half of what decides the preload depth."""
        self.layer_seconds_per_token = _smoothed(self.layer_seconds_per_token, layer_seconds_per_token)

    def _read_state(self) -> None:
        path = self.folder / STATE
        if not path.exists():
            return
        most_bytes = STATE_BYTES * (len(self) + STATE_SPARE)
        fields = Fields(checked_json.read(path, max_bytes=most_bytes), str(path))
        try:
            fields.text("format", choices=(STATE_FORMAT,))
            self.clock = fields.integer("clock", 0, MOST_CLOCK)
            self.load_bytes_per_s = fields.number("load_bytes_per_s", 0, 1e15, 0.0) or None
            self.layer_seconds_per_token = fields.number("layer_seconds_per_token", 0, 1e6, 0.0) or None
            scores = Fields(fields.mapping("scores"), f"{path}: scores")
            for name, variant in self._by_name.items():
                if scores.has(name):
                    entry = Fields(scores.mapping(name), f"{path}: {name}")
                    variant.score = entry.number("score", 0, 1e12)
                    variant.scored = entry.integer("scored", 0, self.clock)
                    variant.used = entry.integer("used", 0, self.clock)
        except InputError as error:
            raise InputError(f"{error}; remove {path}: only the scores of kept chunks are lost") from None

    def save_state(self) -> None:
        """Writes scores and speeds; the file is whole or as it was."""
        scores = {
            name: {"score": variant.score, "scored": variant.scored, "used": variant.used}
            for name, variant in self._by_name.items()
        }
        state = {
            "format": STATE_FORMAT,
            "clock": self.clock,
            "load_bytes_per_s": self.load_bytes_per_s,
            "layer_seconds_per_token": self.layer_seconds_per_token,
            "scores": scores,
        }
        path, temporary = self.folder / STATE, self.folder / f".{STATE}.{os.getpid()}.partial"
        try:
            temporary.write_text(json.dumps(state))
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            self.notes.append(f"{path}: scores were not kept: {error.strerror or error}")

    def close(self) -> None:
        """Writes the scores and gives memory and the folder back."""
        self.wait_preload()
        self.save_state()
        for variant in self._by_name.values():
            self._drop_rows(variant)
            variant.file.close()
        if self._lock_file >= 0:
            os.close(self._lock_file)
            self._lock_file = -1

    def __enter__(self) -> ChunkStore:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close()


def _locked(folder: Path) -> int:
    """Makes the folder if need be and takes its lock; gives the descriptor that holds it."""
    try:
        folder.mkdir(exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise InputError(
            f"--chunk-store {folder}: must be a folder that can be written, or made: {error.strerror or error}"
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise InputError(f"--chunk-store {folder}: another run uses it; wait for that one, or name another") from None
    return descriptor


def _smoothed(before: float | None, now: float) -> float:
    return now if before is None else SMOOTHING * now + (1 - SMOOTHING) * before

"""A chunk's keys and values on disk, with what its tokens looked at when they were computed (`kv.cache_craft`).

One safetensors file for each variant (a chunk behind certain predecessors): rows `keys.L` and `values.L` [T, Hkv, D]
float16 of each layer, keys not rotated, the token ids, and the attention statistics. It is whole or not there. Opening
checks sizes, the statistics and whose it is; each layer has a digest of its own, so that it can be checked as it
arrives, before the next one is there. Digests find damage, not a forger.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memwall.errors import InputError
from memwall.formats import checked_json
from memwall.formats.checked_json import Fields, shown
from memwall.formats.safetensors_file import SafetensorsFile, SafetensorsWriter
from memwall.kv.base import CacheShape
from memwall.kv.cache_craft import Context, chunk_id
from memwall.kv.saved import Origin, SourceChecks
from memwall.models.config import MAX_POSITION

FORMAT = "memwall-chunk"
VERSION = 1
SUFFIX = ".chunk"
ROWS = np.dtype(np.float16)
DIGEST_BYTES = 16
MOST_PREDECESSORS = 4096
_KEYS = ("format", "version", "model", "weights", "weights_sha256", "content")


def variant_name(origin: Origin, chunk: str, predecessors: Sequence[str]) -> str:
    """Names a chunk behind its predecessors, for these weights of this model."""
    told = [origin.model, origin.weights_sha256, chunk, *predecessors]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]


def _forms(shape: CacheShape, tokens: int, predecessors: int) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    rows = (tokens, shape.num_kv_heads, shape.head_dim)
    planes = {f"{which}.{layer}": (ROWS, rows) for layer in range(shape.num_layers) for which in ("keys", "values")}
    return {
        **planes,
        "tokens": (np.dtype(np.int32), (tokens,)),
        "inter": (np.dtype(np.float64), (predecessors,)),
        "intra": (np.dtype(np.float64), (1,)),
        "token_inter": (np.dtype(np.float32), (tokens,)),
        "digests": (np.dtype(np.uint8), (2 * shape.num_layers, DIGEST_BYTES)),
        "check": (np.dtype(np.uint8), (DIGEST_BYTES,)),
    }


def _check(metadata: Mapping[str, str], small: Mapping[str, np.ndarray]) -> np.ndarray:
    """Digest of all but the rows, which have their own."""
    digest = hashlib.blake2b(json.dumps(dict(metadata), sort_keys=True).encode(), digest_size=DIGEST_BYTES)
    for name in sorted(small):
        digest.update(np.ascontiguousarray(small[name]).tobytes())
    return np.frombuffer(digest.digest(), np.uint8)


def weights_of(folder: Path) -> str | None:
    """The choice of weights that made the chunks of a folder, as far as its first one tells; None without any."""
    for path in sorted(folder.glob(f"*{SUFFIX}")) if folder.is_dir() else []:
        if path.is_file():
            with SafetensorsFile(path) as file:
                return file.metadata.get("weights")
    return None


class ChunkWriter:
    """Takes a chunk's rows layer by layer, in pieces, and its statistics at the end."""

    def __init__(
        self,
        folder: Path,
        origin: Origin,
        shape: CacheShape,
        tokens: np.ndarray,
        predecessors: Sequence[str],
        lengths: Sequence[int],
    ) -> None:
        """Reserves the file's bytes: DoesNotFit when the disk is full."""
        self.name = variant_name(origin, chunk_id(tokens), predecessors)
        self._tokens = np.asarray(tokens, np.int32)
        content = {"predecessors": list(predecessors), "lengths": list(lengths)}
        self._metadata = {
            "format": FORMAT,
            "version": str(VERSION),
            "model": origin.model,
            "weights": origin.weights,
            "weights_sha256": origin.weights_sha256,
            "content": json.dumps(content, sort_keys=True),
        }
        forms = _forms(shape, len(tokens), len(predecessors))
        specs = [(name, dtype, form) for name, (dtype, form) in forms.items()]
        self._digests = [hashlib.blake2b(digest_size=DIGEST_BYTES) for _ in range(2 * shape.num_layers)]
        self._writer = SafetensorsWriter(folder / f"{self.name}{SUFFIX}", specs, self._metadata)

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return self._writer.nbytes

    def write(self, layer: int, keys: np.ndarray, values: np.ndarray) -> None:
        """The layer's next rows [n, Hkv, D]; keys not rotated."""
        for index, (name, rows) in enumerate((("keys", keys), ("values", values))):
            stored = np.ascontiguousarray(rows, ROWS)
            self._digests[2 * layer + index].update(stored.data)
            self._writer.write(f"{name}.{layer}", stored)

    def close(self, inter: np.ndarray, intra: float, token_inter: np.ndarray) -> Path:
        """Writes the statistics and puts the file in place."""
        small: dict[str, np.ndarray] = {
            "tokens": self._tokens,
            "inter": np.asarray(inter, np.float64),
            "intra": np.array([intra], np.float64),
            "token_inter": np.asarray(token_inter, np.float32),
            "digests": np.array([np.frombuffer(d.digest(), np.uint8) for d in self._digests]),
        }
        for name, array in (*small.items(), ("check", _check(self._metadata, small))):
            self._writer.write(name, array)
        self._writer.close()
        return self._writer.path

    def abort(self) -> None:
        """Leaves nothing behind."""
        self._writer.abort()


class ChunkFile(SourceChecks):
    """A chunk's file: opened once to be checked and to learn its statistics, then read a layer at a time."""

    path: Path

    def __init__(self, path: Path, origin: Origin, shape: CacheShape) -> None:
        """InputError, naming the file, for one that is damaged or that another model or other weights made."""
        self.path = path
        self.shape = shape
        try:
            regular = stat.S_ISREG(path.stat().st_mode)
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
        if not regular:
            raise InputError(f"{path}: is no file, though it is named like a kept chunk; remove it")
        with SafetensorsFile(path) as file:
            self._read_metadata(file.metadata)
            self.check_model(origin.model)
            self.check_weights(origin)
            self._read_small(file)
            self._starts = {name: file.info(name).start for name in file.names()}
            self.nbytes = file.nbytes
        name = variant_name(origin, self.chunk, self.context.predecessors)
        if path.name != f"{name}{SUFFIX}":
            raise InputError(f"{path}: damaged: holds what should be called {name}{SUFFIX}; remove it")
        self.name = name
        self._descriptor = -1

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer's keys and values."""
        return 2 * self.context.num_tokens * self.shape.row_values * ROWS.itemsize

    def _read_metadata(self, metadata: Mapping[str, str]) -> None:
        if metadata.get("format") != FORMAT:
            raise InputError(f"{self.path}: not a kept chunk; remove it, or name another folder with --chunk-store")
        if metadata.get("version") != str(VERSION):
            found = shown(metadata.get("version"))
            raise InputError(f"{self.path}: kept chunk of version {found}; this memwall reads version {VERSION}")
        if set(metadata) != set(_KEYS):
            raise self.damaged(f"the metadata must be {', '.join(_KEYS)}")
        self.model, self.weights = metadata["model"], metadata["weights"]
        self.weights_sha256 = metadata["weights_sha256"]
        source = f"{self.path}: content"
        content = Fields(checked_json.parse(metadata["content"].encode(), source, max_depth=4), source)
        names = content.items("predecessors", MOST_PREDECESSORS)
        lengths = content.items("lengths", MOST_PREDECESSORS)
        good = len(names) == len(lengths) and all(isinstance(name, str) and len(name) == 32 for name in names)
        if not good or not all(type(length) is int and 0 <= length <= MAX_POSITION for length in lengths):
            raise self.damaged("its predecessors are not names with lengths")
        self._predecessors, self._lengths = tuple(names), tuple(lengths)

    def _read_small(self, file: SafetensorsFile) -> None:
        tokens = file.info("tokens").shape
        if len(tokens) != 1 or not 0 < tokens[0] <= MAX_POSITION:
            raise self.damaged("tokens must be a list, one at least")
        wanted = _forms(self.shape, tokens[0], len(self._predecessors))
        found = {name: (file.info(name).numpy_dtype, file.info(name).shape) for name in file.names()}
        if found != wanted:
            raise self.damaged(f"its arrays are not those of {tokens[0]} tokens over {self.shape.num_layers} layers")
        small = {name: np.array(file.tensor(name)) for name in wanted if "." not in name}
        check = small.pop("check")
        if not np.array_equal(check, _check(file.metadata, small)):
            raise self.damaged("its statistics were altered (their digest differs)")
        numbers = np.concatenate([small["inter"], small["intra"], small["token_inter"]])
        if not np.isfinite(numbers).all() or numbers.min() < 0:
            raise self.damaged("its statistics are no sums of attention")
        self.chunk = chunk_id(small["tokens"])
        self._digests = small["digests"]
        self.context = Context(
            num_tokens=tokens[0],
            predecessors=self._predecessors,
            lengths=self._lengths,
            inter=small["inter"],
            intra=float(small["intra"][0]),
            token_inter=small["token_inter"],
        )

    def read_layer(self, layer: int, keys: np.ndarray, values: np.ndarray) -> None:
        """Reads one layer's rows into keys, values [T, Hkv, D] float16 and checks them."""
        if self._descriptor < 0:
            try:
                self._descriptor = os.open(self.path, os.O_RDONLY)
            except OSError as error:
                raise InputError(f"{self.path}: cannot be read: {error.strerror or error}") from None
        for index, (name, out) in enumerate((("keys", keys), ("values", values))):
            self._fill(out, self._starts[f"{name}.{layer}"])
            found = hashlib.blake2b(out.data, digest_size=DIGEST_BYTES).digest()
            if found != self._digests[2 * layer + index].tobytes():
                raise self.damaged(f"{name} of layer {layer} differ from their digest")

    def _fill(self, out: np.ndarray, start: int) -> None:
        view, done = out.reshape(-1).view(np.uint8).data, 0
        while done < len(view):
            try:
                count = os.preadv(self._descriptor, [view[done:]], start + done)
            except OSError as error:
                raise InputError(f"{self.path}: cannot be read: {error.strerror or error}") from None
            if not count:
                raise self.damaged("it became shorter")
            done += count

    def damaged(self, why: str) -> InputError:
        """What to say of a file that cannot be used."""
        return InputError(f"{self.path}: damaged: {why}; remove it, and the chunk is computed anew")

    def close(self) -> None:
        """Closes what reading opened; the next read opens it again."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def facts(self) -> dict[str, Any]:
        """What a person may want to know of it."""
        return {"chunk": self.chunk, "tokens": self.context.num_tokens, "bytes": self.nbytes}

"""A cache on disk: what a model made of a text, so that a later prompt that begins the same goes on without prefill.

One safetensors file: the token ids, the arrays of `KVCache.dump`, and metadata that say whose they are (model, weights,
policy) with a SHA-256 over all of it. A file is whole or not there. Opening checks the header against the file's size;
`check_model` and `check_policy` compare it with what runs; `verify` hashes the contents. Only then is memory taken.

The digest finds damage and careless changes, not a forger, who would write a new digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memwall.errors import InputError
from memwall.formats import checked_json
from memwall.formats.checked_json import Fields, shown
from memwall.formats.safetensors_file import SafetensorsFile, SafetensorsWriter
from memwall.kv import table
from memwall.kv.base import CacheModel, KVCache
from memwall.kv.policy import Policy, parse
from memwall.kv.table import POLICIES, resolve, technique
from memwall.models.config import MAX_POSITION

if TYPE_CHECKING:
    from memwall.models.decoder import Decoder

FORMAT = "memwall-cache"
VERSION = 1
TOKENS = "tokens"
EXACT = "exact"
ENCODED = "kv/encoded"
"""Ledger owner of what a codec has made until it is written."""
PIECE_BYTES = 1 << 20
"""Bytes of the file that are resident at once while it is read."""
_KEYS = ("format", "version", "model", "weights", "weights_sha256", "content", "sha256")
_DIGEST_LENGTH = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What made the keys and values: fingerprint of the model, choice of weights, and the spec of each tensor."""

    model: str
    weights: str
    specs: Mapping[str, str]

    @property
    def weights_sha256(self) -> str:
        """Names the weights exactly: one choice may stand for several sets of formats."""
        return hashlib.sha256(json.dumps(sorted(self.specs.items())).encode()).hexdigest()


def require_saving(policy: str | Policy, codec: str = EXACT) -> None:
    """InputError when caches of this policy cannot be written down, or not by this codec."""
    kind = technique(resolve(policy).name)
    if not kind.saves and codec == EXACT:
        able = ", ".join(name for name in POLICIES if technique(name).saves)
        raise InputError(f"KV policy {policy}: its caches cannot be saved yet; these can: {able}")
    if codec != EXACT and table.codec(parse(codec).name) and not kind.plain_rows:
        raise InputError(
            f"KV policy {policy}: its caches do not hold the rows of all tokens, which {codec} codes; save them with "
            "--cache-codec exact, or run with a float cache or kivi"
        )


def write(
    path: Path,
    arrays: Mapping[str, np.ndarray],
    tokens: Sequence[int],
    origin: Origin,
    content: Mapping[str, object],
) -> int:
    """Writes token ids and arrays; the file is whole or not there. Gives its bytes. content: what says how to read."""
    held = {TOKENS: np.asarray(tokens, np.int32), **arrays}
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "model": origin.model,
        "weights": origin.weights,
        "weights_sha256": origin.weights_sha256,
        "content": json.dumps(content, sort_keys=True),
    }
    metadata["sha256"] = _digest(metadata, {name: (a.shape, a.dtype, iter((a,))) for name, a in held.items()})
    specs = [(name, array.dtype, array.shape) for name, array in held.items()]
    with SafetensorsWriter(path, specs, metadata) as writer:
        for name, array in held.items():
            writer.write(name, array)
    return writer.nbytes


def save(
    path: Path,
    cache: KVCache,
    tokens: Sequence[int],
    origin: Origin,
    codec: str = EXACT,
    model: CacheModel | None = None,
) -> int:
    """Writes a cache; gives the file's bytes.

    codec: `exact` keeps the very form the cache holds its tokens in; else a codec of `kv.table.CODECS`, for whose
    encoding `model` is needed.
    """
    require_saving(cache.policy, codec)
    if len(tokens) != cache.length or not tokens:
        raise ValueError(f"{len(tokens)} token ids for a cache of {cache.length}")
    if codec == EXACT:
        arrays, facts = cache.dump()
        return write(path, arrays, tokens, origin, {"policy": cache.policy, "facts": facts})
    charge = cache.arena.charge(ENCODED, 0)
    try:
        arrays, content = _codec(codec, model).encode(cache, charge)
        return write(path, arrays, tokens, origin, content)
    finally:
        charge.release()


def check_saving(cache: KVCache, codec: str, model: CacheModel | None) -> None:
    """InputError when `save` with this codec would refuse the cache: before a run, not after it."""
    require_saving(cache.policy, codec)
    if codec != EXACT:
        _codec(codec, model).check_ready()


def restore(saved: SavedCache, cache: KVCache, keep: int, model: CacheModel | None = None) -> int:
    """Fills an empty cache with the first `keep` tokens of a file of either kind; gives how many it took."""
    if saved.policy is not None:
        return saved.restore(cache, keep)
    taken: int = _codec(saved.content.text("codec"), model).decode(saved, cache, keep)
    return taken


def _codec(text: str, model: CacheModel | None) -> Any:
    if model is None:
        raise ValueError("a codec needs the model whose keys and values it codes")
    policy = parse(text)
    return table.codec(policy.name)(policy, model)


def num_shared(seen: Sequence[int], ids: Sequence[int]) -> int:
    """Length of the common beginning of two lists of token ids."""
    return next((place for place, (one, other) in enumerate(zip(seen, ids)) if one != other), min(len(seen), len(ids)))


class SourceChecks:
    """Whether a saved context was made by what runs now."""

    path: Path | str
    model: str
    weights: str
    weights_sha256: str

    def check_model(self, fingerprint: str) -> None:
        """InputError unless the model is the one that made it."""
        if fingerprint != self.model:
            raise InputError(
                f"{self.path}: was made by another model (fingerprint {shown(self.model[:12])}, not "
                f"{fingerprint[:12]}); run the model that it was saved from, or save a cache of this one"
            )

    def check_weights(self, origin: Origin) -> None:
        """InputError unless the weights are held in the formats that made it."""
        if origin.weights_sha256 != self.weights_sha256:
            raise InputError(
                f"{self.path}: was made with {shown(self.weights)} weights, not {origin.weights}; pass --weights "
                f"{shown(self.weights)}, or leave it out"
            )

    def check_rows(self, policy: str) -> None:
        """InputError unless a cache of this policy can take rows."""
        if not technique(resolve(policy).name).plain_rows:
            raise InputError(f"{self.path}: holds rows, which a cache of {policy} cannot take; try --kv float16")


class SavedCache(SourceChecks):
    """A saved cache, open and checked as far as it can be without what it will be used with."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = SafetensorsFile(path)
        self._verified = False
        try:
            self._read_metadata(self.file.metadata)
        except BaseException:
            self.file.close()
            raise

    def _read_metadata(self, metadata: Mapping[str, str]) -> None:
        if metadata.get("format") != FORMAT:
            raise InputError(f"{self.path}: not a saved cache; `memwall run --save-cache FILE` makes one")
        if metadata.get("version") != str(VERSION):
            found = shown(metadata.get("version"))
            raise InputError(f"{self.path}: saved cache of version {found}; this memwall reads version {VERSION}")
        if set(metadata) != set(_KEYS) or any(len(metadata[key]) != _DIGEST_LENGTH for key in ("model", "sha256")):
            raise InputError(f"{self.path}: damaged: the metadata must be {', '.join(_KEYS)}")
        self.model, self.weights = metadata["model"], metadata["weights"]
        self.weights_sha256 = metadata["weights_sha256"]
        source = f"{self.path}: content"
        self.content = Fields(checked_json.parse(metadata["content"].encode(), source, max_depth=4), source)
        info = self.file.info(TOKENS)
        if info.dtype != "I32" or len(info.shape) != 1 or not 0 < info.shape[0] <= MAX_POSITION:
            raise InputError(f"{self.path}: damaged: tokens must be a list of 32-bit integers, one at least")
        self.num_tokens = info.shape[0]

    @property
    def policy(self) -> str | None:
        """The policy whose stored form the file holds; None where it holds rows that any store takes."""
        return self.content.text("policy") if self.content.has("policy") else None

    @property
    def longest_append(self) -> int:
        """The most tokens that loading hands to a cache at once: 0 for a cache's own form, a chunk's for coded ones."""
        if self.policy is not None:
            return 0
        lengths = self.content.items("chunk_tokens", self.num_tokens)
        return max((n for n in lengths if type(n) is int), default=0)

    def tokens(self) -> list[int]:
        """Ids of the tokens that it holds, in order."""
        return [int(token) for _, rows in self.file.pieces(TOKENS, PIECE_BYTES) for token in rows]

    def check_policy(self, policy: str) -> None:
        """InputError unless a cache of this policy can take it."""
        mine = self.policy
        if mine is None:
            self.check_rows(policy)
            return
        if str(resolve(policy)) != str(resolve(mine)):
            raise InputError(
                f"{self.path}: holds a cache of {mine}, not of {policy}; pass --kv '{mine}' or leave it out"
            )

    def shared_tokens(self, prompt: Sequence[int]) -> int:
        """Tokens of the prompt's beginning that it holds; one token at least is left to prefill."""
        return min(num_shared(self.tokens(), prompt), len(prompt) - 1)

    def fill(self, cache: KVCache, keep: int, model: CacheModel, decoder: Decoder) -> int:
        """Fills an empty cache with the first `keep` tokens; gives how many it took."""
        return restore(self, cache, keep, model)

    def verify(self) -> None:
        """Hashes the contents, once; InputError when they are not those that were written."""
        if self._verified:
            return
        names = self.file.names()
        infos = {name: self.file.info(name) for name in names}
        parts = {
            name: (info.shape, info.numpy_dtype, (rows for _, rows in self.file.pieces(name, PIECE_BYTES)))
            for name, info in infos.items()
        }
        if _digest(self.file.metadata, parts) != self.file.metadata["sha256"]:
            raise InputError(f"{self.path}: altered or damaged (its SHA-256 differs); save the cache again")
        self._verified = True

    def restore(self, cache: KVCache, keep: int) -> int:
        """Fills an empty cache with the first `keep` tokens; gives how many it took. Call the checks first.

        BudgetExceeded, with the cache empty, when the arena has no room.
        """
        self.check_policy(cache.policy)
        fields = Fields(self.content.mapping("facts"), f"{self.path}: facts")
        facts = {name: fields.integer(name, 0, 2**40) for name in fields.values}
        try:
            wanted = cache.layout(facts)
        except KeyError as missing:
            raise InputError(f"{self.path}: damaged: {missing} is missing from its facts") from None
        found = {name: self._form(name) for name in self.file.names() if name != TOKENS}
        if facts["tokens"] != self.num_tokens or found != wanted:
            raise InputError(
                f"{self.path}: damaged: its arrays are not those of {self.num_tokens} tokens in {cache.policy} over "
                f"{cache.shape.num_layers} layers"
            )
        cache.restore(facts, keep, self.read)
        return cache.length

    def _form(self, name: str) -> tuple[tuple[int, ...], np.dtype]:
        info = self.file.info(name)
        return info.shape, info.numpy_dtype

    def read(self, name: str, out: np.ndarray) -> None:
        """The first len(out) rows of an array, a piece of the file at a time."""
        for first, rows in self.file.pieces(name, PIECE_BYTES):
            if first >= len(out):
                return
            out[first : first + len(rows)] = rows[: len(out) - first]

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> SavedCache:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close()


def _digest(
    metadata: Mapping[str, str], arrays: Mapping[str, tuple[tuple[int, ...], np.dtype, Iterator[np.ndarray]]]
) -> str:
    """SHA-256 over the metadata and every array's name, form and bytes, in the order of names."""
    told = {key: value for key, value in metadata.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for name in sorted(arrays):
        shape, dtype, pieces = arrays[name]
        digest.update(json.dumps([name, dtype.name, list(shape)]).encode())
        for piece in pieces:
            digest.update(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()

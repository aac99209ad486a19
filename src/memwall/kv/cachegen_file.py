"""CacheGen in saved caches: chunks at every level, coded by the model's profile, decoded into any store of rows.

In the file (`kv.saved`) the array `chunk.2.level.3` is the third chunk at the finest level, with its own checksum: the
very bytes that a server sends (`kv.streaming`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memwall.errors import InputError
from memwall.formats.checked_json import Fields
from memwall.kv import cachegen_profile as profiles
from memwall.kv import fitted
from memwall.kv.base import CacheModel, KVCache
from memwall.kv.cachegen import CacheGenSettings, Chunk, Shape, cache_planes, encode_chunk, scratch_bytes
from memwall.kv.cachegen_profile import LEVELS
from memwall.kv.policy import Policy, parse
from memwall.memory.pages import round_up

if TYPE_CHECKING:
    from memwall.kv.saved import SavedCache
    from memwall.memory.arena import Charge

FIT_KEY = "cachegen/1"
DECODING = "kv/decoding"
"""Ledger owner of a chunk that is being decoded, its tables and its floats."""


def chunk_name(index: int, level: int) -> str:
    """The array of one chunk at one level."""
    return f"chunk.{index}.level.{level}"


class CacheGenFile:
    """The codec `cachegen(...)` of `--cache-codec`; see `kv.cachegen` for what it does to numbers."""

    fits = True

    def __init__(self, policy: Policy, model: CacheModel) -> None:
        self.settings = CacheGenSettings.from_policy(policy)
        self.model = model
        self.policy = policy
        self.shape = Shape.of(model.config)

    @classmethod
    def fit_key(cls, policy: Policy) -> str:
        """One profile serves all levels of a form."""
        return f"{FIT_KEY}/{CacheGenSettings.from_policy(policy).form}"

    @classmethod
    def fit(
        cls,
        policy: Policy,
        directory: Path,
        text: str | None,
        threads: int | None,
        progress: Callable[[str, int, int], None] | None,
    ) -> dict[str, np.ndarray]:
        """The model's profile: means, spreads, bin widths and symbol distributions of its keys and values."""
        from memwall.kv.cachegen_fit import ModelText, learn

        form = CacheGenSettings.from_policy(policy).form
        return learn(ModelText(directory, text, threads, progress), form)

    def check_ready(self) -> None:
        """InputError that says how to fit where a profile is needed and not there."""
        if self.settings.tables == "profile":
            fitted.load(self.model, self.policy, self.fit_key(self.policy), ["id"])

    def profile(self, level: int | None = None) -> dict[str, np.ndarray] | None:
        """What was fitted to the model, only the tables of one level where it is given; None where chunks bring theirs.

        InputError that says how to fit.
        """
        if self.settings.tables == "chunk":
            return None
        names = None if level is None else profiles.table_names(self.settings.form, level)
        return fitted.load(self.model, self.policy, self.fit_key(self.policy), names)

    def encode(self, cache: KVCache, charge: Charge) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Arrays for the file, and what tells how to read them. charge: counts the bytes while they are held."""
        if not cache.plain_rows:
            raise InputError(
                f"codec {self.policy}: a cache of {cache.policy} does not hold the rows of all tokens; save it exactly"
            )
        arrays: dict[str, np.ndarray] = {}
        sizes: dict[str, list[int]] = {}
        held = 0
        for level in self.settings.levels:
            profile = self.profile(level)
            tables = sum(array.nbytes for array in profile.values()) if profile is not None else 0
            charge.resize(held + tables + scratch_bytes(self.shape, min(self.settings.chunk, cache.length)))
            for index, begin in enumerate(range(0, cache.length, self.settings.chunk)):
                end = min(begin + self.settings.chunk, cache.length)
                data = encode_chunk(
                    cache_planes(cache, self.model.config, begin, end),
                    self.shape,
                    model=self.model.fingerprint,
                    first=begin,
                    level=level,
                    form=self.settings.form,
                    profile=profile,
                )
                held += len(data)
                charge.resize(charge.nbytes + len(data))
                arrays[chunk_name(index, level)] = np.frombuffer(data, np.uint8)
                sizes.setdefault(str(level), []).append(len(data))
        charge.resize(held)
        lengths = [min(self.settings.chunk, cache.length - at) for at in range(0, cache.length, self.settings.chunk)]
        return arrays, {"codec": str(self.policy), "chunk_tokens": lengths, "sizes": sizes}

    def decode(self, saved: SavedCache, cache: KVCache, keep: int) -> int:
        """Fills an empty cache with the first `keep` tokens from the finest level there; gives how many it took."""
        lengths, levels = chunk_plan(saved.content, saved)
        level = levels[-1]
        profile = self.profile(level)
        tables = sum(array.nbytes for array in profile.values()) if profile is not None else 0
        largest = max(saved.file.info(chunk_name(index, level)).nbytes for index in range(len(lengths)))
        needed = round_up(tables + largest + scratch_bytes(self.shape, max(lengths)))
        charge = cache.arena.charge(DECODING, needed)
        try:
            for index, tokens in enumerate(lengths):
                if cache.length >= keep:
                    break
                data = np.empty(saved.file.info(chunk_name(index, level)).nbytes, np.uint8)
                saved.read(chunk_name(index, level), data)
                chunk = Chunk(data, self.shape, model=self.model.fingerprint, profile=profile)
                if (chunk.num_tokens, chunk.first) != (tokens, cache.length):
                    raise InputError(f"{saved.path}: damaged: chunk {index} is not the one at token {cache.length}")
                chunk.append_to(cache, self.model.config, keep - cache.length)
        except BaseException:
            cache.truncate(0)
            raise
        finally:
            charge.release()
        return cache.length


def codec_of(saved: SavedCache, model: CacheModel) -> CacheGenFile:
    """The codec that wrote a file."""
    return CacheGenFile(parse(saved.content.text("codec")), model)


def chunk_plan(content: Fields, saved: SavedCache) -> tuple[list[int], list[int]]:
    """(tokens of each chunk, levels that are there, coarse to fine) of a file, checked against its arrays."""
    lengths = content.items("chunk_tokens", 1 << 20)
    good = bool(lengths) and all(type(n) is int and n > 0 for n in lengths) and sum(lengths) == saved.num_tokens
    levels = [level for level in LEVELS if chunk_name(0, level) in saved.file]
    wanted = {chunk_name(index, level) for index in range(len(lengths)) for level in levels}
    found = {name: saved.file.info(name) for name in saved.file.names() if name != "tokens"}
    if not good or not levels or set(found) != wanted or any(info.dtype != "U8" for info in found.values()):
        raise InputError(f"{saved.path}: damaged: its chunks are not those of {saved.num_tokens} tokens")
    return lengths, levels


def sizes_of(saved: SavedCache, levels: list[int], num_chunks: int) -> Mapping[int, list[int]]:
    """Bytes of each chunk at each level."""
    return {v: [saved.file.info(chunk_name(index, v)).nbytes for index in range(num_chunks)] for v in levels}

"""CacheGen: a context's keys and values as a small stream of entropy-coded chunks, decoded in parallel.

Source: CacheGen: KV Cache Compression and Streaming for Fast Large Language Model Serving; Liu et al., 2023 (SIGCOMM
2024), arXiv 2310.07240, sections 5.1 and 5.2; official code github.com/UChi-JCL/CacheGen.
Idea: rounded coarsely, finer in early layers, each channel's symbols have a narrow distribution that hardly changes
from text to text: profiled once per model, it lets an arithmetic coder spend what they are worth. Differences to the
first token of a group of 10 are narrower still where neighbouring tokens are alike.
Units and shapes: rows of a plane [T, C] float32, C = Hkv * D; planes are the keys and values of each layer. A chunk is
bytes: header, scales, stream sizes, far bins, streams, checksum.
Differs from the paper: keys are coded before rotation and turned anew when decoded, so that a chunk serves at any place
of a text; without it their means turn with the position. Groups begin anew with each stream of 256 tokens.
`form=delta` is the paper's (anchors of 8 bits, bin widths in units of the plane's typical deviation of differences),
`form=direct` the official code's (no differences, bins by level); `form=mean` takes differences to the channel's mean;
`auto` lets the profile measure, plane by plane, whether anchors or means take fewer bits, and how wide bins of each
third of the layers may be. Bins beyond +-31 are stored apart.
Cost: T * C * 2 * layers numbers at some 2 to 4 bits each, one to two bytes a stream for its size and end, 2 bytes a
scale; decoding multiplies and adds once a number and holds one plane's floats.
Holds when: all tokens of a cache are there; the model, and for profiled tables the profile, are those of the encoder.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from memwall.errors import InputError
from memwall.formats import checked_json
from memwall.formats.checked_json import Fields
from memwall.kernels import range_coder
from memwall.kv import cachegen_profile as profiles
from memwall.kv.base import KVCache
from memwall.kv.cachegen_profile import CUT_TOKENS, FORMS, GROUP_TOKENS, LEVELS, OwnTables, PlaneCoder
from memwall.kv.policy import Policy
from memwall.models.config import ModelConfig

MAGIC = b"MWCG"
VERSION = 1
CHECKSUM_BYTES = 16
MAX_HEADER_BYTES = 4096
MAX_CHUNK_TOKENS = 1 << 16
SCRATCH_FLOATS = 6
"""Arrays of the size of one plane that decoding holds at once, counted in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheGenSettings:
    """levels: those written; form: what is coded; tables: `profile` or `chunk`; chunk: tokens of a chunk."""

    levels: tuple[int, ...] = LEVELS
    form: str = "auto"
    tables: str = "profile"
    chunk: int = 1500

    @classmethod
    def from_policy(cls, policy: Policy) -> CacheGenSettings:
        """Settings of a string such as `cachegen(level=2,form=delta)`."""
        form, tables = policy.settings.get("form", "auto"), policy.settings.get("tables", "profile")
        own = Policy(policy.name, policy.settings)
        numbers = own.integers({"level": 0, "chunk": 1500}, words=("form", "tables"))
        for key, value, choices in (("form", form, FORMS), ("tables", tables, ("profile", "chunk"))):
            if value not in choices:
                raise InputError(f"codec {policy}: {key}={value}; it is one of {', '.join(choices)}")
        if numbers["level"] not in (0, *LEVELS):
            raise InputError(f"codec {policy}: level {numbers['level']}; it is 1 (coarse), 2 or 3 (fine)")
        if not GROUP_TOKENS <= numbers["chunk"] <= MAX_CHUNK_TOKENS:
            raise InputError(
                f"codec {policy}: chunks of {numbers['chunk']} tokens; {GROUP_TOKENS} to {MAX_CHUNK_TOKENS} can be"
            )
        levels = (numbers["level"],) if numbers["level"] else LEVELS
        return cls(levels=levels, form=form, tables=tables, chunk=numbers["chunk"])


def pack_sizes(sizes: np.ndarray) -> bytes:
    """Sizes below 2^14 in one byte, or in two where they are above 127."""
    long = sizes > 127
    ends = np.cumsum(1 + long)
    data = np.zeros(int(ends[-1]) if len(ends) else 0, np.uint8)
    data[ends - 1 - long] = np.where(long, 128 | sizes & 127, sizes)
    data[ends[long] - 1] = sizes[long] >> 7
    return data.tobytes()


def unpack_sizes(data: np.ndarray, count: int) -> np.ndarray:
    """`count` sizes; InputError where the bytes hold others."""
    # a byte above 127 is followed by one that is not: the rest of its number
    follows = np.zeros(len(data), bool)
    follows[1:] = data[:-1] > 127
    sizes = (data & 127)[~follows].astype(np.uint32)
    long = data[~follows] > 127
    if len(sizes) != count or np.any(data[follows] > 127) or np.count_nonzero(follows) != np.count_nonzero(long):
        raise InputError(f"damaged chunk: {len(sizes)} stream sizes instead of {count}")
    sizes[long] |= data[follows].astype(np.uint32) << 7
    return sizes


@dataclass(frozen=True, slots=True)
class Shape:
    """What a chunk must know of its model."""

    num_layers: int
    channels: int

    @classmethod
    def of(cls, config: ModelConfig) -> Shape:
        return cls(config.num_layers, config.num_kv_heads * config.head_dim)

    @property
    def planes(self) -> int:
        return 2 * self.num_layers


def _seal(header: Mapping[str, object], sections: Sequence[bytes]) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    body = b"".join([MAGIC, struct.pack("<I", len(text)), text, *sections])
    return body + hashlib.blake2b(body, digest_size=CHECKSUM_BYTES).digest()


def encode_chunk(
    planes: Callable[[int], np.ndarray],
    shape: Shape,
    *,
    model: str,
    first: int,
    level: int,
    form: str,
    profile: Mapping[str, np.ndarray] | None,
) -> bytes:
    """One chunk. planes(p): rows [T, C] of a plane, keys not rotated; first: place of its first token in the text.

    profile: what was fitted to the model; None makes tables of the chunk itself and sends them along.
    """
    scales, far, sizes, streams, own, num_tokens = [], [], [], [], [], 0
    form = "mean" if profile is None and form == "auto" else form
    for plane in range(shape.planes):
        x = planes(plane)
        num_tokens = len(x)
        if profile is None:
            own.append(OwnTables.make(x, form, level, plane, shape.num_layers))
            coder = OwnTables.unpack(own[-1], shape.channels, form, level, plane, shape.num_layers)
        else:
            coder = profiles.plane_coder(profile, plane, form, level, shape.num_layers)
        symbols, plane_scales, plane_far = coder.symbols(x)
        if not (np.isfinite(x).all() and np.isfinite(plane_scales.astype(np.float32)).all()):
            raise InputError("keys or values are not finite, or too large for a float16 scale; they cannot be coded")
        coded, lengths = range_coder.encode(symbols[None], **_streams(coder))
        scales.append(plane_scales)
        far.append(plane_far)
        sizes.append(lengths)
        streams.append(coded)
    packed_sizes = pack_sizes(np.concatenate(sizes))
    tables = zlib.compress(b"".join(own), 6)
    header = {
        "version": VERSION, "model": model, "profile": "" if profile is None else bytes(profile["id"]).hex(),
        "form": form, "level": level, "first": first, "tokens": num_tokens, "layers": shape.num_layers,
        "channels": shape.channels, "scales": [len(each) for each in scales], "far": [len(each) for each in far],
        "sizes": len(packed_sizes), "tables": len(tables) if own else 0,
    }  # fmt: skip
    sections = [tables] if own else []
    sections += [part.tobytes() for part in (*scales, *far)] + [packed_sizes] + [part.tobytes() for part in streams]
    return _seal(header, sections)


def _streams(coder: PlaneCoder) -> dict[str, Any]:
    """How the streams of a plane are coded."""
    anchors = coder.anchors[None] if coder.anchors is not None else None
    return {"starts": coder.starts[None], "cut": CUT_TOKENS, "anchors": anchors, "group": GROUP_TOKENS * coder.anchored}


class Chunk:
    """A received chunk, checked; `plane` decodes any part of it, independently of all others.

    InputError for bytes that are damaged, of another model, or coded by another profile.
    """

    def __init__(
        self, data: bytes | np.ndarray, shape: Shape, *, model: str, profile: Mapping[str, np.ndarray] | None
    ) -> None:
        raw = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
        head = len(MAGIC) + 4
        if len(raw) < head + CHECKSUM_BYTES or raw[: len(MAGIC)].tobytes() != MAGIC:
            raise InputError("damaged chunk: it is no CacheGen stream, or was cut off")
        body = raw[:-CHECKSUM_BYTES]
        if hashlib.blake2b(body.data, digest_size=CHECKSUM_BYTES).digest() != raw[-CHECKSUM_BYTES:].tobytes():
            raise InputError("damaged chunk: its checksum differs")
        (length,) = struct.unpack("<I", raw[len(MAGIC) : head].tobytes())
        if length > min(MAX_HEADER_BYTES + 32 * shape.planes, len(body) - head):
            raise InputError(f"damaged chunk: a header of {length} bytes")
        fields = Fields(checked_json.parse(body[head : head + length].tobytes(), "chunk header"), "chunk header")
        self.shape = shape
        self._read_header(fields, model, profile)
        self._read_sections(fields, body[head + length :])

    def _read_header(self, fields: Fields, model: str, profile: Mapping[str, np.ndarray] | None) -> None:
        if fields.integer("version", 0, 2**31) != VERSION:
            raise InputError(f"chunk of version {fields.values['version']}; this memwall reads version {VERSION}")
        if fields.text("model") != model:
            raise InputError("this chunk was made by another model; save the cache again with the one that runs")
        self.form = fields.text("form", choices=FORMS)
        self.level = fields.integer("level", LEVELS[0], LEVELS[-1])
        self.first = fields.integer("first", 0, 2**40)
        self.num_tokens = fields.integer("tokens", 1, MAX_CHUNK_TOKENS)
        layers, channels = fields.integer("layers", 1, 2**20), fields.integer("channels", 1, 2**20)
        if (layers, channels) != (self.shape.num_layers, self.shape.channels):
            raise InputError(f"a chunk of {layers} layers and {channels} channels, not of {self.shape}")
        wanted = fields.text("profile", "")
        if wanted and (profile is None or bytes(profile["id"]).hex() != wanted):
            raise InputError(
                f"this chunk was coded with the profile {wanted[:12]}, which is not the one fitted here; fit on the "
                "same text (`memwall fit MODEL cachegen`) or save the cache again"
            )
        if not wanted and self.form == "auto":
            raise InputError("damaged chunk: tables of its own, but no form")
        self._profile = profile if wanted else None

    def _read_sections(self, fields: Fields, rest: np.ndarray) -> None:
        planes = self.shape.planes
        num_scales, num_far = fields.items("scales", planes), fields.items("far", planes)
        counts = [*num_scales, *num_far]
        cap = self.num_tokens * self.shape.channels
        if len(counts) != 2 * planes or not all(type(n) is int and 0 <= n <= cap for n in counts):
            raise InputError("damaged chunk: counts of scales and far bins that cannot be")
        lengths = [fields.integer("tables", 0, 2**40), *(2 * n for n in counts), fields.integer("sizes", 0, 2**40)]
        if sum(lengths) > len(rest):
            raise InputError("damaged chunk: it is shorter than its header says")
        parts = np.split(rest, np.cumsum(lengths))
        tables, scales, far, sizes, streams = (
            parts[0],
            parts[1 : 1 + planes],
            parts[1 + planes : -2],
            parts[-2],
            parts[-1],
        )
        self._scales = [part.tobytes() for part in scales]
        self._far = [part.tobytes() for part in far]
        per_plane = range_coder.num_streams((1, self.num_tokens, self.shape.channels), CUT_TOKENS)
        self._sizes = unpack_sizes(sizes, planes * per_plane).reshape(planes, per_plane)
        self._ends = np.concatenate([[0], np.cumsum(self._sizes.sum(axis=1, dtype=np.int64))])
        if self._ends[-1] != len(streams):
            raise InputError(f"damaged chunk: {len(streams)} bytes of streams instead of {self._ends[-1]}")
        self._streams = streams
        own = planes * OwnTables.length(self.shape.channels, self.form)
        self._own = profiles.inflate(tables.tobytes(), own) if self._profile is None else b""

    def plane(self, plane: int) -> np.ndarray:
        """Rows [T, C] float32 of a plane as the quantizer rounded them; keys not rotated."""
        coder = self._coder(plane)
        streams = self._streams[self._ends[plane] : self._ends[plane + 1]]
        out = np.empty((1, self.num_tokens, self.shape.channels), np.uint8)
        symbols = range_coder.decode(streams, self._sizes[plane], out=out, **_streams(coder))[0]
        scales, far = np.frombuffer(self._scales[plane], np.float16), np.frombuffer(self._far[plane], np.int16)
        return coder.rows(symbols, scales, far)

    def _coder(self, plane: int) -> PlaneCoder:
        layers = self.shape.num_layers
        if self._profile is not None:
            return profiles.plane_coder(self._profile, plane, self.form, self.level, layers)
        one = OwnTables.length(self.shape.channels, self.form)
        piece = self._own[plane * one : (plane + 1) * one]
        return OwnTables.unpack(piece, self.shape.channels, self.form, self.level, plane, layers)

    def append_to(self, cache: KVCache, config: ModelConfig, most_tokens: int | None = None) -> int:
        """Decodes straight into a cache, behind what it holds, and turns the keys to their places there.

        Takes at most `most_tokens`; gives how many. BudgetExceeded when the arena has no room.
        """
        taken = self.num_tokens if most_tokens is None else min(most_tokens, self.num_tokens)
        positions = np.arange(cache.length, cache.length + taken)
        turns = positions + (cache.next_position - cache.length)
        form = (taken, config.num_kv_heads, config.head_dim)
        for layer in range(self.shape.num_layers):
            keys, values = self.plane(2 * layer)[:taken], self.plane(2 * layer + 1)[:taken]
            profiles.turn(config, keys, turns)
            cache.append(layer, keys.reshape(form), values.reshape(form), positions)
            cache.settle(layer)
        return taken


def scratch_bytes(shape: Shape, chunk_tokens: int) -> int:
    """Bytes that decoding a chunk holds besides the chunk and the cache."""
    return SCRATCH_FLOATS * 4 * chunk_tokens * shape.channels


def cache_planes(cache: KVCache, config: ModelConfig, begin: int, end: int) -> Callable[[int], np.ndarray]:
    """Rows of a cache's tokens as `encode_chunk` takes them; the keys are turned back from their places."""
    turns = np.arange(begin, end) + (cache.next_position - cache.length)
    held: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def plane(index: int) -> np.ndarray:
        layer = index // 2
        if layer not in held:
            held.clear()
            k, v = (x.reshape(end - begin, -1) for x in cache.rows(layer, begin, end))
            profiles.turn(config, k, turns, back=True)
            held[layer] = k, v
        return held[layer][index % 2]

    return plane

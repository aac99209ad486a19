"""What a policy string `instinfer(...)` asks for, and what that takes, on which tier, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from memwall.errors import InputError
from memwall.hardware.units import KIB, MB
from memwall.kv.base import CacheShape
from memwall.kv.flash import HALF_BYTES, QUERY_ROWS, FlashLayout
from memwall.kv.policy import AMOUNT, Policy
from memwall.kv.sparf import SparseSettings
from memwall.kv.storage_link import StorageConfig
from memwall.memory.arena import allocated_bytes

LINK, STAGING, PROCESS, FLASH = "kv/link", "kv/staging", "kv/storage process", "kv/flash"
DEFAULTS: Mapping[str, float] = {
    AMOUNT: 0.125, "r": 0, "k": 0, "least": 64, "mean": 1, "group": 16, "channels": 4, "drives": 1, "direct": 1,
    "chunk_kib": 4096, "block_kib": 1024, "link_mb": 0.0, "flash_mb": 0.0, "threads": 0,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageSettings:
    """layout: of one process. sparse: settings of `SparseSettings`, None to read everything. Rates: 0 for as fast as it
    goes; with one the link, or the flash behind it, is an emulated one.
    """

    layout: FlashLayout
    drives: int
    sparse: dict[str, Any] | None
    direct: bool
    link_bytes_per_s: float
    flash_bytes_per_s: float
    threads: int
    windows: Sequence[int | None]
    scale: float

    def chosen(self, num_tokens: int) -> int:
        """Tokens that a step attends to."""
        return SparseSettings(**self.sparse).count(num_tokens) if self.sparse is not None else num_tokens

    def heads(self, drive: int) -> tuple[slice, slice]:
        """Query heads and key-value heads of a drive."""
        heads, kv_heads = self.layout.heads, self.layout.kv_heads
        return slice(drive * heads, (drive + 1) * heads), slice(drive * kv_heads, (drive + 1) * kv_heads)

    def config(self) -> StorageConfig:
        """What one process is started with."""
        names = ("layout", "windows", "scale", "sparse", "direct", "link_bytes_per_s", "flash_bytes_per_s", "threads")
        return StorageConfig(**{name: getattr(self, name) for name in names})


def settings_of(policy: Policy, shape: CacheShape, capacity_tokens: int) -> StorageSettings:
    """What a policy string asks for, checked against the model's shape."""
    found = policy.numbers(DEFAULTS)
    whole = {name: int(value) for name, value in found.items() if name not in (AMOUNT, "link_mb", "flash_mb")}
    share, dim, drives = found[AMOUNT], shape.head_dim, whole["drives"]
    group, channels = whole["group"], whole["channels"]
    if not 0 < share <= 1:
        raise InputError(f"policy {policy}: reads {share:g} of the cache; must be above 0 and at most 1 (all of it)")
    if group < 16 or group & (group - 1):
        raise InputError(f"policy {policy}: group={group} tokens a page; must be a power of two from 16 on")
    if not 1 <= channels <= dim or dim % channels:
        raise InputError(f"policy {policy}: channels={channels} a page do not divide the {dim} of a head; try 4")
    if drives < 1 or shape.num_kv_heads % drives:
        raise InputError(f"policy {policy}: {shape.num_kv_heads} heads cannot be split over {drives} drives evenly")
    if min(whole["chunk_kib"], whole["block_kib"]) < 1 or whole["r"] > dim:
        raise InputError(f"policy {policy}: chunk_kib and block_kib must be at least 1, r at most {dim}")
    dense = share == 1 and not whole["r"] and not whole["k"]
    layout = FlashLayout(
        layers=shape.num_layers, heads=shape.num_heads // drives, kv_heads=shape.num_kv_heads // drives, head_dim=dim,
        group=group, channels=channels, capacity=capacity_tokens, block_bytes=whole["block_kib"] * KIB,
        chunk_bytes=whole["chunk_kib"] * KIB, sparse=not dense,
    )  # fmt: skip
    # half of what is read goes to channels of all keys, half to the chosen tokens' keys and values
    sparse = {
        "channels": whole["r"] or max(round(share * dim), 1),
        "tokens": whole["k"] or share / 2,
        "least": whole["least"],
        "mean": bool(whole["mean"]),
    }
    return StorageSettings(
        layout=layout, drives=drives, sparse=None if dense else sparse, direct=bool(whole["direct"]),
        link_bytes_per_s=found["link_mb"] * MB, flash_bytes_per_s=found["flash_mb"] * MB, threads=whole["threads"],
        windows=shape.windows or (None,) * shape.num_layers, scale=shape.logit_scale,
    )  # fmt: skip


def held_bytes(settings: StorageSettings, shape: CacheShape, num_tokens: int, prefill_tokens: int) -> dict[str, int]:
    """Bytes per ledger owner with so many tokens, and while a prompt of `prefill_tokens` is shipped."""
    layout = settings.layout
    found = {
        LINK: sum(allocated_bytes(int(np.prod(s)) * np.dtype(d).itemsize) for s, d in buffer_shapes(shape)),
        PROCESS: settings.drives * (layout.fixed_bytes() + layout.sequence_bytes(num_tokens)),
        FLASH: settings.drives * layout.flash_bytes(num_tokens),
    }
    if prefill_tokens > 1:
        found[STAGING] = allocated_bytes(int(np.prod(staging_shape(shape, prefill_tokens))) * HALF_BYTES)
    return found


def step_bytes(settings: StorageSettings, num_tokens: int) -> int:
    """Bytes of pages, and of rows that wait for one, that a decode step reads."""
    layout, total = settings.layout, 0
    groups, spans = num_tokens // layout.group, num_tokens // layout.span
    row = layout.kv_heads * layout.head_dim * HALF_BYTES
    for window in settings.windows:
        if settings.sparse is None or window is not None:
            total += 2 * row * min(num_tokens, window or num_tokens)
            continue
        chosen = settings.chosen(num_tokens)
        pages = 2 * min(groups, chosen) + spans * min(layout.channel_pages, int(settings.sparse["channels"]))
        waiting = num_tokens - spans * layout.span + num_tokens - groups * layout.group
        total += pages * layout.kv_heads * layout.page_bytes + waiting * row
    return settings.drives * total


def buffer_shapes(shape: CacheShape) -> list[tuple[tuple[int, ...], type]]:
    """Queries that go, outputs that come; for prompts that follow others also stats of both parts, and one part."""
    numbers = QUERY_ROWS * shape.num_heads * shape.head_dim
    return [
        ((numbers,), np.float16),
        ((numbers,), np.float16),
        ((2, QUERY_ROWS, shape.num_heads, 2), np.float32),
        ((QUERY_ROWS, shape.num_heads, shape.head_dim), np.float32),
    ]


def staging_shape(shape: CacheShape, num_tokens: int) -> tuple[int, ...]:
    """A prompt's keys and values of the layer on its way, and of the next."""
    return min(shape.num_layers, 2), 2, num_tokens, shape.num_kv_heads, shape.head_dim

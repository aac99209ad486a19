"""`--chunks`, `--chunk-store`, `--chunk-top` and `--chunk-policy`: what they are called and how they go together."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from memwall.errors import InputError

Chunks = Annotated[
    list[Path] | None,
    typer.Option(
        "--chunks",
        help="A text file, or a folder of them, that PROMPT asks about; may be given several times. Each file is a "
        "chunk, whose keys and values --chunk-store keeps.",
        metavar="PATH",
    ),
]
ChunkStoreFolder = Annotated[
    Path | None,
    typer.Option(
        "--chunk-store",
        help="Folder that keeps chunks from run to run; --budget disk=... bounds it, disk_rate=... makes it slow "
        "(emulated).",
        metavar="DIR",
    ),
]
ChunkTop = Annotated[
    int | None,
    typer.Option(
        "--chunk-top", help="Only the N chunks that best meet the question's words, best first.", metavar="N", min=1
    ),
]
ChunkPolicy = Annotated[
    str,
    typer.Option(
        "--chunk-policy",
        help="How chunks are reused: cache-craft, or with settings, such as "
        "cache-craft(alpha=1.0,variants=5,chunks=100,ram_mb=32).",
        metavar="POLICY",
    ),
]
DEFAULT_POLICY = "cache-craft"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkOptions:
    """The options above."""

    paths: list[Path] = field(default_factory=list)
    store: Path | None = None
    top: int | None = None
    policy: str = DEFAULT_POLICY

    @property
    def given(self) -> bool:
        """Whether this run is made of chunks; InputError for options that go without them."""
        if self.paths:
            if self.store is None:
                raise InputError("--chunks keeps what it computes: name a folder for it with --chunk-store DIR")
            return True
        for name, value in (("--chunk-store", self.store), ("--chunk-top", self.top)):
            if value is not None:
                raise InputError(f"{name} {value}: works on texts given with --chunks PATH")
        if self.policy != DEFAULT_POLICY:
            raise InputError(f"--chunk-policy {self.policy}: works on texts given with --chunks PATH")
        return False

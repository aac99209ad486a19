"""The table of published systems: what each claims, where it lives, and how far it has come.

The facts stand in `systems.toml`. The state is worked out, never written down: a system is `missing` while its room
holds no file named after it, `partial` once it does, and `works` when its evidence is there too and the table marks the
mechanism as complete. Nothing here imports a room, so that listing the systems costs no more than reading one file.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from memwall.errors import InputError

FAMILIES = ("codec", "cache policy", "placement", "scheduler", "learner", "cost model")
STATES = ("works", "partial", "missing")
# fmt: off
ROOMS = (
    "hardware", "formats", "kernels", "memory", "models", "compress", "kv", "engine", "serve", "train", "cluster",
    "retrieve", "recall", "graph", "vision", "recommend", "simulate", "plan", "studies", "cli",
)
# fmt: on
"""Folders of the package, in the order of who may import whom: a room imports only rooms before it."""

_PACKAGE = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """One published system. `title`, `year` and `source` name its paper; `claims` say what its evidence (will) show."""

    slug: str
    name: str
    family: str
    room: str
    title: str
    year: int
    source: str
    claims: tuple[str, ...]
    complete: bool = False

    @property
    def file_stem(self) -> str:
        """The slug as the name of a Python file."""
        return self.slug.replace("-", "_")

    @property
    def module(self) -> str | None:
        """Importable name of the technique's file, or None while there is none."""
        room = _PACKAGE / self.room
        if (room / f"{self.file_stem}.py").is_file() or (room / self.file_stem / "__init__.py").is_file():
            return f"memwall.{self.room}.{self.file_stem}"
        return None

    @property
    def evidence_path(self) -> Path | None:
        """The file of its experiment, or None while there is none."""
        return next((path for path in _evidence_places(f"{self.file_stem}.py") if path.is_file()), None)

    @property
    def state(self) -> str:
        if self.module is None:
            return "missing"
        return "works" if self.complete and self.evidence_path is not None else "partial"

    def to_json(self) -> dict[str, Any]:
        return {
            "slug": self.slug,
            "name": self.name,
            "family": self.family,
            "state": self.state,
            "module": self.module,
            "claims": list(self.claims),
            "title": self.title,
            "year": self.year,
            "source": self.source,
        }


def _evidence_places(name: str) -> tuple[Path, ...]:
    """Installed, the experiments travel inside the package; in a source checkout they lie beside it."""
    return (_PACKAGE / "_evidence" / name, _PACKAGE.parents[1] / "evidence" / name)


def wide_heads() -> Path:
    """The folder of the model with heads of 128 channels that experiments judge caches on; InputError without one."""
    places = _evidence_places("models/wide-heads")
    for folder in places:
        if (folder / "model.safetensors").is_file():
            return folder
    raise InputError(f"{places[-1]} holds no model; get it with the source, or grow it: scripts/grow_wide_heads.py")


@cache
def all_systems() -> tuple[System, ...]:
    """Every system of the table, ordered by slug."""
    with (_PACKAGE / "systems.toml").open("rb") as file:
        table = tomllib.load(file)
    return tuple(
        System(slug=slug, **{**facts, "claims": tuple(facts["claims"])}) for slug, facts in sorted(table.items())
    )


def find_system(slug: str) -> System:
    """The system of that slug; an unknown one is an error that names the nearest."""
    for system in all_systems():
        if system.slug == slug:
            return system
    # imported here: only a mistyped slug needs it
    from difflib import get_close_matches

    nearest = get_close_matches(slug, [system.slug for system in all_systems()], n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(nearest)}? " if nearest else ""
    raise InputError(f"no system is called {slug!r}: {hint}`memwall systems` lists all {len(all_systems())}")


def select_systems(*, family: str | None = None, state: str | None = None) -> tuple[System, ...]:
    """The systems of one family and one state; None stands for all."""
    if family is not None and family not in FAMILIES:
        raise InputError(f"unknown family {family!r}: it is one of {', '.join(FAMILIES)}")
    if state is not None and state not in STATES:
        raise InputError(f"unknown state {state!r}: it is one of {', '.join(STATES)}")
    return tuple(
        system
        for system in all_systems()
        if family in (None, system.family) and (state is None or state == system.state)
    )

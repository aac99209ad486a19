"""Picks the settings of a tile program by measuring every declared one, and remembers what was best.

A choice is kept under the user's cache folder by program, shape, type, instruction set and compiler; a damaged file
counts as empty. Candidates that do not divide the shape are left out; if none is left, the error says so.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from memwall.errors import InputError
from memwall.hardware.system import cache_directory, write_whole
from memwall.kernels.tile_program import TileProgram
from memwall.kernels.tilus import CPU_TILES, NUM_STAGES, SPLITS, WARP_REPEATS, WARP_SPATIALS, Config

FILE = "tile_tuning.json"
MAX_FILE_BYTES = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """settings: the best; seconds: median of each candidate measured, by its text; empty where it was remembered."""

    settings: Config
    seconds: dict[str, float]


def gpu_candidates() -> list[Config]:
    """The lists of the authors' example, all combinations."""
    return [
        Config(warp_spatial=spatial, warp_repeat=repeat, num_stages=stages, split_k=split)
        for spatial, repeat, stages, split in product(WARP_SPATIALS, WARP_REPEATS, NUM_STAGES, SPLITS)
    ]


def cpu_candidates() -> list[Config]:
    """How many weight tiles a block of the CPU's product holds side by side."""
    return [Config(cpu_tiles=tiles) for tiles in CPU_TILES]


def valid(candidates: Iterable[Config], make: Callable[[Config], TileProgram]) -> list[tuple[Config, TileProgram]]:
    """Those whose program can be built, with it."""
    found, last = [], None
    for settings in candidates:
        try:
            found.append((settings, make(settings)))
        except InputError as error:
            last = error
    if not found:
        raise InputError(f"none of the declared settings fits: {last}") from last
    return found


def tune(
    key: str,
    candidates: Sequence[Config],
    make: Callable[[Config], TileProgram],
    runner: Callable[[TileProgram], Callable[[], Any]],
    *,
    rounds: int = 7,
    remember: bool = True,
) -> Choice:
    """The fastest of the candidates: `runner` compiles a program, what it returns is run `rounds` times in turn.

    key: what the choice depends on besides the candidates.
    """
    told = f"{key}|{';'.join(map(_text, candidates))}"
    if remember and (known := _read().get(told)) is not None:
        matching = [settings for settings in candidates if _text(settings) == known]
        if matching:
            return Choice(settings=matching[0], seconds={})
    runs = {settings: runner(program) for settings, program in valid(candidates, make)}
    seconds: dict[Config, list[float]] = {settings: [] for settings in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for settings, run in runs.items():
            began = time.perf_counter()
            run()
            seconds[settings].append(time.perf_counter() - began)
    medians = {settings: statistics.median(each) for settings, each in seconds.items()}
    best = min(medians, key=lambda settings: medians[settings])
    if remember:
        _write({**_read(), told: _text(best)})
    return Choice(settings=best, seconds={_text(settings): each for settings, each in medians.items()})


def _text(settings: Config) -> str:
    return (
        f"warps {settings.warp_spatial} repeat {settings.warp_repeat} stages {settings.num_stages} "
        f"split {settings.split_k} tiles {settings.cpu_tiles}"
    )


def _read() -> dict[str, str]:
    path = cache_directory() / FILE
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            return {}
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return {k: v for k, v in found.items() if isinstance(v, str)} if isinstance(found, dict) else {}


def _write(entries: Mapping[str, str]) -> None:
    """Whole or not at all; a cache that cannot be written is measured again next time."""
    folder = cache_directory()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / FILE, json.dumps(entries, indent=1, sort_keys=True))

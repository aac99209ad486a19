"""Tuning measures what fits, picks the fastest, and remembers it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from memwall.errors import InputError
from memwall.kernels import tile_tune, tilus
from memwall.kernels.tile_program import TileProgram
from memwall.kernels.tilus import Config


def make(settings: Config) -> TileProgram:
    return tilus.matvec_program("i4", 1, 128, 128, config=settings)


def test_the_fastest_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built: list[int] = []
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def runner(program: TileProgram) -> Callable[[], None]:
        built.append(program.grid[0])

        def run() -> None:
            now[0] += 0.001 if program.grid[0] == 1 else 0.02

        return run

    candidates = tile_tune.cpu_candidates()
    choice = tile_tune.tune("key", candidates, make, runner, rounds=3)
    assert choice.settings.cpu_tiles == 8
    assert built == [2, 1]  # 16 tiles are wider than the matrix
    assert len(choice.seconds) == 2
    again = tile_tune.tune("key", candidates, make, runner)
    assert (again.settings, again.seconds, built) == (choice.settings, {}, [2, 1])
    tile_tune.tune("other", candidates, make, runner, rounds=1)
    assert built == [2, 1, 2, 1]
    (tmp_path / "memwall" / tile_tune.FILE).write_text("[damaged")
    assert tile_tune.tune("key", candidates, make, runner, rounds=1).seconds


def test_the_declared_lists_are_those_of_the_example() -> None:
    candidates = tile_tune.gpu_candidates()
    assert len(candidates) == len(set(candidates)) == 3 * 5 * 2 * 3
    built = tile_tune.valid(candidates, lambda c: tilus.matmul_program("i4", 16, 4096, 4096, config=c))
    assert len(built) == 90


def test_nothing_fits() -> None:
    with pytest.raises(InputError, match="none of the declared settings fits"):
        tile_tune.valid(tile_tune.cpu_candidates(), lambda c: tilus.matvec_program("i4", 1, 100, 128, config=c))

"""Adapters in two worker processes over one memory: the tokens of one process, from pages that both see."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memwall.engine.apart import ApartEngine
from memwall.engine.phase_loading import PhaseSettings
from memwall.engine.sampling import Sampling
from memwall.engine.sequence import Request
from memwall.engine.serving import LoraSettings, Serving, ServingSettings, load_engine
from memwall.engine.told_adapters import MOST_ROWS, ToldRows
from memwall.engine.workers import ForkedWorkers
from memwall.errors import DoesNotFit, InputError
from memwall.models import DEMO_DIRECTORY, ModelConfig
from tests.engine.phased_loads import HALVES
from tests.models.loras import make_lora
from tests.models.test_dora import make_dora

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
CONFIG = ModelConfig.from_directory(DEMO_DIRECTORY)
NAMES = ("r8", None, "r24", "r8", None, "r24")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("adapters")
    for rank in (8, 24):
        make_lora(where / f"r{rank}", CONFIG, rank=rank, seed=rank, strength=1.0)
    return where


def start(folder: Path, phases: PhaseSettings | None, room_bytes: int = 1 << 20, **told: Any) -> Serving:
    chosen = {"weights": "int8", "context_tokens": 200, "token_budget": 64, "max_sequences": 4, "threads": 2, **told}
    lora = LoraSettings(room_bytes=room_bytes)
    held = load_engine(DEMO_DIRECTORY, ServingSettings(phases=phases, lora=lora, **chosen))
    for path in sorted(folder.iterdir()):
        held.add_adapter(path.name, held.read_adapter(path))
    return held


def texts(held: Serving) -> list[list[int]]:
    made = [
        held.engine.submit(
            Request(
                prompt=tuple(range(9, 15 + 11 * n)), adapter=name,
                sampling=Sampling(max_new_tokens=10 + n, ignore_eos=True),
            )
        )
        for n, name in enumerate(NAMES)
    ]  # fmt: skip
    while held.engine.busy:
        held.govern()
        held.engine.step()
    assert all(one.finish == "length" for one in made)
    return [list(one.made) for one in made]


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    alone = start(folder, None)
    found = texts(alone)
    alone.release()
    return found


DORA = [PhaseSettings(shares=HALVES), PhaseSettings.apart(2)]


@pytest.mark.parametrize("phases", DORA, ids=["one memory", "two"])
def test_dora_goes_over_once_to_each_worker(phases: PhaseSettings, tmp_path: Path) -> None:
    names = ("r8", "r24")
    for seed, name in enumerate(names):
        make_dora(tmp_path / name, seed=seed, targets=("q_proj", "down_proj"), strength=1.0)
    alone, held = start(tmp_path, None), start(tmp_path, phases)
    expected = texts(alone)
    assert len({tuple(made[:8]) for made in expected}) > 3
    assert texts(held) == expected
    row = next(row.nbytes for row in held.ledger.rows() if row.owner == "adapters/known")
    assert row == next(row.nbytes for row in alone.ledger.rows() if row.owner == "adapters/known")
    workers = held.workers
    assert isinstance(workers, ForkedWorkers)
    for phase in ("prefill", "decode"):
        os.kill(workers._process[phase].pid, signal.SIGKILL)
    assert texts(held) == expected  # who comes new is told anew
    held.engine.adapters.remove("r8")  # type: ignore[union-attr]
    other = make_dora(tmp_path / "other", seed=9, targets=("q_proj",), strength=2.0)
    held.add_adapter("r8", held.read_adapter(other))
    assert [a == b for a, b in zip(texts(held), expected)] == [name != "r8" for name in NAMES]
    for each in (alone, held):
        each.release()


def test_rows_are_told_once_and_dropped_when_there_are_many() -> None:
    class Known:
        def rows(self, key: str) -> dict[str, np.ndarray]:
            return {"q_proj": np.full((1, 2, 3), float(key), np.float32)}

    books, known = ToldRows(), Known()
    first = books.message({"1": {"rows": "one"}, "2": {}}, known)  # type: ignore[arg-type]
    assert list(first["new"]) == ["one"]
    assert books.message({"1": {"rows": "one"}}, known) == {"new": {}, "drop": []}  # type: ignore[arg-type]
    many = {str(number): {"rows": f"more {number}"} for number in range(MOST_ROWS)}
    assert books.message(many, known)["drop"] == ["one"]  # type: ignore[arg-type]
    assert list(books.message({"1": {"rows": "one"}}, known)["new"]) == ["one"]  # type: ignore[arg-type]


@pytest.mark.parametrize("fresh", [True, False])
def test_tokens_are_those_of_one_process(folder: Path, expected: list[list[int]], fresh: bool) -> None:
    held = start(folder, PhaseSettings(shares=HALVES, fresh=fresh))
    assert texts(held) == expected
    assert len({tuple(made[:8]) for made in expected}) > 3  # adapters change what is said
    adapters = held.adapters
    assert adapters is not None
    # one copy, in pages that the ledger counts once
    rows = {row.owner: row.nbytes for row in held.ledger.rows()}
    assert rows["adapters/pages"] == adapters.used_pages * held.pool.page_bytes > 0
    held.release()


def test_few_pages_and_an_adapter_that_comes_and_goes(folder: Path, expected: list[list[int]], tmp_path: Path) -> None:
    held = start(folder, PhaseSettings(shares=HALVES), swap_bytes=1 << 24)
    held.engine.wanted_pages = 30
    assert texts(held) == expected
    held.engine.adapters.remove("r8")  # type: ignore[union-attr]
    held.add_adapter("r8", held.read_adapter(make_lora(tmp_path / "other", CONFIG, rank=16, seed=99, strength=2.0)))
    again = texts(held)
    assert [a == b for a, b in zip(again, expected)] == [name != "r8" for name in NAMES]
    held.release()


def both_sides(held: Serving) -> ApartEngine:
    assert isinstance(held.engine, ApartEngine)
    return held.engine


def test_two_memories_hold_an_adapter_each(folder: Path, expected: list[list[int]]) -> None:
    held = start(folder, PhaseSettings.apart(2))
    engine, workers = both_sides(held), held.workers
    assert isinstance(workers, ForkedWorkers)
    assert texts(held) == expected
    mine, front = engine.adapters, engine.front.adapters
    assert mine is not None
    assert front is not None
    rows = {row.owner: row.nbytes for row in held.ledger.rows()}
    assert rows["adapters/pages"] == mine.used_pages * held.pool.page_bytes > 0
    assert rows["adapters/prefill"] == front.used_pages * held.pool.page_bytes > 0
    for each in (mine, front):  # nobody uses them any more
        assert each.used_pages == each.idle_pages
        assert all(one.requests == one.users == 0 for one in each._known.values())
    for phase in ("prefill", "decode"):
        os.kill(workers._process[phase].pid, signal.SIGKILL)
    assert texts(held) == expected
    assert workers.lost == 2
    held.release()


def test_two_memories_of_few_pages_and_an_adapter_that_comes_and_goes(
    folder: Path, expected: list[list[int]], tmp_path: Path
) -> None:
    held = start(folder, PhaseSettings.apart(2), swap_bytes=1 << 24)
    engine = both_sides(held)
    held.govern = lambda: None  # type: ignore[method-assign]
    engine.wanted_pages = 24
    assert texts(held) == expected
    assert engine.pages.pool.peak_pages <= 24 + held.pool.limit_pages
    busy = engine.submit(Request(prompt=(9, 10, 11), adapter="r8", sampling=Sampling(max_new_tokens=5)))
    held.adapters.remove("r8")  # type: ignore[union-attr]
    other = make_lora(tmp_path / "other", CONFIG, rank=16, seed=99, strength=2.0)
    key = held.add_adapter("r8", held.read_adapter(other))
    assert key != busy.request.adapter  # it goes on with what it began with
    while engine.busy:
        engine.step()
    assert busy.finish in ("length", "stop")
    for each in (engine.adapters, engine.front.adapters):
        assert each is not None
        assert sorted(each._known) == sorted(["r24", key])
    held.release()


def test_an_adapter_that_cannot_be_read_on_the_other_side_ends_its_request(folder: Path, tmp_path: Path) -> None:
    where = tmp_path / "adapters"
    shutil.copytree(folder, where)
    held = start(where, PhaseSettings.apart(2))
    engine = both_sides(held)
    assert engine.adapters is not None

    def unreadable(key: str) -> None:
        raise InputError(f"{key} is gone")

    engine.adapters.acquire = unreadable  # type: ignore[method-assign]
    asked = [
        engine.submit(Request(prompt=(9, 10, 11), adapter=name, sampling=Sampling(max_new_tokens=5, ignore_eos=True)))
        for name in ("r8", None)
    ]
    events = []
    while engine.busy:
        events += engine.step()
    assert [one.finish for one in asked] == ["error", "length"]
    assert sum(event.finish is not None for event in events) == 2
    assert engine.front.pages.pool.used_pages == engine.front.pages.idle_pages + engine.front.adapters.used_pages  # type: ignore[union-attr]
    held.release()


def test_what_two_workers_cannot_hold_is_refused(folder: Path, tmp_path: Path) -> None:
    held = start(folder, PhaseSettings.apart(2))
    large = make_lora(tmp_path / "large", CONFIG, rank=64, seed=1)
    with pytest.raises(DoesNotFit, match="the adapter 'large' takes"):
        held.add_adapter("large", held.read_adapter(large))
    assert held.adapters.names == sorted(path.name for path in folder.iterdir())  # type: ignore[union-attr]
    held.release()

"""Adapters in two worker processes over one memory: the tokens of one process, from pages that both see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from memwall.engine.phase_loading import PhaseSettings
from memwall.engine.sampling import Sampling
from memwall.engine.sequence import Request
from memwall.engine.serving import LoraSettings, Serving, ServingSettings, load_engine
from memwall.models import DEMO_DIRECTORY, ModelConfig
from tests.engine.phased_loads import HALVES
from tests.models.loras import make_lora

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
CONFIG = ModelConfig.from_directory(DEMO_DIRECTORY)
NAMES = ("r8", None, "r24", "r8", None, "r24")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("adapters")
    for rank in (8, 24):
        make_lora(where / f"r{rank}", CONFIG, rank=rank, seed=rank, strength=1.0)
    return where


def start(folder: Path, phases: PhaseSettings | None, **told: Any) -> Serving:
    chosen = {"weights": "int8", "context_tokens": 200, "token_budget": 64, "max_sequences": 4, "threads": 2, **told}
    held = load_engine(DEMO_DIRECTORY, ServingSettings(phases=phases, lora=LoraSettings(), **chosen))
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

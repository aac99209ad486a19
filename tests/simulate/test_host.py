"""Profiles of this machine's engine: whole tables, read again, that time its own steps; and an idle engine after."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from memwall.engine import Sampling
from memwall.engine.fcfs import FirstComeFirstServed
from memwall.engine.sequence import Request
from memwall.engine.serving import Serving, ServingSettings, load_engine
from memwall.errors import InputError
from memwall.hardware import load_machine
from memwall.models import DEMO_DIRECTORY
from memwall.simulate.apex import Case, simulate
from memwall.simulate.base import Device
from memwall.simulate.cluster import Cluster
from memwall.simulate.host import profile_engine
from memwall.simulate.iterations import Batching
from memwall.simulate.plans import enumerate_plans
from memwall.simulate.serving_model import ServedModel
from memwall.simulate.tables import read_tables
from tests.simulate.cases import at_once

SETTINGS = ServingSettings(
    weights="int8", context_tokens=256, token_budget=64, max_sequences=4, keep_prefixes=False, swap_bytes=0
)


@pytest.fixture
def serving() -> Iterator[Serving]:
    loaded = load_engine(DEMO_DIRECTORY, SETTINGS, scheduler=FirstComeFirstServed())
    yield loaded
    loaded.release()


def test_a_profile_tells_every_operation_of_a_step(serving: Serving, tmp_path: Path) -> None:
    profile = profile_engine(serving, rounds=2)
    assert not serving.engine.busy
    assert serving.engine.pages.pool.used_pages == 0
    paths = profile.write(tmp_path / "tables")
    assert sorted(path.name for path in paths) == ["attention.csv", "gemm.csv", "pass.csv"]
    assert profile.formats.weights.startswith("int8")
    device = Device.of(load_machine("cloud-2core"))
    case = Case(
        model=ServedModel.of(serving.config, "demo", profile.formats),
        cluster=Cluster(device=device),
        loads=at_once(6, 80, 6),
        tables=read_tables(tmp_path / "tables", device),
        batching=Batching(limits=SETTINGS.limits),
        kv_tokens=1024,
    )
    result = simulate(case, next(enumerate_plans(case.model, 1)))
    assert result is not None
    assert result.sources == {"measured": pytest.approx(1.0)}
    assert {"qkv", "out", "up", "down", "head", "sample", "decode attention", "prompt attention"} <= {
        name for name, seconds in result.seconds_by_operator.items() if seconds > 0
    }


def test_a_busy_engine_is_not_profiled(serving: Serving) -> None:
    serving.engine.submit(Request(prompt=(1, 2, 3), sampling=Sampling(max_new_tokens=2)))
    with pytest.raises(InputError, match="before any come"):
        profile_engine(serving)
    while serving.engine.busy:
        serving.govern()
        serving.engine.step()

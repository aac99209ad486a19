"""Plans of models that keep a state: predicted bytes are those of the ledger, and do not grow with the context."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from memwall import kernels
from memwall.compress.model import compress_model
from memwall.engine import Settings, load
from memwall.errors import InputError
from memwall.plan import Plan, make_plan
from tests.compress.test_quamba2 import OPTIONS, TINY, make_model
from tests.models.ssm_models import MAMBA, MAMBA2


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    made = {"mamba": make_model(folder / "mamba", MAMBA), "mamba2": make_model(folder / "mamba2", MAMBA2)}
    for name in ("mamba", "mamba2"):
        out = made[f"{name} w4a8"] = folder / f"{name} w4a8"
        compress_model(made[name], out, bits="w4a8", method="quamba2", options=OPTIONS, tuning=TINY)
    return made


def planned(folder: Path, **goal: object) -> Plan:
    return make_plan(folder, measure=False, profile=False, runtime_bytes=1 << 26, **goal)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["mamba", "mamba2", "mamba w4a8", "mamba2 w4a8"])
def test_predicted_bytes_are_those_of_the_ledger(folders: dict[str, Path], name: str) -> None:
    plan = planned(folders[name], context=600, threads=kernels.num_threads())
    choice = plan.choice
    assert choice.kv == "state"
    settings = Settings(
        weights=choice.weights, kv=choice.kv, context_tokens=choice.context, segment_tokens=choice.segment_tokens
    )
    session = load(folders[name], settings)
    measured = {row.owner: row.nbytes for row in session.ledger.rows() if row.owner != "runtime"}
    session.release()
    predicted = {row.owner: row.nbytes for row in plan.rows if row.owner not in ("runtime", "headroom", "loading")}
    assert predicted.keys() == measured.keys()
    for owner, nbytes in predicted.items():  # plans round weights up to whole pages
        assert nbytes == pytest.approx(measured[owner], abs=4096), owner


def test_the_context_costs_nothing(folders: dict[str, Path]) -> None:
    short, long = (
        planned(folders["mamba2"], weights="int4", kv="state", context=context) for context in (600, 1 << 20)
    )
    assert short.peak_bytes == long.peak_bytes
    assert replace(short.choice, context=1) == replace(long.choice, context=1)


def test_other_caches_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="--kv state"):
        planned(folders["mamba2"], kv="kivi(2bit)", context=100)

"""Methods meet budgets of real bytes, and say when they cannot."""

from __future__ import annotations

import numpy as np
import pytest

from memwall import kv
from memwall.errors import InputError
from memwall.kv import fitted
from memwall.kv.base import CacheShape
from memwall.studies.kv_methods import (
    AS_THEY_ARE,
    BUDGETED,
    BUDGETS,
    FLOATS,
    METHODS,
    QUICK,
    TOO_LARGE,
    Ground,
    cells,
    parse_budgets,
    parse_methods,
)

SHAPE = CacheShape(num_layers=8, num_heads=8, num_kv_heads=4, head_dim=32, hidden_size=256)
GROUND = Ground(shape=SHAPE, fingerprint="nobody's", model="demo", prompt_tokens=900, context_tokens=1024)


def test_cells_keep_their_budget_and_are_the_mildest_that_do() -> None:
    plain = GROUND.held_bytes("float16")
    found = cells(list(METHODS), BUDGETS, GROUND)
    for cell in found:
        if cell.budget is None or cell.skipped:
            continue
        nbytes = GROUND.held_bytes(cell.policy)
        assert nbytes <= cell.budget * plain
        milder = [GROUND.held_bytes(policy) for policy in METHODS[cell.method]([])]
        assert not [other for other in milder if nbytes < other <= cell.budget * plain]
    measured = {(cell.method, cell.budget) for cell in found if cell.policy}
    assert ("snapkv+think+kivi", 0.125) in measured
    assert ("kivi", 0.25) in measured
    assert ("float16", None) in measured
    policies = [cell.policy for cell in found if cell.policy]
    assert len(policies) == len(set(policies)), "nothing is measured twice"


def test_what_cannot_be_had_is_listed_with_the_reason() -> None:
    skipped = {
        (cell.method, cell.budget): cell.skipped for cell in cells(list(METHODS), BUDGETS, GROUND) if cell.skipped
    }
    assert "memwall fit demo 'locret'" in skipped["locret", None]
    assert "memwall fit demo 'cskv" in skipped["cskv", None]
    assert "its least is 0." in skipped["think", 0.25]  # keys are half of the bytes
    windows = CacheShape(num_layers=8, num_heads=8, num_kv_heads=4, head_dim=32, windows=(128,) * 8)
    sliding = Ground(shape=windows, fingerprint="nobody's", model="demo", prompt_tokens=900, context_tokens=1024)
    assert "sliding windows" in cells(["snapkv"], BUDGETS, sliding)[0].skipped


def test_a_method_too_large_for_every_budget_is_measured_as_its_authors_use_it() -> None:
    def policies(name: str, budgets: tuple[float, ...]) -> list[tuple[str, float | None]]:
        return [(cell.policy, cell.budget) for cell in cells([name], budgets, GROUND) if cell.policy]

    assert policies("think", BUDGETS) == [("think(0.4)", None), ("think(0.6)", None)]
    assert policies("think", (0.9, 0.25)) == [("think(0.3)", 0.9)]
    assert policies("xquant-cl", (0.25,)) == [("xquant(4bit,cl=1)", None)]
    assert policies("bfp", (0.01,)) == []
    assert {name for name in TOO_LARGE if name not in METHODS} == set()


def test_stored_fits_are_used() -> None:
    heads = {"0.w1": np.zeros((2, 2), np.float16)}
    fitted.save("somebody's", "locret heads 1, width auto", heads, "locret")
    fitted.save("somebody's", "cskv k=0.3", heads, "cskv(0.3,init=svd,train=0)")
    ground = Ground(shape=SHAPE, fingerprint="somebody's", model="demo", prompt_tokens=900, context_tokens=1024)
    found = cells(["locret", "cskv"], (0.95,), ground)  # locret holds its heads besides
    assert [kv.parse(cell.policy).name for cell in found] == ["locret", "cskv"]
    assert found[1].policy == "cskv(0.3,init=svd,train=0)"


def test_policies_may_be_written_out() -> None:
    names = parse_methods("kivi, snapkv(budget=0.25)+kivi(bits=2,group=16),kivi,snapkv+think+kivi")
    assert names == ["kivi", "snapkv(budget=0.25)+kivi(bits=2,group=16)", "snapkv+think+kivi"]
    found = cells(names[1:2], BUDGETS, GROUND)
    assert [(cell.policy, cell.budget) for cell in found] == [(names[1], None)]
    assert "fit" in cells(["cskv(0.4)"], BUDGETS, GROUND)[0].skipped
    for bad in ("", "zip", "snapkv+locret"):
        with pytest.raises(InputError):
            parse_methods(bad)
    with pytest.raises(InputError, match="above 0"):
        cells(["snapkv(0)"], BUDGETS, GROUND)


def test_budgets_are_shares() -> None:
    assert parse_budgets("0.25, 0.5,0.5") == [0.5, 0.25]
    for bad in ("", "0", "1.5", "half", "-0.5"):
        with pytest.raises(InputError, match="shares"):
            parse_budgets(bad)


def test_every_policy_of_the_table_is_in_the_study() -> None:
    settings = [policy for method in METHODS.values() for policy in method(["cskv", "locret"])]
    named = {part.name for policy in settings for part in kv.parse(policy).parts}
    assert named | set(FLOATS) == set(kv.POLICIES)
    assert set(QUICK) <= set(METHODS)
    assert set(BUDGETED) <= set(METHODS)
    assert {"float16", "vattention"} <= set(AS_THEY_ARE)
    assert not set(AS_THEY_ARE) & set(BUDGETED)

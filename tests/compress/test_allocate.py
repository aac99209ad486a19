"""Bit allocation: within the budget, as good as trying everything."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.compress import allocate as module
from memwall.compress.allocate import Candidate, allocate
from memwall.errors import DoesNotFit, InputError

QUICK = settings(max_examples=80, deadline=None, derandomize=True)

TABLES = st.lists(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 1000)), min_size=1, max_size=4), min_size=1, max_size=5
).map(lambda table: [[Candidate(spec="x", nbytes=b, loss=float(e)) for b, e in options] for options in table])


def smallest(table: list[list[Candidate]]) -> int:
    return sum(min(candidate.nbytes for candidate in options) for options in table)


def totals(chosen: tuple[Candidate, ...] | list[Candidate]) -> tuple[int, float]:
    return sum(candidate.nbytes for candidate in chosen), sum(candidate.loss for candidate in chosen)


@QUICK
@given(TABLES, st.integers(0, 100))
def test_as_good_as_trying_everything(table: list[list[Candidate]], spare_bytes: int) -> None:
    budget_bytes = smallest(table) + spare_bytes
    chosen = allocate(table, budget_bytes)
    assert all(candidate in options for candidate, options in zip(chosen, table, strict=True))
    nbytes, loss = totals(chosen)
    assert nbytes <= budget_bytes
    assert loss == min(e for b, e in map(totals, itertools.product(*table)) if b <= budget_bytes)


@QUICK
@given(TABLES, st.integers(0, 100), st.integers(2, 5))
def test_thinning_keeps_the_budget(table: list[list[Candidate]], spare_bytes: int, num_states: int) -> None:
    budget_bytes = smallest(table) + spare_bytes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_STATES", num_states)
        assert totals(allocate(table, budget_bytes))[0] <= budget_bytes


def test_too_small_a_budget_says_what_is_needed() -> None:
    with pytest.raises(DoesNotFit, match="need 7 bytes"):
        allocate([[Candidate(spec="x", nbytes=3, loss=0.0)], [Candidate(spec="y", nbytes=4, loss=0.0)]], 6)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_losses_that_are_no_numbers(loss: float) -> None:
    options = [Candidate(spec="int4", nbytes=10, loss=1.0), Candidate(spec="int8", nbytes=20, loss=loss)]
    with pytest.raises(InputError, match="not a number"):
        allocate([options], 100)

"""Sessions on a virtual clock: against the formulas, and by hand where there are two users."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memwall.errors import DoesNotFit, InputError
from memwall.simulate.context_model import PUBLISHED_MODEL, PUBLISHED_PEAK
from memwall.simulate.context_sessions import Costs, simulate
from memwall.simulate.long_context_peak_analysis import Analysis, Workload


def analysis(context: int, users: int, devices: int = 1, **work: float) -> Analysis:
    workload = Workload(context=context, users=users, **work)
    return Analysis(model=PUBLISHED_MODEL, peak=PUBLISHED_PEAK.times(devices), workload=workload)


def costs(**changes: object) -> Costs:
    plain = Costs(
        places=1, prefill_seconds=10.0, swap_seconds=1.0, step_seconds=lambda _: 0.5, answer=4, rounds=1
    )  # fmt: skip
    return replace(plain, **changes)


def test_one_user_alone() -> None:
    served = simulate(costs(), 1, sessions=8)
    assert served.swaps == 0
    assert served.sessions_per_s == pytest.approx(1 / 12)


def test_two_users_of_one_place() -> None:
    """A document, out for the other's; then both come back in turn: out and in each time."""
    served = simulate(costs(), 2, sessions=400)
    assert served.most_held == 1
    assert served.swaps == pytest.approx(2, rel=0.02)
    assert served.sessions_per_s == pytest.approx(1 / (10 + 2 + 2), rel=0.02)


@pytest.mark.parametrize("users", [1, 5, 17, 18, 19, 30, 60])
def test_the_formula_of_sessions(users: int) -> None:
    one = analysis(4_000, users)
    served = simulate(Costs.of(one), users)
    assert served.sessions_per_s == pytest.approx(one.sessions, rel=0.05)
    assert served.most_held == min(users, 18)
    assert (served.swaps > 0) == (users > 18)


def test_places_shrink_in_steps() -> None:
    held = [simulate(Costs.of(one := analysis(n, 40)), 40, sessions=80).most_held for n in (4_000, 8_000, 17_000)]
    assert held == [analysis(n, 40).users for n in (4_000, 8_000, 17_000)] == [18, 9, 4]
    assert one.users == 4
    with pytest.raises(DoesNotFit, match="no user"):
        Costs.of(analysis(100_000, 1))


@pytest.mark.parametrize(("users", "devices"), [(18, 1), (40, 1), (100, 4)])
def test_in_turn_stays_below_its_bound(users: int, devices: int) -> None:
    one = analysis(4_000, users, devices)
    served = simulate(Costs.of(one), users, in_turn=True, sessions=300)
    assert 0.9 * one.sessions_in_turn < served.sessions_per_s < 1.02 * one.sessions_in_turn


def test_readers_leave_their_place_to_others() -> None:
    one = analysis(4_000, 25, reading_seconds=20.0)
    served = simulate(Costs.of(one), 25, seed=3)
    assert 0 < served.swaps < 2 * one.workload.rounds
    assert served == simulate(Costs.of(one), 25, seed=3)
    idle = analysis(4_000, 10, reading_seconds=20.0)
    quiet = simulate(Costs.of(idle), 10)
    assert quiet.swaps == 0
    assert quiet.sessions_per_s == pytest.approx(idle.sessions, rel=0.05)


@given(places=st.integers(1, 6), users=st.integers(1, 12), rounds=st.integers(1, 4), in_turn=st.booleans(),
       reading=st.sampled_from([0.0, 3.0]))  # fmt: skip
def test_nobody_is_lost(places: int, users: int, rounds: int, *, in_turn: bool, reading: float) -> None:
    given_costs = costs(places=places, rounds=rounds, reading_seconds=reading)
    served = simulate(given_costs, users, sessions=60, in_turn=in_turn)
    assert served.sessions >= 60
    assert served.most_held <= min(places, users)
    assert served.swaps <= 2 * rounds + 1e-9 + 2 * rounds * users / 60  # some are still under way at the end
    if users <= places:
        assert served.swaps == 0
    alone = 1 / (10.0 + rounds * 2.0)
    assert served.sessions_per_s <= min(users, places) * alone * 1.3


def test_bad_input() -> None:
    with pytest.raises(InputError, match="0 users"):
        simulate(costs(), 0)

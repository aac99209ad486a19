"""What semi-PD's verdicts hang on: the race between allocators, disaggregation's own pages, and loads."""

from __future__ import annotations

from types import ModuleType

import pytest

from memwall.cli.evidence import load_experiment
from memwall.engine.phase_device import virtual_engine
from memwall.engine.phase_study import SHAREGPT, Lengths, arrivals, r_squared, serve_all
from memwall.engine.semi_pd import percentile
from memwall.systems import find_system


@pytest.fixture(scope="module")
def semi_pd() -> ModuleType:
    return load_experiment(find_system("semi-pd"))


def test_with_the_lock_no_page_is_given_twice(semi_pd: ModuleType) -> None:
    wrong, whole, _ = semi_pd.race(5000, locked=True)
    assert (wrong, whole) == (0, True)


def test_disaggregation_keeps_each_side_within_its_pages(semi_pd: ModuleType) -> None:
    kind = Lengths(prompt=(300, 330), output=(150, 180))
    made = virtual_engine(
        semi_pd.Disaggregated(120), device=semi_pd.DEVICE, size=semi_pd.LLAMA, shares=semi_pd.HALVES, num_pages=240,
        limits=semi_pd.LIMITS,
    )  # fmt: skip
    scheduler, seen = made.scheduler, []

    def watch(state: object, step: object) -> None:
        there = sum(view.pages for view in state.running if view.id in scheduler.there)  # type: ignore[attr-defined]
        seen.append((there, sum(view.pages for view in state.running) - there))  # type: ignore[attr-defined]

    made.observer = watch
    serve_all(made, arrivals([(kind, 1.0)], 6.0, 30, 1))
    assert made.totals.finished == {"length": 30}
    assert max(there for there, _ in seen) <= 120 + 8  # those that decode may each have taken a page since
    assert max(here for _, here in seen) <= 128
    assert made.pages.pool.used_pages == made.pages.idle_pages


def test_lengths_are_those_of_the_table() -> None:
    load = arrivals([(SHAREGPT, 1.0)], 5.0, 3000, 1)
    prompts = [len(one.request.prompt) for one in load]
    outputs = [one.request.sampling.max_new_tokens for one in load]
    assert sum(prompts) / 3000 == pytest.approx(496, rel=0.06)
    assert percentile(outputs, 50) == pytest.approx(37, rel=0.1)
    assert load[-1].at == pytest.approx(600, rel=0.1)
    assert len({one.request.prompt[:3] for one in load}) == 3000 or min(prompts) < 3
    assert r_squared([(1, 2), (2, 4), (3, 6)]) == pytest.approx(1.0)
    assert r_squared([(1, 2), (1, 3)]) == 0.0

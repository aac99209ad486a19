"""What BurstGPT's verdicts hang on: loads of one mean rate, sessions that share, waiting that counts from arrival."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from memwall.cli.evidence import load_experiment
from memwall.serve.traces import Trace
from memwall.systems import find_system


@pytest.fixture(scope="module")
def experiment() -> ModuleType:
    return load_experiment(find_system("burstgpt"))


@pytest.fixture(scope="module")
def trace(experiment: ModuleType) -> Trace:
    made: Trace = experiment.made_trace(4)
    return made


def test_the_made_trace_has_what_is_measured(experiment: ModuleType, trace: Trace) -> None:
    assert np.all(np.diff(trace.at) >= 0)
    assert experiment.burstgpt.burst_index(trace.at).cv > 1.4
    assert 0 < trace.failed.mean() < 0.05
    assert trace.turn.max() > 0
    assert experiment.burstgpt.rank_correlation(trace.answered().prompt, trace.answered().output) > 0.5


def test_all_loads_have_the_same_mean_rate(experiment: ModuleType, trace: Trace) -> None:
    loads = experiment.loads_of(experiment.served_of(trace, 300))
    rates = {name: len(load) / load.seconds for name, load in loads.items()}
    assert max(rates.values()) < 1.02 * min(rates.values())
    assert experiment.burstgpt.burst_index(loads["Poisson, fixed lengths"].at).cv < 1.2
    assert not experiment.burstgpt.has_sessions(loads["replay"])
    assert experiment.burstgpt.has_sessions(loads["replay with sessions"])
    assert all(not load.failed.any() for load in loads.values())


def test_prompts_of_a_session_begin_alike_and_no_others(experiment: ModuleType, trace: Trace) -> None:
    rows = next(rows for rows in trace.sessions().values() if len(rows) > 1)
    first, second = (experiment.request(trace.answered(), 0), experiment.request(trace.answered(), 1))
    assert first.prompt[0] != second.prompt[0] or trace.session[0] == trace.session[1]
    kept = trace.keep(rows, "rows")
    kept.output[:] = 1
    prompts = [experiment.request(kept, place).prompt for place in range(2)]
    least = min(map(len, prompts))
    assert prompts[0][:least] == prompts[1][:least]


def test_every_request_is_served_and_waiting_counts_from_arrival(experiment: ModuleType, trace: Trace) -> None:
    some = trace.answered().clip_lengths(200, 20)
    some = some.keep(np.arange(len(some)) < 40, "first").scale_rate(100)
    served = experiment.serve(some, 256)
    alone = experiment.serve(some.keep(np.arange(40) < 1, "one"), 256)
    assert served.first > served.median > alone.first > 0
    assert 0 < served.pages <= 256
    assert 0 <= served.worst_window <= 1


def test_own_statistics_need_the_own_file(experiment: ModuleType, trace: Trace) -> None:
    assert experiment.own_claim(trace, False).passed is None
    assert experiment.own_claim(trace, True).passed is None  # no log types in it


def test_a_page_that_is_kept_for_each_keeps_all_of_them_in(experiment: ModuleType, trace: Trace) -> None:
    some = trace.answered().clip_lengths(60, 20)
    some = some.keep(np.arange(len(some)) < 60, "first")
    pages = experiment.serve(some, 4096).pages
    crowd = some.scale_rate(1e6)
    assert experiment.serve(some, pages).preempted == 0
    assert experiment.serve(crowd, pages).preempted > 0
    assert experiment.serve(crowd, pages, spare_pages=2).preempted == 0


def test_thinned_counts_follow_theory_and_scaled_ones_stay(experiment: ModuleType, trace: Trace) -> None:
    claim = experiment.scaling_claim(trace, experiment.QUICK)
    assert claim.passed, claim.measured

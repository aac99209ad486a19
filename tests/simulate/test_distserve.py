"""The search: goodput by joint attainment, each phase for itself or both in segments of a node."""

from __future__ import annotations

from dataclasses import replace

import pytest

from memwall.errors import DoesNotFit
from memwall.simulate.distserve import (
    Cluster,
    Degrees,
    Limits,
    Plan,
    Search,
    Served,
    Simulation,
    highest_rate,
    poisson_jobs,
)
from memwall.simulate.phase_instances import Job
from memwall.simulate.phase_latency import OPT_13B

MODEL = Served(latencies=OPT_13B, layers=40, heads=40, kv_bytes_per_token=2 * 40 * 5120 * 2)
LENGTHS = [(300, 100), (600, 200), (900, 150), (1200, 60)]
SEARCH = Search(
    model=MODEL, cluster=Cluster(devices=4, per_node=4), lengths=LENGTHS, limits=Limits(first_token=0.2, per_token=0.1),
    requests=80,
)  # fmt: skip


def job(first: float, per_token: float) -> Job:
    return Job(0.0, 10, 11, first=first, last=first + 10 * per_token)


def test_a_request_counts_that_meets_both_limits() -> None:
    jobs = [job(0.1, 0.2), job(0.3, 0.05)] * 5  # each limit is met by half, both by none
    limits = Limits(first_token=0.2, per_token=0.1)
    assert limits.attained(jobs) == 0.0
    assert replace(limits, separate=True).attained(jobs) == 0.5
    assert limits.attained(jobs, per_token=False) == 0.5
    assert limits.scaled(2).attained(jobs) == 1.0


@pytest.mark.parametrize("edge", [0.0, 0.3, 1.7, 4.9, 9.0])
def test_bisection_finds_the_edge_within_a_step(edge: float) -> None:
    found = highest_rate(lambda rate: float(rate <= edge), 0.9, 0.05, 5.0)
    assert found <= min(edge, 5.0)
    assert found >= min(edge, 5.0) - 0.05


def test_the_same_draws_at_every_rate() -> None:
    slow, fast = (poisson_jobs(LENGTHS, rate, 50, 7) for rate in (1.0, 4.0))
    for a, b in zip(slow, fast, strict=True):
        assert (a.prompt_tokens, a.output_tokens) == (b.prompt_tokens, b.output_tokens)
        assert a.at == pytest.approx(4 * b.at)


def test_room_is_a_line_over_devices_less_the_weights() -> None:
    known = {n: OPT_13B[n] for n in (1, 2)}  # the paper's own figures lie on one
    assert replace(MODEL, latencies=known).kv_tokens(1, 4) == OPT_13B[4].kv_tokens
    assert replace(MODEL, latencies={1: OPT_13B[1], 4: OPT_13B[4]}).kv_tokens(1, 2) == OPT_13B[2].kv_tokens
    tight = {1: replace(OPT_13B[1], kv_tokens=0), 2: replace(OPT_13B[2], kv_tokens=1000), 4: OPT_13B[4]}
    model = replace(MODEL, latencies=tight)
    assert model.kv_tokens(1, 1) == 0
    assert model.kv_tokens(1, 2) == 1000
    assert model.kv_tokens(1, 8) == 1000 + 3 * (OPT_13B[4].kv_tokens - 1000)  # weights that one device cannot hold
    assert replace(MODEL, latencies={4: OPT_13B[4]}).kv_tokens(4, 2) == 2 * OPT_13B[4].kv_tokens
    assert model.kv_tokens(3, 2) is None


def test_plans_over_nodes_hold_weights_that_one_device_does_not() -> None:
    tight = {1: replace(OPT_13B[1], kv_tokens=0), 2: replace(OPT_13B[2], kv_tokens=20_000), 4: OPT_13B[4]}
    search = replace(
        SEARCH,
        model=replace(MODEL, latencies=tight),
        cluster=Cluster(devices=16, per_node=4),
        requests=10,
        rate_step=2.0,
    )
    assert {plan.segments for plan in search.in_segments()} == {1, 2, 4}


def test_plans_fit_the_cluster_and_the_model() -> None:
    plans = SEARCH.together()
    assert plans == sorted(plans, key=lambda plan: -plan.goodput)
    pairs = {(plan.prefill, plan.decode) for plan in plans}
    assert len(pairs) == len(plans)
    brute = {
        (Degrees(tensor=a, pipeline=b), Degrees(tensor=c, pipeline=d))
        for a in (1, 2, 4) for b in (1, 2, 4) for c in (1, 2, 4) for d in (1, 2, 4)
        if a * b + c * d <= 4
    }  # fmt: skip
    assert pairs == brute
    assert plans[0].goodput > 0


def test_each_phase_for_itself_and_instances_by_rate() -> None:
    few, many = SEARCH.apart(2.0), SEARCH.apart(40.0)
    assert (few.prefill, few.decode) == (many.prefill, many.decode)
    assert many.devices > few.devices
    assert many.devices * SEARCH.goodput_prefill(many.prefill) >= 40.0
    jobs = poisson_jobs(LENGTHS, 40.0, 400, 1)
    Simulation(model=MODEL, cluster=SEARCH.cluster).split(
        jobs, many.prefill, many.decode, (many.prefill_instances, many.decode_instances)
    )
    assert SEARCH.limits.attained(jobs) > 0.8


def test_segments_keep_both_phases_of_a_layer_on_one_node() -> None:
    search = replace(SEARCH, cluster=Cluster(devices=8, per_node=4), requests=20)
    plans = search.in_segments()
    assert {plan.segments for plan in plans} == {1, 2}
    for plan in plans:
        per_node = (plan.prefill.devices + plan.decode.devices) / plan.segments
        assert per_node <= 4
        assert plan.devices <= 8
        assert MODEL.layers % plan.prefill.pipeline == MODEL.layers % plan.decode.pipeline == 0


def test_limits_that_nothing_meets() -> None:
    with pytest.raises(DoesNotFit, match="time to the first token"):
        replace(SEARCH, limits=Limits(first_token=1e-3, per_token=0.1)).apart(1.0)
    with pytest.raises(DoesNotFit, match="hold no instance of each phase"):
        replace(SEARCH, cluster=Cluster(devices=1, per_node=1)).together()


def test_moving_keys_and_values_is_in_the_time_per_token() -> None:
    slow = Cluster(devices=4, per_node=4, link_bytes_per_s=1e9)
    times = []
    for cluster in (SEARCH.cluster, slow):
        jobs = [Job(0.0, 1000, 11)]
        Simulation(model=MODEL, cluster=cluster).split(jobs, Degrees(tensor=1), Degrees(tensor=1))
        times.append(jobs[0].per_token_seconds)
    moved = 1000 * MODEL.kv_bytes_per_token
    assert 10 * (times[1] - times[0]) == pytest.approx(moved / 1e9 - moved / 600e9)


def test_devices_of_a_plan() -> None:
    plan = Plan(
        prefill=Degrees(tensor=2), decode=Degrees(tensor=1, pipeline=3), goodput=1.0, prefill_instances=2,
        decode_instances=4,
    )  # fmt: skip
    assert plan.devices == 16


def test_batches_near_what_fills_a_device_bring_first_tokens_sooner() -> None:
    one, times = Degrees(tensor=1), []
    for fill in (False, True):
        jobs = [Job(0.0, 400, 2) for _ in range(16)]
        Simulation(model=MODEL, cluster=SEARCH.cluster, fill=fill).prefill_alone(jobs, one)
        times.append(sorted(job.first_token_seconds for job in jobs))
    whole, filled = times
    assert len(set(whole)) == 2  # the first one, and then all others at once
    assert len(set(filled)) == 16  # L_m holds one of 400
    assert sum(filled) < 0.85 * sum(whole)
    assert filled[-1] < 1.5 * whole[-1]  # what each batch begins with comes 16 times


def test_instances_that_hold_the_longest_request() -> None:
    long = replace(SEARCH, lengths=[(70_000, 100)])
    assert Degrees(tensor=1) not in list(long.degrees(4))
    assert Degrees(tensor=2) in list(long.degrees(4))

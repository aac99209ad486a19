"""The meter on signals whose means are known: memory that rises and falls, joules at a known rate, a busy processor."""

from __future__ import annotations

import itertools
import json
import threading
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.hardware.meter import Meter, Series, processor_ticks
from memwall.hardware.power import WorkModel
from memwall.hardware.system import usable_processors
from memwall.memory import resident_bytes

HAND = Series(
    dt_s=1.0,
    times_s=(0.0, 1.0, 3.0),
    memory_bytes=(0, 10, 30),
    utilisation=(0.0, 1.0, 0.25),
    busy=((0.0, 0.0), (1.0, 1.0), (0.5, 0.5)),
    watts=(0.0, 6.0, 3.0),
    power_source="modelled",
    sampler_share=0.0,
)


def test_means_by_hand() -> None:
    assert HAND.mean_memory_bytes == pytest.approx((5 + 40) / 3)  # trapezoids, not the mean of the samples
    assert HAND.mean_utilisation == pytest.approx((1 * 1 + 0.25 * 2) / 3)
    assert HAND.mean_watts == pytest.approx((6 + 3 * 2) / 3)


def test_others_are_what_the_process_did_not_take() -> None:
    share = usable_processors() / 2
    assert HAND.mean_others == pytest.approx(max(2 / 3 - 0.5 * share, 0))
    assert replace(HAND, busy=()).mean_others == 0


def test_json_round_trip() -> None:
    assert Series.from_dict(json.loads(json.dumps(HAND.to_dict()))) == HAND


def test_a_series_spans_the_stretch_and_counters_are_exact_at_any_interval() -> None:
    """Joules per second of a counter that the clock itself drives, with an interval longer than the stretch."""
    began = time.perf_counter()

    class Clockwork:
        name = "rapl"

        def joules(self) -> float:
            return 5 * (time.perf_counter() - began)

    for dt in (0.01, 10.0):
        with Meter(dt_s=dt, memory=lambda: 7, power=Clockwork()) as meter:
            time.sleep(0.1)
        series = meter.series
        assert series.mean_watts == pytest.approx(5, rel=0.05)
        assert series.mean_memory_bytes == pytest.approx(7)
        assert series.times_s[0] == 0
        assert series.seconds >= 0.1
        assert all(before < after for before, after in itertools.pairwise(series.times_s))
        assert series.power_source == "rapl"
    assert len(series.times_s) == 2


@given(st.lists(st.floats(0.001, 0.2), min_size=2, max_size=60))
def test_a_straight_line_has_its_middle_as_mean_however_it_is_sampled(gaps: list[float]) -> None:
    times = tuple(itertools.accumulate(gaps, initial=0.0))
    memory = tuple(round(1e9 * at) for at in times)
    series = replace(HAND, times_s=times, memory_bytes=memory, utilisation=times, watts=times, busy=())
    assert series.mean_memory_bytes == pytest.approx(1e9 * times[-1] / 2, rel=1e-6)


def test_real_memory_is_seen() -> None:
    with Meter(dt_s=0.005, memory=resident_bytes) as meter:
        time.sleep(0.02)
        held = bytearray(64_000_000)
        time.sleep(0.05)
        del held
        time.sleep(0.02)
    series = meter.series
    assert max(series.memory_bytes) - series.memory_bytes[0] > 55_000_000
    assert series.memory_bytes[0] < series.mean_memory_bytes < max(series.memory_bytes)


def test_processor_time_is_that_of_this_process() -> None:
    with Meter(dt_s=0.01, memory=lambda: 0) as idle:
        time.sleep(0.1)
    began = time.process_time()
    with Meter(dt_s=0.01, memory=lambda: 0) as meter:
        end = time.perf_counter() + 0.1
        while time.perf_counter() < end:
            pass
    own = time.process_time() - began
    busy = meter.series
    assert busy.mean_utilisation * busy.seconds * usable_processors() == pytest.approx(own, rel=0.2)
    assert idle.series.mean_utilisation < 0.5


def test_ticks_of_all_processors() -> None:
    ticks = processor_ticks()
    if not ticks:
        pytest.skip("no /proc/stat here")
    assert len(ticks) >= usable_processors()
    assert all(0 <= busy <= whole for busy, whole in ticks)


def test_the_thread_ends_with_the_stretch_and_the_meter_can_be_used_again() -> None:
    work = WorkModel()
    meter = Meter(dt_s=0.005, memory=lambda: 1, power=work)
    for _ in range(2):
        with meter:
            work.add(1e9, 0)
            time.sleep(0.02)
        assert meter.series.mean_watts * meter.series.seconds == pytest.approx(1e9 * work.joules_per_flop)
    assert not [thread for thread in threading.enumerate() if thread.name == "meter"]


@pytest.mark.parametrize("dt", [0, -1, 1e-6, 1e3, float("nan")])
def test_bad_intervals_are_refused(dt: float) -> None:
    with pytest.raises(InputError, match=r"must be from 0\.001 to 60 seconds"):
        Meter(dt_s=dt, memory=lambda: 0)


def test_no_series_before_a_stretch() -> None:
    meter = Meter(dt_s=0.1, memory=lambda: 0)
    with pytest.raises(InputError, match="not been stopped"):
        _ = meter.series
    with pytest.raises(InputError, match="not started"):
        meter.stop()


def test_a_count_that_lags_is_made_good_at_both_ends() -> None:
    """Too low by 100 at the start and by 300 at the stop: in between as a line has it."""
    exact = iter([1100, 1300])
    with Meter(dt_s=10.0, memory=lambda: 1000, exact=lambda: next(exact)) as meter:
        time.sleep(0.01)
    assert meter.series.memory_bytes == (1100, 1300)
    assert meter.series.mean_memory_bytes == pytest.approx(1200)

"""The device on a virtual clock: iterations that can be worked out by hand, contention, and switches."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.engine.base import PHASES, Shares
from memwall.engine.phase_device import GROUPS, Segment, segments, virtual_engine
from memwall.engine.phased import Done, PhasedEngine
from memwall.engine.phases import Split
from memwall.errors import InputError
from tests.engine.phased_loads import DEVICE, HALVES, SIZE, engine, load, served


def test_an_iteration_by_hand() -> None:
    parts = segments(SIZE, [(100, 3)])
    assert sum(part.flop for part in parts if part.kind == "dense") == pytest.approx(2 * SIZE.parameters * 3)
    assert sum(part.flop for part in parts if part.kind == "attention") == pytest.approx(
        SIZE.attention_flop * (101 + 102 + 103)
    )
    assert sum(part.nbytes for part in parts) == pytest.approx(SIZE.weight_bytes + 103 * SIZE.kv_bytes)
    plain = replace(DEVICE, compute_saturation=1.0, memory_saturation=0.2, seconds=0.0)
    big = segments(SIZE, [(0, 512)])
    assert plain.alone_seconds(big, 50) == pytest.approx(2 * plain.alone_seconds(big, 100), rel=1e-2)  # compute
    one = segments(SIZE, [(0, 1)])
    assert plain.alone_seconds(one, 50) == pytest.approx(plain.alone_seconds(one, 100))  # the weights' bytes
    assert plain.alone_seconds(one, 100) == pytest.approx(SIZE.weight_bytes / plain.bytes_per_s, rel=1e-2)


@settings(max_examples=60, deadline=None)
@given(
    flop=st.tuples(st.floats(1e6, 1e13), st.floats(1e6, 1e13)),
    nbytes=st.tuples(st.floats(0, 1e10), st.floats(0, 1e10)),
    percent=st.tuples(st.integers(1, 99), st.integers(1, 99)),
)
def test_beside_each_other_nobody_is_faster_and_bandwidth_is_kept(
    flop: tuple[float, float], nbytes: tuple[float, float], percent: tuple[int, int]
) -> None:
    parts = [(Segment("dense", f, b), float(p)) for f, b, p in zip(flop, nbytes, percent)]
    both = DEVICE.together(parts)
    for part, seconds in zip(parts, both):
        assert seconds >= DEVICE.together([part])[0] * (1 - 1e-9)
    drawn = sum(segment.nbytes / seconds for (segment, _), seconds in zip(parts, both))
    assert drawn <= DEVICE.bytes_per_s * (1 + 1e-6)


def test_both_workers_run_at_the_same_time_and_pages_stay_where_they_are() -> None:
    made, spans, pages = engine(), [], {}  # type: ignore[var-annotated]

    def watch(done: Done) -> None:
        spans.append((done.phase, done.began, done.ended))
        for entry in done.batch:
            before = pages.get(entry.sequence.id, [])
            if entry.sequence.status == "running":
                assert entry.sequence.pages[: len(before)] == before  # a hand-over moves nothing
                pages[entry.sequence.id] = list(entry.sequence.pages)

    made.on_done = watch
    served(made, load(40, 40.0))
    whole = max(end for _, _, end in spans) - min(begin for _, begin, _ in spans)
    busy = {phase: sum(end - begin for which, begin, end in spans if which == phase) / whole for phase in PHASES}
    assert sum(busy.values()) > 1.2
    assert made.totals.finished == {"length": 40}
    assert made.pages.pool.used_pages == made.pages.idle_pages


def iterations(made: PhasedEngine, switch_at: float, shares: Shares) -> tuple[list[Done], list[float]]:
    """All batches of a run in which shares change once; and the moments at which nobody computed, in seconds."""
    found: list[Done] = []

    def watch(done: Done) -> None:
        found.append(done)
        if made.clock() > switch_at and not made.switches:
            made.switches = 1
            made.workers.switch(shares)

    made.on_done = watch
    served(made, load(60, 60.0))
    ends = sorted((done.began, done.ended) for done in found)
    last, gaps = ends[0][1], []
    for began, ended in ends[1:]:
        gaps.append(began - last)
        last = max(last, ended)
    return found, gaps


def test_a_delayed_switch_leaves_no_moment_without_a_worker_and_the_naive_one_does() -> None:
    other = Shares(prefill=70, decode=30)
    ways = {way: iterations(engine(prepare_seconds=0.3, switching=way), 0.3, other) for way in ("delayed", "stop")}
    assert (
        max(ways["delayed"][1]) < 1e-3 < 0.3 <= max(entry.ended - entry.began for entry in ways["stop"][0])
    )  # the naive one waits inside the iteration that begins after it
    assert max(entry.ended - entry.began for entry in ways["delayed"][0]) < 0.1


def test_pages_that_run_out_and_bad_input() -> None:
    made = engine(pages=30)
    served(made, load(30, 50.0, prompt=100, output=100))
    assert made.totals.finished == {"length": 30}
    assert made.totals.preempted
    with pytest.raises(InputError, match="0 pages"):
        virtual_engine(Split(), device=DEVICE, size=SIZE, shares=HALVES, num_pages=0)
    with pytest.raises(InputError, match="each must be 1 to 100"):
        Shares(prefill=0, decode=100)


def test_groups_are_pairs() -> None:
    assert [part.kind for part in segments(SIZE, [(0, 1)])] == ["dense", "attention"] * GROUPS

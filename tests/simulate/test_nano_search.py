"""The pipeline search: structures that keep every rule, shares that never sum to more than the device, and gains."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.engine.nano_schedule import A100, Interference, NanoOperation, Schedule
from memwall.errors import InputError, MissingDependency
from memwall.simulate import nano_program
from memwall.simulate.nano_costs import LayerOperation
from memwall.simulate.nano_pipeline import Pipeline, Run, carry_out
from memwall.simulate.nano_search import assign_shares, followed, near_bubble, search
from memwall.simulate.nano_structure import Structure, even_cuts, find_structure, in_turns, sequential

scipy = pytest.importorskip("scipy", reason="the search needs SciPy: pip install 'memwall[search]'")


TWO = dict.fromkeys(("kqv", "decode", "o", "down"), 2)


def layer(compute: float = 1.0, memory: float = 0.5) -> list[LayerOperation]:
    def one(name: str, seconds: float, *parents: str, **told: object) -> LayerOperation:
        resource = "memory" if name == "decode" else "compute"
        return LayerOperation(
            name=name, resource=resource, first=0, end=512, fixed=0.01 * seconds, per_token=0.99 * seconds / 512,
            parents=parents, **told,  # type: ignore[arg-type]
        )  # fmt: skip

    return [
        one("kqv", 0.2 * compute, before=("down",)), one("decode", memory, "kqv"), one("o", 0.1 * compute, "decode"),
        one("down", 0.7 * compute, "o"),
    ]  # fmt: skip


def check(run: Run, structure: Structure) -> None:
    """Edges hold, and streams work one thing at a time, in every layer."""
    spans = {(span.operation, span.layer): span for span in run.spans}
    assert len(spans) == len(structure.operations) * run.layers
    for edge in structure.edges:
        for at in range(edge.layers, run.layers):
            assert spans[edge.parent, at - edge.layers].end <= spans[edge.child, at].start + 1e-9
    for name in ("compute", "memory"):
        mine = sorted((s.start, s.end) for s in run.spans if structure.operations[s.operation].resource == name)
        assert all(one[1] <= two[0] + 1e-9 for one, two in pairwise(mine))


def test_halves_overlap_as_far_as_the_longer_class_allows() -> None:
    operations = layer(memory=0.9)
    found = find_structure(operations, {one.name: 2 for one in operations}, follow=followed(operations), seconds=10)
    assert sequential(operations) == pytest.approx(1.9)
    assert found.period == pytest.approx(1.0, rel=0.05)  # all of the products' time, and of attention's beside it
    parts = [(one.first, one.end) for one in found.operations if one.name == "kqv"]
    assert parts[0][0] == 0
    assert parts[-1][1] == 512
    assert all(one.tokens >= 128 and one.first % 128 == 0 for one in found.operations)
    check(carry_out(found.pipeline([1.0 if o.resource == "compute" else 0.1 for o in found.operations]), A100), found)


def test_one_part_each_cannot_overlap() -> None:
    operations = layer()
    found = find_structure(operations, dict.fromkeys(("kqv", "decode", "o", "down"), 1), seconds=5)
    assert found.period == pytest.approx(sequential(operations))
    assert found.compute_bubbles()[0][0] == pytest.approx(0.5)
    assert near_bubble(found, dict.fromkeys(("kqv", "decode", "o", "down"), 1), {}) is not None
    assert near_bubble(found, dict.fromkeys(("kqv", "decode", "o", "down"), 4), {}) is None


@pytest.mark.parametrize("memory", [0.1, 0.6])
def test_shares_never_sum_to_more_than_the_device_and_the_schedule_runs_as_it_says(memory: float) -> None:
    operations = layer(memory=memory)
    structure = find_structure(operations, {one.name: 2 for one in operations}, follow=followed(operations), seconds=10)
    schedule = assign_shares(structure, A100, seconds=10)
    assert schedule.most_share() <= 1 + 1e-9
    assert all(0 < one.share <= 1 for one in schedule.placed)
    run = carry_out(Pipeline.of(schedule, A100), A100, layers=10)
    assert run.period == pytest.approx(schedule.period, rel=0.05)
    pipeline = Pipeline.of(schedule, A100)
    assert run.overlap(pipeline) > 0
    assert run.busy(pipeline, "compute") > 0.5
    fixed = carry_out(pipeline, A100, layers=10, sharing="fixed")
    assert fixed.seconds >= run.seconds * (1 - 1e-9)  # what products may take of the rest is never less


def test_the_search_gains_where_classes_are_balanced_and_nothing_where_one_is_all() -> None:
    gains = {}
    for memory in (0.02, 0.6):
        found = search({"alone": layer(memory=memory)}, A100, seconds=5)
        gains[memory] = found.gain
        assert found.parts_only > found.sequential
        assert found.simulated >= found.lower
    assert gains[0.6] > 1.1
    assert gains[0.02] < 1.05


def test_without_overlap_a_pipeline_takes_the_sum_of_its_parts() -> None:
    structure = in_turns(layer(), TWO)
    run = carry_out(structure.pipeline([0.5] * len(structure.operations)), A100, layers=4, overlap=False)
    assert run.seconds == pytest.approx(4 * sum(structure.seconds))
    assert run.layer_ends() == pytest.approx([sum(structure.seconds) * n for n in (1, 2, 3, 4)])


@settings(max_examples=40, deadline=None)
@given(parts=st.integers(1, 4), shares=st.lists(st.sampled_from([0.1, 0.3, 0.7, 1.0]), min_size=16, max_size=16))
def test_any_shares_keep_the_order(parts: int, shares: list[float]) -> None:
    structure = in_turns(layer(), dict.fromkeys(TWO, parts))
    for sharing in ("fluid", "fixed"):
        told = shares[: len(structure.operations)]
        check(carry_out(structure.pipeline(told), A100, layers=3, sharing=sharing), structure)  # type: ignore[arg-type]


def test_even_cuts_are_of_whole_quanta() -> None:
    one = replace(layer()[0], first=128, end=1024)
    assert even_cuts(one, 2) == [128, 512, 1024] or even_cuts(one, 2) == [128, 640, 1024]
    assert even_cuts(one, 99)[1] == 256


def test_interference_is_a_rising_table() -> None:
    assert A100.speed("memory", 0.2) == 0.3  # the point that the paper tells
    assert A100.speed("compute", 0.37) == 0.37
    assert A100.speed("network", 0.15) == pytest.approx(0.4)
    with pytest.raises(InputError, match="0 to 1"):
        A100.speed("memory", 1.2)
    with pytest.raises(InputError, match="rise"):
        Interference(shares=(0, 0.5, 1), memory=(0, 0.9, 0.5), network=(0, 0.5, 1), source="")
    with pytest.raises(InputError, match="one for each"):
        Interference(shares=(0, 1), memory=(0,), network=(0, 1), source="")


def test_unknown_parents_and_a_missing_solver_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="down, nobody, which the layer"):
        find_structure([replace(layer()[0], parents=("nobody",))], {})

    def missing() -> None:
        raise MissingDependency("scipy", "search")

    monkeypatch.setattr(nano_program, "need_scipy", missing)
    with pytest.raises(MissingDependency, match="pip install 'memwall\\[search\\]'"):
        find_structure(layer(), {})


def test_a_schedule_says_itself_in_json() -> None:
    found = search({"alone": layer()}, A100, seconds=5).schedule
    told = found.to_dict()
    assert isinstance(found, Schedule)
    assert {"operation", "first", "end", "stream", "share", "start", "seconds"} == set(told["operations"][0])
    assert any(edge["layers"] == 1 for edge in told["edges"])  # stitching
    with pytest.raises(InputError, match="no range"):
        NanoOperation(name="x", resource="compute", first=3, end=3)

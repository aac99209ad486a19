"""What a search over splits tells: curves, where layers lie, a page."""

from __future__ import annotations

from memwall.simulate.distserve import Cluster, Degrees, Limits, Plan, Search
from memwall.simulate.phase_models import PUBLISHED
from memwall.simulate.split_report import colocated, curves, page, plan_dict, segment_map, to_dict

SEARCH = Search(
    model=PUBLISHED["opt-13b"], cluster=Cluster(devices=4, per_node=4), lengths=[(300, 100), (900, 150)], requests=60,
    limits=Limits(first_token=0.25, per_token=0.1),
)  # fmt: skip
PLAN = Plan(prefill=Degrees(tensor=2), decode=Degrees(tensor=1), goodput=1.0, prefill_instances=2, decode_instances=3)


def test_a_map_gives_every_layer_to_each_phase_once() -> None:
    plan = Plan(prefill=Degrees(tensor=2, pipeline=2), decode=Degrees(tensor=1, pipeline=4), goodput=1.0, segments=2)
    nodes = segment_map(plan, 40)
    assert [node["layers"] for node in nodes] == [[0, 19], [20, 39]]
    for phase, wide in (("prefill", 2), ("decode", 1)):
        held = [
            layer
            for node in nodes
            for device in node["devices"]
            if device["phase"] == phase
            for layer in range(device["layers"][0], device["layers"][1] + 1)
        ]
        assert sorted(held) == sorted(list(range(40)) * wide)
    for node in nodes:
        assert [device["device"] for device in node["devices"]] == list(range(4))
        assert all(node["layers"][0] <= layer <= node["layers"][1] for d in node["devices"] for layer in d["layers"])


def test_curves_fall_with_the_rate_and_rise_with_the_limits() -> None:
    found = curves(SEARCH, PLAN, 6.0)
    assert found.rates[3] == 6.0
    assert found.by_rate[0] >= found.by_rate[-1]
    assert found.by_scale[0] <= found.by_scale[-1]
    assert found.by_rate[3] == found.by_scale[3]  # the same simulation
    assert found.both_by_rate is not None


def test_as_many_devices_that_do_both() -> None:
    assert colocated(SEARCH, PLAN) == (Degrees(tensor=1), 7)


def test_the_page_and_the_json_tell_the_same() -> None:
    told = {"model": "a <b>", "machine": "m", "first_token_seconds": 0.25, "per_token_seconds": 0.1}
    deep = Plan(prefill=Degrees(tensor=1, pipeline=2), decode=Degrees(tensor=1, pipeline=2), goodput=0.5, segments=2)
    found = curves(SEARCH, deep, 1.0)
    everything = to_dict(SEARCH, [deep, PLAN], told, found, [])
    assert everything["plan"] == plan_dict(deep)
    assert everything["plan"]["goodput"] == 2.0
    assert len(everything["runners_up"]) == 1
    assert len(everything["segment_map"]) == 2
    text = page(told, everything, [deep, PLAN], found)
    assert "a &lt;b&gt;" in text
    assert text.count("<polyline") == 4
    assert "node 1" in text

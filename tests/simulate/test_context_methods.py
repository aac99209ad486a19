"""Multipliers of compression: dimensions, phases, rules of stacking, memwall's own bytes, rankings."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memwall import kv
from memwall.errors import InputError
from memwall.simulate.context_methods import (
    AFTER,
    RANKED,
    Method,
    cache_shape,
    effect,
    gain,
    order,
    policy_methods,
    rank,
    read_methods,
)
from memwall.simulate.context_model import PUBLISHED_MODEL, PUBLISHED_PEAK
from memwall.simulate.long_context_peak_analysis import Analysis, Effect, Workload

CONTEXT = 50_000


def stacked(text: str, context: int = CONTEXT) -> Effect:
    return effect(read_methods(text, PUBLISHED_MODEL, context))


def analysis(context: int = CONTEXT) -> Analysis:
    return Analysis(model=PUBLISHED_MODEL, peak=PUBLISHED_PEAK, workload=Workload(context=context, users=20))


def test_no_method_changes_nothing() -> None:
    assert effect([]) == Effect()
    assert set(gain(analysis(), "token(1)").gains.values()) == {1.0}


def test_dimensions_multiply() -> None:
    one = stacked("layer(0.5)+head(0.25)+token(0.1)+hidden(0.125)")
    assert one.held == one.read == one.switched == pytest.approx(0.5 * 0.25 * 0.1 * 0.125)
    assert (one.prefill, one.attention, one.weights) == (1, 1, 1)
    assert stacked("weights(0.25)+prefill(0.5)") == Effect(weights=0.25, prefill=0.5)


def test_dropping_tokens_is_not_credited_to_prefill_unless_it_happens_there() -> None:
    after, during = gain(analysis(), "token(0.1)"), gain(analysis(), "token(0.1,prefill=1)")
    assert after.gains["prefill"] == 1
    assert after.gains["users"] == pytest.approx(10)
    assert during.effect.attention == pytest.approx(0.19)  # no token looks at more than a tenth
    assert during.gains["prefill"] > 1.2
    assert during.gains["users"] == after.gains["users"]
    snap, locret = gain(analysis(), "snapkv(0.25)"), gain(analysis(), "locret(0.25)")
    assert snap.gains["prefill"] == 1
    assert locret.gains["prefill"] > 1.1  # memwall's evicts block by block while it reads


def test_codes_of_a_transfer_save_nothing_in_memory() -> None:
    won = gain(analysis(), "cachegen").gains
    assert won["switch"] > 6
    assert won["users"] == won["answer"] == won["prefill"] == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("cla(2)+yoco", "cla.2. and yoco are both about layer"),
        ("layer(0.5)+layer(0.5)", "rule=product"),
        ("mla+kivi(2bit)", "both about hidden"),
        ("kivi(2bit)+int8", "both store the rows"),
        ("instinfer", "another tier"),
        ("snapkw(0.2)", "not known"),
        ("token", "give what is left"),
        ("token(0)", "above zero"),
        ("token(0.5,rule=sum)", "min, product or conflict"),
        ("token(0.5,after=1)", "unknown setting"),
        ("yoco(2)", "takes no settings"),
        ("cla(0.5)", "whole number"),
        ("cachegen(0)", "cachegen"),
        ("retrieval-heads(2)", "at most 1"),
        ("", "must look like"),
    ],
)
def test_what_does_not_go_together_or_is_not_known(text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        stacked(text)


def test_declared_rules() -> None:
    assert stacked("token(0.5)+token(0.2)").held == 0.2  # the stricter one decides
    assert stacked("layer(0.5,rule=product)+layer(0.25,rule=product)").held == 0.125
    assert stacked("token(0.5,rule=product)+token(0.25)").held == 0.25  # one of them says min
    with pytest.raises(InputError, match="both about head"):
        stacked("mqa+retrieval-heads")
    assert stacked("cla(2)+cachegen").switched == pytest.approx(0.5 / 6.4)


@pytest.mark.parametrize("policy", ["int8", "int4", "kivi(2bit)", "snapkv(0.25)+kivi(2bit)", "think(0.4)+kivi(4bit)"])
@pytest.mark.parametrize("context", [4096, 100_000])
def test_policies_bring_their_own_bytes(policy: str, context: int) -> None:
    shape = cache_shape(PUBLISHED_MODEL)
    methods = policy_methods(policy, PUBLISHED_MODEL, context)
    held = kv.held_bytes(policy, shape, context, context)
    plain = kv.held_bytes("float16", shape, context, context)
    assert effect(methods).held == pytest.approx(held / plain)
    read = kv.read_bytes(policy, shape, context) / kv.read_bytes("float16", shape, context)
    assert effect(methods).read == pytest.approx(read)


def test_rebuilding_keys_costs_arithmetic() -> None:
    """XQuant keeps less and rebuilds keys and values at every step: an answer to a long context gets slower."""
    won = gain(analysis(1_000_000), "xquant")
    assert won.effect.step_flop > 1e12
    assert won.gains["users"] > 3
    assert won.gains["answer"] < 1


@given(factors=st.lists(st.floats(0.01, 1), min_size=1, max_size=4))
def test_min_never_saves_more_than_product(factors: list[float]) -> None:
    def method(factor: float, rule: str) -> Method:
        return Method(name="x", factors={"token": factor}, rules={"token": rule})

    least = effect([method(factor, "min") for factor in factors]).held
    product = effect([method(factor, "product") for factor in factors]).held
    assert product <= least + 1e-12
    assert least == min(factors)


def test_ranking() -> None:
    found, left_out = rank(analysis())
    assert not left_out
    assert found[0].methods == "yoco"
    assert {one.methods for one in found} == set(RANKED)
    assert order(found, "prefill")[0] == "yoco"
    assert "snapkv(0.25)" not in order(found, "prefill")
    assert order(found, "switch")[:2] == ["yoco", "retrieval-heads"]
    assert "prefill" not in AFTER

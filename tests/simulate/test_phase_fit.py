"""The formulas for any model: near what the cost model says, faster and roomier on more devices."""

from __future__ import annotations

import pytest

from memwall.errors import DoesNotFit
from memwall.simulate.base import Priced, Roofline
from memwall.simulate.cluster import Cluster, LinkModel
from memwall.simulate.phase_fit import fit, has_experts, highest_rate, tensor_plan
from memwall.simulate.phase_latency import OPT_13B
from memwall.simulate.serving_model import ServedModel
from tests.simulate.cases import dense, h100, llama_70b, sparse


def price(cluster: Cluster) -> Priced:
    return Priced([("roofline", Roofline(device=cluster.device)), ("links", LinkModel(cluster=cluster))])


def test_formulas_follow_the_cost_model() -> None:
    cluster = h100()
    found = fit(llama_70b(), cluster, price(cluster))
    latencies = found.served.latencies
    assert sorted(latencies) == [1, 2, 4, 8]
    assert found.prefill_error < 0.15
    assert found.decode_error < 0.15
    assert latencies[1].kv_tokens == 0  # 140 GB of weights
    assert 0 < latencies[4].kv_tokens < latencies[8].kv_tokens
    assert latencies[8].prefill_seconds([1024]) < latencies[2].prefill_seconds([1024])
    assert found.served.kv_bytes_per_token == 80 * 2 * 8 * 128 * 2
    assert found.served.kv_tokens(1, 1) == 0
    assert found.served.heads == 64


def test_a_model_that_fits_nowhere_and_one_with_few_heads() -> None:
    small = h100(per_node=1)
    with pytest.raises(DoesNotFit, match="try fewer bits"):
        fit(llama_70b(), small, price(small))
    wide = h100()
    assert sorted(fit(dense(heads=4), wide, price(wide)).served.latencies) == [1, 2, 4]
    assert tensor_plan(dense(heads=4), 8) is None


def test_experts_are_told() -> None:
    cluster = h100()
    model: ServedModel = sparse()
    assert has_experts(model)
    assert not has_experts(dense())
    assert fit(model, cluster, price(cluster)).served.layers == 8


def test_where_a_search_over_rates_ends() -> None:
    tokens = OPT_13B[1].saturating_tokens
    assert 256 <= tokens <= 1024
    alone = 1 / (OPT_13B[1].prefill_seconds([tokens]) * 1000 / tokens)
    assert highest_rate({1: OPT_13B[1]}, 1000) == pytest.approx(alone)

"""Cache-Craft's evidence in small: its queue, its prefix cache and its ways of choosing, against numbers by hand."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from memwall.cli.evidence import load_experiment
from memwall.kv.cache_craft import Context
from memwall.models import model_directory
from memwall.systems import find_system


@pytest.fixture(scope="module")
def craft() -> ModuleType:
    return load_experiment(find_system("cache-craft"))


def test_rank_correlation(craft: ModuleType) -> None:
    assert craft.rank_correlation([1, 2, 3], [10, 20, 90]) == pytest.approx(1)
    assert craft.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # ranks 1.5, 1.5, 3, 4 against 1, 2, 3, 4
    assert craft.rank_correlation([0, 0, 1, 2], [1, 2, 3, 4]) == pytest.approx(4.5 / np.sqrt(4.5 * 5))


def test_a_queue_by_hand(craft: ModuleType) -> None:
    # the second waits for the first's prefill; both then make two tokens together
    latency, end = craft.serve([2.0, 3.0], [0.0, 1.0], 2, 0.5)
    assert end == 6.0
    assert latency == pytest.approx((6.0 + 5.0) / 2)
    assert craft.serve([1.0], [10.0], 1, 0.5) == (1.5, 11.5)


def test_a_prefix_cache_that_never_forgets(craft: ModuleType) -> None:
    lab = SimpleNamespace(
        cache=SimpleNamespace(shape=SimpleNamespace(num_layers=2)),
        opening=[0],
        tokenizer=SimpleNamespace(encode=lambda text, add_bos: [1] * 5),
    )
    library = craft.Library([[1] * 10, [2] * 20, [3] * 30], ["a", "b", "c"], ["1", "2", "3"])
    full, prefix = craft.full_rows(lab, library, [([0, 1], 0), ([0, 2], 0), ([2, 0], 0), ([0, 1], 1)])
    assert full == [72, 92, 92, 72]
    assert prefix == [72, 92 - 2 * 11, 92, 72 - 2 * 31]


def test_ways_of_choosing_take_their_share(craft: ModuleType) -> None:
    context = Context(
        num_tokens=40, predecessors=("a",), lengths=(9,), inter=np.ones(1), intra=1.0,
        token_inter=np.arange(40, dtype=np.float32),
    )  # fmt: skip
    picks = craft.choices({id(context): -np.arange(40.0)}, np.random.default_rng(0))
    chosen = {name: craft.at_share(pick, 0.1)(context, 99) for name, pick in picks.items()}
    assert chosen["attention"].tolist() == [36, 37, 38, 39]
    assert chosen["first tokens"].tolist() == chosen["deviation of layer 1"].tolist() == [0, 1, 2, 3]
    assert len(set(chosen["random"].tolist())) == 4


def test_requests_are_drawn_by_popularity(craft: ModuleType) -> None:
    library = craft.Library([[index] for index in range(10)], [], [])
    requests = craft.requests_of(np.random.default_rng(0), library, 200, 1.4)
    assert all(len(set(order)) == 4 and asked in order for order, asked in requests)
    counts = np.bincount([index for order, _ in requests for index in order], minlength=10)
    assert counts[0] > counts[4] > counts[9] > 0


def test_facts_lie_across_borders(craft: ModuleType) -> None:
    with craft.Lab(model_directory("demo"), craft.held_out_text()[:30_000]) as lab:
        chunks, question, answer = craft.split_facts(lab, np.random.default_rng(0))
        name = lab.tokenizer.decode(question).split("number of ")[1].split("?")[0]
        texts = [lab.tokenizer.decode(chunk) for chunk in chunks]
    holder = next(index for index, text in enumerate(texts) if text.endswith(f"The secret number of {name} is"))
    assert texts[holder + 1].startswith(f" {answer}.")
    assert answer not in texts[holder]


def test_quick_leaves_times_to_the_whole_run(craft: ModuleType) -> None:
    """Times of some 30 ms are noise."""
    claims = list(craft.time_claims(craft.QUICK, lambda what: None))
    assert [claim.passed for claim in claims] == [None] * 3
    assert all("whole run" in claim.measured for claim in claims)

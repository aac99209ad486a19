"""What BitStack's verdicts hang on: the parts of a stack that are compared, and the products that are timed."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from memwall.cli.evidence import load_experiment
from memwall.formats import codec
from memwall.formats.bitstack import first_blocks
from memwall.models.stack_index import StackIndex
from memwall.systems import find_system


@pytest.fixture(scope="module")
def bitstack() -> ModuleType:
    return load_experiment(find_system("bitstack"))


@pytest.fixture(scope="module")
def study(bitstack: ModuleType) -> SimpleNamespace:
    random = np.random.default_rng(0)
    form = codec("bitstack-r2-b3")
    whole = {name: form.encode(random.standard_normal(shape)) for name, shape in (("a", (64, 32)), ("b", (32, 48)))}
    index = StackIndex.from_info({"tensors": ["a", "b"], "rank": 2, "order": [1, 0, 0, 1]})
    made = SimpleNamespace(whole=whole, index=index)
    made.nbytes = lambda counts: bitstack.Study.nbytes(made, counts)
    return made


def test_bytes_are_those_of_the_blocks(study: SimpleNamespace) -> None:
    assert study.nbytes({"a": 2, "b": 1}) == sum(
        first_blocks(study.whole[n], c).nbytes for n, c in (("a", 2), ("b", 1))
    )


def test_the_longest_first_part_within_a_size(bitstack: ModuleType, study: SimpleNamespace) -> None:
    for count in range(5):
        size = study.nbytes(study.index.counts(count))
        assert bitstack.Study.within(study, size) == study.index.counts(count)
        assert bitstack.Study.within(study, size + 1) == study.index.counts(count)
    assert bitstack.Study.within(study, study.nbytes({"a": 1, "b": 1}) - 1) is None


def test_other_orders_are_filled_to_the_same_size(bitstack: ModuleType, study: SimpleNamespace) -> None:
    levels = [[0, 1], [1, 0]]
    for size in range(study.nbytes({"a": 1, "b": 1}), study.nbytes({"a": 3, "b": 3}) + 1, 97):
        counts = bitstack.filled(study, ["a", "b"], levels, size)
        assert study.nbytes(counts) <= size
        assert counts["a"] >= counts["b"] or size >= study.nbytes({"a": 2, "b": 3})


def test_products_are_timed_and_judged(bitstack: ModuleType) -> None:
    (claim,) = bitstack.fused(1, 1)
    assert "times as fast" in claim.measured
    assert claim.passed is not None

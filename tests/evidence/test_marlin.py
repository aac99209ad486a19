"""What MARLIN's verdicts hang on: exact claims pass, and judging of times by made-up ones."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from memwall.cli.evidence import load_experiment
from memwall.kernels import marlin
from memwall.simulate.marlin import Engine, knee, seconds
from memwall.systems import find_system


@pytest.fixture(scope="module")
def evidence() -> ModuleType:
    return load_experiment(find_system("marlin"))


def test_claims_of_bytes_and_numbers(evidence: ModuleType) -> None:
    for claims in (evidence.packing(), evidence.trick(), evidence.stripes(50), evidence.published_curve()):
        assert all(claim.passed for claim in claims), claims
    assert all(claim.passed is None for claim in evidence.on_a_gpu())


def test_operations_are_counted_where_they_happen(evidence: ModuleType) -> None:
    evidence.Counted.operations.clear()
    marlin.dequantize_words(np.zeros(4, np.int32).view(evidence.Counted))
    assert evidence.Counted.operations["bitwise_and"] == 4 * 4
    assert evidence.Counted.operations["subtract"] == 4 * 4  # four half floats of each word, in pairs


def test_decay_is_judged(evidence: ModuleType) -> None:
    """Times that the roofline itself gives pass; a gain that rises past the knee does not."""
    shape, bits = (1, 10**9), 4.125
    engine = Engine(bytes_per_s=40e9, flop_per_s=800e9, value_bytes=0)
    sizes = (1, 4, 16, 64, 128)
    narrow, wide = ({m: seconds(engine, shape, m, b) for m in sizes} for b in (bits, 32.0))
    fitted = evidence.fit(shape, bits, narrow, (1, 128))
    about = (shape, bits, 32.0, "float32", knee(fitted, bits))
    assert fitted.bytes_per_s == pytest.approx(40e9)
    assert [claim.passed for claim in evidence.decay(sizes, narrow, wide, fitted, about)] == [True, True]
    risen = {**narrow, 64: narrow[64] / 3}
    assert [claim.passed for claim in evidence.decay(sizes, risen, wide, fitted, about)] == [False, False]


def test_matrices_that_are_timed_are_of_the_form(evidence: ModuleType) -> None:
    for spec, bits in ((evidence.DENSE, 4.125), (evidence.SPARSE, 3.125)):
        packed = evidence.filled(spec, 512, 2048)
        assert packed.bits_per_value == bits
    grown = evidence.peak_growth(lambda: np.ones(1 << 22))
    assert grown is None or grown > 30e6

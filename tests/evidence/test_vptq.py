"""What VPTQ's verdicts hang on: the variants it is compared with, and the count of bits."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from memwall.cli.evidence import load_experiment
from memwall.compress.base import Statistics
from memwall.formats import codec
from memwall.systems import find_system
from tests.compress.test_spqr import layer
from tests.kernels.codebooks import random_codebooks


@pytest.fixture(scope="module")
def vptq() -> ModuleType:
    return load_experiment(find_system("vptq"))


def test_without_a_sweep_no_column_makes_up_for_another(vptq: ModuleType) -> None:
    weight, statistics = layer(64, 24)
    for weighted in (True, False):
        form = vptq.without_sweep("vptq-v4-k16", vptq.Vptq(refine=0), weighted=weighted)(weight, statistics)
        decoded = codec(form.spec).decode(form)
        books = form.buffers["centroids"][:-16].reshape(16, 4).astype(np.float32)
        vectors = weight.reshape(16, 4, 24).transpose(0, 2, 1)
        nearest = books[np.square(vectors[:, :, None] - books).sum(axis=3).argmin(axis=2)]
        np.testing.assert_allclose(decoded, nearest.transpose(0, 2, 1).reshape(64, 24), atol=1e-6)


def test_vectors_of_one_column_are_those_of_one_row(vptq: ModuleType) -> None:
    """At length 1 both are GPTQ with a codebook: the losses are alike."""
    weight, statistics = layer(64, 24)
    decoded = vptq.together(weight, statistics, 1, 8)
    ours = vptq.vptq("vptq-v1-k8-ordered", vptq.Vptq(refine=0))(weight, statistics)
    losses = [statistics.error(values - weight) for values in (decoded, codec(ours.spec).decode(ours))]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    wide = vptq.together(weight, statistics, 5, 64)  # 24 columns do not divide
    assert np.isfinite(wide).all()
    assert statistics.error(wide - weight) < statistics.error(weight)


@pytest.mark.parametrize("spec", ["vptq-v4-k16-ordered", "vptq-v3-k8-r16-g2-o100v2k4-ordered-norm"])
def test_bits_counted_as_in_the_paper_are_those_stored_but_for_padding(vptq: ModuleType, spec: str) -> None:
    packed = random_codebooks(spec, (240, 640))
    stored = 8 * packed.nbytes
    assert 0 < stored - vptq.paper_bits(packed) < 0.06 * stored


def test_drawn_forms_are_whole(vptq: ModuleType) -> None:
    form = vptq.drawn("vptq-v8-k256-r16-ordered", (64, 96), np.random.default_rng(0))
    assert form.nbytes == codec(form.spec).nbytes((64, 96))
    values = codec(form.spec).decode(form)
    assert np.isfinite(values).all()
    assert len(np.unique(values[:8], axis=1).T) > 40
    assert Statistics.identity(96).error(values) > 0

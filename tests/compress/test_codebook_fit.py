"""The fit of centroids: its matrix and its products without one are the same form; what it says is lost is lost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from memwall.compress import codebook_fit
from memwall.compress.codebook_fit import fitted
from memwall.compress.vptq import Vptq
from memwall.formats import codec
from memwall.formats.vptq import VptqCodec
from tests.compress.test_spqr import layer

SPECS = [
    "vptq-v4-k16-ordered",
    "vptq-v3-k8-r4-g2-ordered",  # 40 rows: a last vector of one
    "vptq-v1-k4-g2-b6",
    "vptq-v2-k8-r4-b6-ordered",  # a last block of four rows
    "vptq-v3-k8-norm",
    "vptq-v3-k8-r8-g2-o100v2k4-ordered-norm",  # outliers: no one matrix for all coordinates
]


def begun(spec: str) -> tuple[Any, ...]:
    weight, statistics = layer(40, 64)
    form = VptqCodec.parse(spec)
    method = Vptq(refine=0, iterations=3, norm="deviation" if form.norm else "none")
    factored = statistics.factor(0.02, form.ordered)
    ordered = np.ascontiguousarray(weight[:, factored.order])
    columns = method._swept(form, ordered, statistics.hessian.diagonal()[factored.order].astype(np.float64), factored)
    return columns, ordered, statistics, factored.order, weight


@pytest.mark.parametrize("spec", SPECS)
def test_with_and_without_its_matrix(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    columns, ordered, statistics, order, _ = begun(spec)
    found = fitted(columns, ordered, statistics, order, 0.02, 12)
    monkeypatch.setattr(codebook_fit, "_form", lambda plain, hessian: plain.times)
    plain = fitted(columns, ordered, statistics, order, 0.02, 12)
    assert found[1] == pytest.approx(plain[1], rel=1e-4)
    for ours, theirs in zip(found[0], plain[0], strict=True):
        if ours is not None and theirs is not None:
            np.testing.assert_allclose(ours.main, theirs.main, atol=2e-2 * float(np.abs(theirs.main).max()))


@pytest.mark.parametrize("spec", SPECS)
def test_what_is_lost(spec: str) -> None:
    columns, ordered, statistics, order, weight = begun(spec)
    hessian = statistics.hessian + 0.02 * statistics.hessian.diagonal().mean() * np.eye(64, dtype=np.float32)

    def loss() -> float:
        difference = codec(spec).decode(columns.finish()) - weight
        return float(np.einsum("ij,ij->", difference @ hessian, difference, dtype=np.float64))

    assert fitted(columns, ordered, statistics, order, 0.02, 0)[1] == pytest.approx(loss(), rel=1e-4)
    before = loss()
    columns.books, lost = fitted(columns, ordered, statistics, order, 0.02, 20)
    assert lost == pytest.approx(loss(), rel=1e-3)
    assert lost < before

"""BiLLM: what is stored is what was swept, later blocks make up for earlier ones, and whole runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from memwall.compress import weight_method
from memwall.compress.base import MethodConfig, Statistics
from memwall.compress.billm import Billm
from memwall.errors import InputError
from memwall.formats import codec
from memwall.formats.sign_mask_fit import billm_block
from tests.compress.test_spqr import layer
from tests.compress.tiny_model import make_model
from tests.compress.whole_run import check_refused, check_whole_run

FORM = MethodConfig(spec="billm")


def loss(weight: np.ndarray, statistics: Statistics, method: Billm) -> float:
    packed = method.compress(weight, statistics, FORM)
    return statistics.error(codec(packed.spec).decode(packed) - weight) / statistics.error(weight)


def test_identity_is_the_codec_s_own_encoding() -> None:
    weight, _ = layer(37, 300)
    nearest = codec("billm").encode(weight)
    for statistics in (None, Statistics.identity(300)):
        packed = Billm(order="identity").compress(weight, statistics, FORM)
        for name, buffer in nearest.buffers.items():
            np.testing.assert_array_equal(packed.buffers[name], buffer)


def test_feedback_reaches_later_blocks_only() -> None:
    """The first block is rounded as it stands; with correlated inputs the whole loses less than block by block."""
    weight, statistics = layer(64, 384)
    plain = Billm(order="identity")
    swept = codec("billm").decode(plain.compress(weight, statistics, FORM))[:, :128]
    block = billm_block(weight[:, :128], statistics.factor(0.01, False).pivots[:128])
    assert (np.abs(swept - block.values) < 1e-3).mean() > 0.999  # but for ties
    parts = [Billm().compress(weight[:, i : i + 128], None, FORM) for i in range(0, 384, 128)]
    apart = np.concatenate([codec("billm").decode(each) for each in parts], axis=1) - weight
    assert loss(weight, statistics, Billm()) < 0.8 * statistics.error(apart) / statistics.error(weight)


def test_far_better_than_one_sign_and_settings_matter() -> None:
    weight, statistics = layer(128, 256)
    single = codec("binary").encode(weight)
    rounded = statistics.error(codec("binary").decode(single) - weight) / statistics.error(weight)
    variants = {
        "plain": Billm(),
        "scores": Billm(split="scores"),
        "identity": Billm(order="identity"),
        "columns": Billm(feedback="columns"),
    }
    found = {name: loss(weight, statistics, method) for name, method in variants.items()}
    assert found["plain"] < 0.5 * rounded
    assert len(set(found.values())) == 4
    assert found["columns"] < found["plain"] < found["identity"]
    assert max(found.values()) < rounded


def test_bad_settings_and_statistics_of_another_layer() -> None:
    with pytest.raises(InputError, match="activation, identity"):
        weight_method("billm", {"order": "random"})
    with pytest.raises(InputError, match="sizes, scores"):
        weight_method("billm", {"split": "none"})
    with pytest.raises(InputError, match="blocks, columns"):
        weight_method("billm", {"feedback": "none"})
    weight, statistics = layer(16, 32)
    with pytest.raises(InputError, match="do not fit"):
        Billm().compress(weight[:, :16], statistics, FORM)


def test_whole_runs(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source")
    report = check_whole_run(source, tmp_path, "billm", "billm")
    assert all(0 < error < 1 for error in report.errors.values())
    check_refused(source, tmp_path, "billm", 2.0, "--bits 1.1")
    check_refused(source, tmp_path, "billm", "int4", "billm makes its own format")
    check_refused(source, tmp_path, "gptq", "billm", "--method billm")

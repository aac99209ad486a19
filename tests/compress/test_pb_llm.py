"""PB-LLM: salient weights are those that would cost most, errors are made up for, and whole runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from memwall.compress import weight_method
from memwall.compress.base import MethodConfig, Statistics
from memwall.compress.pb_llm import PbLlm
from memwall.errors import InputError
from memwall.formats import codec
from memwall.formats.sign_mask import PbLlmCodec
from tests.compress.test_spqr import layer
from tests.compress.tiny_model import make_model
from tests.compress.whole_run import check_refused, check_whole_run


def loss(weight: np.ndarray, statistics: Statistics, spec: str = "pbllm-s100", **settings: object) -> float:
    packed = PbLlm(**settings).compress(weight, statistics, MethodConfig(spec=spec))  # type: ignore[arg-type]
    return statistics.error(codec(spec).decode(packed) - weight) / statistics.error(weight)


def test_identity_is_the_codec_s_own_encoding() -> None:
    weight, _ = layer(37, 300)
    nearest = codec("pbllm-s100").encode(weight)
    for statistics in (None, Statistics.identity(300)):
        packed = PbLlm().compress(weight, statistics, MethodConfig(spec="pbllm-s100"))
        for name, buffer in nearest.buffers.items():
            np.testing.assert_array_equal(packed.buffers[name], buffer)


def test_salient_weights_are_the_costliest_of_the_first_block() -> None:
    weight, statistics = layer(64, 256)
    form = codec("pbllm-s100")
    assert isinstance(form, PbLlmCodec)
    packed = PbLlm().compress(weight, statistics, MethodConfig(spec=form.spec))
    mask = form.unpack_bits(packed).masks[:, :128]
    costs = np.square(weight[:, :128]) * statistics.factor(0.01, False).pivots[:128]
    assert mask.sum() == form.num_salient(64, 128)
    assert costs[mask].min() >= costs[~mask].max()


def test_all_salient_is_eight_bits_and_none_is_a_sign() -> None:
    weight, statistics = layer(64, 256)
    assert loss(weight, statistics, "pbllm-s1000") < 1e-3
    losses = [loss(weight, statistics, f"pbllm-s{share}") for share in (0, 50, 100, 143, 300)]
    assert losses == sorted(losses, reverse=True)


def test_feedback_scores_and_weighted_means_each_help() -> None:
    weight, statistics = layer(128, 256)
    plain = codec("pbllm-s100").encode(weight)
    rounded = statistics.error(codec("pbllm-s100").decode(plain) - weight) / statistics.error(weight)
    whole = loss(weight, statistics)
    assert whole < 0.8 * rounded
    assert whole < loss(weight, statistics, score="magnitude")
    assert loss(weight, statistics, means="weighted") < min(whole, loss(weight, statistics, means="published"))


def test_bits_are_those_of_the_paper() -> None:
    method = PbLlm()
    assert method.form(1.7) == "pbllm-s100"
    assert method.form(2.0) == "pbllm-s143"
    assert method.form(1) == "pbllm-s0"
    for bits in (0.9, 8.5):
        with pytest.raises(InputError, match="1 to 8 bits"):
            method.form(bits)
    with pytest.raises(InputError, match="hessian, magnitude"):
        weight_method("pb-llm", {"score": "random"})
    with pytest.raises(InputError, match="counted, published, weighted"):
        weight_method("pb-llm", {"means": "none"})


def test_whole_runs(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source")
    check_whole_run(source, tmp_path, "pb-llm", "pbllm-s100")
    check_refused(source, tmp_path, "pb-llm", "int4", "pb-llm makes its own formats")
    check_refused(source, tmp_path, "gptq", "pbllm-s100", "--method pb-llm")

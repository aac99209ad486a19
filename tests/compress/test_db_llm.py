"""DB-LLM on the shared sweep: H = I is rounding, errors are made up for, and whole runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from memwall.compress.base import MethodConfig, Statistics
from memwall.compress.db_llm import DbLlm
from memwall.compress.gptq import Gptq
from memwall.errors import InputError
from memwall.formats import codec
from tests.compress.test_spqr import layer
from tests.compress.tiny_model import make_model
from tests.compress.whole_run import check_refused, check_whole_run


def test_identity_is_the_codec_s_own_encoding() -> None:
    weight, _ = layer(37, 300)
    nearest = codec("dual2-g64").encode(weight)
    for statistics in (None, Statistics.identity(300)):
        packed = DbLlm().compress(weight, statistics, MethodConfig(spec="dual2-g64"))
        for name, buffer in nearest.buffers.items():
            np.testing.assert_array_equal(packed.buffers[name], buffer)


@pytest.mark.parametrize("activation_order", [True, False])
def test_free_scales_beat_integers_of_two_bits_at_equal_bytes(activation_order: bool) -> None:
    weight, statistics = layer(128, 256)

    def error(method: DbLlm | Gptq, spec: str) -> float:
        packed = method.compress(weight, statistics, MethodConfig(spec=spec, activation_order=activation_order))
        assert packed.nbytes == codec("dual2-g128").nbytes(weight.shape)
        return statistics.error(codec(spec).decode(packed) - weight)

    ours = error(DbLlm(), "dual2-g128")
    assert ours < error(Gptq(), "int2-g128-asym")
    rounded = codec("dual2-g128").decode(codec("dual2-g128").encode(weight))
    assert ours < 0.5 * statistics.error(rounded - weight)


def test_bits() -> None:
    assert DbLlm().form(2) == "dual2-g128"
    assert DbLlm().form("dual2-g64") == "dual2-g64"
    with pytest.raises(InputError, match="--bits 2"):
        DbLlm().form(3)


def test_whole_runs(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source")
    check_whole_run(source, tmp_path, "db-llm", "dual2-g128")
    check_refused(source, tmp_path, "db-llm", "int2", "db-llm makes its own formats")

"""What XQuant's verdicts hang on: the written-out model, the direct form, the bytes counted."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from memwall import kv
from memwall.cli.evidence import load_experiment
from memwall.systems import find_system


@pytest.fixture(scope="module")
def xquant() -> ModuleType:
    return load_experiment(find_system("xquant"))


def sizes(xquant: ModuleType) -> object:
    return xquant.kivi.Sizes(
        windows=1, step_tokens=16, recall_tries=1, rounds=1, prompt_tokens=130, decoded_tokens=32, recall_tokens=64
    )


def test_written_out_heads_are_the_same_model(xquant: ModuleType) -> None:
    demos = [xquant.LatentDemo(None, sizes(xquant), written_out=written) for written in (False, True)]
    assert demos[1].shape.row_values == demos[1].shape.hidden_size == 256
    window = next(demos[0].windows())[:130]
    logits = [demo.decoder.forward(window, demo.cache("float32")) for demo in demos]
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-3)
    assert demos[1].inputs().shape == (8, 130, 256)


def test_the_direct_form_is_the_cache_without_its_directions(xquant: ModuleType) -> None:
    demo = xquant.LatentDemo(None, sizes(xquant), written_out=False)
    scores = xquant.Scores(demo, lambda what: None)
    assert xquant.direct_score(scores, 16).divergence < 1e-4
    assert xquant.direct_score(scores, 2).divergence > 0.01


def test_bytes_counted_are_those_that_grow(xquant: ModuleType) -> None:
    shape = xquant.ONE_B
    for policy in ("xquant(4bit)", "xquant(2bit,cl=1)", "kivi", "float16"):
        sizes = kv.predict(policy, shape, 4096)
        assert set(sizes) - set(xquant.GROWING) <= {"kv/rebuild", "kv/factors", "kv/staging"}

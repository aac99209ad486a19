"""Vectors of texts through OpenAI's own client."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import openai
import pytest

from memwall.errors import InputError
from memwall.models.pooling import pooling_of
from tests.serve.conftest import Running, Starter

TEXTS = ["The river rose in the spring.", "In spring the water of the river rose.", "def add(a, b):\n    return a + b"]


def test_near_texts_have_near_vectors(server: Running) -> None:
    answer = server.client().embeddings.create(model="demo", input=TEXTS, encoding_format="float")
    vectors = np.array([one.embedding for one in answer.data])
    assert [one.index for one in answer.data] == [0, 1, 2]
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    near = vectors @ vectors.T
    assert near[0, 1] > max(near[0, 2], near[1, 2])
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 20
    coded = server.client().embeddings.create(model="demo", input=TEXTS)  # the client asks for base64
    np.testing.assert_allclose([one.embedding for one in coded.data], vectors, atol=1e-6)
    raw = server.post("/v1/embeddings", {"input": [5, 6, 7], "encoding_format": "base64"}).json()["data"]
    assert np.frombuffer(base64.b64decode(raw[0]["embedding"]), "<f4").shape == vectors[0].shape


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "input is missing"),
        ({"input": []}, "not empty"),
        ({"input": [1, "a"]}, "token ids"),
        ({"input": "a", "dimensions": 7}, "dimensions is 7"),
        ({"input": "a", "encoding_format": "hex"}, "float or base64"),
        ({"input": "a " * 600}, "the context is 512"),
        ({"input": "a", "model": "other"}, "is not here"),
        ({"input": "a", "stream": True}, "unknown parameter"),
    ],
)
def test_what_is_wrong_with_a_body(server: Running, body: dict[str, object], words: str) -> None:
    answer = server.post("/v1/embeddings", body)
    assert answer.status_code == (404 if "model" in body else 400)
    assert words in answer.json()["error"]["message"]


def test_a_model_says_how_it_is_pooled(tmp_path: Path) -> None:
    assert pooling_of(tmp_path) == "last"
    path = tmp_path / "1_Pooling" / "config.json"
    path.parent.mkdir()
    for asked, kind in (("lasttoken", "last"), ("mean_tokens", "mean")):
        modes = {f"pooling_mode_{name}": name == asked for name in ("cls_token", "mean_tokens", "lasttoken")}
        path.write_text(json.dumps({"word_embedding_dimension": 8, **modes}))
        assert pooling_of(tmp_path) == kind
    path.write_text(json.dumps({"pooling_mode_cls_token": True}))
    with pytest.raises(InputError, match="cls_token"):
        pooling_of(tmp_path)


def test_the_client_is_told_what_is_wrong(server: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="at most 64"):
        server.client().embeddings.create(model="demo", input=["a"] * 65)


def test_batches_formed_ahead_embed_too_and_leave_nothing_behind(server: Running, starter: Starter) -> None:
    other = starter("--memory", "160MB", "--weights", "int8", "--context", "512", "--scheduler", "nanoflow")
    vectors = [
        [one.embedding for one in each.client().embeddings.create(model="demo", input=TEXTS).data]
        for each in (server, other)
    ]
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-4)
    assert other.end() == "memwall: ended\n"


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
@pytest.mark.parametrize("scheduler", ["semi-pd", "nexus", "distserve"])
def test_two_processes_embed_too(server: Running, starter: Starter, scheduler: str) -> None:
    options = ("--memory", "220MB", "--weights", "int8", "--context", "512", "--pooling", "last")
    other = starter(*options, "--scheduler", scheduler)
    vectors = [
        [one.embedding for one in each.client().embeddings.create(model="demo", input=TEXTS).data]
        for each in (server, other)
    ]
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-4)
    assert "/v1/embeddings" in other.get("/openapi.json").json()["paths"]
    assert other.end() == "memwall: ended\n"

"""Answers in a form, penalties and bias, through OpenAI's own client."""

from __future__ import annotations

import datetime
import json
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field

from memwall.models import DEMO_DIRECTORY
from memwall.models.tokenizer import Tokenizer
from tests.serve.conftest import Running, Starter

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "people": {"type": "integer"}},
    "required": ["city", "people"],
    "additionalProperties": False,
}
FORM: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": SCHEMA}}
ASK: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "Which city?"}], "max_tokens": 200}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_is_kept_to(server: Running, temperature: float, stream: bool) -> None:
    ask = {**ASK, "response_format": FORM, "temperature": temperature, "seed": 7, "stream": stream}
    answer = server.client().chat.completions.create(**ask)
    if stream:
        chunks = [chunk.choices[0] for chunk in answer if chunk.choices]
        text, finish = "".join(one.delta.content or "" for one in chunks), chunks[-1].finish_reason
    else:
        text, finish = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert finish == "stop"
    value = json.loads(text)
    assert list(value) == ["city", "people"]
    assert isinstance(value["people"], int)


def test_choices_and_neighbours_are_each_their_own(server: Running) -> None:
    client = server.client()
    ask: dict[str, Any] = {"response_format": FORM, "n": 3, "seed": 1, "temperature": 1.0, "logprobs": True}
    both = client.chat.completions.create(**ASK, **ask, top_logprobs=2)
    texts = [choice.message.content for choice in both.choices]
    assert len(set(texts)) == 3
    assert all(set(json.loads(text)) == {"city", "people"} for text in texts)
    told = both.choices[0].logprobs.content
    assert all(len(one.top_logprobs) == 2 and one.logprob <= 0 for one in told)
    plain = client.chat.completions.create(**{**ASK, "max_tokens": 8}, temperature=0.0)
    assert not plain.choices[0].message.content.startswith("{")


class Place(BaseModel):
    """Made up."""

    kind: Literal["city", "river"]
    name: str = Field(max_length=10)
    near: list[Place] = Field(max_length=1)
    since: datetime.date | None


def test_pydantic_models_go_through_the_client(server: Running) -> None:
    ask = {**ASK, "max_tokens": 400, "temperature": 1.0, "seed": 5}
    schema = {"name": "place", "strict": True, "schema": Place.model_json_schema()}
    form: dict[str, Any] = {"response_format": {"type": "json_schema", "json_schema": schema}}
    answer = server.client().chat.completions.create(**ask, **form)
    if answer.choices[0].finish_reason == "stop":
        assert Place.model_validate_json(answer.choices[0].message.content).kind in ("city", "river")
    # what the client makes of a model by itself
    from openai.lib._parsing._completions import type_to_response_format_param

    made = type_to_response_format_param(Place)
    assert server.post("/v1/chat/completions", {**ASK, "max_tokens": 5, "response_format": made}).status_code == 200


def test_any_object(server: Running) -> None:
    client = server.client()
    answer = client.chat.completions.create(
        **{**ASK, "max_tokens": 400}, response_format={"type": "json_object"}, temperature=0.8, seed=3
    )
    choice = answer.choices[0]
    assert choice.message.content.lstrip().startswith("{")
    assert choice.finish_reason == "length" or isinstance(json.loads(choice.message.content), dict)


def test_penalties_and_bias_change_the_answer(server: Running) -> None:
    client, tokenizer = server.client(), Tokenizer.from_directory(DEMO_DIRECTORY)
    ask: dict[str, Any] = {"model": "demo", "prompt": "a a a a", "max_tokens": 30, "temperature": 0.0}
    plain = client.completions.create(**ask).choices[0].text
    varied = client.completions.create(**ask, frequency_penalty=2.0, presence_penalty=2.0).choices[0].text
    assert len(set(tokenizer.encode(varied))) > len(set(tokenizer.encode(plain)))
    token = tokenizer.encode(" city", add_bos=False)[0]
    forced = client.completions.create(**ask, logit_bias={str(token): 100}).choices[0].text
    assert set(tokenizer.encode(forced, add_bos=False)) == {token}


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"response_format": {"type": "xml"}}, "json_schema with its schema"),
        ({"response_format": "json"}, "json_schema with its schema"),
        ({"response_format": {"type": "json_schema"}}, "name and schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}, "not"),
        ({"response_format": {"type": "json_object"}, "extra_body": {"ignore_eos": True}}, "ignore_eos"),
        ({"logit_bias": {"-1": 1}}, "token id"),
        ({"logit_bias": {"99999": 1}}, "token id"),
        ({"logit_bias": {"5": 101}}, "-100 to 100"),
        ({"presence_penalty": -2.5}, "-2 to 2"),
    ],
)
def test_what_is_wrong_is_named(server: Running, extra: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        server.client().chat.completions.create(**ASK, **extra)


def test_two_workers_answer_the_same(server: Running, starter: Starter) -> None:
    phased = starter("--memory", "220MB", "--weights", "int8", "--context", "512", "--scheduler", "semi-pd")
    for extra in (
        {"response_format": FORM, "temperature": 1.0},
        {"frequency_penalty": 2.0},
        {"logit_bias": {"300": 9}},
    ):
        ask = {**ASK, "max_tokens": 40, "temperature": 0.0, "seed": 2, **extra}
        texts = [one.client().chat.completions.create(**ask).choices[0].message.content for one in (server, phased)]
        assert texts[0] == texts[1]

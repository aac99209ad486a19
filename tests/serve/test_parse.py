"""Bodies of any shape become requests or errors that name them, and nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.models import DEMO_DIRECTORY
from memwall.models.chat import ChatTemplate
from memwall.models.tokenizer import Tokenizer
from memwall.serve.fields import ApiError, read_object
from memwall.serve.guard import refuse
from memwall.serve.parse import CHAT, COMPLETION, Asked, Parser
from memwall.serve.settings import ServerSettings

TOKENIZER = Tokenizer.from_directory(DEMO_DIRECTORY)
PARSER = Parser(
    ServerSettings(name="demo"), TOKENIZER, ChatTemplate.from_directory(DEMO_DIRECTORY), context=128, vocab=4096
)
NAMES = st.sampled_from(["role", "content", "type", "text"])
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.sampled_from(["demo", "user"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(COMPLETION), ANY, max_size=6))
def test_any_completion_is_a_request_or_a_named_error(body: dict[str, Any]) -> None:
    check(lambda: PARSER.completion({"prompt": "a", **body}))


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(CHAT), ANY, max_size=6))
def test_any_chat_is_a_request_or_a_named_error(body: dict[str, Any]) -> None:
    check(lambda: PARSER.chat({"messages": [{"role": "user", "content": "a"}], **body}))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60) | ANY.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_an_object_or_a_named_error(raw: bytes) -> None:
    try:
        value = read_object(raw)
    except ApiError as error:
        status = error.status
    else:
        assert isinstance(value, dict)
        return
    assert status == 400


def check(parse: Any) -> None:
    try:
        asked = parse()
    except ApiError as error:
        told = error
    else:
        check_requests(asked)
        return
    assert told.status in (400, 404)
    assert json.loads(bytes(refuse(told).body))["error"]["message"]


def check_requests(asked: Asked) -> None:
    assert asked.requests
    for request in asked.requests:
        assert 0 < len(request.prompt) < 128
        assert 1 <= request.sampling.max_new_tokens <= 128 - len(request.prompt)
        assert all(0 <= token < 4096 for token in request.prompt)


def test_choices_draw_from_seeds_of_their_own() -> None:
    asked = PARSER.completion({"prompt": ["a", "b"], "n": 2, "seed": (1 << 63) - 2, "temperature": 1})
    assert len({request.sampling.seed for request in asked.requests}) == 2
    assert asked.requests[0].prompt == asked.requests[1].prompt != asked.requests[2].prompt
    assert asked.prompt_tokens == len(asked.requests[0].prompt) + len(asked.requests[2].prompt)


def test_an_answer_is_as_long_as_the_context_leaves_where_a_chat_does_not_say() -> None:
    asked = PARSER.chat({"messages": [{"role": "developer", "content": [{"type": "text", "text": "hi"}]}]})
    only = asked.requests[0]
    assert len(only.prompt) + only.sampling.max_new_tokens == 128
    with pytest.raises(ApiError, match="leaves") as refused:
        PARSER.completion({"prompt": "a", "max_tokens": 128})
    assert refused.value.code == "context_length_exceeded"

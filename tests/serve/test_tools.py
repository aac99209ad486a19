"""Calls of tools through OpenAI's own client, and what templates are given."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import openai
import pytest
from pydantic import BaseModel, Field

from memwall.engine.sequence import Event
from memwall.models import DEMO_DIRECTORY, ModelConfig
from memwall.models.chat import ChatTemplate
from memwall.models.tokenizer import Tokenizer
from memwall.serve.choices import Choice
from memwall.serve.fields import ApiError
from memwall.serve.parse import Parser
from memwall.serve.settings import ServerSettings
from tests.serve.conftest import Running

PLACE = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "description": "Rain or sun.", "parameters": PLACE}},
    {"type": "function", "function": {"name": "now"}},
]
ASK: dict[str, Any] = {
    "model": "demo", "messages": [{"role": "user", "content": "Rain?"}], "max_tokens": 200, "tools": TOOLS, "seed": 3,
}  # fmt: skip
NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_named_tool_is_called_with_what_its_schema_wants(server: Running, temperature: float, stream: bool) -> None:
    ask = {**ASK, "tool_choice": NAMED, "temperature": temperature}
    if stream:
        with server.client().chat.completions.stream(**ask) as events:
            kinds = {event.type for event in events}
            choice = events.get_final_completion().choices[0]
        assert "tool_calls.function.arguments.delta" in kinds
    else:
        choice = server.client().chat.completions.create(**ask).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert not choice.message.content
    (call,) = choice.message.tool_calls or ()
    assert (call.type, call.function.name, len(call.id)) == ("function", "weather", 9)
    found = json.loads(call.function.arguments)
    assert list(found) == ["city", "days"]
    assert 1 <= found["days"] <= 9


def test_required_calls_some_tool_and_several_choices_are_each_their_own(server: Running) -> None:
    ask = {**ASK, "tool_choice": "required", "temperature": 1.0, "n": 3, "max_tokens": 300}
    answer = server.client().chat.completions.create(**ask)
    for choice in answer.choices:
        calls = choice.message.tool_calls
        assert calls
        assert {call.function.name for call in calls} <= {"weather", "now"}
        if choice.finish_reason == "tool_calls":
            assert all(isinstance(json.loads(call.function.arguments), dict) for call in calls)
    assert len({call.id for choice in answer.choices for call in choice.message.tool_calls or ()}) >= 3


class Trip(BaseModel):
    """Made up."""

    place: str = Field(pattern="^[A-Z][a-z]{2,8}$")
    nights: int = Field(ge=1, lt=30)


def test_pydantic_tools_go_through_the_client(server: Running) -> None:
    tool = openai.pydantic_function_tool(Trip)
    ask = {
        **ASK,
        "tools": [tool],
        "tool_choice": {"type": "function", "function": {"name": "Trip"}},
        "temperature": 1.0,
    }
    answer = server.client().chat.completions.parse(**ask)
    call = (answer.choices[0].message.tool_calls or [])[0]
    assert isinstance(call.function.parsed_arguments, Trip)


def test_auto_and_none_answer_with_text_and_a_conversation_goes_on(server: Running) -> None:
    client = server.client()
    for choice in ("auto", "none"):
        answer = client.chat.completions.create(**{**ASK, "max_tokens": 8}, tool_choice=choice)
        assert answer.choices[0].finish_reason in ("length", "stop")
        assert answer.choices[0].message.content is not None
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages: list[Any] = [
        *ASK["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "sun"},
    ]
    assert client.chat.completions.create(**{**ASK, "messages": messages, "max_tokens": 5}).choices


def test_cut_short_a_call_is_told_as_far_as_it_came(server: Running) -> None:
    ask = {**ASK, "tool_choice": NAMED, "max_tokens": 30, "temperature": 0.0}
    choice = server.client().chat.completions.create(**ask).choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.content or choice.message.tool_calls


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"tools": "weather"}, "tools must be a list"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "type: function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "its name must be"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "two tools"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": 3}}]}, "parameters"),
        ({"tool_choice": "maybe"}, "tool_choice must be"),
        ({"tool_choice": {"type": "function", "function": {"name": "none"}}}, "none of the tools"),
        ({"tools": [], "tool_choice": "required"}, "no tools"),
        ({"tool_choice": "required", "ignore_eos": True}, "ignore_eos"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"not": {}}}}],
          "tool_choice": "required"}, "tool 'a'.*'not'"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}, "tool_calls must be"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "[1"}}]}]},
         "JSON object"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(server: Running, extra: dict[str, Any], words: str) -> None:
    answer = server.post("/v1/chat/completions", {**ASK, **extra})
    assert answer.status_code == 400
    assert re.search(words, answer.json()["error"]["message"]), answer.text


# ---- templates ------------------------------------------------------------------------------------------------------

QWEN = (
    "{% if tools %}<|tools|>{{ tools | tojson }}<|end|>{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    '{% for c in m.tool_calls or [] %}<tool_call>\n{"name": "{{ c.function.name }}", '
    '"arguments": {{ c.function.arguments | tojson }}}{% endfor %}'
    "{% endfor %}[assistant]"
)
TOKENIZER = Tokenizer.from_directory(DEMO_DIRECTORY)
HISTORY: list[Any] = [
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "tool_calls": [{"function": {"name": "now", "arguments": '{"a": 1}'}}]},
    {"role": "tool", "tool_call_id": "x", "content": "noon"},
    {"role": "tool", "tool_call_id": "y", "content": "one"},
]


def parser_of(template: ChatTemplate) -> Parser:
    return Parser(
        ServerSettings(name="demo"), TOKENIZER, template, context=2048, vocab=4096,
        eos=ModelConfig.from_directory(DEMO_DIRECTORY).eos_token_ids,
    )  # fmt: skip


def prompt_of(parser: Parser, body: dict[str, Any]) -> str:
    return TOKENIZER.decode(parser.chat(body).requests[0].prompt, False)


def test_a_template_that_knows_tools_gets_them() -> None:
    plain = ChatTemplate.from_directory(DEMO_DIRECTORY)
    for template in (replace(plain, text=QWEN), replace(plain, tool_text=QWEN)):
        parser = parser_of(template)
        text = prompt_of(parser, {"messages": HISTORY, "tools": TOOLS, "tool_choice": "required"})
        assert text.startswith('<|tools|>[{"type": "function", "function": {"name": "weather"')
        assert '<tool_call>\n{"name": "now", "arguments": {"a": 1}}[tool]noon[tool]one[assistant]' in text
        assert text.endswith("<tool_call>\n")
        assert not prompt_of(parser, {"messages": HISTORY[:1], "tools": TOOLS}).endswith("<tool_call>\n")


def test_a_template_that_knows_none_gets_them_as_text() -> None:
    parser = parser_of(ChatTemplate.from_directory(DEMO_DIRECTORY))
    text = prompt_of(parser, {"messages": HISTORY, "tools": TOOLS})
    assert text.index("<tools>") < text.index('"name": "weather"') < text.index("Rain?") < text.index("noon")
    assert '<tool_call>\n{"name": "now", "arguments": {"a": 1}}\n</tool_call>' in text
    assert text.count("<tool_response>") == 2
    system = [{"role": "system", "content": "Be kind."}, *HISTORY]
    text = prompt_of(parser, {"messages": system, "tools": TOOLS})
    assert text.index("Be kind.") < text.index("<tools>") < text.index("Rain?")
    assert "<tools>" not in prompt_of(parser, {"messages": HISTORY, "tools": TOOLS, "tool_choice": "none"})


def test_an_answer_that_calls_is_read() -> None:
    parser = parser_of(ChatTemplate.from_directory(DEMO_DIRECTORY))
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n'
    text = f"Well.\n{call}</tool_call>\n{call}"
    for parallel, count in ((True, 2), (False, 1)):
        asked = parser.chat({"messages": HISTORY[:1], "tools": TOOLS, "parallel_tool_calls": parallel})
        choice = Choice(TOKENIZER, asked.stop, asked.calls)
        ids = TOKENIZER.encode(text, add_bos=False)
        for place, token in enumerate(ids):
            choice.push(Event(id=0, token=token, finish="stop" if place == len(ids) - 1 else None))
        assert "".join(choice.text) == "Well."
        assert choice.finish == "tool_calls"
        assert sum(call.name == "now" for call in choice.calls) == count


def test_a_marker_that_is_a_special_token_is_seen() -> None:
    import tokenizers

    made = tokenizers.Tokenizer.from_str(TOKENIZER._tokenizer.to_str())
    made.add_special_tokens(["[TOOL_CALLS]"])
    tokenizer = Tokenizer(made, TOKENIZER.special_tokens)
    listed = QWEN.replace("<tool_call>\n", "[TOOL_CALLS] [")
    template = replace(ChatTemplate.from_directory(DEMO_DIRECTORY), text=listed)
    parser = Parser(ServerSettings(name="demo"), tokenizer, template, context=2048, vocab=4200)
    asked = parser.chat({"messages": HISTORY[:1], "tools": TOOLS})
    choice = Choice(tokenizer, asked.stop, asked.calls)
    for token in tokenizer.encode('[TOOL_CALLS] [{"name": "now", "arguments": {"a": 1}}]', add_bos=False):
        choice.push(Event(id=0, token=token))
    choice.push(Event(id=0, finish="stop"))
    assert (choice.finish, "".join(choice.text)) == ("tool_calls", "")
    assert "".join(call.arguments for call in choice.calls) == '{"a": 1}'


def test_calls_or_a_value_in_a_form() -> None:
    parser = parser_of(ChatTemplate.from_directory(DEMO_DIRECTORY))
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}}
    guide = parser.chat({"messages": HISTORY[:1], "tools": TOOLS, "response_format": form}).requests[0].guide
    assert guide is not None
    for text in ("12", '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'):
        assert guide.walker.complete(guide.walker.feed(guide.walker.start, text.encode()))
    with pytest.raises(ApiError, match="end-of-text"):
        Parser(
            ServerSettings(name="demo"), TOKENIZER, parser.template, context=2048, vocab=4096
        ).chat({"messages": HISTORY[:1], "tools": TOOLS, "tool_choice": "required"})  # fmt: skip

"""Calls in a text that comes in pieces: whatever the pieces, the same calls and the same text."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.engine.call_forms import BARE, FORMS, LISTED, TAGGED, CallForm
from memwall.engine.call_grammar import CallRules, calls_spec, form_walker
from memwall.errors import InputError
from memwall.models.chat import ChatTemplate
from memwall.serve.call_probe import form_of_template
from memwall.serve.calls import CallReader, Calls

NAMES = ("weather", "sum")
TEXTS = [
    (TAGGED, 'So: \n<tool_call>\n{"name": "sum", "arguments": {"a": [1, "}"]}}\n</tool_call>', "So:",
     [("sum", {"a": [1, "}"]})]),
    (TAGGED, '<tool_call>{"name":"sum","arguments":{}}</tool_call>\n<tool_call>\n{"name": "weather", "arguments": '
     '{"c": "\\"x"}}\n</tool_call>', "", [("sum", {}), ("weather", {"c": '"x'})]),
    (TAGGED, '<tool_call>\n{"arguments": {"a": 1}, "name": "sum"}\n</tool_call> done', " done", [("sum", {"a": 1})]),
    (TAGGED, '<tool_call>\n{"name": "other", "arguments": {}}\n</tool_call>', None, []),
    (TAGGED, "a < b, <tool and <tool_calls>", None, []),
    (TAGGED, "<tool_call>\nnothing", None, []),
    (TAGGED, "  text \n", None, []),
    (LISTED, '[TOOL_CALLS] [{"name": "sum", "arguments": {"a": 1}, "id": "x"}, {"name": "weather", "arguments": {}}]',
     "", [("sum", {"a": 1}), ("weather", {})]),
    (BARE, '{"name": "sum", "parameters": {"a": {"b": []}}}', "", [("sum", {"a": {"b": []}})]),
    (BARE, ' {"name": "sum", "parameters": {}}; {"name": "sum", "parameters": {"a": 1}}', "",
     [("sum", {}), ("sum", {"a": 1})]),
    (BARE, '{"name": "city", "people": 3}', None, []),
    (BARE, "no {\"name\": \"sum\", \"parameters\": {}}", None, []),
]  # fmt: skip


def read(form: CallForm, pieces: list[str], *, begun: bool = False) -> tuple[str, list[tuple[str, str]]]:
    reader, text, calls = CallReader(Calls(form=form, names=NAMES, begun=begun)), "", []
    for shown, found in [*map(reader.push, pieces), reader.flush()]:
        text += shown
        for delta in found:
            if delta.name is not None:
                calls.append([delta.name, ""])
            assert delta.index == len(calls) - 1
            calls[-1][1] += delta.arguments
    return text, [(name, arguments) for name, arguments in calls]


@pytest.mark.parametrize(("form", "text", "shown", "calls"), TEXTS)
@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 130), max_size=12))
def test_calls_are_found_whatever_the_pieces(
    form: CallForm, text: str, shown: str | None, calls: list[Any], cuts: list[int]
) -> None:
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(places)]
    for some in (pieces, list(text)):
        found, called = read(form, some)
        assert found == (text if shown is None else shown)
        assert [(name, json.loads(arguments)) for name, arguments in called] == calls


def test_an_answer_that_begins_within_a_call() -> None:
    assert read(TAGGED, ['{"name": "sum", "argu', 'ments": {"a": 1'], begun=True) == ("", [("sum", '{"a": 1')])
    assert read(TAGGED, ['{"na'], begun=True) == ('{"na', [])


@settings(max_examples=200, deadline=None)
@given(
    st.text(alphabet='{}[]",:\\ \n<>/tool_callTOL;name"argumentsp', max_size=80), st.sampled_from(list(FORMS.values()))
)
def test_no_text_makes_it_fail_or_gets_lost(text: str, form: CallForm) -> None:
    found, called = read(form, list(text))
    assert called or found == text


TURN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
LAST = "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
TOLD = "{% if tools %}{{ tools | tojson }}{% endif %}"
ONE = '{"name": "{{ c.function.name }}", "%s": {{ c.function.arguments | tojson }}}'
EACH = "{% for c in m.tool_calls or [] %}"
FUNCTION = "<tool_call><function={{ c.function.name }}></tool_call>{% endfor %}"
TEMPLATES = {
    "qwen": (TOLD + TURN + EACH + "<tool_call>\n" + ONE % "arguments" + "\n</tool_call>{% endfor %}" + LAST, TAGGED),
    "mistral": (TOLD + TURN + "{% if m.tool_calls %}[TOOL_CALLS] [" + EACH + ONE % "arguments"
                + "{% endfor %}]{% endif %}" + LAST, LISTED),
    "mistral, narrow": (TOLD + TURN + "{% if m.tool_calls %}[TOOL_CALLS][" + EACH + ONE % "arguments"
                        + "{% endfor %}]{% endif %}" + LAST, replace(LISTED, opening="[TOOL_CALLS][")),
    "llama": (TOLD + TURN + EACH + ONE % "parameters" + "{% endfor %}<|eot|>" + LAST, BARE),
    "tools are not told": (TURN + EACH + ONE % "parameters" + "{% endfor %}" + LAST, None),
    "another form": (TOLD + TURN + EACH + FUNCTION + LAST, None),
    "calls are not written": (TOLD + TURN + LAST, None),
    "it fails": (TOLD + "{{ raise_exception('no') }}", None),
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_forms_are_those_that_templates_teach(name: str) -> None:
    text, form = TEMPLATES[name]
    assert form_of_template(ChatTemplate(source=name, text=text)) == form
    assert form_of_template(ChatTemplate(source=name, text=TURN + LAST, tool_text=text)) == form


PEOPLE = {
    "type": "object",
    "properties": {"n": {"$ref": "#/$defs/n"}},
    "required": ["n"],
    "$defs": {"n": {"type": "integer"}},
}


@pytest.mark.parametrize("form", list(FORMS.values()))
def test_the_grammar_of_a_form_is_what_its_reader_reads(form: CallForm) -> None:
    rules = CallRules(form=form, tools=[("sum", PEOPLE), ("weather", None)], most=2)
    spec = json.loads(json.dumps({"calls": calls_spec(rules)}))
    made, first = form_walker(spec), f'{{"name": "sum", "{form.key}": {{"n": 3}}}}'
    second = f'{{"name":"weather","{form.key}":{{"any": [1]}}}}'

    def takes(text: str) -> bool:
        return made.complete(made.feed(made.start, text.encode()))

    assert takes(first + form.closing)
    assert takes(first + form.between + second + form.closing)
    assert not takes(form.between.join([first] * 3) + form.closing)
    assert not takes(first.replace("3", '"3"') + form.closing)
    assert not takes(first.replace("sum", "other") + form.closing)
    text, called = read(form, [first + form.between + second + form.closing], begun=True)
    assert (text, [name for name, _ in called]) == ("", ["sum", "weather"])


def test_calls_or_a_value() -> None:
    rules = CallRules(form=TAGGED, tools=[("sum", None)], most=1, opened=False)
    made = form_walker({"schema": {"type": "integer"}, "calls": calls_spec(rules)})
    for text, taken in (
        ("17", True),
        ('<tool_call>\n{"name": "sum", "arguments": {}}\n</tool_call>', True),
        ("{}", False),
    ):
        assert made.complete(made.feed(made.start, text.encode())) == taken


def test_a_schema_that_is_not_known_names_its_tool() -> None:
    with pytest.raises(InputError, match=r"tool 'sum'.*uniqueItems"):
        form_walker(
            {"calls": calls_spec(CallRules(form=TAGGED, tools=[("sum", {"type": "array", "uniqueItems": True})]))}
        )

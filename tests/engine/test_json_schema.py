"""JSON by a grammar: what Python's reader takes is taken, what it refuses is not, and schemas hold."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.engine.grammar import DEAD, Grammar, Walker, byte_mask
from memwall.engine.json_schema import walker
from memwall.errors import InputError

ANY = walker(True)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**15) + 1, 10**15 - 1) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 3},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 2},
        "born": {"type": "string", "format": "date"},
    },
    "required": ["name", "tags"],
}
TREE = {
    "$defs": {"node": {"properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
                       "required": ["next"], "additionalProperties": False}},
    "$ref": "#/$defs/node",
}  # fmt: skip


def takes(found: Walker, text: str) -> bool:
    return found.complete(found.feed(found.start, text.encode()))


@settings(max_examples=200, deadline=None)
@given(VALUES, st.booleans(), st.sampled_from([None, 1]))
def test_every_value_is_taken(value: Any, plain: bool, indent: int | None) -> None:
    assert takes(ANY, json.dumps(value, ensure_ascii=plain, indent=indent))


@settings(max_examples=300, deadline=None)
@given(VALUES.map(json.dumps), st.integers(0, 40), st.sampled_from('"\\{}[],:0-.eE truefalsn\n\x00é'))
def test_what_is_taken_is_json(text: str, at: int, letter: str) -> None:
    broken = text[:at] + letter + text[at + 1 :]
    if takes(ANY, broken):
        json.loads(broken)


@pytest.mark.parametrize(
    "text", ['"\\ud800"', '"\\ud83d\\ude00"', "1.5e10", "-0", "01", "1.", "nul", '{"a" 1}', "[1,]"]
)
def test_corners(text: str) -> None:
    try:
        json.loads(text).encode() if text.startswith('"') else json.loads(text)
        good = True
    except ValueError:
        good = False
    assert takes(ANY, text) is good


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (None, ["{}", '{"a": [1, {"b": null}]}'], ["[]", "1", "", '{"a"}']),
        (PERSON,
         ['{"name":"x","tags":["a"]}', '{ "name": "é\\n3", "age": -3, "tags": ["b","a"], "born": "2026-01-31" }'],
         ['{"tags":["a"]}', '{"name":"","tags":["a"]}', '{"name":"long","tags":["a"]}', '{"name":"x","tags":[]}',
          '{"name":"x","tags":["c"]}', '{"tags":["a"],"name":"x"}', '{"name":"x","tags":["a"],"z":1}',
          '{"name":"x","tags":["a","b","a"]}', '{"name":"x","age":1.5,"tags":["a"]}']),
        (TREE, ['{"next":null}', '{"next":{"next":null}}'], ['{"next":1}', "null", "{}"]),
        ({"type": ["integer", "null"]}, ["12", "null"], ["1.5", '"x"']),
        ({"const": {"a": [1]}}, ['{"a":[1]}'], ['{"a":[2]}']),
        ({"type": "object", "additionalProperties": {"type": "boolean"}}, ["{}", '{"x":true}'], ['{"x":1}']),
        ({"properties": {"a": {"type": "null"}}, "additionalProperties": {"type": "integer"}},
         ["{}", '{"a":null}', '{"a":null,"b":2}', '{"b":2,"c":3}'], ['{"b":null}', '{"a":1.5}']),
        ({"type": "object", "properties": {}, "additionalProperties": False}, ["{}"], ['{"a":1}']),
        ({"type": "array", "maxItems": 0}, ["[]"], ["[1]"]),
        ({"type": "array", "items": {"type": "integer"}, "minItems": 2}, ["[1,2]", "[1,2,3]"], ["[1]", "[]"]),
        ({"type": "string", "format": "date-time"}, ['"2026-02-28T23:59:00Z"'],
         ['"2026-13-01T00:00:00Z"', '"2026-02-30T00:00:00Z"', '"0001-01-01T00:00:00Z"', '"2026-01-01T24:00:00Z"']),
        ({"type": "string", "format": "uuid"}, ['"0f8fad5b-d9cb-469f-a165-70867728950e"'], ['"0f8"']),
    ],
)  # fmt: skip
def test_schemas(schema: Any, good: list[str], bad: list[str]) -> None:
    found = walker(schema)
    assert [takes(found, text) for text in good] == [True] * len(good)
    assert [takes(found, text) for text in bad] == [False] * len(bad)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "integer", "multipleOf": 3}, "multipleOf"),
        ({"type": "date"}, "none of object"),
        ({"$ref": "http://x"}, "#/"),
        ({"$ref": "#/$defs/none"}, "no such place"),
        ({"$ref": "#"}, "describes no value"),
        ({"enum": []}, "enum"),
        ({"enum": [float("nan")]}, "no JSON value"),
        ({"properties": {}, "required": ["a"]}, "required"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "below"),
        ({"type": "array", "maxItems": 10**6}, "maxItems"),
        ({"type": "string", "format": "email"}, "format"),
        ({"anyOf": []}, "anyOf"),
        ({"allOf": [{}, {}]}, "allOf"),
        (3, "must be an object"),
    ],
)
def test_what_is_not_known_is_named(schema: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        walker(schema)


@settings(max_examples=200, deadline=None)
@given(VALUES)
def test_any_schema_is_a_grammar_or_an_error(schema: Any) -> None:
    with contextlib.suppress(InputError):
        walker(schema)


def test_deep_nesting_ends() -> None:
    state = ANY.feed(ANY.start, b"[" * 1000)
    assert state == DEAD
    schema: Any = {"type": "null"}
    for _ in range(100):
        schema = {"type": "array", "items": schema}
    with pytest.raises(InputError, match="nested deeper"):
        walker(schema)


def test_a_grammar_that_names_itself_first_is_dead() -> None:
    grammar = Grammar()
    symbol = grammar.declare()
    grammar.define(symbol, (symbol, grammar.one_of(byte_mask((65, 65)))))
    assert Walker(grammar, symbol).start == DEAD

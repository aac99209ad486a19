"""Schemas with patterns and bounds: what the grammar takes is what the standard describes, by other means."""

from __future__ import annotations

import json
import random
import re
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.engine.grammar import Walker
from memwall.engine.json_schema import walker
from memwall.errors import InputError


def takes(form: Walker, text: str) -> bool:
    return form.complete(form.feed(form.start, text.encode()))


def drawn(form: Walker, draw: random.Random, most: int = 400) -> str | None:
    """A text of the form, byte by byte at random; None where it does not end by itself."""
    state, made = form.start, bytearray()
    while len(made) < most:
        bits = form.next_bytes(state)
        if form.complete(state) and (not bits or draw.random() < 0.2):
            return made.decode()
        made.append(draw.choice([byte for byte in range(256) if bits >> byte & 1]))
        state = form.step(state, made[-1])
    return None


BOUND = st.integers(-1200, 1200) | st.integers(-(10**7), 10**7).map(lambda value: value / 1000)
NAMES = st.sampled_from(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"])


def within(value: Decimal, bounds: dict[str, Any]) -> bool:
    limits = {name: Decimal(repr(bound)) for name, bound in bounds.items()}
    return (
        value >= limits.get("minimum", value)
        and value <= limits.get("maximum", value)
        and ("exclusiveMinimum" not in limits or value > limits["exclusiveMinimum"])
        and ("exclusiveMaximum" not in limits or value < limits["exclusiveMaximum"])
    )


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(NAMES, BOUND, min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_numbers_keep_to_their_bounds(bounds: dict[str, Any], draw: random.Random) -> None:
    for kind in ("integer", "number"):
        try:
            form = walker({"type": kind, **bounds})
        except InputError:
            low = max(bounds.get("minimum", -1e9), bounds.get("exclusiveMinimum", -1e9))
            high = min(bounds.get("maximum", 1e9), bounds.get("exclusiveMaximum", 1e9))
            assert high - low < 1
            continue
        for _ in range(10):
            text = drawn(form, draw)
            assert text is not None
            assert within(Decimal(text), bounds), text
            assert kind == "number" or isinstance(json.loads(text), int)
        near = [Decimal(repr(bound)) + step for bound in bounds.values() for step in map(Decimal, (0, 1, -1, "0.25"))]
        for value in near:
            if kind == "number" or value == int(value):
                text = str(int(value)) if value == int(value) else format(value, "f")
                assert takes(form, text) == within(value, bounds), text


def test_bounds_at_their_edges() -> None:
    form = walker({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5})
    assert [takes(form, text) for text in ("0", "0.0", "0.0001", "0.5", "0.50", "0.501", "-0.1")] == [
        False, False, True, True, True, False, False,
    ]  # fmt: skip
    form = walker({"type": ["integer", "null"], "minimum": 17, "maximum": 17.5})
    assert [takes(form, text) for text in ("17", "18", "null", "017")] == [True, False, True, False]
    assert takes(walker({"type": "integer", "minimum": -(10**20)}), "-999999999999999")


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ({"minimum": "1"}, "must be a number"),
        ({"exclusiveMinimum": True}, "must be a number"),
        ({"minimum": 3, "maximum": 2}, "no value"),
        ({"minimum": 1e-300}, "digits"),
        ({"minimum": 10**16}, "no value"),
    ],
)
def test_bounds_that_cannot_be_kept_are_named(bounds: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        walker({"type": "integer", **bounds})


PATTERNS = [
    r"^[A-Z]{2}-\d{3,5}$", r"^(red|green|blue)$", r"^\w+@\w+\.(com|org)$", r"a+b?", r"^\+?[0-9]{1,3}( [0-9]{2,4})*$",
    r"^[^\"\\a-z]{0,4}$", r"^$", r"^a|b$", r"^(?:x|yz*){1,3}?$", r"^.\.\x41é[à-ü]$", r"^(a*)*$",
    r"^[\w.-]+$", r"^[\]-]$",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_is_drawn_matches(pattern: str) -> None:
    form, draw = walker({"type": "string", "pattern": pattern}), random.Random(pattern)
    found = [json.loads(text) for _ in range(60) if (text := drawn(form, draw)) is not None]
    assert found
    assert [text for text in found if not re.search(pattern, text, re.ASCII)] == []


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    "text", ["", "AB-123", "AB-12", "red", "a@b.org", "xaab", "+49 30 1234", "b", "xyz", "-", "é.Aéü"]
)
def test_texts_are_taken_where_they_match(pattern: str, text: str) -> None:
    quoted = json.dumps(text, ensure_ascii=False)
    assert takes(walker({"type": "string", "pattern": pattern}), quoted) == bool(re.search(pattern, text, re.ASCII))


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (r"(?=a)", "colon"), (r"\bword\b", r"\\b"), (r"(a)\1", r"\\1"), ("a$b", "anywhere but at the end"),
        ("(a", "without an end"), ("a)", "nothing opened"), ("*a", "nothing before it"), ("a{2,1}", "counts"),
        ("a{x}", "counts nothing"),
        ("[z-a]", "range"), ("[a", "an end in the middle"), ("(" * 99, "nesting"), (r"\uD800", "surrogate"),
        (r"a{9999}", "counts"),
    ],
)  # fmt: skip
def test_what_a_pattern_may_not_have_is_named(pattern: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        walker({"type": "object", "properties": {"p": {"type": "string", "pattern": pattern}}})


def test_a_pattern_stands_alone() -> None:
    with pytest.raises(InputError, match="beside pattern"):
        walker({"type": "string", "pattern": "a", "maxLength": 3})
    with pytest.raises(InputError, match="must be a text"):
        walker({"type": "string", "pattern": 3})

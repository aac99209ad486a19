"""Policy strings: what parses, to what, and what is said of the rest."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.kv.policy import Policy, parse


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("float16", "float16"),
        (" KIVI ", "kivi"),
        ("kivi()", "kivi"),
        ("kivi(2bit)", "kivi(bits=2)"),
        ("kivi( 4 bits , residual = 64 )", "kivi(bits=4,residual=64)"),
        ("kivi(4-bit,exact=bfloat16)", "kivi(bits=4,exact=bfloat16)"),
    ],
)
def test_canonical_form(text: str, canonical: str) -> None:
    assert str(parse(text)) == canonical
    assert parse(canonical) == parse(text)


@pytest.mark.parametrize(
    "text", ["", "(", "kivi(", "kivi)", "kivi(2bit", "kivi(=)", "kivi(a=b=c)", "kivi(2)", "2bit", "a b"]
)
def test_what_does_not_parse(text: str) -> None:
    with pytest.raises(InputError, match="KV policy"):
        parse(text)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text(max_size=40))
def test_any_text_parses_or_is_refused(text: str) -> None:
    try:
        policy = parse(text)
    except InputError:
        return
    assert parse(str(policy)) == policy


def test_integers() -> None:
    assert Policy("kivi", {"bits": "4"}).integers({"bits": 2, "group": 32}) == {"bits": 4, "group": 32}
    with pytest.raises(InputError, match="it takes bits"):
        Policy("kivi", {"bit": "4"}).integers({"bits": 2})

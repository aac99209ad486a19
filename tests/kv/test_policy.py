"""Policy strings: what parses, to what, and what is said of the rest."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall import kv
from memwall.errors import InputError
from memwall.kv.policy import Policy, parse, stacked


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("float16", "float16"),
        (" KIVI ", "kivi"),
        ("kivi()", "kivi"),
        ("kivi(2bit)", "kivi(bits=2)"),
        ("kivi( 4 bits , residual = 64 )", "kivi(bits=4,residual=64)"),
        ("kivi(4-bit,exact=bfloat16)", "kivi(bits=4,exact=bfloat16)"),
        ("snapkv(0.25, window=16)", "snapkv(0.25,window=16)"),
        (" snapkv(.25) + think(0.4)+KIVI(2bit)", "snapkv(.25)+think(0.4)+kivi(bits=2)"),
    ],
)
def test_canonical_form(text: str, canonical: str) -> None:
    assert str(parse(text)) == canonical
    assert parse(canonical) == parse(text)


@pytest.mark.parametrize(
    "text", ["", "(", "kivi(", "kivi)", "kivi(2bit", "kivi(=)", "kivi(a=b=c)", "+", "kivi+", "kivi(1,2)", "2bit", "a b"]
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


def test_endless_policies_are_refused() -> None:
    for text in ("snapkv(0.2)+" * 3000 + "kivi", f"kivi(bits={'9' * 5000})"):
        with pytest.raises(InputError, match="characters"):
            parse(text)


def test_integers() -> None:
    assert Policy("kivi", {"bits": "4"}).integers({"bits": 2, "group": 32}) == {"bits": 4, "group": 32}
    with pytest.raises(InputError, match="it takes bits"):
        Policy("kivi", {"bit": "4"}).integers({"bits": 2})


def test_numbers() -> None:
    defaults = {"amount": 0.5, "window": 32}
    assert parse("snapkv(.25,window=16)").numbers(defaults) == {"amount": 0.25, "window": 16}
    assert parse("snapkv").numbers(defaults) == defaults
    with pytest.raises(InputError, match=r"window='0\.5' is not a whole number"):
        parse("snapkv(window=0.5)").numbers(defaults)
    with pytest.raises(InputError, match="a bare number; it takes bits"):
        parse("kivi(2)").integers({"bits": 2})
    with pytest.raises(InputError, match="a bare number; it takes no settings"):
        parse("int4(2)").integers({})


def test_parts() -> None:
    whole = parse("snapkv(0.25)+think(0.4)+kivi(2bit)")
    assert [str(part) for part in whole.parts] == ["snapkv(0.25)", "think(0.4)", "kivi(bits=2)"]
    assert str(whole.inner) == "think(0.4)+kivi(bits=2)"
    assert stacked(whole.parts) == whole


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ("kivi", "exact, queries"),
        ("kv4", "exact"),
        ("bfp", "order, axis, top, exact"),
        ("snapkv", "pool"),
        ("cskv", "init"),
        ("epicache", "encoder"),
        ("lambda", "positions"),
    ],
)
def test_an_unknown_setting_is_answered_with_all_that_there_are(policy: str, words: str) -> None:
    shape = kv.CacheShape(num_layers=1, num_heads=2, num_kv_heads=2, head_dim=64)
    with pytest.raises(InputError, match="unknown setting 'nosuch'; it takes ") as refused:
        kv.held_bytes(f"{policy}(nosuch=3)", shape, 100)
    assert set(words.split(", ")) <= set(str(refused.value).partition("it takes ")[2].split(", "))

"""Passages with queries: what is cut from what, and that a query does not stand in its passage."""

from __future__ import annotations

from pathlib import Path

import pytest

from memwall.studies import passages
from memwall.studies.passages import LONGEST, docstrings, pairs_of, paragraphs, speeches, stretches

LONG = "words that fill a passage up to the least length that one must have to be kept by those who read it"


def test_paragraphs_lose_the_sentence_that_asks() -> None:
    text = f" = Title = \n\n The first one is here . The middle one asks now . {LONG} . \n Too short . \n"
    found = paragraphs("wiki", text)
    assert found.queries == ["The middle one asks now"]
    assert found.passages == [f"The first one is here . {LONG} ."]
    assert len(found) == 1


def test_speeches_lose_the_line_that_asks() -> None:
    lines = ["a line that opens it,", f"{LONG},", "the middle line asks for it,", "and the last one closes it."]
    found = speeches("plays", "FIRST:\n" + "\n".join(lines) + "\n\nSECOND:\nshort\n")
    assert found.queries == ["the middle line asks for it,"]
    assert "middle" not in found.passages[0]
    assert "FIRST" not in found.passages[0]


def test_docstrings_of_named_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("first", "second"):
        (tmp_path / package / "tests").mkdir(parents=True)
        (tmp_path / package / "__init__.py").write_text(f'"""What {package} is for.\n\n{LONG} {package}\n"""\n')
        (tmp_path / package / "tests" / "a.py").write_text(f'"""Read by nobody at all.\n\n{LONG} tests\n"""\n')
        (tmp_path / package / "broken.py").write_text("def (")
    monkeypatch.setattr(passages.sysconfig, "get_path", lambda name: str(tmp_path))
    assert docstrings("one", ("second",), 9).queries == ["What second is for."]
    assert docstrings("others", ("first", "absent", "second"), 1).passages == [f"{LONG} first"]


def test_each_once_in_a_fixed_order() -> None:
    many = [(f"a query with the number {at % 7}", f"{LONG} {at}") for at in range(20)]
    found = pairs_of("x", iter(many))
    assert sorted(found.queries) == sorted({query for query, _ in many})
    assert pairs_of("x", iter(many[:7][::-1])).passages == found.passages
    assert len(pairs_of("x", iter([("a query that is long enough", "x" * 5000)])).passages[0]) == LONGEST


def test_stretches_end_with_sentences() -> None:
    found = stretches("A sentence of some length stands here. " * 40)
    assert all(one.endswith("here.") for one in found)
    assert all(400 <= len(one) <= LONGEST for one in found)

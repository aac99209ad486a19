"""Choices: made of text, read from files, and judged by summed likelihood."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from memwall.errors import InputError
from memwall.studies.choice_task import Question, from_file, from_text, is_right


def encode(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def test_questions_of_text_hold_how_it_goes_on() -> None:
    text = np.random.default_rng(0).integers(0, 1000, 500)
    found = from_text(text, np.random.default_rng(1), count=20, context=16, length=4)
    assert len({question.answer for question in found}) == 4
    for question in found:
        assert [len(choice) for choice in question.choices] == [4] * 4
        whole = [*question.context, *question.choices[question.answer]]
        assert any(text[i : i + 20].tolist() == whole for i in range(481))
    with pytest.raises(InputError, match="questions of its own need 80"):
        from_text(text[:79], np.random.default_rng(1), count=1, context=16, length=4)


def test_questions_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(
        '{"context": "a", "choices": ["b", "cc"], "answer": 1}\n\n'
        '{"context": "d", "choices": ["e", "f"], "answer": 0}\n'
    )
    assert from_file(path, encode) == [
        Question(context=(97,), choices=((98,), (99, 99)), answer=1),
        Question(context=(100,), choices=((101,), (102,)), answer=0),
    ]
    given = '{"context": "a", '
    for line in (
        "{}",
        "[1]",
        "no",
        given + '"choices": ["b"], "answer": 0}',
        given + '"choices": ["b", "c"], "answer": 2}',
        given + '"choices": ["b", ""], "answer": 0}',
        given + '"choices": ["b", "c"], "answer": true}',
    ):
        path.write_text(line + "\n")
        with pytest.raises(InputError, match="line 1"):
            from_file(path, encode)
    path.write_text("\n \n")
    with pytest.raises(InputError, match=r"empty|no question"):
        from_file(path, encode)


def test_the_likeliest_choice_is_taken_and_the_first_of_equals() -> None:
    question = Question(context=(1,), choices=((1,), (2,), (3,)), answer=1)
    assert is_right(question, [-3.0, -2.0, -5.0])
    assert not is_right(question, [-2.0, -2.0, -5.0])

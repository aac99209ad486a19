"""Multiple choice by likelihood: of several continuations, the one that a model finds likeliest should be the true one.

Benchmarks of this kind (PIQA, ARC, HellaSwag, WinoGrande) score a choice by its summed log-likelihood, without dividing
by its length; so does this. Questions are read from a file, or made of running text: how it really goes on, among
pieces of the same length from elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from memwall.engine.quality import read_text
from memwall.errors import InputError

CHOICES = 4
MOST_CHOICES = 26


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Tokens of what is given and of the choices, and which of them is right."""

    context: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]
    answer: int


def from_text(
    text: np.ndarray, random: np.random.Generator, *, count: int, context: int = 48, length: int = 12
) -> list[Question]:
    """Questions out of running text (tokens)."""
    whole = context + length
    if len(text) < 4 * whole:
        raise InputError(f"the text has {len(text):,} tokens; questions of its own need {4 * whole:,}")
    found = []
    for start in random.integers(0, len(text) - whole, count):
        elsewhere = [int(at) for at in random.integers(0, len(text) - length, CHOICES - 1)]
        answer = int(random.integers(CHOICES))
        starts = [*elsewhere[:answer], int(start) + context, *elsewhere[answer:]]
        choices = tuple(tuple(int(t) for t in text[at : at + length]) for at in starts)
        given = tuple(int(t) for t in text[start : start + context])
        found.append(Question(context=given, choices=choices, answer=answer))
    return found


def from_file(path: Path, encode: Callable[[str], list[int]]) -> list[Question]:
    """One JSON object a line: {"context": text, "choices": [text, ...], "answer": index from 0}."""
    found = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            held = json.loads(line)
            context, choices, answer = str(held["context"]), [str(each) for each in held["choices"]], held["answer"]
        except (ValueError, KeyError, TypeError, RecursionError):
            choices, answer, context = [], -1, ""
        encoded = [tuple(encode(each)) for each in choices]
        whole = isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices)
        if not (whole and 2 <= len(choices) <= MOST_CHOICES and all(encoded) and context.strip()):
            raise InputError(
                f'{path}, line {number}: expected {{"context": text, "choices": [two texts or more], "answer": index}}'
            )
        found.append(Question(context=tuple(encode(context)), choices=tuple(encoded), answer=answer))
    if not found:
        raise InputError(f"{path}: holds no question; give one JSON object a line")
    return found


def is_right(question: Question, likelihoods: Sequence[float]) -> bool:
    """Whether the likeliest choice (of equals, the first) is the answer; likelihoods: summed log p of each."""
    return int(np.argmax(likelihoods)) == question.answer

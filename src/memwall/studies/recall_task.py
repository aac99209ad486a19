"""Facts hidden in real text, and the questions that ask for them: what a cache must still know.

A prompt holds a few lines such as `The secret number of falcon is 4711.` between pieces of running text; a question
begins the sentence anew, and the answer is right when it goes on with the number.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from memwall.errors import InputError
from memwall.models.tokenizer import Tokenizer

NAMES = (
    "Alice Tom Maria Oscar Nina Peter Laura Victor Emma David Sarah Henry Ruth Simon Clara Martin red blue green "
    "silver tiger falcon otter badger alpha beta gamma delta sigma omega"
)
"""What numbers are told of, one word each."""
ANSWER_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Hidden:
    """A prompt without its question, and of each fact its question's tokens and its answer, the first asked first."""

    prompt: list[int]
    questions: list[tuple[list[int], str]]


def statement(name: str, number: str) -> str:
    """A fact as it stands in the text."""
    return f"\nThe secret number of {name} is {number}.\n"


def question(name: str) -> str:
    """What asks for it."""
    return f"\nWhat is the secret number of {name}? The secret number of {name} is"


def hide_facts(
    tokenizer: Tokenizer,
    text: np.ndarray,
    rng: np.random.Generator,
    *,
    num_tokens: int,
    num_facts: int = 4,
    opening: int | None = None,
) -> Hidden:
    """`num_facts` facts at random depths of a random stretch of `text` (tokens).

    With the first question the prompt has `num_tokens` tokens, `opening`, the model's begin token, included.
    """
    names = rng.choice(NAMES.split(), num_facts, replace=False)
    numbers = [str(n) for n in rng.integers(1000, 100_000, num_facts)]
    encode = lambda words: tokenizer.encode(words, add_bos=False)  # noqa: E731
    facts = [encode(statement(name, number)) for name, number in zip(names, numbers)]
    asked = int(rng.integers(num_facts))
    order = [asked, *(place for place in range(num_facts) if place != asked)]
    questions = [(encode(question(names[place])), numbers[place]) for place in order]
    head = [] if opening is None else [opening]
    filler = num_tokens - len(head) - len(questions[0][0]) - sum(map(len, facts))
    if filler < num_facts or filler >= len(text):
        raise InputError(
            f"{num_facts} facts in {num_tokens} tokens: {len(text):,} tokens of text are given, {max(filler, 0):,} "
            "would stand between the facts; give a longer text, or other sizes"
        )
    start = int(rng.integers(len(text) - filler))
    cuts = np.sort(rng.integers(0, filler, num_facts))
    pieces = np.split(text[start : start + filler], cuts)
    prompt = [*head, *pieces[0].tolist()]
    for fact, piece in zip(facts, pieces[1:]):
        prompt += [*fact, *piece.tolist()]
    return Hidden(prompt, questions)


def is_right(said: str, answer: str) -> bool:
    """Whether a continuation begins with the answer."""
    return said.strip().startswith(answer)

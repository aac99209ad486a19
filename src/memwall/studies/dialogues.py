"""Made-up conversations whose topics return: sessions of a few lines about one of four topics, in random order.

Some lines state a fact about one of the topic's names; questions about all facts come afterwards, in random order, so
that each asks for a topic that was left long before.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from memwall.kv.episodes import Utterance

TOPICS = {
    "falcon badger otter heron salmon raven": (
        "The {0} was seen near the river with its young.",
        "We watched a {0} hunt in the forest at night.",
        "The old {0} sleeps in its nest in winter.",
        "A wild {0} eats fish and small birds.",
    ),
    "red blue green yellow orange silver": (
        "She painted the kitchen wall in {0}.",
        "That {0} dress would suit the picture.",
        "The artist mixed {0} paint with white.",
        "Her new shirt is {0} with black stripes.",
    ),
    "alpha beta gamma delta theta omega": (
        "In the equation {0} is the angle of the function.",
        "The proof sets {0} equal to zero.",
        "We compute the value of {0} from the matrix.",
        "The parameter {0} must be a positive integer.",
    ),
    "Alice David Clara Hugo Maria Oscar": (
        "{0} came home from school with a friend.",
        "We had dinner with {0} and her mother.",
        "{0} wrote a letter to his brother last week.",
        "My uncle met {0} at the church on Sunday.",
    ),
}
SESSIONS, LINES = 3, 4
"""Sessions of each topic, and lines of each."""


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Lines, and of each fact its question, its answer and the line that states it."""

    lines: list[Utterance]
    facts: list[tuple[str, str, int]]

    @property
    def sessions(self) -> list[list[Utterance]]:
        """The lines, a session at a time."""
        return [self.lines[begin : begin + LINES] for begin in range(0, len(self.lines), LINES)]


def dialogue(seed: int) -> Dialogue:
    """Three sessions a topic in random order; two of them state a fact each, about names of their own."""
    rng = np.random.default_rng(seed)
    names = {topic: list(rng.permutation(topic.split())) for topic in TOPICS}
    sessions = [(topic, number) for topic in TOPICS for number in range(SESSIONS)]
    lines: list[Utterance] = []
    facts = []
    for which in rng.permutation(len(sessions)):
        topic, number = sessions[which]
        told = [TOPICS[topic][i].format(rng.choice(names[topic])) for i in rng.permutation(4)][: LINES - (number < 2)]
        if number < 2:
            name, value = names[topic][number], int(rng.integers(1000, 100_000))
            place = int(rng.integers(LINES))
            told.insert(place, f"The secret number of {name} is {value}.")
            asked = f"What is the secret number of {name}? The secret number of {name} is"
            facts.append((asked, str(value), len(lines) + place))
        lines += [Utterance(line) for line in told]
    return Dialogue(lines, [facts[i] for i in rng.permutation(len(facts))])

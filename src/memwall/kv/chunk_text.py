"""Texts that become chunks of a prompt: read from files, and ranked by how well their words meet a question (BM25).

Source: BM25 as in Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", 2009, with k1 = 1.2
and b = 0.75; endings of English words are cut as for episodes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from memwall.errors import InputError
from memwall.kv.episodes import ENDING, WORD

SUFFIXES = (".txt", ".md", ".rst")
"""Files of a folder that are taken as text."""
SATURATION = 1.2
LENGTH_WEIGHT = 0.75


@dataclass(frozen=True, slots=True)
class Passage:
    """One chunk's text and where it came from."""

    source: str
    text: str


def read_passages(paths: Sequence[Path]) -> list[Passage]:
    """One passage a file, in the order given; of a folder all its text files, by name."""
    files: list[Path] = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
        if not found:
            raise InputError(f"--chunks {path}: the folder has no text files ({', '.join(SUFFIXES)})")
        files += found
    return [Passage(str(file), _read(file)) for file in files]


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"--chunks {path}: cannot be read: {error.strerror or error}") from None
    try:
        text = data.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise InputError(f"--chunks {path}: is not text: byte {error.start} is not UTF-8") from None
    if not text or "\0" in text:
        raise InputError(f"--chunks {path}: {'holds NUL characters' if text else 'is empty'}; give a text")
    return text


def words(text: str) -> list[str]:
    """The words of a text as they are compared."""
    return [ENDING.sub("", word) for word in WORD.findall(text.lower())]


class Ranking:
    """Ranks passages for questions."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._counts = [Counter(words(text)) for text in texts]
        self._lengths = [sum(counts.values()) for counts in self._counts]
        self._mean = sum(self._lengths) / max(len(texts), 1) or 1.0
        self._holding = Counter(word for counts in self._counts for word in counts)

    def best(self, question: str, count: int) -> list[int]:
        """Indices of the `count` best passages, best first; of equals the first."""
        asked = set(words(question))
        scores = [sum(self._score(word, index) for word in asked) for index in range(len(self._counts))]
        return sorted(range(len(scores)), key=lambda index: (-scores[index], index))[:count]

    def _score(self, word: str, index: int) -> float:
        seen = self._counts[index][word]
        if not seen:
            return 0.0
        holding = self._holding[word]
        rarity = math.log(1 + (len(self._counts) - holding + 0.5) / (holding + 0.5))
        length = 1 - LENGTH_WEIGHT + LENGTH_WEIGHT * self._lengths[index] / self._mean
        return rarity * seen * (SATURATION + 1) / (seen + SATURATION * length)

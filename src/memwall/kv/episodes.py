"""Cuts a conversation into episodes: windows of utterances, clustered by what they are about.

Windows of a few utterances are embedded and grouped by k-means; each group is an episode, with a centroid that
questions are compared with, and a text made of its most central windows, which stands in for the questions that may
come. The encoder is any function from texts to vectors; two that need no further model are here.

Source: EpiCache, arXiv 2509.17396, section 3.1; windows of 4 and 8 central windows as in the official scripts.
Shapes: n windows, d numbers an embedding, E episodes.
"""

from __future__ import annotations

import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from memwall import kernels
from memwall.compress.calibration import read_text
from memwall.errors import InputError
from memwall.models.chat import ChatTemplate
from memwall.models.tokenizer import Tokenizer

Encoder = Callable[[Sequence[str]], np.ndarray]
"""Texts -> float32 [texts, d], rows of length 1."""

INSTRUCTION = "\nNote what matters in this: names, events and dates, numbers, details, opinions.\n"
WORD = re.compile(r"[^\W_]+")
ENDING = re.compile(r"(?<=...)(ing|ed|es|s|ly)$")
"""Endings that are cut off, so that a question meets what was said in another form (English)."""
MARK = "<<the words of the user>>"
ASSISTANT, LONG_REPLY = "assistant", 500
"""Whose replies are cut into sentences when they have more characters than that, as the official code does."""
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
SHORT_SENTENCE = 10
RESTARTS = 10
ROUNDS = 100


@dataclass(frozen=True, slots=True)
class Utterance:
    """Who said what; the speaker may be unknown."""

    text: str
    speaker: str = ""

    @property
    def line(self) -> str:
        """As the model reads it in the history."""
        return f"{self.speaker}: {self.text}\n" if self.speaker else f"{self.text}\n"

    @property
    def told(self) -> str:
        """As it stands in a window."""
        return f'{self.speaker} said, "{self.text}"' if self.speaker else self.text


def read_history(path: Path) -> list[Utterance]:
    """Utterances of a file: JSON lines with `text` and perhaps `speaker`, or plain lines."""
    found = []
    for number, line in enumerate(read_text(path, "conversation").splitlines(), 1):
        if not line.strip():
            continue
        if not line.lstrip().startswith("{"):
            found.append(Utterance(line.strip()))
            continue
        try:
            told = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: not JSON: {error}") from None
        text, speaker = told.get("text"), told.get("speaker", "")
        if not isinstance(text, str) or not isinstance(speaker, str) or not text.strip():
            raise InputError(f'{path}, line {number}: must look like {{"speaker": "Ann", "text": "Hello."}}')
        found.append(Utterance(" ".join(text.split()), speaker.strip()))
    return found


def windows_of(utterances: Sequence[Utterance], size: int) -> list[str]:
    """`size` utterances each, one a line; the last window may be shorter.

    A long reply of an assistant counts as several, a sentence each: it would drown what is around it.
    """
    told = [part.told for utterance in utterances for part in _parts(utterance)]
    return ["\n".join(told[begin : begin + size]) for begin in range(0, len(told), size)]


def _parts(utterance: Utterance) -> list[Utterance]:
    if utterance.speaker.lower() != ASSISTANT or len(utterance.text) <= LONG_REPLY:
        return [utterance]
    sentences = (part.strip() for part in SENTENCE_END.split(utterance.text))
    return [Utterance(sentence, utterance.speaker) for sentence in sentences if len(sentence) > SHORT_SENTENCE] or [
        utterance
    ]


class HashedWords:
    """Words of a text, counted in `width` places by their hash and weighted by rarity. Needs no model at all.

    How rare a word is, is learned from the windows that the encoder is first given, and then holds for questions too.
    """

    def __init__(self, width: int = 4096) -> None:
        self.width = width
        self._rarity: np.ndarray | None = None

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        counts = np.zeros((len(texts), self.width), np.float32)
        for row, text in zip(counts, texts):
            for word in WORD.findall(text.lower()):
                row[zlib.crc32(ENDING.sub("", word).encode()) % self.width] += 1
        if self._rarity is None:
            self._rarity = np.log((len(texts) + 1) / ((counts > 0).sum(axis=0) + 0.5))
        return unit(np.log1p(counts) * self._rarity)


class MeanEmbedding:
    """The mean of a model's own input embeddings of a text's tokens, less what all texts share.

    A plain mean is near the same for all texts, since the same few tokens fill them. So tokens count less the more
    windows have them, and the direction common to the windows is taken out; both are learned from the windows that the
    encoder is first given, and then hold for questions too.
    """

    def __init__(self, embedding: kernels.Matrix, width: int, tokenizer: Tokenizer, *, plain: bool = False) -> None:
        """plain: neither weights nor centre: the mean as it is."""
        self._embedding, self._width, self._tokenizer, self._plain = embedding, width, tokenizer, plain
        self._texts_with: Counter[int] | None = None
        self._num_texts = 0
        self._centre = np.zeros(width, np.float32)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        ids = [np.array(self._tokenizer.encode(text, add_bos=False), np.int64) for text in texts]
        is_first = self._texts_with is None
        if self._texts_with is None:
            self._texts_with = Counter(int(token) for each in ids for token in np.unique(each))
            self._num_texts = len(ids)
        means = np.stack([self._mean(each) for each in ids])
        if is_first and not self._plain:
            self._centre = means.mean(axis=0)
        return unit(means - self._centre)

    def _mean(self, ids: np.ndarray) -> np.ndarray:
        if not len(ids):
            return self._centre.copy()
        rows = np.empty((len(ids), self._width), np.float32)
        kernels.gather_rows(self._embedding, ids, rows)
        if self._plain:
            return rows.mean(axis=0)
        assert self._texts_with is not None
        weights = np.array([np.log((self._num_texts + 1) / (self._texts_with[int(token)] + 0.5)) for token in ids])
        weights = np.maximum(weights, 1e-3).astype(np.float32)
        return np.asarray(weights @ rows / weights.sum())


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1; zeros stay."""
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.asarray(rows / np.where(lengths > 0, lengths, 1), np.float32)


def k_means(
    points: np.ndarray, clusters: int, *, seed: int = 0, restarts: int = RESTARTS
) -> tuple[np.ndarray, np.ndarray]:
    """(centroids [E, d], cluster of each point [n]) of the best of several starts by k-means++."""
    rng = np.random.default_rng(seed)
    best: tuple[float, np.ndarray, np.ndarray] | None = None
    for _ in range(restarts):
        centroids = _spread(points, clusters, rng)
        owners = np.full(len(points), -1)
        for _ in range(ROUNDS):
            distances = squared_distances(points, centroids)
            moved = distances.argmin(axis=1)
            if np.array_equal(moved, owners):
                break
            owners = moved
            for cluster in range(clusters):
                mine = points[owners == cluster]
                # a cluster without points takes the point that its own centroid serves worst
                centroids[cluster] = mine.mean(axis=0) if len(mine) else points[distances.min(axis=1).argmax()]
        distances = squared_distances(points, centroids)
        owners, cost = distances.argmin(axis=1), float(distances.min(axis=1).sum())
        if best is None or cost < best[0]:
            best = (cost, centroids, owners)
    assert best is not None
    return best[1], best[2]


def squared_distances(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """[n, E]."""
    return np.asarray(((points[:, None] - centroids[None]) ** 2).sum(axis=2))


def _spread(points: np.ndarray, clusters: int, rng: np.random.Generator) -> np.ndarray:
    """First centroids, far from each other: each next one is drawn by its squared distance to the nearest so far."""
    chosen = [points[rng.integers(len(points))]]
    while len(chosen) < clusters:
        nearest = squared_distances(points, np.stack(chosen)).min(axis=1)
        total = nearest.sum()
        chosen.append(points[rng.choice(len(points), p=nearest / total if total > 0 else None)])
    return np.stack(chosen).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Turn:
    """What a chat model writes before and after the words of a user's turn, the answer's beginning included."""

    opening: str
    ending: str

    @staticmethod
    def of(directory: Path) -> Turn | None:
        """The turn of a model with a chat template, which follows instructions; None without one."""
        template = ChatTemplate.from_directory(directory)
        if template.is_plain:
            return None
        parts = template.render([{"role": "user", "content": MARK}]).split(MARK)
        return Turn(parts[0], parts[-1])


@dataclass(frozen=True, slots=True)
class Episodes:
    """centroids [E, d]; owners [n]: the episode of each window; central: of each episode its most central windows, in
    the order of the conversation; windows: their texts.
    """

    centroids: np.ndarray
    owners: np.ndarray
    central: list[list[int]]
    windows: list[str]
    encoder: Encoder

    def match(self, question: str) -> int:
        """The episode whose centroid is nearest to the question."""
        return int((self.centroids @ self.encoder([question])[0]).argmax())

    def prompts(self, tokenizer: Tokenizer, most_tokens: int, turn: Turn | None = None) -> list[list[int]]:
        """The patched prompt of each episode: an instruction and the end of the user's turn, then the central windows,
        as if the model answered with them; of at most so many tokens, windows being cut short.

        turn: of a model that follows instructions; another one would only be distracted, and gets the windows alone.
        """
        opening = tokenizer.encode(INSTRUCTION + turn.ending if turn else "\n", add_bos=False)
        found = []
        for central in self.central:
            body = tokenizer.encode("".join(f"{self.windows[place]}\n" for place in central), add_bos=False)
            found.append([*opening, *body][:most_tokens])
        return found


def find_episodes(
    utterances: Sequence[Utterance], encoder: Encoder, episodes: int, *, window: int, central: int, seed: int = 0
) -> Episodes:
    """Clusters a conversation; with fewer windows than episodes there are as many episodes as windows."""
    windows = windows_of(utterances, window)
    if not windows:
        raise InputError("the history is empty; give at least one utterance")
    points = encoder(windows)
    centroids, owners = k_means(points, min(episodes, len(windows)), seed=seed)
    directions = unit(centroids)
    most_central = []
    for cluster in range(len(centroids)):
        mine = np.flatnonzero(owners == cluster)
        likeness = points[mine] @ directions[cluster]
        most_central.append(sorted(int(place) for place in mine[np.argsort(-likeness, kind="stable")[:central]]))
    return Episodes(centroids, owners, most_central, windows, encoder)

"""What a task of the cache study sees: a model that reads turns, makes tokens, and remembers by one kind of cache.

Every subject runs the same model on the same tokens; only the cache differs. `CacheSubject` is memwall's own decoder
with a policy of `memwall.kv`; other libraries are in `kv_peers`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np

from memwall import kv
from memwall.engine.loading import cache_shape
from memwall.hardware import available_memory_bytes
from memwall.kv.epicache import EpiCache
from memwall.kv.episodes import Utterance
from memwall.memory import Arena, Ledger
from memwall.models import Checkpoint, ModelConfig
from memwall.models.decoder import Decoder
from memwall.models.precision import resolve
from memwall.models.tokenizer import Tokenizer
from memwall.models.weights import load_weights
from memwall.studies.recall_task import ANSWER_TOKENS

SEGMENT_TOKENS = 1024
"""Most tokens read at once: a prompt of this length attends exactly."""


class StudyModel:
    """One loaded model that all of memwall's subjects share: float arithmetic, weights as they are unless asked."""

    def __init__(
        self,
        directory: Path,
        weights: str,
        context_tokens: int = SEGMENT_TOKENS,
        *,
        exact: bool = True,
        logit_rows: int = 1,
    ) -> None:
        self.directory = directory
        self.config = ModelConfig.from_directory(directory)
        self.context_tokens = min(context_tokens, self.config.max_position)
        self.shape = cache_shape(self.config)
        # refuse what the machine does not have, rather than be killed for taking it
        self.arena = Arena(available_memory_bytes(), Ledger())
        with Checkpoint(directory, self.config) as checkpoint:
            self.fingerprint = checkpoint.fingerprint()
            held = load_weights(self.config, checkpoint, resolve(self.config, weights, checkpoint), self.arena)
        self.tokenizer = Tokenizer.from_directory(directory)
        self.decoder = Decoder(
            self.config, held, self.arena, segment_tokens=self.context_tokens, logit_rows=logit_rows, exact=exact
        )
        self.behind = kv.CacheModel(config=self.config, weights=held, directory=directory)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without a begin token."""
        return self.tokenizer.encode(text, add_bos=False)

    @property
    def opening(self) -> list[int]:
        """The begin token, where the model has one."""
        return [] if self.config.bos_token_id is None else [self.config.bos_token_id]

    def cache(self, policy: str, arena: Arena | None = None) -> kv.KVCache:
        """An empty cache for the whole context, on a ledger of its own."""
        own = arena or Arena(available_memory_bytes(), Ledger())
        return kv.build(policy, self.shape, own, self.context_tokens, self.behind)


class Subject(ABC):
    """A model with one cache. Logits are [V] float32 and hold until the next call."""

    @abstractmethod
    def begin(self) -> None:
        """Forgets everything."""

    @abstractmethod
    def read(self, tokens: Sequence[int]) -> np.ndarray:
        """Takes a turn: the first one is the prompt. Logits after its last token."""

    @abstractmethod
    def step(self, token: int) -> np.ndarray:
        """Takes one token more."""

    @abstractmethod
    def branch(self) -> AbstractContextManager[None]:
        """Context: what is read inside is forgotten again."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the cache now."""

    def listen(self, turns: Sequence[Sequence[Utterance]], opening: Sequence[int]) -> None:
        """Takes a conversation, a turn at a time."""
        for number, turn in enumerate(turns):
            tokens = self.encode("".join(line.line for line in turn))
            self.read([*opening, *tokens] if number == 0 else tokens)

    def turn_to(self, question: str) -> None:  # noqa: B027 - only caches that keep episodes do anything
        """Told before a question about the conversation is read."""

    def say(self, logits: np.ndarray, count: int = ANSWER_TOKENS, *, answer: str | None = None) -> str:
        """The likeliest continuation; no more of it than tells whether it begins with an answer, where one is given."""
        said: list[int] = []
        for _ in range(count):
            if said:
                logits = self.step(said[-1])
            said.append(int(logits.argmax()))
            if answer is not None and _decided(self.decode(said).strip(), answer):
                break
        return self.decode(said)

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without a begin token."""

    @abstractmethod
    def decode(self, tokens: list[int]) -> str:
        """Text of tokens."""

    def release(self) -> None:  # noqa: B027 - most have nothing to give back
        """Gives memory back."""


def _decided(said: str, answer: str) -> bool:
    """Whether what follows cannot change that it begins with the answer, or does not."""
    return said.startswith(answer) or not answer.startswith(said)


class CacheSubject(Subject):
    """memwall's decoder through a policy of `memwall.kv`."""

    def __init__(self, model: StudyModel, policy: str) -> None:
        self.model, self.policy = model, policy
        self.cache = model.cache(policy)

    def begin(self) -> None:
        if isinstance(self.cache, EpiCache):
            self.cache.forget()
        self.cache.truncate(0)

    def read(self, tokens: Sequence[int]) -> np.ndarray:
        decoder, begin = self.model.decoder, 0
        hidden = np.empty((0, 0), np.float32)
        for size in self.cache.begin_prompt(len(tokens), decoder.segment_tokens):
            hidden = decoder.hidden(np.asarray(tokens[begin : begin + size]), self.cache)[-1:]
            begin += size
        return np.asarray(decoder.logits(hidden)[-1])

    def step(self, token: int) -> np.ndarray:
        return np.asarray(self.model.decoder.forward(np.asarray([token]), self.cache)).reshape(-1)

    @contextmanager
    def branch(self) -> Iterator[None]:
        if isinstance(self.cache, EpiCache) and self.cache.episodes is not None:
            yield  # a question gets its episode as it was when the history ended
            return
        kept = self.cache
        self.cache = kept.fork()
        try:
            yield
        finally:
            self.cache.release()
            self.cache = kept

    @property
    def nbytes(self) -> int:
        return self.cache.nbytes

    def listen(self, turns: Sequence[Sequence[Utterance]], opening: Sequence[int]) -> None:
        if isinstance(self.cache, EpiCache) and self.cache.settings.episodes:
            lines = [line for turn in turns for line in turn]
            self.cache.remember(self.model.decoder, self.model.tokenizer, lines, opening=opening)
        else:
            super().listen(turns, opening)

    def turn_to(self, question: str) -> None:
        if isinstance(self.cache, EpiCache) and self.cache.episodes is not None:
            self.cache.recall(self.cache.match(question))

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text)

    def decode(self, tokens: list[int]) -> str:
        return self.model.tokenizer.decode(tokens)

    def release(self) -> None:
        self.cache.release()

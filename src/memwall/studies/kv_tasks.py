"""The three tasks of the cache study, the same for every subject.

text: held-out text, the first half of a window as the prompt, the rest decoded token by token: KL divergence to the
float32 cache, perplexity, top-1 agreement. recall: several facts hidden in running text; one is asked for at the
prompt's end (`recall`), the others in later turns (`later`), when the prompt has been pruned for the first. talk: a
conversation read turn by turn, then questions whose topics return.

Bytes are those of the cache where it is fullest in a task: after the last token of text, after the prompt of facts,
after the conversation.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from memwall import kv
from memwall.engine.quality import Divergence
from memwall.errors import InputError
from memwall.memory import Arena, Ledger
from memwall.studies.dialogues import dialogue
from memwall.studies.recall_task import hide_facts, is_right
from memwall.studies.subjects import StudyModel, Subject

TASKS = ("text", "recall", "talk")
TALK_ANSWER_TOKENS = 6
FIRST_SEED = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """windows of text, tokens of their prompts and tokens decoded; prompts with facts and their tokens; dialogues."""

    windows: int
    prompt_tokens: int
    decoded_tokens: int
    tries: int
    recall_tokens: int
    dialogues: int


FULL = Sizes(windows=3, prompt_tokens=512, decoded_tokens=448, tries=16, recall_tokens=900, dialogues=6)
QUICK = Sizes(windows=2, prompt_tokens=512, decoded_tokens=64, tries=4, recall_tokens=900, dialogues=1)


class Tasks:
    """The material of all tasks, drawn once, and the truth that text is compared with."""

    def __init__(self, model: StudyModel, text: str, sizes: Sizes) -> None:
        self.model, self.sizes = model, sizes
        self.tokens = np.array(model.encode(text), np.int64)
        longest = max(sizes.prompt_tokens + sizes.decoded_tokens, sizes.recall_tokens + 64)
        if longest > model.context_tokens:
            raise InputError(f"the study needs {longest} positions, and this model has {model.context_tokens}")
        if len(self.tokens) < longest + sizes.windows:
            raise InputError(f"--text: {len(self.tokens):,} tokens in it; give at least {longest + sizes.windows:,}")
        self._truth: list[np.ndarray] = []

    def run(self, task: str, subject: Subject) -> dict[str, Any]:
        """Figures of one task."""
        figures: dict[str, Any] = {"text": self._text, "recall": self._recall, "talk": self._talk}[task](subject)
        return figures

    def _windows(self) -> list[np.ndarray]:
        size = self.sizes.prompt_tokens + self.sizes.decoded_tokens - len(self.model.opening)
        stride = (len(self.tokens) - size - 1) // max(self.sizes.windows - 1, 1)
        pieces = (self.tokens[i * stride : i * stride + size] for i in range(self.sizes.windows))
        return [np.concatenate([self.model.opening, piece]).astype(np.int64) for piece in pieces]

    def _hidden_truth(self) -> list[np.ndarray]:
        """Hidden states of the scored tokens under the float32 cache."""
        if not self._truth:
            cache = kv.build("float32", self.model.shape, Arena(1 << 62, Ledger()), self.model.context_tokens)
            for window in self._windows():
                cache.truncate(0)
                hidden = self.model.decoder.hidden(window[:-1], cache)
                self._truth.append(hidden[self.sizes.prompt_tokens - 1 :].copy())
            cache.release()
        return self._truth

    def _text(self, subject: Subject) -> dict[str, Any]:
        sums, seconds, first = Divergence(), [], self.sizes.prompt_tokens
        for window, truth in zip(self._windows(), self._hidden_truth()):
            subject.begin()
            logits = subject.read(window[:first].tolist())
            for row, position in enumerate(range(first, len(window))):
                mine = logits.copy()[None]
                sums.add(mine, window[position : position + 1], self.model.decoder.logits(truth[row : row + 1]))
                if position + 1 < len(window):
                    began = time.perf_counter()
                    logits = subject.step(int(window[position]))
                    seconds.append(time.perf_counter() - began)
        found = sums.figures(bits_per_weight=0, kv_bits_per_value=None)
        return {
            "kl_nats": found.kl_nats,
            "perplexity": found.perplexity,
            "exact_perplexity": found.reference_perplexity,
            "top1_agreement": found.top1_agreement,
            "scored_tokens": found.tokens,
            "step_seconds": statistics.median(seconds),
            **self._held(subject, len(window) - 1),
        }

    def _recall(self, subject: Subject) -> dict[str, Any]:
        right: dict[str, list[bool]] = {"recall": [], "later": []}
        opening = self.model.opening[0] if self.model.opening else None
        held: dict[str, Any] = {}
        for attempt in range(self.sizes.tries):
            rng = np.random.default_rng(attempt)
            hidden = hide_facts(
                self.model.tokenizer, self.tokens, rng, num_tokens=self.sizes.recall_tokens, opening=opening
            )
            (first, answer), *others = hidden.questions
            subject.begin()
            logits = subject.read([*hidden.prompt, *first]).copy()
            held = self._held(subject, self.sizes.recall_tokens)
            with subject.branch():
                right["recall"].append(is_right(subject.say(logits, answer=answer), answer))
            for asked, expected in others:
                with subject.branch():
                    right["later"].append(is_right(subject.say(subject.read(asked), answer=expected), expected))
        return {**_shares(right), **held}

    def _talk(self, subject: Subject) -> dict[str, Any]:
        right: dict[str, list[bool]] = {"talk": []}
        held: dict[str, Any] = {}
        for seed in range(self.sizes.dialogues):
            told = dialogue(FIRST_SEED + seed)
            subject.begin()
            subject.listen(told.sessions, self.model.opening)
            tokens = len(self.model.opening) + sum(
                len(self.model.encode("".join(line.line for line in turn))) for turn in told.sessions
            )
            held = self._held(subject, tokens)
            for asked, answer, _ in told.facts:
                with subject.branch():
                    subject.turn_to(asked)
                    logits = subject.read(self.model.encode(f"\n{asked}"))
                    right["talk"].append(is_right(subject.say(logits, TALK_ANSWER_TOKENS, answer=answer), answer))
        return {**_shares(right), **held}

    def _held(self, subject: Subject, num_tokens: int) -> dict[str, Any]:
        """Bytes now, beside those of a float16 cache with as many tokens."""
        plain = kv.held_bytes("float16", self.model.shape, num_tokens)
        numbers = 2 * self.model.shape.num_layers * self.model.shape.row_values * num_tokens
        return {
            "tokens": num_tokens,
            "kv_bytes": subject.nbytes,
            "float16_bytes": plain,
            "kv_bits_per_value": 8 * subject.nbytes / numbers,
        }


def _shares(right: dict[str, list[bool]]) -> dict[str, Any]:
    """Share of right answers, and out of how many."""
    shares = {name: float(np.mean(found)) for name, found in right.items()}
    return {**shares, **{f"{name}_asked": len(found) for name, found in right.items()}}

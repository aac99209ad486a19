"""What the low-bit study asks one model: how likely text is, which hidden facts it recalls, which choice it takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memwall.engine.quality import log_softmax
from memwall.studies.choice_task import is_right as chose_right
from memwall.studies.recall_task import is_right
from memwall.studies.subjects import CacheSubject, StudyModel

if TYPE_CHECKING:
    from memwall.studies.low_bit_llama3_study import Material

LOGIT_ROWS = 64


def judged(directory: Path, weights: str, read: Material, *, exact: bool) -> dict[str, Any]:
    """Losses per window, shares of right answers, resident bytes of the weights. exact: activations are not rounded."""
    longest = max(read.windows.shape[1], *(len(q.context) + max(map(len, q.choices)) for q in read.questions))
    prompts = max((len(hidden.prompt) + max(len(q) for q, _ in hidden.questions) for hidden in read.hidden), default=0)
    model = StudyModel(directory, weights, max(longest + 1, prompts + 32), exact=exact, logit_rows=LOGIT_ROWS)
    subject = CacheSubject(model, "float16")
    try:
        losses = [float(np.mean(token_losses(subject, model, window[:1], window[1:]))) for window in read.windows]
        right = [
            _recalls(subject, each.prompt, asked, answer) for each in read.hidden for asked, answer in each.questions
        ]
        chosen = []
        for question in read.questions:
            sums = [-sum(token_losses(subject, model, question.context, choice)) for choice in question.choices]
            chosen.append(chose_right(question, sums))
        held = model.decoder.weights
        nbytes = sum(matrix.nbytes for matrix in {id(m): m for m in held.matrices.values()}.values())
        return {
            "losses": losses,
            "recall": float(np.mean(right)) if right else None,
            "num_recall": len(right),
            "choice": float(np.mean(chosen)) if chosen else None,
            "num_choice": len(chosen),
            "weight_bytes": nbytes,
        }
    finally:
        subject.release()
        model.decoder.release()
        model.decoder.weights.release()


def token_losses(
    subject: CacheSubject, model: StudyModel, given: Sequence[int] | np.ndarray, scored: Sequence[int] | np.ndarray
) -> list[float]:
    """-log p of each of the tokens `scored` after `given`, in nats; a text opens with the model's begin token."""
    subject.begin()
    head = [*model.opening, *map(int, given)]
    tokens = np.asarray([*head, *map(int, scored)])
    found: list[float] = []
    hidden = model.decoder.hidden(tokens[:-1], subject.cache)[len(head) - 1 :]
    for start in range(0, len(hidden), LOGIT_ROWS):
        rows = np.asarray(model.decoder.logits(hidden[start : start + LOGIT_ROWS]))
        wanted = tokens[len(head) + start : len(head) + start + len(rows)]
        found += (-log_softmax(rows)[np.arange(len(rows)), wanted]).tolist()
    return found


def _recalls(subject: CacheSubject, prompt: Sequence[int], asked: Sequence[int], answer: str) -> bool:
    subject.begin()
    return is_right(subject.say(subject.read([*prompt, *asked])), answer)

"""Forms of answers in a process that draws for another: a job tells the form as text, and here it is made once.

What an answer has made so far comes with every job, so that nothing here is needed for the next one: a worker that was
made anew, or that another began the answer in, walks the form again. What is kept only saves that.
"""

from __future__ import annotations

import base64
import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from memwall.engine.call_grammar import form_walker
from memwall.engine.executor import Entry
from memwall.engine.guide import Cursor, Guide, TokenTable
from memwall.engine.sampling import Sampling

MOST_GUIDES = 32
MOST_CURSORS = 1024


class ToldForms:
    """table: makes the tokens' bytes, when the first form is told."""

    def __init__(self, table: Callable[[], TokenTable]) -> None:
        self._make = table
        self._table: TokenTable | None = None
        self._guides: OrderedDict[str, Guide] = OrderedDict()
        self._cursors: OrderedDict[int, Cursor] = OrderedDict()

    def prepare(self) -> TokenTable:
        """Makes the table now."""
        if self._table is None:
            self._table = self._make()
        return self._table

    def guide(self, spec: str) -> Guide:
        """Of a description, see `Guide`."""
        table = self.prepare()
        if spec not in self._guides:
            self._guides[spec] = Guide(form_walker(json.loads(spec)), table, spec)
        self._guides.move_to_end(spec)
        if len(self._guides) > MOST_GUIDES:
            self._guides.popitem(last=False)
        return self._guides[spec]

    def cursor(self, number: int, guide: Guide) -> Cursor:
        """Where the answer of a sequence stands."""
        cursor = self._cursors.get(number)
        if cursor is None or cursor.guide is not guide:
            cursor = self._cursors[number] = guide.cursor()
        self._cursors.move_to_end(number)
        if len(self._cursors) > MOST_CURSORS:
            self._cursors.popitem(last=False)
        return cursor


def bends_message(entry: Entry) -> dict[str, Any]:
    """What a worker must know to draw where the answer so far has a say; nothing where it has none."""
    request, one = entry.sequence.request, entry.sequence
    asked, guide = request.sampling, request.guide
    if not entry.sample or (guide is None and not asked.bends):
        return {}
    told: dict[str, Any] = {
        "prompt": one.num_prompt,
        "made": base64.b64encode(np.array(one.tokens[one.num_prompt : entry.first], "<i4").tobytes()).decode(),
        "bend": [asked.frequency_penalty, asked.presence_penalty, [list(pair) for pair in asked.bias]],
    }
    return told if guide is None else {**told, "form": guide.spec}


def made_before(told: dict[str, Any]) -> list[int]:
    """The tokens of the answer in a message, up to those that come with the batch."""
    found: list[int] = np.frombuffer(base64.b64decode(told["made"]), "<i4").tolist()
    return found


def bent(sampling: Sampling, told: dict[str, Any]) -> Sampling:
    """The penalties and the bias of a message."""
    frequency, presence, bias = told["bend"]
    pairs = tuple((token, more) for token, more in bias)
    return replace(sampling, frequency_penalty=frequency, presence_penalty=presence, bias=pairs)

"""Answers that keep to a form: of the tokens that may follow, only those are drawn that the form allows.

What is drawn has the model's own probabilities among the allowed tokens: a draw that the form forbids is struck out
and another one taken. First all tokens go that begin with a byte that may not come, in one pass over the vocabulary;
the few that begin well and go wrong are met one by one. (Willard and Louf, Efficient Guided Generation for Large
Language Models, 2023, keep the table of allowed tokens of each state instead, which is megabytes a schema.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from memwall.engine.grammar import BYTES, DEAD, Walker
from memwall.errors import InputError
from memwall.models.tokenizer import Tokenizer

ASCII = 128
ENDS, NEVER = BYTES, BYTES + 1
"""Beside the 256 first bytes: tokens that end the text, and those that no text may hold."""


class TokenTable:
    """What each token of a vocabulary adds, in bytes. One for all guides of a server."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos: Sequence[int]) -> None:
        self.eos = frozenset(eos)
        self._bytes = tokenizer.token_bytes
        self.first = np.full(vocab_size, NEVER, np.int16)
        for token in range(min(vocab_size, tokenizer.vocab_size)):
            if token not in self.eos and (text := self._bytes(token)):
                self.first[token] = text[0]
        self.first[[token for token in self.eos if token < vocab_size]] = ENDS
        begins = np.flatnonzero(self.first < ASCII)
        alone = {int(self.first[token]) for token in begins if len(self.text(int(token))) == 1}
        self.alone = sum(1 << byte for byte in alone)
        """The ASCII characters that are tokens by themselves."""

    def text(self, token: int) -> bytes:
        """The token's bytes; nothing for one that no text may hold."""
        return self._bytes(token) or b""


class Guide:
    """One form of an answer; its cursors follow one answer each."""

    def __init__(self, walker: Walker, table: TokenTable, spec: str | None = None) -> None:
        """spec: what another process makes the same walker of (`call_forms.form_walker`), as JSON. InputError where a
        character that the form asks for is no token: an answer could stop short before it.
        """
        ascii_only = (1 << ASCII) - 1 & ~(1 << ord(" ") | 1 << ord("\n"))  # blanks may be left out
        for mask in walker.grammar.masks:
            if mask & ascii_only and not mask & table.alone:
                letter = chr((mask & ascii_only).bit_length() - 1)
                raise InputError(f"this model has no token for {letter!r} alone, which the form asks for")
        self.walker = walker
        self.table = table
        self.spec = spec

    def cursor(self) -> Cursor:
        """At the beginning of an answer."""
        return Cursor(self)


class Cursor:
    """Where one answer stands."""

    def __init__(self, guide: Guide) -> None:
        self.guide = guide
        self._state = guide.walker.start
        self._made: list[int] = []
        self._allowed = np.zeros(BYTES + 2, bool)

    def pick(self, made: Sequence[int], logits: np.ndarray, draw: Callable[[np.ndarray], int]) -> int:
        """The next token after those that were made. logits [V] float32 become -inf where the form forbids."""
        walker, table = self.guide.walker, self.guide.table
        self._follow(made)
        bits = walker.next_bytes(self._state)
        self._allowed[:BYTES] = np.unpackbits(
            np.frombuffer(bits.to_bytes(BYTES // 8, "little"), np.uint8), bitorder="little"
        )
        self._allowed[ENDS] = walker.complete(self._state) or not bits
        logits[~self._allowed[table.first]] = -np.inf
        while logits.max() > -np.inf:
            token = int(draw(logits))
            if token in table.eos or walker.feed(self._state, table.text(token)) != DEAD:
                return token
            logits[token] = -np.inf
        return min(table.eos)  # no token of this vocabulary goes on from here

    def _follow(self, made: Sequence[int]) -> None:
        """A request that was set aside, or whose step failed, may have others behind it than were drawn."""
        if self._made != list(made[: len(self._made)]):
            self._state, self._made = self.guide.walker.start, []
        for token in made[len(self._made) :]:
            self._state = self.guide.walker.feed(self._state, self.guide.table.text(token))
            self._made.append(token)

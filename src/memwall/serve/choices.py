"""One choice of an answer while it is made: tokens become text that is certain, stop texts end it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from memwall.engine.sampling import StopWatcher
from memwall.engine.sequence import Event, TokenLogprobs
from memwall.models.tokenizer import UNFINISHED, Tokenizer
from memwall.serve.calls import CallDelta, CallReader, Calls

REASONS = {"stop": "stop", "length": "length", "cancelled": "length", "aborted": "error", "error": "error"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """New text of a choice, its tokens' log-probabilities where they were asked for, and ids of the tokens since the
    last piece that says something. calls: of tools, that begin or go on.
    """

    text: str = ""
    calls: tuple[CallDelta, ...] = ()
    logprobs: tuple[tuple[int, TokenLogprobs], ...] = ()
    ids: tuple[int, ...] = ()
    finish: str | None = None


@dataclass(slots=True)
class Choice:
    """Text and calls of one choice, or the vector of a text. `tokens` counts those that were made up to its end."""

    tokenizer: Tokenizer
    stop: tuple[str, ...]
    tools: Calls | None = None
    tokens: int = 0
    cached_tokens: int = 0
    finish: str | None = None
    failed: bool = False
    aborted: bool = False
    text: list[str] = field(default_factory=list)
    calls: list[CallDelta] = field(default_factory=list)
    logprobs: list[tuple[int, TokenLogprobs]] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    told_ids: int = 0
    vector: np.ndarray | None = None

    def __post_init__(self) -> None:
        self._stream = self.tokenizer.stream()
        self._watcher = StopWatcher(self.stop)
        self._reader = None if self.tools is None else CallReader(self.tools)

    _stream: Any = field(init=False, repr=False)
    _watcher: Any = field(init=False, repr=False)
    _reader: CallReader | None = field(init=False, repr=False)

    def push(self, event: Event) -> Piece | None:
        """What an event adds; None once the choice has ended."""
        if self.finish is not None:
            return None
        self.cached_tokens = event.cached_tokens
        self.vector = event.vector
        shown, met = "", False
        told: tuple[tuple[int, TokenLogprobs], ...] = ()
        if event.token is not None:
            self.tokens += 1
            self.ids.append(event.token)
            shown, met = self._watcher.push(self._text_of(event.token))
            told = ((event.token, event.logprobs),) if event.logprobs is not None else ()
        if met:
            self.finish = "stop"
        elif event.finish is not None:
            rest, met = self._watcher.push(self._stream.flush())
            shown += rest + ("" if met else self._watcher.flush())
            self.failed = event.finish == "error"
            self.aborted = event.finish == "aborted"
            self.finish = "stop" if met else REASONS[event.finish]
        calls: list[CallDelta] = []
        if self._reader is not None:
            shown, calls = self._read(self._reader, shown)
        self.text.append(shown)
        self.calls += calls
        self.logprobs += told
        ids: tuple[int, ...] = ()
        if shown or calls or told or self.finish:
            ids, self.told_ids = tuple(self.ids[self.told_ids :]), len(self.ids)
        return Piece(text=shown, calls=tuple(calls), logprobs=told, ids=ids, finish=self.finish)

    def _text_of(self, token: int) -> str:
        """What a token adds; special ones are no text, but that with which calls begin is."""
        if self.tools is not None and token == self.tools.marker_token:
            return str(self._stream.flush()) + self.tools.form.marker
        return str(self._stream.push(token))

    def _read(self, reader: CallReader, text: str) -> tuple[str, list[CallDelta]]:
        shown, calls = reader.push(text)
        if reader.full and self.finish is None:
            self.finish = "stop"
        if self.finish is not None:
            rest, more = ("", []) if reader.full else reader.flush()
            shown, calls = shown + rest, calls + more
        if self.finish == "stop" and reader.count:
            self.finish = "tool_calls"
        return shown, calls


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token alone, as text."""
    return tokenizer.decode([token], False)


def chat_logprobs(tokenizer: Tokenizer, told: tuple[tuple[int, TokenLogprobs], ...]) -> dict[str, Any]:
    """OpenAI's form for chats."""

    def entry(token: int, value: float) -> dict[str, Any]:
        text = token_text(tokenizer, token)
        return {"token": text, "logprob": value, "bytes": None if UNFINISHED in text else list(text.encode())}

    return {
        "content": [
            {**entry(token, found.own), "top_logprobs": [entry(other, value) for other, value in found.top]}
            for token, found in told
        ]
    }


def completion_logprobs(
    tokenizer: Tokenizer, told: tuple[tuple[int, TokenLogprobs], ...], offset: int
) -> tuple[dict[str, Any], int]:
    """OpenAI's form for completions, and where the next token's text begins."""
    texts, offsets = [token_text(tokenizer, token) for token, _ in told], []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    tops = [{token_text(tokenizer, other): value for other, value in reversed(found.top)} for _, found in told]
    own = [found.own for _, found in told]
    return {"tokens": texts, "token_logprobs": own, "top_logprobs": tops, "text_offset": offsets}, offset

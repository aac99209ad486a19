"""OpenAI's forms of answers, whole and in pieces."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from memwall.models.tokenizer import Tokenizer
from memwall.serve.calls import joined
from memwall.serve.choices import Choice, Piece, chat_logprobs, completion_logprobs
from memwall.serve.parse import Asked

DONE = b"data: [DONE]\n\n"


def sse(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n\n"


def usage(asked: Asked, choices: list[Choice]) -> dict[str, Any]:
    """Tokens in and out."""
    made = sum(choice.tokens for choice in choices)
    cached = sum(choice.cached_tokens for choice in choices[:: asked.choices])
    return {
        "prompt_tokens": asked.prompt_tokens,
        "completion_tokens": made,
        "total_tokens": asked.prompt_tokens + made,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


@dataclass(slots=True, kw_only=True)
class Form:
    """One answer's frame: `chat` or completion."""

    asked: Asked
    model: str
    tokenizer: Tokenizer
    chat: bool
    created: int = field(default_factory=lambda: int(time.time()))
    offsets: dict[int, int] = field(default_factory=dict)
    id: str = ""

    def __post_init__(self) -> None:
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + secrets.token_hex(12)

    def whole(self, choices: list[Choice]) -> dict[str, Any]:
        """The answer in one."""
        kind = "chat.completion" if self.chat else "text_completion"
        found = [self._whole_choice(index, choice) for index, choice in enumerate(choices)]
        return {**self._frame(kind), "choices": found, "usage": usage(self.asked, choices)}

    def opening(self) -> list[dict[str, Any]]:
        """Pieces before the first token: whose turn it is, or the prompt where it is echoed."""
        if self.chat:
            delta = {"role": "assistant", "content": ""}
            return [self._chunk([self._delta(i, delta, None, None)]) for i in range(len(self.asked.requests))]
        if not self.asked.echo:
            return []
        return [self._chunk([self._text(i, self._echo(i), None, None)]) for i in range(len(self.asked.requests))]

    def piece(self, index: int, piece: Piece) -> dict[str, Any] | None:
        """One piece of a stream; None for one that says nothing."""
        if not (piece.text or piece.calls or piece.logprobs or piece.finish):
            return None
        told = self._logprobs(index, piece.logprobs)
        if self.chat:
            delta: dict[str, Any] = {"content": piece.text} if piece.text or not (piece.finish or piece.calls) else {}
            if piece.calls:
                delta["tool_calls"] = [call.body() for call in joined(piece.calls)]
            return self._chunk([{**self._delta(index, delta, told, piece.finish), **self._ids(piece.ids)}])
        return self._chunk([{**self._text(index, piece.text, told, piece.finish), **self._ids(piece.ids)}])

    def closing(self, choices: list[Choice]) -> dict[str, Any] | None:
        """The last piece, with the usage, where it was asked for."""
        return {**self._chunk([]), "usage": usage(self.asked, choices)} if self.asked.usage else None

    def _whole_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        told = self._logprobs(index, tuple(choice.logprobs))
        text = "".join(choice.text)
        if not self.chat:
            return {**self._text(index, self._echo(index) + text, told, choice.finish), **self._ids(choice.ids)}
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if choice.calls:
            calls = [call.body() for call in joined(choice.calls)]
            message["tool_calls"] = [{key: one[key] for key in ("id", "type", "function")} for one in calls]
            message["content"] = text or None
        found = {"index": index, "message": message, "logprobs": told, "finish_reason": choice.finish}
        return {**found, **self._ids(choice.ids)}

    def _logprobs(self, index: int, told: tuple[Any, ...]) -> dict[str, Any] | None:
        if self.asked.requests[index].logprobs is None:
            return None
        if self.chat:
            return chat_logprobs(self.tokenizer, told)
        found, self.offsets[index] = completion_logprobs(self.tokenizer, told, self.offsets.get(index, 0))
        return found

    def _ids(self, ids: Sequence[int]) -> dict[str, Any]:
        return {"token_ids": list(ids)} if self.asked.token_ids else {}

    def _echo(self, index: int) -> str:
        return self.asked.echo[index // self.asked.choices] if self.asked.echo else ""

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._frame("chat.completion.chunk" if self.chat else "text_completion"), "choices": choices}

    def _delta(self, index: int, delta: dict[str, Any], told: Any, finish: str | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": told, "finish_reason": finish}

    def _text(self, index: int, text: str, told: Any, finish: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": told, "finish_reason": finish}

    def _frame(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

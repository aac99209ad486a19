"""Calls of tools found in an answer while it is made, in any form of `engine.call_forms`.

Text that may still become a call is held back; arguments go out as they come. What turns out to be no call (a tool
that nobody offered, broken JSON) is text.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from memwall.engine.call_forms import CallForm

ID_LETTERS = string.ascii_letters + string.digits
ID_LENGTH = 9
"""Mistral's templates take ids of nine letters and digits, and no others; everyone else takes any."""
HEAD = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
BETWEEN = " \t\r\n,;["
MOST_HEAD = 1024
"""Characters of a call before its arguments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """What an answer may call. begun: the prompt ends with the opening, so that the answer begins within a call.
    marker_token: the token that is the form's marker, where that is a special one. most: calls after which an answer
    ends, whatever else it would say; None for any number.
    """

    form: CallForm
    names: tuple[str, ...]
    begun: bool = False
    marker_token: int | None = None
    most: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CallDelta:
    """A call begins (id and name are told), or its arguments go on."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""

    def body(self) -> dict[str, Any]:
        """OpenAI's form in a stream."""
        function: dict[str, Any] = {"arguments": self.arguments}
        if self.name is None:
            return {"index": self.index, "function": function}
        return {"index": self.index, "id": self.id, "type": "function", "function": {"name": self.name, **function}}


def joined(calls: Iterable[CallDelta]) -> list[CallDelta]:
    """The same with the pieces of each call together."""
    found: dict[int, CallDelta] = {}
    for call in calls:
        before = found.get(call.index)
        found[call.index] = call if before is None else replace(before, arguments=before.arguments + call.arguments)
    return list(found.values())


@dataclass(slots=True)
class Object:
    """Where a JSON object ends. depth 1: its opening brace is there already."""

    depth: int = 0
    quoted: bool = False
    escaped: bool = False

    def end(self, text: str, start: int = 0) -> int:
        """The place behind its last brace; -1 while that is not there."""
        for at in range(start, len(text)):
            letter = text[at]
            if self.escaped:
                self.escaped = False
            elif self.quoted:
                self.escaped, self.quoted = letter == "\\", letter != '"'
            elif letter == '"':
                self.quoted = True
            elif letter in "{[":
                self.depth += 1
            elif letter in "}]":
                self.depth -= 1
                if not self.depth:
                    return at + 1
        return -1


@dataclass(slots=True)
class CallReader:
    """One answer's text and calls. `push` and `flush` give (text, calls) that are new."""

    calls: Calls
    count: int = 0
    _held: str = ""
    _state: str = ""
    _seen: str = ""
    _scanned: int = 0
    _object: Object = field(default_factory=Object)

    def __post_init__(self) -> None:
        self._state = "head" if self.calls.begun else "text"
        if not self.calls.form.marker:
            self._state = "head"

    @property
    def full(self) -> bool:
        """Whether there are all the calls that there may be."""
        return self.count == self.calls.most and self._state not in ("arguments", "rest")

    def push(self, text: str) -> tuple[str, list[CallDelta]]:
        """More of the answer."""
        self._held += text
        shown: list[str] = []
        found: list[CallDelta] = []
        while getattr(self, f"_{self._state}")(shown, found):
            pass
        return "".join(shown), found

    def flush(self) -> tuple[str, list[CallDelta]]:
        """The end: what was held back is text after all."""
        rest = self._seen + self._held if self._state in ("text", "plain", "head") else ""
        self._held = self._seen = ""
        return (rest if rest.strip() or not self.count else ""), []

    def _plain(self, shown: list[str], found: list[CallDelta]) -> bool:
        """Nothing more is looked for."""
        shown.append(self._held)
        self._held = ""
        return False

    def _text(self, shown: list[str], found: list[CallDelta]) -> bool:
        """Up to the marker; blanks before it belong to it."""
        marker = self.calls.form.marker
        at = self._held.find(marker)
        if at >= 0:
            before = self._held[:at]
            shown.append(before.rstrip())
            self._seen, self._held = before[len(before.rstrip()) :] + marker, self._held[at + len(marker) :]
            self._state = "head"
            return True
        keep = next(n for n in range(min(len(marker) - 1, len(self._held)), -1, -1) if self._held.endswith(marker[:n]))
        cut = len(self._held[: len(self._held) - keep].rstrip())
        shown.append(self._held[:cut])
        self._held = self._held[cut:]
        return False

    def _head(self, shown: list[str], found: list[CallDelta]) -> bool:
        """Up to the arguments."""
        begin = len(self._held) - len(self._held.lstrip(BETWEEN))
        if begin == len(self._held):
            return False
        if self._held[begin] != "{":
            return self._no_call(shown)
        match = HEAD.match(self._held, begin, begin + MOST_HEAD)
        if match is not None:
            name = json.loads(match[1], strict=False)
            if name not in self.calls.names:
                return self._no_call(shown)
            self._begin(name, found)
            self._held, self._state = self._held[match.end() :], "arguments"
            self._object, self._scanned = Object(), 0
            return True
        end = self._object.end(self._held, max(begin, self._scanned))
        self._scanned = len(self._held)
        if end < 0:
            return False
        self._object, self._scanned = Object(), 0
        return self._whole(self._held[begin:end], end, found) or self._no_call(shown)

    def _whole(self, text: str, end: int, found: list[CallDelta]) -> bool:
        """A call whose parts come in another order."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return False
        given = value.get("arguments", value.get("parameters", {}))
        if not isinstance(value.get("name"), str) or value["name"] not in self.calls.names:
            return False
        self._begin(value["name"], found)
        arguments = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
        found.append(CallDelta(index=self.count - 1, arguments=arguments))
        self._held, self._state = self._held[end:], "behind"
        return True

    def _begin(self, name: str, found: list[CallDelta]) -> None:
        number = "".join(secrets.choice(ID_LETTERS) for _ in range(ID_LENGTH))
        found.append(CallDelta(index=self.count, id=number, name=name))
        self.count += 1
        self._seen = ""

    def _arguments(self, shown: list[str], found: list[CallDelta]) -> bool:
        """Up to the end of the arguments."""
        end = self._object.end(self._held)
        piece = self._held if end < 0 else self._held[:end]
        if piece:
            found.append(CallDelta(index=self.count - 1, arguments=piece))
        self._held = self._held[len(piece) :]
        if end >= 0:
            self._state, self._object = "rest", Object(depth=1)
        return end >= 0

    def _rest(self, shown: list[str], found: list[CallDelta]) -> bool:
        """Up to the end of the call, whatever else it says."""
        end = self._object.end(self._held)
        self._held = "" if end < 0 else self._held[end:]
        if end >= 0:
            self._state, self._object = "behind", Object()
        return end >= 0

    def _behind(self, shown: list[str], found: list[CallDelta]) -> bool:
        """After a call: the form's closing, another call, or text again."""
        form, rest = self.calls.form, self._held.lstrip()
        closing = form.closing.strip()
        if closing and rest.startswith(closing):
            self._held = rest[len(closing) :]
            self._state = "text"
            return True
        if not rest or closing.startswith(rest):
            return False
        if rest[:1] in (",", ";", "{"):
            self._state = "head"
        else:
            self._state = "text" if form.marker else "plain"
        return True

    def _no_call(self, shown: list[str]) -> bool:
        """What began like one is text."""
        self._object, self._scanned = Object(), 0
        shown.append(self._seen)
        self._seen = ""
        if self.calls.form.marker:
            shown.append(self._held[:1])
            self._held, self._state = self._held[1:], "text"
        else:
            self._state = "plain"
        return True

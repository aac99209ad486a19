"""Files of OpenAI's batch format: requests in, one a line; answers out, one a line, appended whole and at once.

A run that was killed leaves answers and at most one unfinished line, which the next run cuts off; it goes on with what
has no answer yet. When all is done the answers are put in the order of the requests.

Memory: places of lines are kept, not the lines.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from memwall.errors import InputError
from memwall.serve.fields import ApiError, read_object

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
MOST_ID_CHARACTERS = 512
BEGINNING = b'{"id": "batch_req_'
KNOWN = ("custom_id", "method", "url", "body")


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes of a file: where a line begins, and how many it has."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One request. number counts from 1, blank lines included."""

    number: int
    custom_id: str
    url: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A line of the input: where it is, what it is called, and what is wrong with it."""

    number: int
    place: Place
    custom_id: str | None = None
    error: ApiError | None = None


def parse_line(raw: bytes, number: int) -> Line:
    """A line's request; ApiError says what is wrong with it."""
    value = read_object(raw)
    custom_id = value.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MOST_ID_CHARACTERS:
        raise ApiError(
            f"custom_id must be a text of 1 to {MOST_ID_CHARACTERS} characters", param="custom_id", code="invalid_line"
        )
    line = Line(number=number, custom_id=custom_id, url=str(value.get("url"))[:80], body={})
    if unknown := [name for name in value if name not in KNOWN]:
        raise LineError(line, f"unknown field {unknown[0][:80]!r}; a line has {', '.join(KNOWN)}", unknown[0][:80])
    if value.get("method") != "POST":
        raise LineError(line, 'method must be "POST"', "method")
    if line.url not in (CHAT, COMPLETION):
        raise LineError(line, f"url is {line.url!r}; a batch knows {CHAT} and {COMPLETION}", "url")
    body = value.get("body")
    if not isinstance(body, dict):
        raise LineError(line, "body must be an object", "body")
    if body.get("stream"):
        raise LineError(line, "stream is for servers; a batch answers in whole lines", "stream")
    return Line(number=number, custom_id=custom_id, url=line.url, body=body)


class LineError(ApiError):
    """A line that is wrong but says what it is called."""

    def __init__(self, line: Line, message: str, param: str) -> None:
        super().__init__(message, param=param, code="invalid_line")
        self.custom_id = line.custom_id


class BatchInput:
    """The file of requests. Read it twice: once for `lines`, then line by line as each is run."""

    def __init__(self, path: Path, most_line_bytes: int) -> None:
        self.path = path
        self.most_line_bytes = most_line_bytes
        self._file = path.open("rb")
        self.size = os.fstat(self._file.fileno()).st_size

    def __iter__(self) -> Iterator[tuple[Found, Line | None]]:
        """All lines that are not blank, with their requests where these are sound."""
        seen: dict[str, int] = {}
        offset = number = 0
        self._file.seek(0)
        while raw := self._file.readline(self.most_line_bytes + 1):
            number += 1
            length, long = len(raw), len(raw) > self.most_line_bytes
            while long and not raw.endswith(b"\n") and (raw := self._file.readline(self.most_line_bytes)):
                length += len(raw)
            place = Place(offset, length)
            offset += length
            if long:
                message = f"the line has {length:,} bytes; a context of this size takes {self.most_line_bytes:,}"
                yield Found(number=number, place=place, error=ApiError(message, code="invalid_line")), None
            elif raw.strip():
                yield self._checked(raw, number, place, seen)

    def _checked(self, raw: bytes, number: int, place: Place, seen: dict[str, int]) -> tuple[Found, Line | None]:
        try:
            line = parse_line(raw, number)
            first = seen.setdefault(line.custom_id, number)
            if first != number:
                raise LineError(line, f"custom_id {line.custom_id[:80]!r} is that of line {first} already", "custom_id")
        except ApiError as error:
            custom_id = error.custom_id if isinstance(error, LineError) else None
            return Found(number=number, place=place, custom_id=custom_id, error=error), None
        return Found(number=number, place=place, custom_id=line.custom_id), line

    def read(self, found: Found) -> Line:
        """The request of a line again. InputError when the file was changed meanwhile."""
        self._file.seek(found.place.offset)
        try:
            line = parse_line(self._file.read(found.place.length), found.number)
        except ApiError:
            line = None
        if line is None or line.custom_id != found.custom_id:
            raise InputError(f"{self.path}: line {found.number} was changed while the batch ran; run it again")
        return line

    def close(self) -> None:
        """Gives the file up."""
        self._file.close()


@dataclass(slots=True)
class BatchOutput:
    """The file of answers. answered: places of answers by custom_id; errors: of error lines of this run, by number."""

    path: Path
    answered: dict[str, Place] = field(default_factory=dict)
    errors: dict[int, Place] = field(default_factory=dict)
    first_error: str | None = None
    kept: int = 0
    _file: BinaryIO | None = None
    _end: int = 0
    _made: bool = False

    @property
    def is_open(self) -> bool:
        """Whether answers can be written."""
        return self._file is not None

    def open(self) -> None:
        """Opens and locks the file; answers of an earlier run are kept. InputError when it is another file."""
        self._made = not self.path.exists()
        if not self._made and not self.path.is_file():
            raise InputError(f"{self.path}: not a plain file; answers are read again and put in order there")
        self._file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{self.path}: another batch is writing to it") from None
        self._scan()
        self._file.truncate(self._end)

    def _scan(self) -> None:
        with self.path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                if not raw.endswith(b"\n"):  # what a kill left
                    if not (raw.startswith(BEGINNING) or BEGINNING.startswith(raw)):
                        raise InputError(f"{self.path}: line {number} is no answer of a batch; choose another file")
                    return
                custom_id, response = self._answer(raw, number)
                if isinstance(response, dict):
                    self.answered[custom_id] = Place(self._end, len(raw))
                self._end += len(raw)
        self.kept = len(self.answered)

    def _answer(self, raw: bytes, number: int) -> tuple[str, Any]:
        try:
            value = read_object(raw)
        except ApiError:
            value = {}
        custom_id, response = value.get("custom_id"), value.get("response")
        ours = str(value.get("id")).startswith("batch_req_") and (response is None or isinstance(custom_id, str))
        if not ours:
            raise InputError(f"{self.path}: line {number} is no answer of a batch; choose another file")
        return str(custom_id), response

    def check(self, known: set[str]) -> None:
        """InputError when an answer is to nothing that was asked."""
        strange = next((name for name in self.answered if name not in known), None)
        if strange is not None:
            raise InputError(
                f"{self.path}: holds an answer to {strange[:80]!r}, which is not asked for; choose another file for "
                "another batch"
            )
        self.kept = len(self.answered)

    def usage(self, custom_id: str) -> tuple[int, int]:
        """Tokens that an answer has, all its choices together, and how many choices these are."""
        body = read_object(self.read(self.answered[custom_id]))["response"].get("body")
        try:
            return int(body["usage"]["completion_tokens"]), len(body["choices"])
        except (KeyError, TypeError, ValueError):
            return 0, 0

    def answer(self, custom_id: str, body: dict[str, Any]) -> None:
        """Appends an answer."""
        response = {"status_code": 200, "request_id": "req_" + secrets.token_hex(12), "body": body}
        self.answered[custom_id] = self._append(custom_id, response, None)

    def fail(self, found: Found, error: ApiError) -> None:
        """Appends an error line."""
        message = f"line {found.number}: {error.message}"
        self.first_error = self.first_error or message
        told = {"code": error.code or "invalid_request", "message": message}
        self.errors[found.number] = self._append(found.custom_id, None, {**told, "param": error.param})

    def _append(self, custom_id: str | None, response: Any, error: Any) -> Place:
        assert self._file is not None
        value = {"id": "batch_req_" + secrets.token_hex(12), "custom_id": custom_id, "response": response}
        raw = json.dumps({**value, "error": error}, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        place, view = Place(self._end, len(raw)), memoryview(raw)
        self._file.seek(self._end)
        while view:
            view = view[self._file.write(view) :]
        self._end += len(raw)
        return place

    def read(self, place: Place) -> bytes:
        """A line's bytes."""
        assert self._file is not None
        return os.pread(self._file.fileno(), place.length, place.offset)

    def finish(self, order: list[Found]) -> None:
        """Puts the lines in the order of the requests, through a temporary file beside it."""
        assert self._file is not None
        temporary = self.path.with_name(self.path.name + ".ordering")
        with temporary.open("wb") as file:
            os.fchmod(file.fileno(), os.fstat(self._file.fileno()).st_mode & 0o777)
            for found in order:
                place = self.errors.get(found.number)
                if place is None and found.custom_id is not None:
                    place = self.answered.get(found.custom_id)
                if place is not None:
                    file.write(self.read(place))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)

    def close(self) -> None:
        """Gives the file up, as it is; one that was made for nothing goes."""
        if self._file is not None:
            if self._made and not self._end:
                self.path.unlink(missing_ok=True)
            self._file.close()
            self._file = None

"""Checked access to the fields of a JSON body, and errors in OpenAI's form."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Collection, Mapping
from typing import Any

KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 405: "invalid_request_error",
    413: "invalid_request_error", 415: "invalid_request_error", 421: "invalid_request_error",
    429: "rate_limit_error", 500: "server_error", 503: "overloaded_error",
}  # fmt: skip


class ApiError(Exception):
    """What a client did wrong, or what the server cannot do now: status, message, the parameter it is about."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        error = {"message": self.message, "type": KINDS.get(self.status, "server_error"), "param": self.param}
        return {"error": {**error, "code": self.code}}


def read_object(raw: bytes) -> dict[str, Any]:
    """A JSON object from the bytes of a body."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no number that JSON knows")

    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise ApiError(f"the body is not UTF-8: byte {error.start} is wrong") from None
    except RecursionError:
        raise ApiError("the body is nested too deeply") from None
    except ValueError as error:
        raise ApiError(f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise ApiError(f"the body must be a JSON object, not {_kind(value)}")
    return value


class Fields:
    """One body's fields. null counts as absent."""

    def __init__(self, body: Mapping[str, Any], known: Collection[str]) -> None:
        self._body = {name: value for name, value in body.items() if value is not None}
        for name in self._body:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ApiError(f"unknown parameter {name[:80]!r}{hint}", param=name[:80])

    def get(self, name: str) -> Any:
        """The field as it is, or None."""
        return self._body.get(name)

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        """A whole number in [low, high]."""
        value = self._body.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ApiError(f"{name} must be a whole number, not {_kind(value)}", param=name)
        if not low <= value <= high:
            raise ApiError(f"{name} is {str(value)[:40]}; it must be {low:,} to {high:,}", param=name)
        return value

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """A number in [low, high]."""
        value = self._body.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ApiError(f"{name} must be a number, not {_kind(value)}", param=name)
        if not low <= value <= high or not math.isfinite(value):
            raise ApiError(f"{name} is {str(value)[:40]}; it must be {low:g} to {high:g}", param=name)
        return float(value)

    def boolean(self, name: str, default: bool = False) -> bool:
        """true or false."""
        value = self._body.get(name, default)
        if not isinstance(value, bool):
            raise ApiError(f"{name} must be true or false, not {_kind(value)}", param=name)
        return value

    def text(self, name: str, default: str | None = None) -> str | None:
        """A string."""
        value = self._body.get(name, default)
        if value is not None and not isinstance(value, str):
            raise ApiError(f"{name} must be a string, not {_kind(value)}", param=name)
        return value

    def neutral(self, name: str, *neutral: Any) -> None:
        """A parameter that is understood only at its neutral value."""
        value = self._body.get(name)
        if value is not None and value not in neutral:
            raise ApiError(f"{name} is not supported; leave it out", param=name, code="unsupported_parameter")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")

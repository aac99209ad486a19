"""JSON from a stranger: size, nesting and repeated keys are checked before anything is built, and fields are read by
type and range.

All readers of headers, configurations and manifests go through here, so that a bad file always ends in an `InputError`
that names it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from memwall.errors import InputError

MAX_DEPTH = 16
MAX_FILE_BYTES = 16_000_000
# A JSON object or list costs Python some 60-200 bytes and its text as few as 2: a text that is nearly all brackets is
# refused, because it would grow a hundredfold in memory. Real headers and configurations spend more than 20 bytes of
# text on each.
MIN_BYTES_PER_CONTAINER = 8
# a string (its brackets do not count; possessive, so that hostile text takes linear time) or a bracket
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{}]', re.DOTALL)


def shown(name: object) -> str:
    """A name of unknown origin for an error message: quoted, printable and short."""
    text = ascii(name)
    return text if len(text) <= 120 else text[:80] + "..." + text[-20:]


def parse(data: bytes, source: str, *, max_depth: int = MAX_DEPTH, infinite: bool = False) -> dict[str, Any]:
    """A JSON object from bytes. `source` names the file (and part) in errors.

    infinite: take `Infinity`, which is no JSON but stands in some configurations, as the text "Infinity".
    """
    _check_nesting(data, source, max_depth)
    try:
        constant = _infinity_as_text if infinite else _refuse_constant
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_without_repeats, parse_constant=constant)
    except UnicodeDecodeError as error:
        raise InputError(f"{source}: not UTF-8 text (byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source}: broken JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise InputError(f"{source}: expected a JSON object, got {_kind(value)}")
    return value


def read(path: Path, *, max_bytes: int = MAX_FILE_BYTES, infinite: bool = False) -> dict[str, Any]:
    """A JSON object from a file of bounded size; infinite: see `parse`."""
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    if len(data) > max_bytes:
        raise InputError(f"{path}: larger than {max_bytes:,} bytes, which no file of this kind is")
    return parse(data, str(path), infinite=infinite)


def file_name(name: Any, source: str) -> str:
    """`name` if it is a plain file name; anything that could lead out of the folder is refused."""
    plain = (
        isinstance(name, str)
        and 0 < len(name) <= 255
        and name not in (".", "..")
        and name.isprintable()
        and not any(separator in name for separator in "/\\:")
    )
    if not plain:
        raise InputError(f"{source}: {shown(name)} is not a plain file name (folders and '..' are refused)")
    return str(name)


class Fields:
    """Typed, range-checked reading of one JSON object. `None` and absent are the same; a field without default is
    required.
    """

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values = values
        self.source = source

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.error(name, value, f"a whole number from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        value = self._get(name, default)
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
        if not good or not math.isfinite(value):
            raise self.error(name, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, value, "true or false")
        return value

    def text(self, name: str, default: str | None = None, choices: Collection[str] = ()) -> str:
        value = self._get(name, default)
        if not isinstance(value, str) or (choices and value not in choices):
            raise self.error(name, value, f"one of {', '.join(choices)}" if choices else "a string")
        return value

    def mapping(self, name: str, default: Mapping[str, Any] | None = None) -> dict[str, Any]:
        value = self._get(name, default)
        if not isinstance(value, Mapping):
            raise self.error(name, value, "an object")
        return dict(value)

    def items(self, name: str, max_length: int, default: list[Any] | None = None) -> list[Any]:
        value = self._get(name, default)
        if not isinstance(value, list) or len(value) > max_length:
            raise self.error(name, value, f"a list of at most {max_length} entries")
        return value

    def shape(self, name: str, max_dimensions: int = 8) -> tuple[int, ...]:
        value = self.items(name, max_dimensions)
        if any(not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 2**48 for size in value):
            raise self.error(name, value, "a list of sizes")
        return tuple(value)

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def only(self, *known: str) -> None:
        """Refuses fields that are not known, with the nearest name."""
        for name in self.values:
            if name not in known:
                near = get_close_matches(name[:100], known, 1)
                hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"
                raise InputError(f"{self.source}: unknown field {shown(name)}{hint}")

    def error(self, name: str, value: Any, wanted: str) -> InputError:
        got = "missing" if value is None else f"{_kind(value)} {_brief(value)}"
        return InputError(f"{self.source}: {name} must be {wanted}, got {got}")

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        return default if value is None else value


def _brief(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 200:
        return f"of {value.bit_length()} bits"
    if isinstance(value, (list, dict)):
        return f"of {len(value)} entries" if len(value) > 8 else shown(value)
    return shown(value)


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "the string",
        bool: "the value",
        int: "the number",
        float: "the number",
    }
    return names.get(type(value), "null")


def _check_nesting(data: bytes, source: str, max_depth: int) -> None:
    most = 4 * max_depth + len(data) // MIN_BYTES_PER_CONTAINER
    depth = num_containers = 0
    for match in _TOKEN.finditer(data):
        first = data[match.start()]
        if first in b"[{":
            depth += 1
            num_containers += 1
            if depth > max_depth:
                raise InputError(f"{source}: JSON nested deeper than {max_depth} levels")
            if num_containers > most:
                raise InputError(f"{source}: JSON of almost only brackets, which no file of this kind is")
        elif first in b"]}":
            depth -= 1


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {shown(key)} stands twice in one object")
            seen.add(key)
    return result


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _infinity_as_text(name: str) -> Any:
    return name if name == "Infinity" else _refuse_constant(name)

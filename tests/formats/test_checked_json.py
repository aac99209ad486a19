"""JSON of unknown origin: limits hold, and fields are checked by type and range."""

from __future__ import annotations

from pathlib import Path

import pytest

from memwall.errors import InputError
from memwall.formats.checked_json import Fields, file_name, parse, read, shown


def test_parse_accepts_ordinary_objects_with_brackets_in_strings() -> None:
    text = b'{"a[[[[": "]]]]}}}}\\"[[[", "b": [1, {"c": null}]}'
    assert parse(text, "x", max_depth=3) == {"a[[[[": ']]]]}}}}"[[[', "b": [1, {"c": None}]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[1]", "expected a JSON object"),
        (b"", "broken JSON"),
        (b'{"a": 1', "broken JSON"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"a": Infinity}', "not JSON"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b'{"a": ' + b'{"a":' * 50 + b"1" + b"}" * 51, "deeper"),
    ],
)
def test_parse_refuses(text: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(text, "x")


def test_read_bounds_the_size(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}')
    assert read(path) == {"a": 1}
    with pytest.raises(InputError, match="larger than 4 bytes"):
        read(path, max_bytes=4)
    with pytest.raises(InputError, match="cannot be read"):
        read(tmp_path / "absent.json")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "../a", "a\\b", "c:a", "a\0", "a\n", 3, None, "x" * 300])
def test_file_names_stay_in_their_folder(name: object) -> None:
    with pytest.raises(InputError, match="not a plain file name"):
        file_name(name, "index")


def test_fields_check_type_and_range() -> None:
    fields = Fields({"n": 3, "x": 0.5, "t": True, "s": "a", "l": [1], "o": {}, "z": None, "big": 10**5000}, "cfg")
    assert fields.integer("n", 0, 3) == 3
    assert fields.integer("z", 0, 3, 2) == 2
    assert fields.number("n", 0, 9) == 3.0
    for call, message in [
        (lambda: fields.integer("n", 4, 9), "from 4 to 9, got the number 3"),
        (lambda: fields.integer("t", 0, 9), "whole number"),
        (lambda: fields.integer("x", 0, 9), "whole number"),
        (lambda: fields.integer("z", 0, 9), "missing"),
        (lambda: fields.integer("big", 0, 9), "bits"),
        (lambda: fields.number("s", 0, 9), "a number"),
        (lambda: fields.number("big", 0, 9), "a number"),
        (lambda: fields.flag("n", False), "true or false"),
        (lambda: fields.text("s", choices=("b", "c")), "one of b, c"),
        (lambda: fields.mapping("l"), "an object"),
        (lambda: fields.items("o", 3), "a list"),
        (lambda: fields.items("l", 0), "at most 0"),
        (lambda: Fields({"shape": [1, -2]}, "cfg").shape("shape"), "sizes"),
        (lambda: Fields({"sepc": 1}, "cfg").only("spec", "shape"), "did you mean spec"),
        (lambda: Fields({"qqq": 1}, "cfg").only("spec", "shape"), "known are"),
    ]:
        with pytest.raises(InputError, match=message):
            call()


def test_shown_is_short_and_printable() -> None:
    assert shown("a") == "'a'"
    assert len(shown("\ud800\n" * 5000)) < 130
    assert shown("\ud800\n").isascii()

"""Files of the batch format: what is wrong with a line, what a kill leaves, what is no answer of ours."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.serve.batch_file import BatchInput, BatchOutput, parse_line
from memwall.serve.fields import ApiError

GOOD: dict[str, Any] = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}


def raw(**changes: Any) -> bytes:
    return json.dumps({**GOOD, **changes}).encode()


def test_a_good_line() -> None:
    line = parse_line(raw(), 3)
    assert (line.number, line.custom_id, line.url, line.body) == (3, "a", "/v1/completions", {"prompt": "x"})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not JSON"),
        (b"[]", "must be a JSON object"),
        (b"\xff", "not UTF-8"),
        (b'{"custom_id": NaN}', "NaN"),
        (b"[" * 100000, "nested too deeply|not JSON"),
        (raw(custom_id=None), "custom_id must be a text"),
        (raw(custom_id=7), "custom_id must be a text"),
        (raw(custom_id=""), "custom_id must be a text"),
        (raw(custom_id="x" * 600), "custom_id must be a text"),
        (raw(method="GET"), "method must be"),
        (raw(url="/v1/embeddings"), "a batch knows /v1/chat/completions"),
        (raw(body=[]), "body must be an object"),
        (raw(body={"prompt": "x", "stream": True}), "stream is for servers"),
        (raw(extra=1), "unknown field 'extra'"),
    ],
)
def test_what_is_wrong_with_a_line(line: bytes, message: str) -> None:
    with pytest.raises(ApiError, match=message):
        parse_line(line, 1)


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_a_line_or_an_error(line: bytes) -> None:
    with contextlib.suppress(ApiError):
        assert parse_line(line, 1).custom_id


def test_lines_are_found_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(raw() + b"\n\n" + b"x" * 5000 + b"\n" + raw() + b"\n" + raw(custom_id="b"))
    source = BatchInput(path, 1000)
    found = [one for one, _ in source]
    assert [(one.number, one.custom_id) for one in found] == [(1, "a"), (3, None), (4, "a"), (5, "b")]
    assert [one.error.message.split(";")[0] if one.error else None for one in found] == [
        None, "the line has 5,001 bytes", "custom_id 'a' is that of line 1 already", None,
    ]  # fmt: skip
    assert source.read(found[3]).custom_id == "b"
    path.write_bytes(raw(custom_id="c") + b"\n" + b" " * 9000)
    with pytest.raises(InputError, match="changed while the batch ran"):
        source.read(found[0])
    source.close()


def answers(path: Path, *names: str) -> None:
    output = BatchOutput(path)
    output.open()
    for name in names:
        output.answer(name, {"text": name + "\n\u00fc"})
    output.close()


def opened(path: Path) -> BatchOutput:
    output = BatchOutput(path)
    output.open()
    return output


def test_answers_are_found_again_and_put_in_order(tmp_path: Path) -> None:
    path, source = tmp_path / "out.jsonl", tmp_path / "in.jsonl"
    answers(path, "c", "a")
    output = opened(path)
    assert (set(output.answered), output.kept) == ({"a", "c"}, 2)
    source.write_bytes(b"".join(raw(custom_id=name) + b"\n" for name in "abc") + b"nonsense\n")
    found = [one for one, _ in BatchInput(source, 1000)]
    output.fail(found[3], ApiError("no"))
    output.answer("b", {})
    output.finish(found)
    output.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["custom_id"] for line in lines] == ["a", "b", "c", None]
    assert lines[3]["error"]["message"] == "line 4: no"
    assert lines[0]["response"]["body"] == {"text": "a\n\u00fc"}
    assert [one.name for one in tmp_path.iterdir() if "ordering" in one.name] == []


def test_an_error_line_is_no_answer(tmp_path: Path) -> None:
    path, source = tmp_path / "out.jsonl", tmp_path / "in.jsonl"
    source.write_bytes(raw())
    found = [one for one, _ in BatchInput(source, 1000)]
    output = opened(path)
    output.fail(found[0], ApiError("engine"))
    output.close()
    assert opened(path).answered == {}


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_cut_anywhere_goes_on(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "out.jsonl"
    path.unlink(missing_ok=True)
    answers(path, "a", "b")
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    output = opened(path)
    left = whole[:cut].count(b"\n")
    assert list(output.answered) == ["a", "b"][:left]
    output.answer("b" if left == 1 else "z", {})
    output.close()
    assert all(json.loads(line) for line in path.read_text().splitlines())
    assert path.read_bytes().count(b"\n") == left + 1


@pytest.mark.parametrize(
    "text", ["hello", "hello\n", '{"custom_id": "a"}\n', '{"id": "other", "custom_id": "a", "response": {}}\n', "\n"]
)
def test_a_file_of_somebody_else_is_left_as_it_was(tmp_path: Path, text: str) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match="no answer of a batch"):
        opened(path)
    assert path.read_text() == text


def test_answers_to_other_requests_are_refused(tmp_path: Path) -> None:
    answers(tmp_path / "out.jsonl", "a", "b")
    with pytest.raises(InputError, match="'b', which is not asked for"):
        opened(tmp_path / "out.jsonl").check({"a"})


def test_two_runs_do_not_write_to_one_file(tmp_path: Path) -> None:
    first = opened(tmp_path / "out.jsonl")
    with pytest.raises(InputError, match="another batch is writing"):
        opened(tmp_path / "out.jsonl")
    first.close()
    assert not (tmp_path / "out.jsonl").exists()  # nothing was answered


def test_what_is_no_plain_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a plain file"):
        opened(tmp_path)

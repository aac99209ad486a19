"""Tables, JSON and silence."""

from __future__ import annotations

import pytest

from memwall.cli.printing import format_table, print_json, progress_bar


def test_columns_line_up() -> None:
    text = format_table(("owner", "bytes"), [("weights", "12 MB"), ("kv", "1 kB")], right=frozenset({1}))
    assert text.splitlines() == ["owner    bytes", "-------  -----", "weights  12 MB", "kv        1 kB"]


def test_an_empty_table_has_its_headers() -> None:
    assert format_table(("a", "bc"), []).splitlines() == ["a  bc", "-  --"]


def test_json_refuses_what_is_no_json(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"text": "é", "none": None})
    assert '"é"' in capsys.readouterr().out
    with pytest.raises(ValueError, match="JSON"):
        print_json(float("inf"))


def test_no_bar_without_a_terminal() -> None:
    with progress_bar("working") as bar:
        assert bar.counted is bar.staged is bar.labelled is None

"""Traces: files in both forms, and what kernels touch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.simulate.access_traces import KINDS, READ, WRITE, made_trace, read_trace, save_trace

ROW = st.tuples(
    st.sampled_from(KINDS), st.integers(0, (1 << 48) - 1), st.integers(0, 255), st.integers(0, 255), st.integers(0, 255)
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(ROW, min_size=1, max_size=20), st.booleans())
def test_both_forms_hold_the_same(
    tmp_path: Path, rows: list[tuple[str, int, int, int, int]], hexadecimal: bool
) -> None:
    text = tmp_path / "trace.txt"
    form = "{} {:#x} {} {} {}  # why" if hexadecimal else "{} {} {} {} {}"
    lines = [form.format(*row) for row in rows]
    text.write_text("# a trace\n\n" + "\n".join(lines))
    first = read_trace(text)
    save_trace(tmp_path / "trace.npy", first)
    for trace in (first, read_trace(tmp_path / "trace.npy")):
        columns = (trace.kinds, trace.addresses, trace.gaps, trace.depends, trace.processes)
        read = list(zip(*(column.tolist() for column in columns), strict=True))
        assert read == [(KINDS.index(row[0]), *row[1:]) for row in rows]


def test_short_lines_and_plain_arrays(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("0x1000\nw 4096\nr 8192 7\n")
    trace = read_trace(path)
    assert trace.addresses.tolist() == [4096, 4096, 8192]
    assert trace.kinds.tolist() == [READ, WRITE, READ]
    assert trace.gaps.tolist() == [3, 3, 7]
    assert len(read_trace(path, 2)) == 2
    assert trace.instructions == 3 + 13
    np.save(tmp_path / "plain.npy", np.arange(5))
    assert read_trace(tmp_path / "plain.npy", 3).addresses.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no access"),
        ("r\n", "line 1: wanted is KIND ADDRESS"),
        ("r 1\nq 2\n", "line 2: address 'q' is no number"),
        ("r 0x1000000000000\n", "between 0 and"),
        ("r 1 256\n", "gap 256"),
        ("r 1 2 3 4 5\n", "wanted is"),
        ("r -4\n", "address -4"),
    ],
)
def test_bad_text(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "bad.txt"
    path.write_text(text)
    with pytest.raises(InputError, match=says):
        read_trace(path)


def test_bad_arrays(tmp_path: Path) -> None:
    path = tmp_path / "bad.npy"
    for array, says in (
        (np.zeros(3), "whole numbers"),
        (np.zeros((2, 2), np.int64), "whole numbers"),
        (np.array([-1]), "address -1 of access 0"),
        (np.zeros(2, [("place", "u8")]), "whole numbers"),
        (np.zeros(2, [("address", "u8"), ("colour", "u1")]), "field colour"),
        (np.array([(1, 9)], [("address", "u8"), ("kind", "u1")]), "kind 9"),
    ):
        np.save(path, array)
        with pytest.raises(InputError, match=says):
            read_trace(path)
    np.save(path, np.arange(1000))
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(InputError, match=r"cannot be read|not an array"):
        read_trace(path)
    path.write_bytes(b"nothing")
    with pytest.raises(InputError, match="not an array"):
        read_trace(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_trace(tmp_path / "absent.txt")


def test_what_is_touched_is_mapped_in_order() -> None:
    trace = made_trace("t", np.array([5, 4, 6, 9, 5]) << 12, processes=[0, 0, 0, 0, 3])
    assert list(trace.mapped_runs()) == [(0, 4, 3), (0, 9, 1), (3, 5, 1)]

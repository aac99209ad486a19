"""`memwall simulate fusemax` and `simulate cascade`: tables, JSON, pictures, files, and bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest


def test_the_published_models_and_their_means(memwall: Callable) -> None:
    done = memwall("simulate", "fusemax", "--means")
    assert done.exit_code == 0, done.stderr
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines()[2:]}
    assert [rows[name][1] for name in ("unfused", "cascade", "architecture", "binding")] == [
        "0.668", "0.907", "2.183", "6.723",
    ]  # fmt: skip
    assert rows["binding"][3] == "5.302"


def test_any_model_as_table_json_and_picture(memwall: Callable, tmp_path: Path) -> None:
    picture = tmp_path / "arrays.svg"
    done = memwall("simulate", "fusemax", "demo", "bert", "--tokens", "1k,2k", "--plot", picture)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.count("binding") == 5
    assert "memwall: wrote" in done.stderr
    assert picture.read_text().startswith("<svg")
    done = memwall("simulate", "fusemax", "BERT", "--tokens", "1k", "--designs", "binding", "--json")
    told = json.loads(done.stdout)
    (point,) = told["points"]
    assert (point["cycles"], point["traffic_bytes"]) == (1_892_352, 402_653_184)
    assert [phase["cycles"] for phase in told["schedules"]["binding"]] == [81, 1, 8, 64]
    done = memwall("simulate", "fusemax", "demo", "--tokens", "1k", "--schedule", "--array", "64", "--clock", "500")
    assert "binding: and two tiles interleaved: FuseMax" in done.stdout


def test_cascades_are_listed_with_their_passes(memwall: Callable) -> None:
    done = memwall("simulate", "cascade")
    assert done.exit_code == 0, done.stderr
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines()[2:17]}
    assert [rows[name][2] for name in ("three-pass", "two-pass", "one-pass", "linear")] == ["3", "2", "1", "1"]
    told = json.loads(memwall("simulate", "cascade", "--json").stdout)
    assert {row["cascade"]: row["passes"] for row in told}["two-normalisers"] == 4


def test_a_cascade_of_ones_own(memwall: Callable, tmp_path: Path) -> None:
    file = tmp_path / "norm.txt"
    file.write_text("S = sum{m} X[m]\nY[m] = X[m] / S  # twice over X\n")
    done = memwall("simulate", "cascade", file, "--sizes", "m=100", "--run")
    assert done.exit_code == 0, done.stderr
    assert "passes over m: 2 (by input: X 2)" in done.stdout
    assert "100 fetched again" in done.stdout
    assert "run: Y 100, finite" in done.stdout
    told = json.loads(memwall("simulate", "cascade", "one-pass", "--sizes", "m=70,m0=16", "--run", "--json").stdout)
    assert told["by_rank"]["m0"] == "2"
    assert told["run"]["softmax_error"] < 1e-12
    assert told["run"]["sizes"]["m1"] == 5
    assert told["sizes"]["m1"] == 5
    done = memwall("simulate", "cascade", "three-pass", "--rank", "p")
    assert "passes over p: 1" in done.stdout
    done = memwall("simulate", "cascade", "sinkhorn")
    assert "passes over m: 2 + 1 (I - 1)" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("fusemax", "GPT-9"), "published models are BERT"),
        (("fusemax", "--designs", "flash"), "--designs flash"),
        (("fusemax", "--tokens", "many"), "is not a count"),
        (("fusemax", "--tokens", "0"), "tokens 0"),
        (("fusemax", "--dram", "fast"), "is not a rate"),
        (("fusemax", "--buffer", "1g"), "two readings"),
        (("fusemax", "--plot", "a.png"), "ends in .svg"),
        (("cascade", "one-pas"), "did you mean one-pass"),
        (("cascade", "--run"), "go with a cascade"),
        (("cascade", "one-pass", "--rank", "x"), "no rank 'x'"),
        (("cascade", "one-pass", "--sizes", "m"), "write a rank and its size"),
        (("cascade", "one-pass", "--sizes", "x=3"), "no rank 'x'"),
        (("cascade", "one-pass", "--sizes", "m=0"), "from 1 to"),
        (("cascade", "three-pass", "--sizes", "m=268435456", "--run"), "give smaller --sizes"),
        (("cascade", "three-pass", "--sizes", "m=64k,p=64k,e=1,f=1", "--run"), "take smaller sizes"),
    ],
)
def test_bad_input_ends_with_2(memwall: Callable, arguments: tuple[str, ...], says: str) -> None:
    done = memwall("simulate", *arguments)
    assert done.exit_code == 2, done.stdout
    assert says in done.stderr


def test_files_that_hold_no_cascade_are_refused(memwall: Callable, tmp_path: Path) -> None:
    file = tmp_path / "wrong.txt"
    for content, says in (
        (b"Z[p] = X[m, p", "line 1, column 14"),
        (b"\xff\xfe", "not UTF-8"),
        (b"#" * 70_000, "70,000"),
    ):
        file.write_bytes(content)
        done = memwall("simulate", "cascade", file)
        assert done.exit_code == 2
        assert says in done.stderr


def test_a_buffer_that_holds_no_tile_ends_with_1(memwall: Callable) -> None:
    done = memwall("simulate", "fusemax", "--buffer", "64KiB")
    assert done.exit_code == 1
    assert "holds no tile of 256 query rows" in done.stderr

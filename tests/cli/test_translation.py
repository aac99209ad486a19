"""`memwall simulate translation`: kernels and files, a table, JSON, a picture, and bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "scan.txt"
    lines = [f"r {4096 * page + 64 * (page // 32 % 64):#x} 3\n" for page in range(4000)]  # in all sets of the caches
    path.write_text("".join(2 * lines))
    return path


def test_a_file_as_a_table_and_json(memwall: Callable, trace: Path) -> None:
    common = ("simulate", "translation", trace, "--large-pages", "0")
    done = memwall(*common)
    assert done.exit_code == 0, done.stderr
    rows = {line.split()[1]: line.split() for line in done.stdout.splitlines()[2:6]}
    assert list(rows) == ["radix", "pom-tlb", "victima", "tlb-64k"]
    assert "beside radix, geometric mean of 1 traces" in done.stdout
    told = json.loads(memwall(*common, "--variants", "radix,victima", "--warm", "0", "--json").stdout)
    radix, parked = told["runs"]
    assert radix["counters"]["walks"] == 8000  # a loop over more pages than the TLB holds
    assert parked["counters"]["walks"] == 500
    assert parked["gain"] == pytest.approx(told["mean_gains"]["victima"])
    assert told["settings"]["large_per_mille"] == 0


def test_kernels_are_drawn_saved_and_read_again(memwall: Callable, tmp_path: Path) -> None:
    saved, drawn = tmp_path / "stream.npy", tmp_path / "cycles.svg"
    done = memwall(
        "simulate", "translation", "--kernels", "stream", "--accesses", "3k", "--variants", "radix,victima",
        "--save", saved, "--plot", drawn, "--virtualised", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert drawn.read_text().count("<title>") == 6
    first = json.loads(done.stdout)["runs"]
    again = json.loads(
        memwall("simulate", "translation", saved, "--variants", "radix", "--virtualised", "--json").stdout
    )
    assert first[0]["counters"]["accesses"] == pytest.approx(again["runs"][0]["counters"]["accesses"], abs=50)
    done = memwall("simulate", "translation", "--kernels", "all", "--accesses", "0")
    assert done.exit_code == 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--variants", "victim"], "--variants victim: it is one of radix"),
        (["--variants", ","], "name one at least"),
        (["--kernels", "bfs"], "give one of both"),
        (["--l2", "3MiB"], "1MiB, 2MiB, 4MiB and 8MiB"),
        (["--l3", "1MB"], "third cache: 15,625 entries in 11 ways"),
        (["--large-pages", "1.5"], "between 0 and 1"),
        (["--warm", "1"], "1 excluded"),
        (["--plot", "picture.png"], "end"),
        (["--save", "x.npy"], "the files are there already"),
        (["--accesses", "1t"], "'1t' is not a count"),
        (["--memory-rate", "fast"], "not a rate"),
    ],
)
def test_bad_input(memwall: Callable, trace: Path, options: list[str], says: str) -> None:
    done = memwall("simulate", "translation", trace, *options)
    assert done.exit_code == 2
    assert says in done.stderr


def test_bad_files_and_kernels(memwall: Callable, tmp_path: Path) -> None:
    path = tmp_path / "bad.txt"
    path.write_text("r 1\nr x\n")
    done = memwall("simulate", "translation", path)
    assert done.exit_code == 2
    assert "line 2: address 'x'" in done.stderr
    done = memwall("simulate", "translation", "--kernels", "bsf")
    assert done.exit_code == 2
    assert "it is one of random" in done.stderr
    done = memwall("simulate", "translation", "--kernels", "bfs,stream", "--save", tmp_path / "x.npy")
    assert done.exit_code == 2
    assert "name one kernel" in done.stderr

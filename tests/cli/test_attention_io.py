"""`memwall simulate attention-io`: tables, JSON, a picture, and bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from memwall.cli.attention_io import fast_words
from memwall.hardware.system import describe_system

VERB = ("simulate", "attention-io")


def test_the_table_says_which_schedule_to_take(memwall: Callable) -> None:
    done = memwall(*VERB, "--tokens", "1024", "--head-size", "64", "--fast-memory", "64KiB")
    assert done.exit_code == 0, done.stderr
    rows = {line.split()[0]: line for line in done.stdout.splitlines()[2:6]}
    assert "3,342,336" in rows["kv-outer"]
    assert "q-outer *" in rows["q-outer"]
    assert "M = 16,384 words, d^2 = 4,096: large regime" in done.stdout
    done = memwall(*VERB, "--tokens", "1k", "--head-size", "64", "--fast-memory", "1024", "--dtype", "float16")
    assert "three-phase *" in done.stdout


def test_schedules_are_carried_out_and_traced(memwall: Callable) -> None:
    size = ("--tokens", "64", "--head-size", "16", "--fast-memory", "512")
    done = memwall(*VERB, *size, "--heads", "2", "--kv-heads", "1", "--causal", "--trace", "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    planned = {row["schedule"]: row["words"] for row in told["schedules"]}
    for row in told["executed"]:
        assert row["counted"] == planned[row["schedule"]]
        assert row["peak"] <= 512
        assert row["error"] < 1e-5
        assert row["belady"] <= row["lru"]
    done = memwall(*VERB, *size, "--execute")
    assert "counted" in done.stdout


def test_a_machine_and_a_picture(memwall: Callable, tmp_path: Path) -> None:
    picture = tmp_path / "words.svg"
    done = memwall(*VERB, "--machine", "h100-sxm", "--dtype", "float16", "--plot", picture)
    assert done.exit_code == 0, done.stderr
    assert "sram over l2" in done.stdout
    assert "no schedule takes less than" in done.stdout
    assert picture.read_text().count("<polyline") == 6
    done = memwall(*VERB, "--machine", "h100-sxm", "--fast-memory", "64KiB", "--backward", "--json")
    told = json.loads(done.stdout)
    assert [level["tier"] for level in told["hierarchy"]["levels"]] == ["fast memory", "sram", "l2"]
    assert {row["schedule"] for row in told["schedules"]} == {"kv-outer", "three-phase", "unfused"}


def test_sizes_of_fast_memory() -> None:
    assert fast_words("32KiB", 4) == 8192
    assert fast_words("8192", 2) == 8192
    for cache in describe_system().caches:
        assert fast_words(f"L{cache.level}", 4) == cache.nbytes // 4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), "--fast-memory is wanted"),
        (("--execute", "--machine", "h100-sxm"), "--fast-memory is wanted"),
        (("--fast-memory", "1g"), "two readings"),
        (("--fast-memory", "0"), "0 words"),
        (("--fast-memory", "-3KiB"), "negative"),
        (("--fast-memory", "1KiB", "--dtype", "int3"), "--dtype int3"),
        (("--fast-memory", "1KiB", "--tokens", "many"), "is not a count"),
        (("--fast-memory", "1KiB", "--heads", "3", "--kv-heads", "2"), "cannot share"),
        (("--fast-memory", "1KiB", "--unit", "gpu"), "--unit goes with --machine"),
        (("--fast-memory", "1KiB", "--machine", "h100"), "unknown machine"),
        (("--fast-memory", "1GB", "--machine", "h100-sxm"), "give less"),
        (("--fast-memory", "1KiB", "--execute"), "would take minutes"),
        (("--fast-memory", "1KiB", "--tokens", "1k", "--head-size", "64", "--trace"), "--trace would take minutes"),
        (("--fast-memory", "1KiB", "--tokens", "64", "--execute", "--backward"), "leave --backward out"),
        (("--fast-memory", "1KiB", "--plot", "a.png"), "ends in .svg"),
        (("--fast-memory", "1KiB", "--plot", "nowhere/a.svg"), "not a directory"),
    ],
)
def test_bad_input_ends_with_2(memwall: Callable, options: tuple[str, ...], says: str) -> None:
    done = memwall(*VERB, *options)
    assert done.exit_code == 2
    assert says in done.stderr


def test_what_does_not_fit_ends_with_1(memwall: Callable) -> None:
    done = memwall(*VERB, "--fast-memory", "2")
    assert done.exit_code == 1
    assert "fewer than 3" in done.stderr

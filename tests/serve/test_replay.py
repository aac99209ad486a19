"""A trace replayed on the virtual clock: conversations from rows, figures of each scheduler, refusals in words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from memwall.cli import app
from memwall.engine.arrivals import Load
from memwall.errors import InputError
from memwall.serve.replay import VARIANTS, chats_of, replay_loads


def loads() -> list[Load]:
    return [
        Load(at=0.3 * n, prompt_tokens=120 + 90 * (n // 6), output_tokens=60 + n % 3, session=f"s{n % 6}")
        for n in range(18)
    ]


def test_rows_become_conversations_whose_turns_keep_their_times() -> None:
    rows = [
        Load(at=1.0, prompt_tokens=10, output_tokens=5, session="a"),
        Load(at=2.0, prompt_tokens=7, output_tokens=3),
    ]
    chats = chats_of([*rows, Load(at=9.0, prompt_tokens=40, output_tokens=2, session="a")])
    assert [(chat.turns, chat.times) for chat in chats] == [(((10, 5), (25, 2)), (1.0, 9.0)), (((7, 3),), (2.0,))]
    with pytest.raises(InputError, match="no times"):
        chats_of([Load(at=None, prompt_tokens=1, output_tokens=1)])


def test_every_scheduler_answers_all_and_parts_lower_the_bill() -> None:
    runs = replay_loads(loads(), num_pages=60, priorities="random", frequency=0.1)
    assert [run["scheduler"] for run in runs] == ["fcfs", *VARIANTS]
    assert {run["turns"] for run in runs} == {18}
    single, groups, overlap, reuse = runs[1:]
    assert groups["copies"] < single["copies"] / 2
    assert single["stall_seconds"] > groups["stall_seconds"] > overlap["stall_seconds"]
    assert reuse["moved_bytes"] < overlap["moved_bytes"]
    assert reuse["reused_bytes"] > overlap["reused_bytes"] == 0


def test_too_few_pages_are_refused_with_what_would_do() -> None:
    with pytest.raises(InputError, match=r"one conversation comes to .*give"):
        replay_loads(loads(), num_pages=10)


def test_the_command_tells_each_part(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = [f"{load.at},{load.session},{load.prompt_tokens},{load.output_tokens}" for load in loads()]
    trace.write_text("\n".join(["Timestamp,Session ID,Request tokens,Response tokens", *rows]) + "\n")
    command = ["bench", "trace", str(trace), "--replay", "60", "--priorities", "random", "--quiet"]
    done = CliRunner().invoke(app, [*command, "--json"], prog_name="memwall")
    assert done.exit_code == 0, done.output
    assert [run["turns"] for run in json.loads(done.stdout)["replay"]] == [18] * 5
    table = CliRunner().invoke(app, command, prog_name="memwall")
    assert "+ reuse" in table.stdout
    assert "stalled, s" in table.stdout
    alone = CliRunner().invoke(app, ["bench", "trace", str(trace), "--priorities", "random"], prog_name="memwall")
    assert alone.exit_code == 2
    assert "give --replay PAGES" in " ".join(alone.output.split())

"""The measuring client against a real server, and its figures by hand."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from typer.testing import CliRunner

from memwall.cli import app
from memwall.engine.arrivals import Load, joined
from memwall.errors import InputError
from memwall.serve.bench import Outcome, Target, measure, report
from memwall.serve.watch import queue_figures, sample, watch
from tests.serve.conftest import Running


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", "serve", *arguments], prog_name="memwall")


def test_both_loops_against_a_server(server: Running) -> None:
    common = ("demo", "--url", server.url, "--requests", "6", "--prompt-tokens", "20", "--output-tokens", "8", "--json")
    closed = json.loads(invoke(*common, "--concurrency", "1,3").stdout)["runs"]
    assert [run["concurrency"] for run in closed] == [1, 3]
    opened = json.loads(invoke(*common, "--rate", "50", "--variation", "2").stdout)["runs"]
    for run in [*closed, *opened]:
        assert (run["requests"], run["failed"]) == (6, 0)
        assert run["output_tokens_per_s"] > 0
        assert run["first_token_seconds"]["p50"] <= run["whole_seconds"]["p50"]
        assert run["resident_peak_bytes"] <= run["budget_bytes"]
    assert opened[0]["loop"] == "open"
    assert opened[0]["arrivals"]["cv"] > 0
    assert "arrivals" not in closed[0]
    table = invoke(*common[:-1], "--concurrency", "2")
    assert "tokens / s" in table.stdout
    assert "2 at a time" in table.stdout


def test_a_server_that_is_started_for_it_and_one_that_cannot_be() -> None:
    done = invoke("demo", "--memory", "140MB", "--weights", "int4", "--requests", "3", "--output-tokens", "4", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["runs"][0]["failed"] == 0
    small = invoke("demo", "--memory", "20MB", "--requests", "3")
    assert small.exit_code == 1
    assert "--memory" in small.stderr or "budget" in small.stderr


def test_conversations_with_priorities_that_change() -> None:
    options = ("--weights", "int8", "--scheduler", "fastswitch", "--priorities", "random", "--turns", "3", "--json")
    lengths = ("--requests", "9", "--prompt-tokens", "40", "--output-tokens", "20", "--concurrency", "3")
    done = invoke("demo", "--memory", "140MB", *options, *lengths)
    assert done.exit_code == 0, done.stderr
    (run,) = json.loads(done.stdout)["runs"]
    assert (run["requests"], run["failed"]) == (9, 0)
    assert run["switches"]["kept"] >= 6
    assert run["switches"]["out_bytes"] > 0
    assert run["switches"]["clean_bytes"] > 0  # the second turn does not send the first one again
    assert run["resident_peak_bytes"] <= run["budget_bytes"]


def test_turns_hold_what_was_said_and_follow_each_other() -> None:
    loads = joined([Load(at=float(i), prompt_tokens=10, output_tokens=5) for i in range(5)], 2)
    assert [load.prompt_tokens for load in loads] == [10, 25, 10, 25, 10]
    assert [load.at for load in loads] == [0.0, None, 2.0, None, 4.0]
    assert len({load.session for load in loads}) == 3
    with pytest.raises(InputError, match="at least 1"):
        joined(loads, 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--priorities", "fair"), "need --scheduler fastswitch"),
        (("--scheduler", "fastswitch", "--priorities", "fixed", "--priority-updates", "0.1"), "do not change"),
        (("--scheduler", "fastswitch", "--priority-updates", "3"), "at most 1"),
        (("--scheduler", "fastswitch", "--lora-dir", "adapters"), "serves no adapters"),
    ],
)
def test_what_does_not_go_together_is_refused(options: tuple[str, ...], words: str) -> None:
    done = CliRunner().invoke(app, ["serve", "demo", *options], prog_name="memwall")
    assert done.exit_code == 2, done.output
    assert words in " ".join(done.output.split())
    if "--lora-dir" not in options:
        done = invoke("demo", "--url", "http://127.0.0.1:1", *options)
        assert done.exit_code == 2
        assert "leave --url out" in " ".join(done.output.split())


def test_refusals_count_as_failures(server: Running) -> None:
    target = Target(url=server.url, model="other", vocabulary=4096)
    outcomes = asyncio.run(measure(target, [Load(at=0.0, prompt_tokens=4, output_tokens=2)], concurrency=None))
    assert "404" in (outcomes[0].error or "")
    with pytest.raises(InputError, match="404"):
        report(outcomes, slo_first=1, slo_token=1)


def test_figures_by_hand() -> None:
    def outcome(due: float, first: float, last: float, tokens: int, **changes: Any) -> Outcome:
        load = Load(at=due, prompt_tokens=10, output_tokens=tokens)
        return Outcome(load, due=due, sent=due + 0.5, first=first, last=last, tokens=tokens, **changes)

    found = report(
        [outcome(10, 11, 13, 3), outcome(10, 14, 20, 4), outcome(11, 12, 12, 1, error="gone")],
        slo_first=1.0,
        slo_token=1.0,
    )
    assert (found["requests"], found["failed"], found["seconds"]) == (3, 1, 10)
    assert found["output_tokens_per_s"] == pytest.approx(0.7)
    assert found["goodput_per_s"] == pytest.approx(0.1)
    assert found["slo_share"] == pytest.approx(1 / 3)
    assert found["first_token_seconds"]["mean"] == 2.5
    assert found["per_token_seconds"] == {"mean": 1.5, "p50": 2, "p90": 2, "p99": 2}
    assert found["send_lag_seconds"]["p50"] == 0.5
    assert found["normalised_seconds"]["mean"] == pytest.approx((3 / 3 + 10 / 4) / 2)
    assert found["timed_out"] == 0


def test_stretches_of_time_are_told_by_themselves() -> None:
    def outcome(due: float, wait: float, **changes: Any) -> Outcome:
        load = Load(at=due, prompt_tokens=1, output_tokens=1)
        return Outcome(load, due=due, sent=due, first=due + wait, last=due + wait, tokens=1, **changes)

    some = [
        outcome(5, 0.5),
        outcome(6, 3),
        outcome(27, 0.5),
        outcome(28, 0.7),
        outcome(29, 9, error="late", timed_out=True),
    ]
    found = report(some, slo_first=1.0, slo_token=1.0, window_seconds=10)
    assert [(part["begin"], part["requests"]) for part in found["windows"]] == [(0, 2), (20, 3)]
    assert [part["slo_share"] for part in found["windows"]] == pytest.approx([0.5, 2 / 3])
    assert found["windows"][1]["failed_share"] == pytest.approx(1 / 3)
    assert found["windows"][0]["requests_per_s"] == 0.2
    assert found["stability"]["slo_share_worst"] == 0.5
    assert found["stability"]["slo_share_variance"] == pytest.approx((1 / 12) ** 2)
    assert found["timed_out"] == 1


def test_a_turn_waits_for_the_answer_and_for_the_one_who_thinks(server: Running) -> None:
    loads = joined([Load(at=0.0, prompt_tokens=6, output_tokens=3)] * 2, 2, think_seconds=0.3)
    target = Target(url=server.url, model="demo", vocabulary=4096)
    first, then = asyncio.run(measure(target, loads, concurrency=None))
    assert first.error is None is then.error
    assert first.last is not None
    assert then.due >= first.last + 0.3
    assert then.sent >= then.due


def test_queues_and_pages_are_read_from_metrics_of_either_name(server: Running) -> None:
    text = (
        '# HELP vllm:num_requests_waiting x\nvllm:num_requests_waiting{model_name="a"} 3.0\n'
        'vllm:num_requests_waiting{model_name="b"} 1.0\nvllm:gpu_cache_usage_perc{model_name="a"} 0.25\nother 7\n'
    )
    assert sample(text) == {"waiting": 4.0, "pages": 0.25}
    figures = queue_figures([{"at": 0.0, "waiting": 1.0}, {"at": 1.0, "waiting": 3.0}])
    assert (figures["waiting"]["mean"], figures["waiting"]["most"], figures["pages"]) == (2.0, 3.0, {})
    assert queue_figures([]) == {}

    async def some() -> list[dict[str, float]]:
        task = asyncio.create_task(watch(Target(url=server.url, model="demo", vocabulary=9), 0.01))
        await asyncio.sleep(0.3)
        task.cancel()
        return await task

    found = asyncio.run(some())
    assert found
    assert {"at", "waiting", "running", "pages"} == set(found[0])


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("--concurrency", "0"), "concurrency"),
        (("--concurrency", "x"), "concurrency"),
        (("--rate", "-1"), "above zero"),
        (("--scale", "0"), "scale"),
        (("--url", "http://127.0.0.1:9"), "no server"),
        (("--url", "ftp://a"), "http://HOST:PORT"),
        (("--trace", "/nowhere.csv"), "nowhere"),
    ],
)
def test_what_cannot_be_measured_is_named(arguments: tuple[str, ...], names: str) -> None:
    done = invoke("demo", *arguments)
    assert done.exit_code == 2
    assert names in done.stderr

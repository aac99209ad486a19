"""`memwall bench serve`: measure a server under load, open or closed loop."""

from __future__ import annotations

import json as jsons
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memwall.cli import bench_trace
from memwall.cli.command import AsJson, Debug, Memory, Quiet, Threads, Weights, add_command, complete_model
from memwall.cli.fair import PrioritiesOption, UpdatesOption
from memwall.cli.printing import format_table, note, print_json
from memwall.cli.schedulers import SchedulerName, SchedulerOption
from memwall.cli.serve import PagedKV
from memwall.errors import DoesNotFit, InputError

if TYPE_CHECKING:
    from memwall.engine.arrivals import Load


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="Measure memwall under load.", no_args_is_help=True, rich_markup_mode=None)
    add_command(group, "serve", serve)
    add_command(group, "trace", bench_trace.trace)
    app.add_typer(group, name="bench")


ModelOrDemo = Annotated[
    str,
    typer.Argument(
        help="Directory of a Hugging Face model, or `demo` (the default).",
        metavar="MODEL",
        autocompletion=complete_model,
        show_default=False,
    ),
]


def serve(
    model: ModelOrDemo = "demo",
    *,
    url: Annotated[
        str | None, typer.Option(help="A server that runs already (default: one is started).", show_default=False)
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="Its key.", envvar="MEMWALL_API_KEY", show_default=False)] = None,
    memory: Memory = None,
    weights: Weights = "auto",
    kv: PagedKV = "auto",
    threads: Threads = None,
    requests: Annotated[int, typer.Option(help="Requests to send.", min=1, max=100000)] = 64,
    concurrency: Annotated[
        str | None,
        typer.Option(help="Closed loop: so many at a time; several counts between commas are measured in turn."),
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Open loop: requests a second.", show_default=False)] = None,
    variation: Annotated[
        float, typer.Option(help="Of the gaps between arrivals: 1 is Poisson, above it bursty (Gamma).")
    ] = 1.0,
    trace: Annotated[
        Path | None,
        typer.Option(help="Lengths and times from a trace: Azure, BurstGPT, Mooncake, or columns of lengths."),
    ] = None,
    scale: Annotated[float, typer.Option(help="How many times as dense the trace's arrivals come.")] = 1.0,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of a prompt, half less to half more.", min=1)] = 64,
    output_tokens: Annotated[int, typer.Option(help="Tokens of an answer, half less to half more.", min=1)] = 64,
    turns: Annotated[
        int, typer.Option(help="Turns of a conversation: each prompt holds all that was said before.", min=1, max=1000)
    ] = 1,
    think: Annotated[float, typer.Option(help="Seconds from an answer to the next turn.", min=0)] = 0.0,
    window: Annotated[float, typer.Option(help="Seconds of a stretch that is told by itself (--json).", min=1)] = 60.0,
    scheduler: SchedulerOption = SchedulerName.fcfs,
    priorities: PrioritiesOption = None,
    priority_updates: UpdatesOption = None,
    shared_tokens: Annotated[int, typer.Option(help="Tokens that all prompts begin with alike.", min=0)] = 0,
    slo_first: Annotated[float, typer.Option(help="Objective: seconds to the first token.", min=0)] = 1.0,
    slo_token: Annotated[float, typer.Option(help="Objective: seconds per further token.", min=0)] = 0.1,
    seed: Annotated[int, typer.Option(help="Seed of arrivals, lengths and prompts.", min=0)] = 0,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Time to first token, time per token, their tails, goodput under objectives, and memory.

    Open loop with --rate or a --trace that has times (requests come when they come), else closed loop.
    """
    from memwall.engine.arrivals import joined
    from memwall.models import model_directory
    from memwall.models.config import ModelConfig

    loads = _loads(trace, requests, prompt_tokens, output_tokens, rate, variation, scale, seed)
    loads = joined(loads, turns, think) if turns > 1 else loads
    counts = _counts(concurrency, loads)
    config = ModelConfig.from_directory(model_directory(model))
    options = [] if memory is None else ["--memory", memory]
    if scheduler is SchedulerName.semi_pd:
        options += ["--slo-first", str(slo_first), "--slo-token", str(slo_token)]
    options += ["--weights", weights, "--kv", kv, *([] if threads is None else ["--threads", str(threads)])]
    options += _scheduling(scheduler, priorities, priority_updates, url)
    with _server(model, url, options, requests, quiet=quiet) as where:
        runs = [
            _measure(
                where, api_key, config.vocab_size, loads, count, seed, shared_tokens,
                {"slo_first": slo_first, "slo_token": slo_token, "window_seconds": window},
            )
            for count in counts
        ]  # fmt: skip
    if json:
        print_json({"server": where, "runs": runs})
        return
    typer.echo(_table(runs))
    for run in runs:
        for error in run["errors"]:
            note(f"memwall: {error}", quiet=quiet)


def _scheduling(scheduler: SchedulerName, priorities: str | None, updates: float | None, url: str | None) -> list[str]:
    """Options of the server that is started."""
    told: dict[str, object] = {"--priorities": priorities, "--priority-updates": updates}
    given = [part for name, value in told.items() if value is not None for part in (name, str(value))]
    if url is not None and (given or scheduler is not SchedulerName.fcfs):
        raise InputError("--scheduler and --priorities are for a server that is started here; leave --url out")
    return ["--scheduler", scheduler.value, *given]


def _loads(
    trace: Path | None, count: int, prompt: int, output: int, rate: float | None, cv: float, scale: float, seed: int
) -> list[Load]:
    from memwall.engine.arrivals import drawn_lengths, gamma_gaps, read_trace, scaled, timed

    loads = drawn_lengths(prompt, output, count, seed) if trace is None else read_trace(trace, count)
    if rate is not None:
        return timed(loads, gamma_gaps(rate, cv, len(loads), seed))
    if not scale > 0:
        raise InputError(f"--scale is {scale}; it must be above zero")
    return scaled(loads, scale)


def _timed(loads: list[Load]) -> bool:
    """Whether all have times, but for turns that follow others."""
    sessions: set[str] = set()
    for load in loads:
        if load.at is None and load.session not in sessions:
            return False
        if load.session is not None:
            sessions.add(load.session)
    return True


def _counts(concurrency: str | None, loads: list[Load]) -> list[int | None]:
    """What to run: None for an open loop, else counts for closed ones."""
    if concurrency is None:
        return [None] if loads[0].at is not None and _timed(loads) else [8]
    try:
        counts = [int(part) for part in concurrency.split(",")]
    except ValueError:
        raise InputError(f"--concurrency is {concurrency!r}; write counts, such as 1,4,16") from None
    if min(counts) < 1:
        raise InputError(f"--concurrency is {concurrency}; each count must be at least 1")
    return [*counts]


@contextmanager
def _server(model: str, url: str | None, options: list[str], requests: int, *, quiet: bool) -> Iterator[str]:
    """The address of the given server, or of one that is started and ended here."""
    if url is not None:
        yield url.rstrip("/").removesuffix("/v1")
        return
    queue = ["--queue", str(requests), "--connections", str(requests + 64)]
    command = [sys.executable, "-m", "memwall", "serve", model, "--port", "0", "--json", "--quiet", *queue, *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        text = ""
        while not text.endswith("}\n}\n") and not text.endswith("]\n}\n"):
            line = process.stdout.readline()
            if not line:
                said = process.communicate()[1].strip()
                kind = DoesNotFit if process.returncode == 1 else InputError
                raise kind(said.removeprefix("memwall: ") or "the server ended before it listened")
            text += line
        told = jsons.loads(text)
        note(f"memwall: {told['weights']} weights, {told['kv']} pages for {told['kv_tokens']:,} tokens", quiet=quiet)
        yield str(told["url"])
    finally:
        process.terminate()
        process.wait(60)


def _measure(
    url: str,
    key: str | None,
    vocabulary: int,
    loads: list[Load],
    count: int | None,
    seed: int,
    shared_tokens: int,
    judged: dict[str, float],
) -> dict[str, Any]:
    import asyncio

    from memwall.engine.arrivals import clipped
    from memwall.serve.bench import Target, fetch, measure, report
    from memwall.serve.watch import queue_figures, watch

    async def run() -> dict[str, Any]:
        target = Target(url=url, model="", vocabulary=vocabulary, api_key=key)
        served = (await fetch(target, "/v1/models"))["data"][0]
        target = Target(url=url, model=served["id"], vocabulary=vocabulary, api_key=key)
        fitting = clipped(loads, int(served.get("max_model_len", 2048)))
        watching = asyncio.create_task(watch(target))
        try:
            outcomes = await measure(target, fitting, concurrency=count, seed=seed, shared_tokens=shared_tokens)
        finally:
            watching.cancel()
        found = {**report(outcomes, **judged), "server": queue_figures(await watching)}
        loop = {"loop": "open" if count is None else "closed", "concurrency": count}
        return {**loop, **_arrivals(loads, count), **found, **await _memory(target)}

    async def _memory(target: Target) -> dict[str, Any]:
        try:
            held = await fetch(target, "/memory")
        except (InputError, ValueError):
            return {}  # another project's server
        names = ("budget_bytes", "resident_peak_bytes")
        return {
            **{name: held[name] for name in names},
            "preempted": held["totals"]["preempted"],
            "switches": held["totals"].get("switches"),
        }

    try:
        return asyncio.run(run())
    except OSError as error:
        raise InputError(f"{url}: no server answers there: {error}") from error


def _arrivals(loads: list[Load], count: int | None) -> dict[str, Any]:
    """How bursty an open loop's arrivals are."""
    from dataclasses import asdict

    import numpy as np

    from memwall.serve.burstgpt import burst_index

    times = np.array([load.at for load in loads if load.at is not None])
    if count is not None or len(times) < 2 or times[-1] <= times[0]:
        return {}
    return {"arrivals": asdict(burst_index(times))}


def _bursts(index: dict[str, float] | None) -> str:
    return f"{index['cv']:.2f} / {index['fano']:.2f} / {index['peak']:.2f}" if index else "-"


def _queue(told: dict[str, Any]) -> str:
    waiting, pages = (told.get(name, {}).get("most") for name in ("waiting", "pages"))
    return "-" if waiting is None or pages is None else f"{waiting:.0f} / {100 * pages:.0f} %"


def _switches(counts: dict[str, float] | None) -> str:
    if not counts or not counts["out_copies"] + counts["in_copies"]:
        return "-"
    moved = (counts["out_bytes"] + counts["in_bytes"]) / 1e6
    return f"{counts['out_copies'] + counts['in_copies']:,} / {moved:,.0f} / {counts['stall_seconds']:.2f}"


def _table(runs: list[dict[str, Any]]) -> str:
    from memwall.hardware.units import format_bytes

    def milliseconds(figures: dict[str, float]) -> str:
        return " / ".join(f"{1e3 * figures[name]:.1f}" for name in ("p50", "p90", "p99")) if figures else "-"

    names = [run["loop"] if run["concurrency"] is None else f"{run['concurrency']} at a time" for run in runs]
    rows = [
        ("answered", [f"{run['requests'] - run['failed']} of {run['requests']}" for run in runs]),
        ("requests / s", [f"{run['requests_per_s']:.2f}" for run in runs]),
        ("arrivals, CV / Fano / peak", [_bursts(run.get("arrivals")) for run in runs]),
        ("tokens / s", [f"{run['output_tokens_per_s']:.0f}" for run in runs]),
        ("goodput / s", [f"{run['goodput_per_s']:.2f} ({100 * run['slo_share']:.0f} %)" for run in runs]),
        ("first token, ms p50 / p90 / p99", [milliseconds(run["first_token_seconds"]) for run in runs]),
        ("per token, ms", [milliseconds(run["per_token_seconds"]) for run in runs]),
        ("between tokens, ms", [milliseconds(run["between_tokens_seconds"]) for run in runs]),
        ("whole answer, ms", [milliseconds(run["whole_seconds"]) for run in runs]),
        ("per token of the whole, ms", [milliseconds(run["normalised_seconds"]) for run in runs]),
        ("worst window, within objectives", [f"{100 * run['stability']['slo_share_worst']:.0f} %" for run in runs]),
        ("most waiting / most of the pages", [_queue(run["server"]) for run in runs]),
        ("sent late by, ms", [milliseconds(run["send_lag_seconds"]) for run in runs]),
        ("swaps: copies / MB / s stalled", [_switches(run.get("switches")) for run in runs]),
        (
            "peak resident",
            [format_bytes(run["resident_peak_bytes"]) if "resident_peak_bytes" in run else "-" for run in runs],
        ),
    ]
    return format_table(
        ("", *names), [(name, *cells) for name, cells in rows], right=frozenset(range(1, len(runs) + 1))
    )

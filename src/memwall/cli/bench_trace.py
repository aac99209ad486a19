"""`memwall bench trace`: what a trace of requests is like, and a new one of the same kind at any scale."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memwall.cli.command import AsJson, Debug, Quiet
from memwall.cli.fair import PrioritiesOption, UpdatesOption
from memwall.cli.printing import format_table, note, print_json, progress_bar
from memwall.errors import InputError
from memwall.hardware.units import GB

if TYPE_CHECKING:
    from memwall.serve.traces import Trace

HOUR_SECONDS = 3600.0
STRETCHES = (1, 10, 60, 600)
"""Seconds of the stretches whose counts are looked at: bursts are as long as they are."""


class LengthsName(StrEnum):
    """Where generated lengths come from."""

    joint = "joint"
    zipf = "zipf"


SpreadOption = Annotated[
    bool,
    typer.Option(
        "--spread",
        help="Before all else draw the times of requests that were recorded at one moment from the time between two: "
        "such moments are no bursts.",
    ),
]
ReplayOption = Annotated[
    int | None,
    typer.Option(
        help="Replay the trace on a virtual clock with so many pages of 16 tokens: what context switches cost.",
        metavar="PAGES",
        min=1,
    ),
]


def trace(
    path: Annotated[Path, typer.Argument(help="BurstGPT's or Azure's CSV, or Mooncake's JSON lines.", metavar="TRACE")],
    *,
    model: Annotated[str | None, typer.Option(help="Only requests to this model.")] = None,
    kind: Annotated[str | None, typer.Option(help="Only this log type, such as 'API log'.")] = None,
    window: Annotated[float, typer.Option(help="Seconds of a window that is fitted.", min=1)] = 60.0,
    generate: Annotated[
        Path | None, typer.Option(help="Write a new trace of the same kind here, as CSV.", metavar="OUT.csv")
    ] = None,
    scale: Annotated[float, typer.Option(help="Of the new trace: how many times as many requests.")] = 1.0,
    trim: Annotated[
        float | None, typer.Option(help="Before all else shorten idle stretches to so many seconds.", min=0.001)
    ] = None,
    spread: SpreadOption = False,
    thin: Annotated[
        float | None, typer.Option(help="Before all else keep each request with this probability: milder bursts.")
    ] = None,
    lengths: Annotated[
        LengthsName, typer.Option(help="Of the new trace: pairs of this one, or each for itself by Zipf's law.")
    ] = LengthsName.joint,
    conversations: Annotated[
        int | None,
        typer.Option(help="New requests begin conversations of at most so many tokens, whose prompts hold history."),
    ] = None,
    replay: ReplayOption = None,
    requests: Annotated[int, typer.Option(help="Of the replay: the first so many answered ones.", min=1)] = 500,
    priorities: PrioritiesOption = None,
    priority_updates: UpdatesOption = None,
    seed: Annotated[int, typer.Option(help="Seed of all that is drawn.", min=0)] = 0,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Rate, bursts (per window too), lengths, conversations and failures of a trace; --generate makes another.

    `memwall bench serve --trace OUT.csv` replays it. Scaling keeps the shape of bursts; thinning does not.
    """
    from memwall.serve.traces import read_columns, write_columns

    whole, tick = _spread(read_columns(path), seed, asked=spread, quiet=quiet)
    found = _asked_for(whole, model, kind, trim, thin, seed)
    report = {**describe(found, window), "tick_seconds": tick}
    if generate is not None:
        made = _another(found, path, window, lengths, scale, conversations, seed)
        write_columns(made, generate)
        report["generated"] = {"path": str(generate), "provenance": list(made.provenance), **describe(made, window)}
    if replay is not None:
        report["replay"] = _replay(generate or path, requests, replay, priorities, priority_updates, quiet=quiet)
    elif priorities is not None or priority_updates is not None:
        raise InputError("--priorities and --priority-updates are for a replay: give --replay PAGES")
    if json:
        print_json(report)
        return
    typer.echo(_table(report))
    if replay is not None:
        typer.echo(_replay_table(report["replay"]))
    if generate is not None:
        note(f"memwall: {report['generated']['requests']:,} requests are in {generate}", quiet=quiet)


def _spread(whole: Trace, seed: int, *, asked: bool, quiet: bool) -> tuple[Trace, float | None]:
    """The trace, with times between the moments of recording if `asked`, and the seconds between these; None: none."""
    tick = whole.tick_seconds
    if tick and not asked:
        told = f"memwall: times were recorded every {tick:.3g} s; give --spread, or these moments count as bursts"
        note(told, quiet=quiet)
    return (whole.spread(seed) if tick and asked else whole), tick or None


def _asked_for(
    found: Trace, model: str | None, kind: str | None, trim: float | None, thin: float | None, seed: int
) -> Trace:
    """The part of a trace that the options name."""
    if model is not None or kind is not None:
        found = found.select(model=model, kind=kind)
    found = found.trim_gaps(trim) if trim is not None else found
    return found.thin(thin, seed) if thin is not None else found


def _another(
    found: Trace, path: Path, window: float, lengths: LengthsName, scale: float, conversations: int | None, seed: int
) -> Trace:
    """A new trace of the same kind."""
    from memwall.serve import burstgpt

    answered = found.answered()
    if not len(answered):
        raise InputError(f"{path}: every request failed; there are no answers to draw lengths from")
    drawn = burstgpt.JointLengths(answered) if lengths is LengthsName.joint else burstgpt.ZipfLengths()
    made = burstgpt.generate(burstgpt.windows(found.at, window), drawn, seed, scale)
    return made if conversations is None else burstgpt.Conversations.of(found).unfold(made, seed, conversations)


def _replay(
    path: Path, count: int, pages: int, priorities: str | None, updates: float | None, *, quiet: bool
) -> list[dict[str, Any]]:
    from memwall.engine.arrivals import read_trace
    from memwall.engine.priorities import FREQUENCY
    from memwall.serve.replay import replay_loads

    with progress_bar("replaying", quiet=quiet) as bar:
        return replay_loads(
            read_trace(path, count), num_pages=pages, priorities=priorities or "markov",
            frequency=FREQUENCY if updates is None else updates, progress=bar.counted,
        )  # fmt: skip


def _replay_table(runs: list[dict[str, Any]]) -> str:
    def milliseconds(figures: dict[str, float]) -> str:
        return " / ".join(f"{1e3 * figures[name]:,.0f}" for name in ("p50", "p90", "p99")) if figures else "-"

    rows = [
        ("first token, ms p50 / p90 / p99", [milliseconds(run["first_token_seconds"]) for run in runs]),
        ("between tokens, ms", [milliseconds(run["between_tokens_seconds"]) for run in runs]),
        ("set aside", [f"{sum(run['preempted'].values()):,}" for run in runs]),
        ("copies", [f"{run['copies']:,}" for run in runs]),
        ("moved, GB", [f"{run['moved_bytes'] / GB:,.1f}" for run in runs]),
        ("not moved again, GB", [f"{run['reused_bytes'] / GB:,.1f}" for run in runs]),
        ("stalled, s", [f"{run['stall_seconds']:,.1f}" for run in runs]),
    ]
    heads = ("virtual clock", *(run["scheduler"] for run in runs))
    return format_table(heads, [(name, *cells) for name, cells in rows], right=frozenset(range(1, len(heads))))


def describe(found: Trace, window: float) -> dict[str, Any]:
    """A trace's figures, for `--json`; what too short a trace cannot tell is null."""
    from memwall.serve import burstgpt

    whole = burstgpt.burst_index(found.at)
    fitted = [one for one in burstgpt.windows(found.at, window) if one.fitted]
    answered = found.answered()
    hours = burstgpt.counts_per(found.at, HOUR_SECONDS)
    sessions, failed = found.sessions(), burstgpt.failures(found, HOUR_SECONDS)
    return {
        "provenance": list(found.provenance),
        "requests": len(found),
        "seconds": found.seconds,
        "rate_per_s": whole.rate_per_s,
        "cv": whole.cv,
        "fano": whole.fano,
        "fano_over": {str(each): _known(burstgpt.fano_factor(found.at, each)) for each in STRETCHES},
        "peak_to_mean": whole.peak,
        "windows": {
            "seconds": window,
            "fitted": len(fitted),
            "cv_median": _median([one.cv for one in fitted]),
            "shape_median": _median([one.shape for one in fitted]),
            "fano_median": _median([one.fano for one in fitted]),
            "gamma_better": _known(sum(one.gain > 0 for one in fitted) / len(fitted)) if fitted else None,
        },
        "prompt_tokens": _lengths(answered.prompt),
        "output_tokens": _lengths(answered.output),
        "rank_correlation": _known(burstgpt.rank_correlation(answered.prompt, answered.output))
        if len(answered) > 2
        else None,
        "sessions": len(sessions),
        "turns_mean": _known(sum(map(len, sessions.values())) / len(sessions)) if sessions else None,
        "conversations": burstgpt.conversations(found) or None,
        "failures": failed["share"],
        "failures_by_model": failed["by_model"],
        "failures_with_load": _known(failed["with_load"]),
        "parts": _parts(found, window),
        "daily": _known(burstgpt.autocorrelation(hours, 24)),
        "weekly": _known(burstgpt.autocorrelation(hours, 24 * 7)),
    }


def _parts(found: Trace, window: float) -> dict[str, dict[str, Any]]:
    """Requests and burstiness of each model and each kind of log, where there are several: median CV of the windows,
    and over time.
    """
    from memwall.serve import burstgpt

    parts = {}
    for what, names in (("model", found.models), ("kind", found.kinds)):
        for name in names if len(names) > 1 else ():
            some = found.select(**{what: name})
            cvs = [(one.begin, one.cv) for one in burstgpt.windows(some.at, window) if one.fitted]
            parts[f"{what} {name}"] = {
                "requests": len(some), "cv_median": _median([cv for _, cv in cvs]), "cv_over_time": cvs,
            }  # fmt: skip
    return parts


def _lengths(values: Any) -> dict[str, float] | None:
    import numpy as np

    if not len(values):
        return None
    names = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    return {"mean": float(values.mean()), **{name: float(np.quantile(values, share)) for name, share in names.items()}}


def _median(values: list[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None


def _known(value: float) -> float | None:
    return value if value == value else None  # JSON has no nan


def _table(report: dict[str, Any]) -> str:
    def digits(value: float) -> int:
        return 0 if value >= 20 else 1

    def cell(value: Any) -> str:
        if isinstance(value, dict):
            return " / ".join("-" if each is None else f"{each:,.{digits(each)}f}" for each in value.values())
        return "-" if value is None else f"{value:,.3g}" if isinstance(value, float) else f"{value:,}"

    columns = [report, *([report["generated"]] if "generated" in report else [])]
    names = {
        "requests": "requests", "seconds": "seconds", "requests / s": "rate_per_s", "CV of gaps": "cv",
        "Fano factor in 1, 10, 60, 600 s": "fano_over", "peak / mean": "peak_to_mean",
        "prompt tokens, mean p50 p90 p99": "prompt_tokens",
        "output tokens, mean p50 p90 p99": "output_tokens", "rank correlation": "rank_correlation",
        "recorded every, s": "tick_seconds",
        "sessions": "sessions", "turns": "turns_mean", "failures": "failures", "daily": "daily", "weekly": "weekly",
    }  # fmt: skip
    rows = [(told, *(cell(one.get(name)) for one in columns)) for told, name in names.items()]
    for part in report["parts"]:
        rows.append((f"CV of windows, {part}", *(cell(one["parts"].get(part, {}).get("cv_median")) for one in columns)))
    for name in ("cv_median", "shape_median", "gamma_better"):
        rows.append((f"windows: {name.replace('_', ' ')}", *(cell(one["windows"][name]) for one in columns)))
    heads = ("", "trace", "generated")[: len(columns) + 1]
    return format_table(heads, rows, right=frozenset(range(1, len(heads))))

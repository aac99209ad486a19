"""`memwall simulate paging`: which eviction policy would fetch how much, on a sequence of accesses."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memwall.cli.command import AsJson, Debug, Quiet
from memwall.cli.printing import format_table, note, print_json, progress_bar
from memwall.errors import InputError

if TYPE_CHECKING:
    from memwall.memory.replay import Predicted, Result

SHOWN = "lru,marker,flush,robust-flush,mark0,robust-mark0,mark-predict,predictive-marker,lfd"


class Source(StrEnum):
    """Where predictions come from."""

    oracle = "oracle"
    noisy = "noisy"
    seen = "seen"
    popu = "popu"
    pleco = "pleco"
    learned = "learned"


FlipZeros = Annotated[
    float | None, typer.Option(help="With oracle: share of the zeros that are told as ones (default: 0).")
]
FlipOnes = Annotated[
    float | None, typer.Option(help="With oracle: share of the ones that are told as zeros (default: 0).")
]
Train = Annotated[
    float | None,
    typer.Option(help="With popu, pleco or learned: share of a trace that is learned from (default: 0.5)."),
]


def paging(
    traces: Annotated[
        list[Path],
        typer.Argument(
            help="Files of accesses: a key a line, or JSON lines with hash_ids (.jsonl), such as Mooncake's traces of "
            "prefix blocks.",
            metavar="TRACE...",
        ),
    ],
    *,
    slots: Annotated[int, typer.Option(help="Keys that the cache holds.", min=1)] = 10,
    policies: Annotated[str, typer.Option(help="Policies between commas, or `all`.")] = SHOWN,
    predictions: Annotated[
        Source,
        typer.Option(
            help="oracle and noisy look ahead. The others do not: seen takes what comes for the first time for what "
            "will not come again; popu (how often a key came), pleco (and when) and learned (boosted trees) learn from "
            "the beginning of each trace, and are judged by the rest."
        ),
    ] = Source.oracle,
    flip_zeros: FlipZeros = None,
    flip_ones: FlipOnes = None,
    sigma: Annotated[
        float | None, typer.Option(help="With noisy: deviation of the logarithm of distances (default: 1).")
    ] = None,
    train: Train = None,
    limit: Annotated[int | None, typer.Option(help="Read at most so many accesses of a trace.", min=1)] = None,
    seeds: Annotated[int, typer.Option(help="Runs of policies that draw lots.", min=1, max=1000)] = 5,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Replay accesses against eviction policies: what each fetches, beside the least that any could.

    Policies that take a predicted bit are those of Paging with Succinct Predictions; lfd knows the future.
    """
    from memwall.memory.replay import predicted, read_accesses, replay

    names = _names(policies)
    settings = _settings(predictions, flip_zeros, flip_ones, sigma, train)
    sequences, runs = [read_accesses(path, limit) for path in traces], []
    with progress_bar("replay", quiet=quiet) as bar:
        for number, keys in enumerate(sequences):
            told = predicted(keys, slots, predictions.value, **settings)
            runs.append((keys, told, replay(keys, slots, names, told, seeds=seeds)))
            if bar.staged is not None:
                bar.staged(traces[number].name, number + 1, len(sequences))
    whole = _whole(runs)
    left_out = [name for name in names if name not in {one.policy for one in whole}]
    why = f"{predictions.value} does not say when a key comes next, which {' and '.join(left_out)} must be told"
    if not whole:
        raise InputError(f"--predictions {why}")
    if json:
        report = {"slots": slots, "predictions": predictions.value, "traces": _each(traces, runs)}
        print_json({**report, "policies": [one.to_dict() for one in whole], "left_out": left_out})
        return
    _tell(whole)
    note(f"memwall: {whole[0].counted:,} accesses of {len(runs)} traces, {slots} slots; {_shares(runs)}", quiet=quiet)
    if left_out:
        note(f"memwall: left out: {why}", quiet=quiet)


def _tell(whole: list[Result]) -> None:
    rows = [
        [one.policy, one.hint, f"{one.faults:,.0f}", f"{one.times_least:.3f}", f"{one.hit_rate:.1%}"] for one in whole
    ]
    typer.echo(format_table(["policy", "told", "faults", "times lfd", "hits"], rows, right=frozenset({2, 3, 4})))


def _names(policies: str) -> list[str]:
    from memwall.memory.succinct_paging import NAMES, make_policy

    names = list(NAMES) if policies == "all" else [name.strip() for name in policies.split(",") if name.strip()]
    if not names:
        raise InputError("--policies: name one at least, or all")
    for name in names:
        make_policy(name, 1)
    return list(dict.fromkeys(names))


def _settings(
    source: Source, zeros: float | None, ones: float | None, sigma: float | None, train: float | None
) -> dict[str, Any]:
    """Those that were given; one that another source of predictions takes is refused."""
    told = {"zeros": zeros, "ones": ones, "sigma": sigma, "train": train}
    options = {"zeros": "--flip-zeros", "ones": "--flip-ones", "sigma": "--sigma", "train": "--train"}
    takers = {"zeros": ("oracle",), "ones": ("oracle",), "sigma": ("noisy",), "train": ("popu", "pleco", "learned")}
    given = {name: value for name, value in told.items() if value is not None}
    for name in given:
        if source.value not in takers[name]:
            raise InputError(f"{options[name]} goes with --predictions {' or '.join(takers[name])}, not {source.value}")
    return given


def _each(traces: list[Path], runs: list[tuple[Any, Predicted, list[Result]]]) -> list[dict[str, Any]]:
    """Trace by trace, as `--json` prints it."""
    return [
        {"trace": str(path), "accesses": len(keys), "counted": len(keys) - told.train,
         "wrong_bits": {kind: list(told.wrong[kind]) for kind in told.wrong},
         "policies": [one.to_dict() for one in found]}
        for path, (keys, told, found) in zip(traces, runs, strict=True)
    ]  # fmt: skip


def _whole(runs: list[tuple[Any, Predicted, list[Result]]]) -> list[Result]:
    """All traces together, policy by policy."""
    from memwall.memory.replay import together

    return [together(column) for column in zip(*(found for _, _, found in runs), strict=True)]


def _shares(runs: list[tuple[Any, Predicted, list[Result]]]) -> str:
    """Wrong bits, in words."""
    told = []
    for kind in ("discard", "phase"):
        zeros, ones = (sum(run[1].wrong[kind][at] for run in runs) for at in (0, 1))
        told.append(f"{kind} bits: {zeros:,} wrong zeros, {ones:,} wrong ones")
    return "; ".join(told)

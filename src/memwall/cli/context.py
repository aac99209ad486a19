"""`memwall simulate context`: what long contexts cost on a device, what binds each cost, what compression would buy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memwall.cli.command import AsJson, Debug, Quiet, complete_weights
from memwall.cli.plan import _complete_machine
from memwall.cli.printing import format_table, note, print_json
from memwall.errors import DoesNotFit, InputError

if TYPE_CHECKING:
    from memwall.simulate.context_methods import Gain
    from memwall.simulate.context_model import ContextModel, Peak
    from memwall.simulate.context_sessions import Served
    from memwall.simulate.long_context_peak_analysis import Analysis

PUBLISHED = "34b"
SWEPT_DEVICES = (1, 2, 4, 8)
MOST_CONTEXT = 10**8
MOST_SIMULATED = 500
"""Users that --simulate follows; each step of its clock looks at all who are served."""

ContextModelName = Annotated[
    str,
    typer.Argument(
        help="Directory of a Hugging Face model (its config.json is enough), `demo`, or 34b: the paper's example.",
        metavar="MODEL",
    ),
]
MachineName = Annotated[
    str,
    typer.Option(
        help="Machine: a preset's name, a TOML file, or `here`, which is measured in a second or two.",
        metavar="MACHINE",
        autocompletion=_complete_machine,
    ),
]
Memory = Annotated[str | None, typer.Option(help="Of a device, in place of the machine's: 80GB.", show_default=False)]
Compute = Annotated[str | None, typer.Option(help="The same of arithmetic: 312TFLOP/s.", show_default=False)]
Bandwidth = Annotated[str | None, typer.Option(help="The same of memory's rate: 2TB/s.", show_default=False)]
Link = Annotated[
    str | None, typer.Option(help="The same of the way that switched users take: 20GB/s.", show_default=False)
]
Exchange = Annotated[
    str | None,
    typer.Option(
        help="Count what devices exchange, at this rate each, such as 300GB/s (default: free, as in the paper).",
        show_default=False,
    ),
]
Shares = Annotated[
    str,
    typer.Option(help="Shares of the peak that arithmetic, memory and link reach: 0.7,0.8,0.8.", metavar="A,M,L"),
]
Contexts = Annotated[str, typer.Option(help="Tokens of the documents, between commas (k = 1024).")]
Attention = Annotated[
    str | None,
    typer.Option(
        help="Count a prompt's attention with these layers and width, such as 48x4096 (default: the model's).",
        metavar="LxD",
        show_default=False,
    ),
]
Methods = Annotated[
    str | None,
    typer.Option(
        help="Compress with these together, such as 'snapkv(0.25)+kivi(2bit)+cla(2)': memwall's policies, cla, yoco, "
        "mqa, retrieval-heads, mla, cachegen, or layer(0.5), head, token, hidden, prefill, weights.",
        show_default=False,
    ),
]
Sweep = Annotated[
    str | None,
    typer.Option(help="Show these machines too, between commas, 1, 2, 4 and 8 devices of each.", show_default=False),
]


def context(
    model: ContextModelName,
    *,
    machine: MachineName = "a100-80gb",
    devices: Annotated[int, typer.Option(help="Devices that hold the model together.", min=1, max=4096)] = 1,
    links: Annotated[int, typer.Option(help="Host links that carry a switch side by side.", min=1, max=4096)] = 1,
    memory: Memory = None,
    compute: Compute = None,
    bandwidth: Bandwidth = None,
    link: Link = None,
    exchange: Exchange = None,
    shares: Shares = "1,1,1",
    context: Contexts = "4k,50k,100k,1m",
    users: Annotated[int, typer.Option(help="Users who share the device.", min=1, max=1_000_000)] = 20,
    rounds: Annotated[int, typer.Option(help="Questions after the document.", min=1, max=100_000)] = 5,
    answer: Annotated[int, typer.Option(help="Tokens of an answer.", min=1, max=1_000_000)] = 250,
    reading: Annotated[float, typer.Option(help="Seconds for which a user reads, the answer or the document.")] = 0.0,
    activations: Annotated[str, typer.Option(help="Memory kept free for activations, such as 2GB.")] = "0B",
    weights: Annotated[
        str, typer.Option(help="Format of the weights.", metavar="FORMAT", autocompletion=complete_weights)
    ] = "bfloat16",
    attention: Attention = None,
    causal: Annotated[
        bool, typer.Option("--causal/--all-pairs", help="A prompt's tokens look back, or at each other.")
    ] = True,
    methods: Methods = None,
    rank: Annotated[
        bool, typer.Option("--rank", help="Rank methods by what each gains alone at the longest context.")
    ] = False,
    sweep: Sweep = None,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Simulate the users' sessions too, with users swapped out by LRU.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the costs over the contexts (SVG).", metavar="FILE")] = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Tell how many users fit, and how long a document, an answer and a switch of users take, at a device's peak.

    For each cost: what limits it, and what a little more of anything would change. Everything that a longer context
    costs comes from the bytes of its keys and values; --methods and --rank tell what compressing them buys.
    """
    from memwall.hardware.system import write_whole
    from memwall.hardware.units import parse_bytes
    from memwall.simulate import context_report
    from memwall.simulate.context_methods import gain
    from memwall.simulate.context_methods import rank as ranked_methods
    from memwall.simulate.long_context_peak_analysis import Analysis, Workload
    from memwall.simulate.nano_report import check_picture

    if plot is not None:
        check_picture(plot)
    told = _model(model, weights, attention, causal)
    peak = _peak(machine, told, (memory, compute, bandwidth, link), exchange, shares, weights).times(devices, links)
    analyses = [
        Analysis(
            model=told,
            peak=peak,
            workload=Workload(
                context=tokens,
                users=users,
                rounds=rounds,
                answer=answer,
                reading_seconds=reading,
                activation_bytes=parse_bytes(activations),
            ),
        )
        for tokens in _contexts(context)
    ]
    stack: list[Gain] = []
    if methods is not None:
        analyses, stack = _compressed(analyses, methods)
    others = [] if sweep is None else _swept(analyses, sweep, told, exchange, shares, weights)
    found, left_out = ranked_methods(analyses[-1]) if rank else ([], {})
    if methods is not None and rank:
        found.append(gain(analyses[-1], methods))
    simulated = _simulated(analyses) if simulate else {}
    if not any(one.users for one in (*analyses, *others)):
        one = min(analyses, key=lambda each: each.least_devices)
        raise DoesNotFit(
            f"{told.name} and one user of {one.workload.context:,.0f} tokens do not fit {peak.devices} x {peak.name}; "
            f"{one.least_devices} would hold them: try --devices {one.least_devices}, or compress with --methods"
        )
    if plot is not None:
        write_whole(plot, context_report.picture(analyses))
        note(f"memwall: wrote {plot}", quiet=quiet)
    if json:
        print_json(context_report.to_dict(analyses, simulated, others, stack, found, left_out))
        return
    _tell(analyses, simulated, others, stack, found, quiet=quiet)
    for name, why in left_out.items():
        note(f"memwall: {name} is left out: {why}", quiet=quiet)


def _model(name: str, weights: str, attention: str | None, causal: bool) -> ContextModel:
    from dataclasses import replace

    from memwall.models import model_directory
    from memwall.models.config import ModelConfig
    from memwall.simulate.context_model import PUBLISHED_MODEL, ContextModel
    from memwall.simulate.serving_model import bits_of

    if name == PUBLISHED:
        size = PUBLISHED_MODEL.parameters * bits_of(weights) / 8
        found = replace(PUBLISHED_MODEL, weight_bytes=size, causal=causal)
    else:
        config = ModelConfig.from_directory(model_directory(name))
        found = ContextModel.of(config, name, weights=weights, causal=causal)
    if attention is None:
        return found
    layers, _, width = attention.lower().partition("x")
    if not (layers.isdecimal() and width.isdecimal() and int(layers) and int(width)):
        raise InputError(f"--attention {attention}: write layers and width, such as 48x4096")
    return replace(found, prefill_attention=(int(layers), int(width)))


def _peak(
    machine: str, model: ContextModel, given: tuple[str | None, ...], exchange: str | None, shares: str, weights: str
) -> Peak:
    """One device of a machine, with the numbers that were given in place of its own."""
    from dataclasses import replace

    from memwall.hardware import load_machine
    from memwall.hardware.units import parse_bytes, parse_flop_rate, parse_rate
    from memwall.simulate.context_calibration import NAME, calibrate
    from memwall.simulate.context_model import Peak

    memory, compute, bandwidth, link = given
    if machine == NAME:
        peak = calibrate(weights)
    else:
        peak = Peak.of(load_machine(machine), model.dtype, None if link is None else parse_rate(link))
    changed: dict[str, Any] = {}
    for field, text, parse in (
        ("memory_bytes", memory, parse_bytes), ("flop_per_s", compute, parse_flop_rate),
        ("bytes_per_s", bandwidth, parse_rate), ("link_bytes_per_s", link, parse_rate),
        ("peer_bytes_per_s", exchange, parse_rate),
    ):  # fmt: skip
        if text is not None:
            changed[field] = parse(text)
    try:
        changed["shares"] = tuple(float(part) for part in shares.split(","))
    except ValueError:
        raise InputError(f"--shares {shares}: write three shares of the peak, such as 0.7,0.8,0.8") from None
    return replace(peak, **changed)


def _contexts(text: str) -> list[int]:
    from memwall.hardware.units import parse_count

    found = [parse_count(part) for part in text.split(",") if part.strip()]
    if not found or min(found) < 1 or max(found) > MOST_CONTEXT:
        raise InputError(f"--context {text}: write counts of tokens such as 4k,50k, from 1 to {MOST_CONTEXT:,}")
    return sorted(set(found))


def _compressed(analyses: list[Analysis], methods: str) -> tuple[list[Analysis], list[Gain]]:
    """The same with methods, whose factors are of each context, and what they gain."""
    from dataclasses import replace

    from memwall.simulate.context_methods import gain

    gains = [gain(one, methods) for one in analyses]
    return [replace(one, effect=won.effect) for one, won in zip(analyses, gains, strict=True)], gains


def _swept(
    analyses: list[Analysis], names: str, model: ContextModel, exchange: str | None, shares: str, weights: str
) -> list[Analysis]:
    from memwall.simulate.context_report import sweep

    peaks = [
        _peak(name.strip(), model, (None,) * 4, exchange, shares, weights) for name in names.split(",") if name.strip()
    ]
    if not peaks:
        raise InputError("--sweep: name one machine at least, such as h100-sxm,desktop-rtx-4090")
    return sweep(analyses, [peak.times(count) for peak in peaks for count in SWEPT_DEVICES])


def _simulated(analyses: list[Analysis]) -> dict[str, list[Served | None]]:
    """Sessions on a virtual clock, both ways of sharing; None where nobody fits."""
    from memwall.simulate.context_sessions import Costs, simulate

    if analyses[0].workload.users > MOST_SIMULATED:
        raise InputError(f"--simulate follows {MOST_SIMULATED} users at most; give fewer --users, or leave it out")

    def run(one: Analysis, *, in_turn: bool) -> Served | None:
        return simulate(Costs.of(one), int(one.workload.users), in_turn=in_turn) if one.users else None

    return {
        "side by side": [run(one, in_turn=False) for one in analyses],
        "in turn": [run(one, in_turn=True) for one in analyses],
    }


def _tell(
    analyses: list[Analysis],
    simulated: dict[str, list[Served | None]],
    others: list[Analysis],
    stack: list[Gain],
    found: list[Gain],
    *,
    quiet: bool,
) -> None:
    from memwall.simulate import context_report as report

    def table(heads: Any, rows: list[list[str]], words: int = 1) -> None:
        typer.echo(format_table(heads, rows, right=frozenset(range(words, len(heads)))) + "\n")

    last = analyses[-1]
    table(report.columns(analyses), report.rows(analyses, simulated))
    typer.echo(f"At {last.workload.context:,.0f} tokens: per cent that one per cent more of each changes")
    table(report.BOTTLENECK_COLUMNS, report.bottlenecks(last), 2)
    if others:
        table(report.SWEEP_COLUMNS, [report.sweep_row(one) for one in others])
    if stack:
        typer.echo("Gains of the methods together")
        heads = ("context", *report.RANK_COLUMNS[1:])
        table(heads, [[f"{one.context:,}", *report.gain_row(one)[1:]] for one in stack])
    if found:
        typer.echo(f"Gains of each method alone at {last.workload.context:,.0f} tokens")
        table(report.RANK_COLUMNS, [report.gain_row(one) for one in found])
    note(f"memwall: {report.shape_text(last)}", quiet=quiet)
    note(f"memwall: {report.limits_text(last)}", quiet=quiet)

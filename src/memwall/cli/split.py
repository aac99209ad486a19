"""`memwall simulate split`: how many devices for prompts and how many for tokens, and how each should be cut."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memwall.cli.command import AsJson, Debug, Quiet, complete_weights
from memwall.cli.plan import _complete_machine
from memwall.cli.printing import format_table, note, print_json, progress_bar
from memwall.errors import DoesNotFit, InputError

if TYPE_CHECKING:
    from memwall.engine.arrivals import Load
    from memwall.simulate.distserve import Plan, Search, Served

MOST_PLANS = 12
"""Lines of the table."""
RATE_STEPS = 32


def split(
    model: Annotated[
        str,
        typer.Argument(
            help="Directory of a Hugging Face model (its config.json is enough), `demo`, or opt-13b or opt-66b: the "
            "paper's measured latencies on A100-80G.",
            metavar="MODEL",
        ),
    ],
    *,
    machine: Annotated[
        str,
        typer.Option(
            help="Machine of the cluster: a preset's name or a TOML file.",
            metavar="MACHINE",
            autocompletion=_complete_machine,
        ),
    ] = "h100-sxm",
    nodes: Annotated[int, typer.Option(help="Machines.", min=1, max=256)] = 1,
    devices: Annotated[int, typer.Option(help="Devices of each machine.", min=1, max=16)] = 8,
    link: Annotated[
        str | None, typer.Option(help="Rate of each device's link, such as 450GB/s.", show_default=False)
    ] = None,
    network: Annotated[
        str | None, typer.Option(help="What each device gets of the network between machines.", show_default=False)
    ] = None,
    slow_network: Annotated[
        bool,
        typer.Option(
            "--slow-network",
            help="Keys and values never leave a machine: both phases of the same layers share one.",
        ),
    ] = False,
    profiles: Annotated[
        Path | None,
        typer.Option(
            help="Folder of measured tables (`simulate profile`): asked before the roofline.",
            metavar="DIR",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    weights: Annotated[
        str, typer.Option(help="Format of the weights.", metavar="FORMAT", autocompletion=complete_weights)
    ] = "float16",
    kv: Annotated[str, typer.Option(help="Format of keys and values.", metavar="FORMAT")] = "float16",
    trace: Annotated[Path | None, typer.Option(help="Lengths (and with --watch times) from a trace.")] = None,
    requests: Annotated[int, typer.Option(help="Requests of each simulation.", min=20, max=100_000)] = 1000,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of a prompt, half less to half more.", min=1)] = 750,
    output_tokens: Annotated[int, typer.Option(help="Tokens of an answer, half less to half more.", min=2)] = 230,
    rate: Annotated[
        float | None,
        typer.Option(
            help="Requests a second to plan for, with as many devices as it takes (default: the best split of these).",
            show_default=False,
        ),
    ] = None,
    slo_first: Annotated[float, typer.Option(help="Objective: seconds to the first token.")] = 0.2,
    slo_token: Annotated[float, typer.Option(help="Objective: seconds per further token.")] = 0.1,
    attainment: Annotated[float, typer.Option(help="Share of requests that must meet both.")] = 0.9,
    fill: Annotated[
        bool,
        typer.Option(
            "--fill/--no-fill",
            help="Batches of prompts near what fills a device (the paper), or up to 8,192 tokens (its simulator).",
        ),
    ] = True,
    watch: Annotated[
        int | None,
        typer.Option(
            help="With a trace that has times: plan anew when means of so many requests shift clearly.", min=10
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of arrivals and lengths.", min=0)] = 0,
    html: Annotated[Path | None, typer.Option(help="Write a page with plots.", metavar="FILE")] = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Give prompts and tokens devices of their own: how many, how wide (tensor) and how deep (pipeline).

    Goodput is the rate at which enough requests meet both objectives. Every split is simulated with the lengths given,
    and the best is shown with its attainment over rates and over looser and tighter objectives.
    """
    from memwall.simulate import split_report
    from memwall.simulate.report import check_page, write_text

    if html is not None:
        check_page(html)
    if not 0 < attainment <= 1:
        raise InputError(f"--attainment is {attainment}; it must be above 0 and at most 1, such as 0.9")
    for name, seconds in (("--slo-first", slo_first), ("--slo-token", slo_token)):
        if not seconds > 0:
            raise InputError(f"{name} is {seconds}; it must be above zero, in seconds, such as 0.2")
    served, moving, notes = _served(model, machine, nodes, devices, link, network, profiles, weights, kv)
    loads = _lengths(trace, requests, prompt_tokens, output_tokens, seed)
    search = _search(served, moving, loads, nodes, devices, requests, seed, (slo_first, slo_token, attainment), fill)
    with progress_bar("splits", quiet=quiet) as bar:
        plans = _plans(search, rate, slow_network, bar.counted)
        goal = plans[0].goodput * plans[0].devices if rate is None else rate
        found = split_report.curves(search, plans[0], goal, bar.counted)
    changes = [] if watch is None else _watch(search, trace, watch, slow_network, loads)
    told = {
        "model": model, "machine": machine, "nodes": nodes, "devices": nodes * devices, "weights": weights, "kv": kv,
        "first_token_seconds": slo_first, "per_token_seconds": slo_token, "rate": rate, "requests": requests,
        "seed": seed, "fill": fill,
    }  # fmt: skip
    everything = split_report.to_dict(search, plans, told, found, changes)
    if html is not None:
        page = split_report.page(told, everything, plans, found)
        note(f"memwall: wrote {write_text(page, html)}", quiet=quiet)
    if json:
        print_json(everything)
        return
    rows = [split_report.cells(plan) for plan in plans[:MOST_PLANS]]
    typer.echo(format_table(split_report.COLUMNS, rows, right=frozenset({2, 3, 4})))
    typer.echo(_curves_table(everything["attainment"]))
    if requests / goal < 20 * slo_first:
        notes.append(f"{requests:,} requests pass in {requests / goal:.2g} s, too short for queues to grow: try more")
    for text in (*notes, *_told_changes(changes)):
        note(f"memwall: {text}", quiet=quiet)


def _served(
    model: str, machine: str, nodes: int, devices: int, link: str | None, network: str | None, profiles: Path | None,
    weights: str, kv: str,
) -> tuple[Served, float, list[str]]:  # fmt: skip
    """The model's latencies, the rate at which keys and values move, and what to say of the fit."""
    from memwall.simulate.distserve import Cluster
    from memwall.simulate.phase_models import PUBLISHED

    if model in PUBLISHED:
        return (
            PUBLISHED[model],
            Cluster(devices=1, per_node=1).link_bytes_per_s,
            ["latencies are the paper's, measured on A100-80G"],
        )
    from memwall.cli.simulate import _cluster
    from memwall.hardware import load_machine
    from memwall.models import model_directory
    from memwall.models.config import ModelConfig
    from memwall.simulate.base import Priced, Roofline
    from memwall.simulate.cluster import LinkModel
    from memwall.simulate.phase_fit import fit, has_experts
    from memwall.simulate.serving_model import Formats, ServedModel
    from memwall.simulate.tables import read_tables

    cluster = _cluster(load_machine(machine), nodes, devices, link, network)
    config = ModelConfig.from_directory(model_directory(model))
    wanted = ServedModel.of(config, model, Formats(weights=weights, kv=kv))
    measured = [] if profiles is None else [("measured", read_tables(profiles, cluster.device))]
    price = Priced([*measured, ("roofline", Roofline(device=cluster.device)), ("links", LinkModel(cluster=cluster))])
    found = fit(wanted, cluster, price)
    notes = [
        f"formulas are fitted to the cost model's batches: {found.prefill_error:.1%} off in the mean for prompts, "
        f"{found.decode_error:.1%} for tokens"
    ]
    if has_experts(wanted):
        notes.append("which experts a batch meets is a matter of chance; the formulas are means over that")
    return found.served, cluster.link_bytes_per_s or math.inf, notes


def _lengths(trace: Path | None, count: int, prompt: int, output: int, seed: int) -> list[Load]:
    from memwall.engine.arrivals import drawn_lengths, read_trace

    loads = drawn_lengths(prompt, output, max(count, 1000), seed) if trace is None else read_trace(trace, 1 << 20)
    loads = [load for load in loads if load.output_tokens > 1]
    if not loads:
        raise InputError(f"{trace}: no request has an answer of two tokens or more, so there is no time per token")
    return loads


def _search(
    served: Served, moving: float, loads: list[Load], nodes: int, devices: int, requests: int, seed: int,
    goal: tuple[float, float, float], fill: bool,
) -> Search:  # fmt: skip
    from memwall.simulate.distserve import Cluster, Limits, Search
    from memwall.simulate.phase_fit import highest_rate

    lengths = [(load.prompt_tokens, load.output_tokens) for load in loads]
    longest, room = max(map(sum, lengths)), max(one.kv_tokens for one in served.latencies.values())
    if longest > room:
        raise InputError(
            f"a request of {longest:,} tokens does not fit the {room:,} of the widest instance; give shorter ones, or "
            "more --devices"
        )
    most = highest_rate(served.latencies, sum(prompt for prompt, _ in lengths) / len(lengths))
    return Search(
        model=served, cluster=Cluster(devices=nodes * devices, per_node=devices, link_bytes_per_s=moving),
        lengths=lengths, limits=Limits(first_token=goal[0], per_token=goal[1], attainment=goal[2]), requests=requests,
        seeds=(seed,), rate_most=most, rate_step=most / RATE_STEPS, fill=fill,
    )  # fmt: skip


def _plans(search: Search, rate: float | None, slow: bool, progress: Any) -> list[Plan]:
    """The best first."""
    if rate is not None and not rate > 0:
        raise InputError(f"--rate is {rate}; it must be above zero")
    if not slow and rate is not None:
        return [search.apart(rate)]
    found = search.in_segments(progress) if slow else search.together(progress)
    best = found[0]
    if best.goodput <= 0:
        raise DoesNotFit("no split meets both objectives at any rate; loosen --slo-first or --slo-token")
    if rate is None:
        return found
    copies = max(math.ceil(rate / (best.goodput * best.devices)), 1)
    return [replace(best, prefill_instances=copies, decode_instances=copies), *found[1:]]


def _watch(search: Search, trace: Path | None, window: int, slow: bool, loads: list[Load]) -> list[dict[str, Any]]:
    """Plans along a trace."""
    from memwall.simulate.distserve import Lengths
    from memwall.simulate.replan import Replanner
    from memwall.simulate.split_report import plan_dict

    if trace is None or any(load.at is None for load in loads):
        raise InputError("--watch needs a --trace with times: it follows how the load shifts")

    def plan(lengths: Lengths, rate: float) -> Plan:
        return _plans(replace(search, lengths=lengths), rate, slow, None)[0]

    watched = Replanner(planner=plan, window=window)
    for load in loads:
        watched.observe(load.at or 0.0, load.prompt_tokens, load.output_tokens)
    return [{"at": one.at, "shifted": list(one.shifted), **plan_dict(one.plan)} for one in watched.changes]


def _told_changes(changes: list[dict[str, Any]]) -> list[str]:
    found = []
    for one in changes:
        sides = [
            f"{one[phase]['instances']} x ({one[phase]['tensor']}, {one[phase]['pipeline']})"
            for phase in ("prefill", "decode")
        ]
        why = f" ({', '.join(one['shifted'])} shifted)" if one["shifted"] else ""
        found.append(f"from {one['at']:,.0f} s on: prefill {sides[0]}, decode {sides[1]}{why}")
    return found


def _curves_table(attainment: dict[str, Any]) -> str:
    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.0%}"

    rows = [
        (f"{one['rate']:.2f} requests/s", share(one["split"]), share(one["colocated"]))
        for one in attainment["over_rate"]
    ]
    rows += [
        (f"objectives x {one['scale']:g}", share(one["split"]), share(one["colocated"]))
        for one in attainment["over_limits"]
    ]
    return format_table(("within both objectives at", "apart", "both on each"), rows, right=frozenset({1, 2}))

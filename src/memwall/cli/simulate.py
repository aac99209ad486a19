"""`memwall simulate`: what something would do on machines that are not here; `simulate serving` finds the plan by which
a cluster serves a model best, `simulate split` how many devices prompts and tokens need, `simulate profile` measures
this machine's engine for both, `simulate accllm` runs a model on an FPGA card, `simulate nanoflow` says what bounds an
iteration, `simulate paging` how much eviction policies would fetch, `simulate context` what long contexts cost,
`simulate attention-io` how little attention can move, `simulate fusemax` what an accelerator makes of it, `simulate
cascade` how many passes a kernel needs, `simulate oblivious-map` what hiding accesses takes, `simulate translation`
what page walks cost.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memwall.cli import split
from memwall.cli.attention_io import attention_io
from memwall.cli.bench import _loads
from memwall.cli.command import AsJson, Debug, Model, Quiet, Threads, add_command, complete_weights
from memwall.cli.context import context
from memwall.cli.fusemax import cascade, fusemax
from memwall.cli.nanoflow import nanoflow
from memwall.cli.oblivious import oblivious_map
from memwall.cli.paging import paging
from memwall.cli.plan import _complete_machine
from memwall.cli.printing import format_table, note, print_json, progress_bar
from memwall.cli.simulate_fpga import accllm
from memwall.cli.translation import translation
from memwall.errors import DoesNotFit, InputError

if TYPE_CHECKING:
    from memwall.engine.arrivals import Load
    from memwall.simulate.apex import Case


def register(app: typer.Typer) -> None:
    group = typer.Typer(
        help="Simulate what is not here: clusters that serve a model, an FPGA card, a cache and its future.",
        no_args_is_help=True,
        rich_markup_mode=None,
    )
    add_command(group, "serving", serving)
    add_command(group, "split", split.split)
    add_command(group, "profile", profile)
    add_command(group, "accllm", accllm)
    add_command(group, "nanoflow", nanoflow)
    add_command(group, "paging", paging)
    add_command(group, "context", context)
    add_command(group, "attention-io", attention_io)
    add_command(group, "fusemax", fusemax)
    add_command(group, "cascade", cascade)
    add_command(group, "oblivious-map", oblivious_map)
    add_command(group, "translation", translation)
    app.add_typer(group, name="simulate")


MachineName = Annotated[
    str,
    typer.Option(
        help="Machine of the cluster: a preset's name or a TOML file.",
        metavar="MACHINE",
        autocompletion=_complete_machine,
    ),
]
WeightFormats = Annotated[
    str,
    typer.Option(
        help="Format of the weights; several between commas are all tried.",
        metavar="FORMATS",
        autocompletion=complete_weights,
    ),
]
Profiles = Annotated[
    Path | None,
    typer.Option(
        help="Folder of measured tables (gemm.csv, attention.csv, all_reduce.csv ...): asked before the roofline.",
        metavar="DIR",
        exists=True,
        file_okay=False,
    ),
]
Clocks = Annotated[
    str, typer.Option(help="Shares of the full clock to try each plan at, such as 1,0.6; they matter for energy.")
]
Rate = Annotated[str | None, typer.Option(help="Rate of each device's link, such as 450GB/s.", show_default=False)]


def serving(
    model: Model,
    *,
    machine: MachineName = "h100-sxm",
    nodes: Annotated[int, typer.Option(help="Machines.", min=1, max=4096)] = 1,
    devices: Annotated[int, typer.Option(help="Devices of each machine.", min=1, max=64)] = 8,
    link: Rate = None,
    network: Annotated[
        str | None,
        typer.Option(help="What each device gets of the network between machines, such as 400Gbit/s."),
    ] = None,
    profiles: Profiles = None,
    weights: WeightFormats = "float16",
    kv: Annotated[str, typer.Option(help="Format of keys and values.", metavar="FORMAT")] = "float16",
    activations: Annotated[str, typer.Option(help="Format of activations.", metavar="FORMAT")] = "float16",
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Lengths and times from a trace: Azure, BurstGPT, apex_plus, Mooncake, or columns of lengths."
        ),
    ] = None,
    requests: Annotated[int, typer.Option(help="Requests to serve.", min=1, max=1_000_000)] = 256,
    rate: Annotated[
        float | None, typer.Option(help="Requests a second (default: the trace's times, else all at once).")
    ] = None,
    variation: Annotated[
        float, typer.Option(help="Of the gaps between arrivals: 1 is Poisson, above it bursty.")
    ] = 1.0,
    scale: Annotated[float, typer.Option(help="How many times as dense the trace's arrivals come.")] = 1.0,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of a prompt, half less to half more.", min=1)] = 2048,
    output_tokens: Annotated[int, typer.Option(help="Tokens of an answer, half less to half more.", min=1)] = 128,
    scheduler: Annotated[str, typer.Option(help="Scheduler of the engine: fcfs or batchllm.")] = "fcfs",
    step_tokens: Annotated[int, typer.Option(help="Most tokens of one iteration.", min=1)] = 65536,
    max_batch: Annotated[int, typer.Option(help="Most requests of one iteration (default: no cap).", min=1)] = 1 << 20,
    goal: Annotated[
        str, typer.Option(help="What the best plan has least of: latency, time (of all), energy, slo (late ones).")
    ] = "latency",
    clocks: Clocks = "1",
    slo_first: Annotated[float, typer.Option(help="Objective: seconds to the first token.")] = 0.01,
    slo_token: Annotated[float, typer.Option(help="Objective: seconds per further token.")] = 0.01,
    only: Annotated[
        str | None, typer.Option("--plan", help="Simulate this plan alone, by the name the table gives it.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Give no plan up, however slow it turns out.")] = False,
    jobs: Annotated[int | None, typer.Option(help="Processes that simulate (default: one per core).", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Seed of arrivals and lengths.", min=0)] = 0,
    html: Annotated[Path | None, typer.Option(help="Write a page with plots.", metavar="FILE")] = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Find the parallel plan by which a cluster serves a model and a load best, without the cluster.

    Every way to spread the model over the devices (data, pipeline, tensor and expert parallel, for each cell of a
    block by itself) that fits their memory is simulated iteration by iteration, with the scheduler of `memwall serve`
    on a virtual clock. MODEL needs no more than a config.json.
    """
    from dataclasses import replace

    from memwall.engine.base import Limits
    from memwall.hardware import load_machine, usable_processors
    from memwall.models import model_directory
    from memwall.models.config import ModelConfig
    from memwall.simulate import report
    from memwall.simulate.apex import Case
    from memwall.simulate.iterations import SCHEDULERS, Batching
    from memwall.simulate.metrics import Objectives
    from memwall.simulate.serving_model import Formats, ServedModel
    from memwall.simulate.tables import read_tables

    if scheduler not in SCHEDULERS:
        raise InputError(f"--scheduler {scheduler}: it is one of {', '.join(SCHEDULERS)}")
    if html is not None:
        report.check_page(html)
    cluster = _cluster(load_machine(machine), nodes, devices, link, network)
    formats = [Formats(weights=one.strip(), kv=kv, activations=activations) for one in weights.split(",")]
    config = ModelConfig.from_directory(model_directory(model))
    loads = _loads(trace, requests, prompt_tokens, output_tokens, rate, variation, scale, seed)
    case = Case(
        model=ServedModel.of(config, model, formats[0]),
        cluster=cluster,
        loads=tuple(_started(loads)),
        tables=None if profiles is None else read_tables(profiles, cluster.device),
        batching=Batching(
            scheduler=SCHEDULERS[scheduler], limits=Limits(token_budget=step_tokens, max_sequences=max_batch)
        ),
        objectives=Objectives(first_token=slo_first, per_token=slo_token),
    )
    told = {
        "model": model, "parameters": case.model.parameters, "machine": machine, "nodes": nodes,
        "devices": cluster.devices, "weights": weights, "kv": kv, "activations": activations, "requests": len(loads),
        "scheduler": scheduler, "seed": seed,
    }  # fmt: skip
    cases = [replace(case, model=replace(case.model, formats=one)) for one in formats]
    with progress_bar("plans", quiet=quiet) as bar:
        found = _search(cases, goal, clocks, only, everything, jobs or usable_processors(), bar.labelled)
    if html is not None:
        note(f"memwall: wrote {report.write_page(found, told, html)}", quiet=quiet)
    if json:
        print_json(report.to_dict(found, told))
        return
    rows = [report.cells(one) for one in found.results]
    typer.echo(format_table(report.COLUMNS, rows, right=frozenset(range(1, len(report.COLUMNS)))))
    for text in report.remarks(found):
        note(f"memwall: {text}", quiet=quiet)


def _cluster(machine: Any, nodes: int, devices: int, link: str | None, network: str | None) -> Any:
    from memwall.hardware.units import parse_rate
    from memwall.simulate.cluster import Cluster

    return Cluster.of(
        machine,
        nodes=nodes,
        per_node=devices,
        link_bytes_per_s=None if link is None else parse_rate(link),
        network_bytes_per_s=None if network is None else parse_rate(network),
    )


def _started(loads: list[Load]) -> list[Load]:
    """Loads without times come all at once."""
    from dataclasses import replace

    return [load if load.at is not None else replace(load, at=0.0) for load in loads]


def _search(
    cases: list[Case], goal: str, clocks: str, only: str | None, everything: bool, jobs: int, progress: Any
) -> Any:
    """The search for each case (they differ in the weights' format), joined; formats that do not fit are left out."""
    from memwall.simulate.apex import GOALS, Search, join, search, simulate
    from memwall.simulate.plans import enumerate_plans

    case = cases[0]
    if goal not in GOALS:
        raise InputError(f"--goal {goal}: it is one of {', '.join(GOALS)}")
    try:
        shares = [float(part) for part in clocks.split(",")]
    except ValueError:
        raise InputError(f"--clocks {clocks}: write shares of the full clock, such as 1,0.6") from None
    if goal == "energy" and case.cluster.device.watts is None:
        raise InputError(f"{case.cluster.device.name} states no power, so energy is not known; choose another --goal")
    plans = {plan.name: plan for plan in enumerate_plans(case.model, case.cluster.devices)}
    if only is not None and only not in plans:
        raise InputError(f"--plan {only}: plans for {case.cluster.devices} devices are {', '.join(plans)}")
    found, misfits = [], []
    for one in cases:
        try:
            if only is None:
                found.append(search(one, goal=goal, clocks=shares, keep_all=everything, jobs=jobs, progress=progress))
            else:
                result = simulate(one, plans[only])
                assert result is not None
                found.append(Search(goal=goal, results=(result,), given_up=(), misfits=()))
        except DoesNotFit as error:
            misfits.append(error)
    if not found:
        raise misfits[-1]
    return join(found)


def profile(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Folder for gemm.csv, attention.csv and pass.csv.", metavar="OUT")],
    *,
    weights: Annotated[
        str,
        typer.Option(help="Format of the weights.", metavar="FORMAT", autocompletion=complete_weights),
    ] = "int8",
    context: Annotated[int, typer.Option(help="Longest request, prompt and answer.", min=64)] = 1024,
    max_requests: Annotated[int, typer.Option(help="Most requests of one step.", min=1, max=512)] = 16,
    step_tokens: Annotated[int, typer.Option(help="Most tokens of one step.", min=1, max=4096)] = 256,
    threads: Threads = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure this machine's engine with a model, as tables that `simulate serving --profiles` reads."""
    from memwall.engine.serving import ServingSettings, load_engine
    from memwall.models import model_directory
    from memwall.simulate.host import profile_engine

    settings = ServingSettings(
        weights=weights,
        context_tokens=context,
        max_sequences=max_requests,
        token_budget=step_tokens,
        keep_prefixes=False,
        swap_bytes=0,
        threads=threads,
    )
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give a folder for the tables")
    engine = load_engine(model_directory(model), settings)
    try:
        with progress_bar("measuring", quiet=quiet) as bar:
            found = profile_engine(engine, progress=bar.labelled)
    finally:
        engine.release()
    paths = found.write(out)
    formats = found.formats
    if json:
        print_json({
            "files": [str(path) for path in paths], "weights": formats.weights, "kv": formats.kv,
            "activations": formats.activations, "rows": len(found.gemm) + len(found.attention) + len(found.passes),
        })  # fmt: skip
        return
    for path in paths:
        typer.echo(str(path))
    note(
        f"memwall: use them with --weights {formats.weights} --kv {formats.kv} --activations {formats.activations}",
        quiet=quiet,
    )

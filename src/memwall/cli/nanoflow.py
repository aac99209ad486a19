"""`memwall simulate nanoflow`: what bounds an iteration of a model on a node, and the pipeline that comes nearest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memwall.cli.command import AsJson, Debug, Model, Quiet
from memwall.cli.plan import _complete_machine
from memwall.cli.printing import format_table, note, print_json, progress_bar
from memwall.errors import InputError

if TYPE_CHECKING:
    from memwall.simulate.nano_costs import Batch, Node
    from memwall.simulate.nano_search import Found
    from memwall.simulate.serving_model import ServedModel


def nanoflow(
    model: Model,
    *,
    machine: Annotated[
        str,
        typer.Option(
            help="Machine: a preset's name or a TOML file.", metavar="MACHINE", autocompletion=_complete_machine
        ),
    ] = "a100-80gb",
    devices: Annotated[int, typer.Option(help="Devices that hold the model together.", min=1, max=64)] = 8,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of the dense batch.", min=256, max=1 << 20)] = 2048,
    prompt_tokens: Annotated[float, typer.Option(help="Mean tokens of a prompt.")] = 512,
    output_tokens: Annotated[float, typer.Option(help="Mean tokens of an answer.")] = 1024,
    profiled: Annotated[
        str | None,
        typer.Option(help="What large products reach on a device, such as 260TFLOP/s (default: 83 % of its peak)."),
    ] = None,
    reached: Annotated[
        float | None, typer.Option(help="Tokens a second and device that a server makes: its share of the best.")
    ] = None,
    search: Annotated[bool, typer.Option("--search", help="Search the pipeline of nano-batches; needs SciPy.")] = False,
    seconds: Annotated[float, typer.Option(help="Most seconds of each program of the search.", min=0.5)] = 8.0,
    plot: Annotated[Path | None, typer.Option(help="With --search: draw the pipeline (SVG).", metavar="FILE")] = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Tell which class of work limits a model's iterations on a node, the most tokens a second that it could make, and
    with --search how near operations come that run beside each other. MODEL needs no more than a config.json.
    """
    from memwall.hardware import load_machine
    from memwall.hardware.system import write_whole
    from memwall.hardware.units import parse_flop_rate
    from memwall.models import model_directory
    from memwall.models.config import ModelConfig
    from memwall.simulate import nano_report
    from memwall.simulate.nano_costs import Batch, Node, bound_of, operation_table
    from memwall.simulate.serving_model import Formats, ServedModel

    if plot is not None:
        nano_report.check_picture(plot)
        if not search:
            raise InputError("--plot draws what --search finds: add --search")
    if reached is not None and not reached > 0:
        raise InputError(f"--reached {reached:g}: it must be above 0 tokens a second")
    node = Node.of(load_machine(machine), devices, profiled=None if profiled is None else parse_flop_rate(profiled))
    served = ServedModel.of(ModelConfig.from_directory(model_directory(model)), model, Formats())
    batch = Batch(tokens=batch_tokens, prompt=prompt_tokens, output=output_tokens)
    rows, bound = operation_table(served, node, batch), bound_of(served, node, batch_tokens)
    found = _search(served, node, batch, seconds, quiet=quiet) if search else None
    if plot is not None and found is not None:
        write_whole(plot, nano_report.picture(found.schedule))
        note(f"memwall: wrote {plot}", quiet=quiet)
    share = None if reached is None else reached / bound.optimal_tokens_per_s
    if json:
        told: dict[str, Any] = {"model": model, "machine": machine, "devices": devices, "batch_tokens": batch_tokens}
        told["share_of_optimal"] = share
        print_json(nano_report.to_dict(told, rows, bound, found))
        return
    cells = [nano_report.row_cells(row) for row in rows]
    typer.echo(format_table(nano_report.ROW_COLUMNS, cells, right=frozenset(range(2, 7))))
    typer.echo(
        f"\nmemory {1e3 * bound.memory:.1f} ms, compute {1e3 * bound.compute:.1f} ms, network "
        f"{1e3 * bound.network:.1f} ms an iteration: limited by {bound.limit}, T_R {bound.ratio:.2f}\n"
        f"at best {bound.optimal_tokens_per_s:,.0f} tokens/s and device"
        + ("" if share is None else f"; {reached:,.0f} are {share:.1%} of that")
    )
    if found is not None:
        typer.echo(
            f"\na layer: {1e3 * found.sequential:.3f} ms one operation after another, {1e3 * found.parts_only:.3f} ms "
            f"in nano-batches without overlap, {1e3 * found.simulated:.3f} ms with: {found.gain:.2f} times as fast\n"
        )
        typer.echo(
            format_table(
                nano_report.PLACED_COLUMNS, nano_report.placed_cells(found.schedule), right=frozenset({3, 4, 5})
            )
        )


def _search(model: ServedModel, node: Node, batch: Batch, seconds: float, *, quiet: bool) -> Found:
    from memwall.engine.nano_schedule import A100
    from memwall.simulate.nano_costs import PLACEMENTS, layer_of
    from memwall.simulate.nano_program import need_scipy
    from memwall.simulate.nano_search import search

    need_scipy()
    ways = PLACEMENTS if node.devices > 1 else PLACEMENTS[:1]
    layers = {way: layer_of(model, node, batch, way) for way in ways}
    with progress_bar("pipelines", quiet=quiet) as bar:
        done = 0

        def tick(text: str) -> None:
            nonlocal done
            done += 1
            if bar.labelled is not None:
                bar.labelled(done, 2 * len(ways) + 2, text)

        return search(layers, A100, seconds=seconds, progress=tick)

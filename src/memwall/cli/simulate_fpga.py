"""`memwall simulate accllm`: a language model on an FPGA card, in AccLLM's formats and FlightLLM's."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from memwall.cli.command import AsJson, Debug, Quiet, complete_model
from memwall.cli.plan import _complete_machine
from memwall.cli.printing import format_table, note, print_json
from memwall.errors import InputError

PUBLISHED = {"FlightLLM": 55.0, "AccLLM": 164.0}
"""Tokens a second of LLaMA-2-7B on a U280: a board's and a simulator's (paper)."""

Sizes = Annotated[
    str | None,
    typer.Argument(
        help="A model directory (its config.json is all that is read) or `demo`; LLaMA-2-7B's sizes if left out.",
        metavar="[MODEL]",
        autocompletion=complete_model,
        show_default=False,
    ),
]
Card = Annotated[
    str,
    typer.Option(
        help="Card with a tier called hbm: a preset's name or a TOML file.",
        metavar="MACHINE",
        autocompletion=_complete_machine,
    ),
]


def accllm(
    model: Sizes = None,
    *,
    machine: Card = "alveo-u280",
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt.", min=1)] = 512,
    output_tokens: Annotated[int, typer.Option(help="Tokens of the answer.", min=1)] = 1536,
    contexts: Annotated[str, typer.Option(help="Contexts of the long-context table.")] = "2048,8192,32768",
    sinks: Annotated[int, typer.Option(help="First tokens that stay.", min=0)] = 4,
    window: Annotated[int, typer.Option(help="Last tokens that stay.", min=1)] = 1024,
    lanes: Annotated[int | None, typer.Option(help="2-bit weights in a multiplier (default: the fastest).")] = None,
    spacing: Annotated[int | None, typer.Option(help="Bits between them, with --lanes.", min=1)] = None,
    shared_places: Annotated[
        bool,
        typer.Option(
            "--shared-places", help="Rows packed together keep the same two of every four: one token's products pack."
        ),
    ] = False,
    flush_cycles: Annotated[int, typer.Option(help="Cycles that splitting a packed sum takes.", min=0)] = 1,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Simulate AccLLM's and FlightLLM's formats and engines on one card: speed, energy, and what makes the difference.

    Loads, products and special functions are instructions of units that work side by side on double-buffered tiles. The
    difference is taken apart step by step; the last table is the speed at long contexts.
    """
    from memwall.hardware import load_machine
    from memwall.models import model_directory
    from memwall.models.config import ModelConfig
    from memwall.simulate.fpga_designs import ModelShape, Recipe
    from memwall.simulate.fpga_llm import compare

    shape = ModelShape() if model is None else ModelShape.of(ModelConfig.from_directory(model_directory(model)))
    recipe = Recipe(
        sinks=sinks,
        window=window,
        flush_cycles=flush_cycles,
        weight_packing=_packing(lanes, spacing),
        shared_places=shared_places,
    )
    found = compare(
        shape, load_machine(machine), recipe, prompt_tokens=prompt_tokens, output_tokens=output_tokens,
        contexts=_numbers(contexts),
    )  # fmt: skip
    if json:
        print_json({"model": model or "llama-2-7b", **found})
        return
    for columns, rows in _tables(found):
        typer.echo(format_table(columns, rows, right=frozenset(range(1, len(columns)))))
    typer.echo(f"decode {found['speed_up']:.2f} times as fast")
    if model is None and machine == "alveo-u280":
        told = ", ".join(f"{name} {speed:.0f}" for name, speed in PUBLISHED.items())
        note(f"memwall: published for this model and card, tokens/s: {told}", quiet=quiet)


def _packing(lanes: int | None, spacing: int | None) -> Any:
    from memwall.simulate.dsp_packing import PORT_BITS, Packing

    if lanes is None:
        if spacing is not None:
            raise InputError("--spacing is the distance between lanes; give --lanes too")
        return None
    widest = PORT_BITS - 3 if lanes == 1 else (PORT_BITS - 3) // max(lanes - 1, 1)
    return Packing(code_bits=2, lanes=lanes, spacing=widest if spacing is None else spacing)


def _numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"--contexts {text}: write numbers of tokens, such as 2048,8192,32768")
    return [int(part) for part in parts]


def _tables(found: dict[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """Headings and rows of the four tables."""
    designs = [
        [
            one["design"], f"{one['weight_bits']:.2f}", f"{one['decode_tokens_per_s']:.1f}",
            f"{one['tokens_per_s']:.1f}", f"{one['prompt_seconds']:.2f}", f"{one['tokens_per_joule']:.2f}",
            f"{one['bandwidth_share']:.0%}", f"{one['shares']['load']:.0%}", f"{one['shares']['compute']:.0%}",
            f"{one['shares']['special']:.0%}",
        ]
        for one in found["designs"]
    ]  # fmt: skip
    steps = [[one["step"], f"{one['decode_tokens_per_s']:.1f}", f"{one['times']:.2f}"] for one in found["steps"]]
    names = [one["design"] for one in found["designs"]]
    curves = [
        [f"{one['context']:,}", *("does not fit" if one[name] is None else f"{one[name]:.1f}" for name in names)]
        for one in found["contexts"]
    ]
    packings = [
        [name, *(str(one[key]) for key in ("lanes", "spacing", "flush_interval")), f"{one['products_per_cycle']:.2f}"]
        for name, one in found["packings"].items()
    ]
    return [
        (
            ["design", "bits/weight", "decode tok/s", "request tok/s", "prompt s", "tok/J", "HBM", "load", "compute",
             "special"], designs,
        ),
        (["step", "decode tok/s", "times"], steps),
        (["context", *(f"{name} tok/s" for name in names)], curves),
        (["product", "lanes", "spacing", "flush after", "per cycle"], packings),
    ]  # fmt: skip

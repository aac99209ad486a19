"""`memwall simulate attention-io`: the least traffic of exact attention, and the schedule and tiles near it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memwall.cli.command import AsJson, Debug, Quiet
from memwall.cli.plan import _complete_machine
from memwall.cli.printing import format_table, note, print_json
from memwall.errors import InputError

if TYPE_CHECKING:
    from memwall.simulate.attention_levels import Hierarchy
    from memwall.simulate.attention_shape import Attention


def attention_io(
    *,
    tokens: Annotated[str, typer.Option(help="Tokens of a sequence, such as 4096 or 32k.")] = "4096",
    head_size: Annotated[int, typer.Option(help="Numbers of a head.", min=1, max=4096)] = 128,
    fast_memory: Annotated[
        str | None,
        typer.Option(
            help="Fast memory: bytes with a unit (32KiB), words without one (8192), or l1, l2, l3 of this machine.",
            metavar="SIZE",
        ),
    ] = None,
    machine: Annotated[
        str | None,
        typer.Option(
            help="Bounds between each two tiers of a machine, and times: a preset's name or a TOML file.",
            metavar="MACHINE",
            autocompletion=_complete_machine,
        ),
    ] = None,
    unit: Annotated[str | None, typer.Option(help="Its compute unit (default: the first).")] = None,
    dtype: Annotated[
        str, typer.Option(help="Type of a word: float32, bfloat16, float16, float8, float64.")
    ] = "float32",
    keys: Annotated[int | None, typer.Option(help="Keys, if not as many as tokens.", min=1)] = None,
    causal: Annotated[
        bool, typer.Option("--causal", help="Token i sees keys 0 to i (the last of them, with --keys).")
    ] = False,
    heads: Annotated[int, typer.Option(help="Query heads.", min=1)] = 1,
    kv_heads: Annotated[
        int | None, typer.Option(help="KV heads, a divisor of --heads (default: as many).", min=1)
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences.", min=1)] = 1,
    backward: Annotated[bool, typer.Option("--backward", help="Gradients instead of the forward pass.")] = False,
    execute: Annotated[
        bool, typer.Option("--execute", help="Carry the schedules out on random numbers, and count.")
    ] = False,
    trace: Annotated[
        bool, typer.Option("--trace", help="The same, and what LRU and Belady caches of that size would move.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw words over the fast memory's size (SVG).", metavar="FILE")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random numbers.", min=0)] = 0,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Tell how little exact attention can move through a fast memory, and which schedule and tiles come near that.

    Words are counted exactly. The gap is words by N^2 d^2 / M (N^2 d / sqrt(M) where M is below d^2, 4 N d at least).
    """
    from memwall.hardware import load_machine
    from memwall.hardware.system import write_whole
    from memwall.hardware.units import parse_count
    from memwall.simulate import attention_io_report as reports
    from memwall.simulate.attention_levels import WORD_BYTES, hierarchy, to_dict
    from memwall.simulate.attention_shape import Attention
    from memwall.simulate.nano_report import check_picture

    if plot is not None:
        check_picture(plot)
    if dtype not in WORD_BYTES:
        raise InputError(f"--dtype {dtype}: it is one of {', '.join(WORD_BYTES)}")
    if fast_memory is None and (machine is None or execute or trace):
        raise InputError("--fast-memory is wanted (such as 32KiB), or --machine for the tiers of one")
    shape = Attention(
        tokens=parse_count(tokens), head_size=head_size, keys=keys, causal=causal, heads=heads,
        kv_heads=heads if kv_heads is None else kv_heads, batch=batch, backward=backward,
    )  # fmt: skip
    words = None if fast_memory is None else fast_words(fast_memory, WORD_BYTES[dtype])
    told: dict[str, Any] = {
        "tokens": shape.tokens, "head_size": head_size, "keys": shape.num_keys, "causal": causal, "heads": heads,
        "kv_heads": shape.kv_heads, "batch": batch, "backward": backward, "dtype": dtype,
    }  # fmt: skip
    if words is not None:
        told |= reports.report(shape, words, WORD_BYTES[dtype])
    found = None
    if machine is not None:
        found = hierarchy(
            shape,
            load_machine(machine),
            dtype,
            unit=unit,
            fast_bytes=None if words is None else words * WORD_BYTES[dtype],
        )
        told["hierarchy"] = to_dict(found)
    elif unit is not None:
        raise InputError("--unit goes with --machine")
    if words is not None and (execute or trace):
        told["executed"] = reports.executed(shape, words, seed, traced=trace)
    if plot is not None:
        write_whole(plot, reports.picture(shape, words))
        note(f"memwall: wrote {plot}", quiet=quiet)
    if json:
        print_json(told)
        return
    _tell(told, shape, found)


def _tell(told: dict[str, Any], shape: Attention, found: Hierarchy | None) -> None:
    from memwall.hardware.units import format_seconds
    from memwall.simulate import attention_io_report as reports

    if "schedules" in told:
        typer.echo(format_table(reports.PLAN_COLUMNS, reports.plan_cells(told), right=frozenset(range(2, 7))))
        typer.echo(
            f"\nM = {told['fast_words']:,} words, d^2 = {shape.head_size**2:,}: {told['regime']} regime; at least "
            f"{told['least_words']:,} words, order {told['order_words']:,.0f}, inputs and outputs "
            f"{told['compulsory_words']:,}"
        )
    if "executed" in told:
        columns = list(told["executed"][0])
        rows = [
            [
                f"{row[name]:.1e}" if name == "error" else f"{row[name]:,}" if name != "schedule" else row[name]
                for name in columns
            ]
            for row in told["executed"]
        ]
        typer.echo("\n" + format_table(columns, rows, right=frozenset(range(1, len(columns)))))
    if found is not None:
        if "schedules" in told:
            typer.echo("")
        typer.echo(format_table(reports.LEVEL_COLUMNS, reports.level_cells(found), right=frozenset((4, 5, 6, 7, 8))))
        typer.echo(
            f"\nno schedule takes less than {format_seconds(found.least_seconds)}; the chosen ones "
            f"{format_seconds(found.seconds)}, limited by {found.limit}"
        )


def fast_words(text: str, word_bytes: int) -> int:
    """`32KiB` and `l2` (of this machine) to words, as words without a unit."""
    from memwall.hardware.system import describe_system
    from memwall.hardware.units import parse_bytes

    named = re.fullmatch(r"l([1-4])", text.strip().lower())
    if named is not None:
        caches = {cache.level: cache.nbytes for cache in describe_system().caches}
        if int(named[1]) not in caches:
            known = ", ".join(f"l{level}" for level in sorted(caches)) or "none"
            raise InputError(f"--fast-memory {text}: the caches that this machine tells of are: {known}")
        return caches[int(named[1])] // word_bytes
    try:
        words = int(text) if text.strip().isdecimal() else parse_bytes(text) // word_bytes
    except InputError as error:
        raise InputError(f"--fast-memory: {error}; a number without a unit is words") from None
    if not 1 <= words <= 1 << 50:
        raise InputError(f"--fast-memory {text}: {words:,} words; give from 1 to {1 << 50:,}")
    return words

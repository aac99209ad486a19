"""`memwall simulate oblivious-map`: what an oblivious map takes, moves and holds back, by share of private memory."""

from __future__ import annotations

from typing import Annotated

import typer

from memwall.cli.command import AsJson, Debug, Quiet
from memwall.cli.printing import format_table, note, print_json, progress_bar
from memwall.errors import InputError


def oblivious_map(
    *,
    items: Annotated[str, typer.Option(help="Items, such as 100000 or 1M (2^20).", metavar="COUNT")] = "1M",
    value_bytes: Annotated[int, typer.Option(help="Bytes of a value.", min=1, max=1 << 20)] = 8,
    private: Annotated[
        str, typer.Option(help="Shares of the bins that are private memory, between commas.", metavar="SHARES")
    ] = "0.01,0.2,0.5",
    bin_items: Annotated[int, typer.Option(help="Items of a bin on average.", min=1, max=24)] = 8,
    slots_per_item: Annotated[
        float, typer.Option(help="Entries of the position map for each item.", min=1.25, max=64)
    ] = 4.0,
    accesses: Annotated[int, typer.Option(help="Accesses to simulate.", min=0, max=10_000_000_000)] = 1_000_000,
    seed: Annotated[int, typer.Option(help="Of what is drawn.", min=0)] = 0,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Sizes, bounds and traffic of an oblivious map (`memwall map`), beside Path ORAM, a tree map and a scan."""
    from memwall.hardware.units import format_bytes, parse_count
    from memwall.retrieve.bolt import MapSettings
    from memwall.retrieve.oblivious_bounds import fullness
    from memwall.retrieve.path_oram import rival_bytes

    found, count = [], parse_count(items)
    with progress_bar("simulate", quiet=quiet) as bar:
        shares = _shares(private)
        for number, share in enumerate(shares):
            settings = MapSettings(
                capacity=count, value_bytes=value_bytes, bin_items=bin_items, private_share=share,
                slots_per_item=slots_per_item,
            )  # fmt: skip
            found.append(fullness(settings, accesses, seed=seed))
            if bar.staged is not None:
                bar.staged(f"share {share:g}", number + 1, len(shares))
    rivals = rival_bytes(count, value_bytes)
    if json:
        told = [
            {"private_share": one.settings.private_share, "private_bytes": one.settings.private_bytes(),
             "paper_bytes": one.settings.model_bytes(), "host_bytes": one.settings.host_bytes,
             "page_bytes": one.settings.page_bytes, "bytes_per_access": one.settings.bytes_per_access, **one.to_dict()}
            for one in found
        ]  # fmt: skip
        raw = count * (4 + value_bytes)
        print_json({"items": count, "raw_bytes": raw, "maps": told, "rivals_bytes_per_access": rivals})
        return
    rows = []
    for one in found:
        settings = one.settings
        taken = sum(settings.private_bytes().values())
        row = [f"{settings.private_share:g}", format_bytes(taken), format_bytes(settings.host_bytes)]
        row += [f"{settings.bytes_per_access:,.0f}"]
        rows.append([*row, *(f"{seen:,.0f} < {bound:,.1f}" for seen, bound in one.bounds.values())])
    headers = ["private", "private bytes", "host bytes", "bytes/access", "load", "private items", "pending", "frames"]
    typer.echo(format_table(headers, rows, right=frozenset(range(1, 8))))
    note("memwall: others move per access: " + ", ".join(f"{name} {moved:,}" for name, moved in rivals.items()),
         quiet=quiet)  # fmt: skip
    if not all(one.hold for one in found):
        note("memwall: a bound was passed: take more items a bin, or more items", quiet=quiet)


def _shares(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--private {text[:60]}: numbers from 0 to 1 between commas, such as 0.01,0.2") from None
    return found

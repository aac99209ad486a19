"""`memwall map`: a key-value store on a host that sees every access and does not learn which keys are used."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memwall.cli.command import AsJson, Debug, Quiet, add_command
from memwall.cli.printing import format_table, note, print_json
from memwall.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from memwall.retrieve.bolt import MapSettings
    from memwall.retrieve.oblivious_file import MapFile

MOST_ITEMS = 1 << 29


def register(app: typer.Typer) -> None:
    group = typer.Typer(
        help="An oblivious map: values by key on a host that sees every access and learns nothing of the keys.",
        no_args_is_help=True,
        rich_markup_mode=None,
    )
    for name, verb in (("create", create), ("put", put), ("get", get), ("delete", delete), ("info", info),
                       ("rebuild", rebuild)):  # fmt: skip
        add_command(group, name, verb)
    app.add_typer(group, name="map")


MapPath = Annotated[Path, typer.Argument(help="Folder of the map.", metavar="MAP")]
KeyFile = Annotated[
    Path,
    typer.Option("--key", help="File with the map's key, 32 bytes. The host must not read it.", metavar="FILE"),
]
Keys = Annotated[list[int], typer.Argument(help="Keys, whole numbers from 0 to 4,294,967,295.", metavar="KEY...")]
Pairs = Annotated[
    Path | None,
    typer.Option("--from", help="Text file with a key, a tab and a value a line (UTF-8).", metavar="FILE"),
]
Share = Annotated[
    float | None,
    typer.Option(
        help="Share of the bins that are private memory (default: 0.2). More of it, fewer visible bytes.",
        min=0,
        max=1,
    ),
]
Room = Annotated[
    str | None,
    typer.Option(
        "--memory", help="Private memory the map may take, such as 100MB: the largest share that fits.", metavar="BYTES"
    ),
]
TraceFile = Annotated[
    Path | None,
    typer.Option("--trace", help="Write what the host saw, as CSV: op, page, bytes of every access.", metavar="FILE"),
]


def create(
    path: MapPath,
    *,
    capacity: Annotated[int, typer.Option(help="Items that it can hold.", min=4, max=MOST_ITEMS)],
    key: KeyFile,
    value_bytes: Annotated[int, typer.Option(help="The longest value.", min=1, max=65_535)] = 64,
    private_share: Share = None,
    memory: Room = None,
    bin_items: Annotated[int, typer.Option(help="Items of a bin on average.", min=1, max=24)] = 8,
    slots_per_item: Annotated[
        float, typer.Option(help="Entries of the position map for each item, 12 private bytes each.", min=1.25, max=64)
    ] = 4.0,
    pairs: Pairs = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Make a map, empty or with items, and its key where the key's file is not there."""
    from memwall.retrieve.bolt import MapSettings
    from memwall.retrieve.oblivious_file import MapFile, new_key, read_key

    settings = MapSettings(
        capacity=capacity, value_bytes=value_bytes, bin_items=bin_items, slots_per_item=slots_per_item,
        private_share=0.2 if private_share is None else private_share,
    )  # fmt: skip
    settings = _fitting(settings, private_share, memory, value_bytes)
    items = [] if pairs is None else _read_pairs(pairs)
    if path.exists():
        raise InputError(f"{path} exists; a new map needs a name of its own")
    made = not key.exists()
    secret = new_key(key) if made else read_key(key)
    with MapFile.create(path, settings, secret, items) as file:
        told = _told(file)
    if json:
        print_json(told)
        return
    _show(told)
    note(f"memwall: {'new key in' if made else 'key of'} {key}; without it the map cannot be read", quiet=quiet)


def put(
    path: MapPath,
    item: Annotated[list[str] | None, typer.Argument(help="A key and its value.", metavar="[KEY VALUE]")] = None,
    *,
    key: KeyFile,
    pairs: Pairs = None,
    trace: TraceFile = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Give keys values: one, or those of a file. All of them last, or none where the command is broken off."""
    if (item is None) == (pairs is None):
        raise InputError("give a key and a value, or --from with a file of them")
    if item is not None and len(item) != 2:
        raise InputError(f"{len(item)} words; give one key and one value (in quotes where it has spaces)")
    items = _read_pairs(pairs) if pairs is not None else [_pair(item[0], item[1], "KEY")] if item else []
    with _opened(path, key, trace, quiet) as file:
        before = file.put(items)
    new = sum(value is None for value in before)
    told = {"put": len(items), "new": new, **_seen(file)}
    if json:
        print_json(told)
        return
    typer.echo(f"{len(items):,} put, {new:,} of them new")
    note(_moved(told), quiet=quiet)


def get(
    path: MapPath,
    keys: Keys,
    *,
    key: KeyFile,
    trace: TraceFile = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Values of keys, one a line. A read is an access like any other: it writes too, and takes the map's lock."""
    with _opened(path, key, trace, quiet) as file:
        _report("values", keys, file.get(keys), file, json, quiet)


def delete(
    path: MapPath,
    keys: Keys,
    *,
    key: KeyFile,
    trace: TraceFile = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Take keys out, and say what they had."""
    with _opened(path, key, trace, quiet) as file:
        _report("deleted", keys, file.delete(keys), file, json, quiet)


def info(path: MapPath, *, key: KeyFile, json: AsJson = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """Sizes of a map: items, private memory by part, the host's pages, visible bytes of an access, bounds."""
    with _opened(path, key, None, quiet) as file:
        told = _told(file)
    if json:
        print_json(told)
    else:
        _show(told)


def rebuild(
    path: MapPath,
    *,
    key: KeyFile,
    capacity: Annotated[int | None, typer.Option(help="Items it can hold from now on.", min=4, max=MOST_ITEMS)] = None,
    private_share: Share = None,
    memory: Room = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Place all items anew, in another size or share where one is given: call it after putting back a copy of a map."""
    from dataclasses import replace

    with _opened(path, key, None, quiet) as file:
        settings = file.settings
        if capacity is not None:
            if capacity < len(file.map):
                raise InputError(f"--capacity {capacity:,}: the map holds {len(file.map):,} items")
            settings = replace(settings, capacity=capacity, page_slots=None)
        if private_share is not None:
            settings = replace(settings, private_share=private_share)
        file.rebuild(_fitting(settings, private_share, memory, settings.value_bytes))
        told = _told(file)
    if json:
        print_json(told)
    else:
        _show(told)


# ---- parts ---------------------------------------------------------------------------------------------------------


@contextmanager
def _opened(path: Path, key: Path, trace: Path | None, quiet: bool) -> Iterator[MapFile]:
    """The map, committed at the end where nothing went wrong, and then its trace."""
    from memwall.retrieve.oblivious_file import MapFile, read_key

    with MapFile(path, read_key(key), logged=trace is not None) as file:
        if file.recovered:
            note(f"memwall: {path}: what was not committed last time is undone, and all items lie anew", quiet=quiet)
        yield file
    if trace is not None:
        _write_trace(trace, file)


def _fitting(settings: MapSettings, share: float | None, memory: str | None, value_bytes: int) -> MapSettings:
    """With the largest share that fits --memory, where it is given."""
    from dataclasses import replace

    from memwall.hardware.units import parse_bytes
    from memwall.retrieve.bolt import largest_share
    from memwall.retrieve.oblivious_file import LENGTH_BYTES

    if memory is None:
        return settings
    if share is not None:
        raise InputError("--memory chooses the share of private bins: leave out --private-share")
    found = largest_share(replace(settings, value_bytes=value_bytes + LENGTH_BYTES), parse_bytes(memory))
    return replace(found, value_bytes=value_bytes)


def _pair(key: str, value: str, where: str) -> tuple[int, bytes]:
    if not (key.isascii() and key.isdigit() and int(key[:12]) < 1 << 32):
        raise InputError(f"{where} {key[:40]!r}: a whole number from 0 to {(1 << 32) - 1:,}")
    return int(key), value.encode(errors="surrogateescape")


def _read_pairs(path: Path) -> list[tuple[int, bytes]]:
    from memwall.engine.quality import read_text

    found = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line:
            key, tab, value = line.partition("\t")
            if not tab:
                raise InputError(f"{path}, line {number}: no tab between a key and its value")
            found.append(_pair(key, value, f"{path}, line {number}: key"))
    return found


def _shown(value: bytes | None) -> dict[str, Any]:
    """A value for `--json`."""
    import base64

    if value is None:
        return {"found": False}
    try:
        return {"found": True, "value": value.decode()}
    except UnicodeDecodeError:
        return {"found": True, "base64": base64.b64encode(value).decode()}


def _report(what: str, keys: list[int], values: list[bytes | None], file: MapFile, json: bool, quiet: bool) -> None:
    told = {what: [{"key": one, **_shown(value)} for one, value in zip(keys, values, strict=True)], **_seen(file)}
    if json:
        print_json(told)
        return
    for one, value in zip(keys, values, strict=True):
        if value is not None:
            typer.echo(f"{one}\t{value.decode(errors='replace')}")
    absent = sum(value is None for value in values)
    note(_moved(told) + (f"; {absent} of {len(keys)} keys are not there" if absent else ""), quiet=quiet)


def _seen(file: MapFile) -> dict[str, Any]:
    trace = file.store.trace
    return {
        "pages_read": trace.reads, "pages_written": trace.writes, "page_bytes": trace.page_bytes,
        "visible_bytes": trace.visible_bytes,
    }  # fmt: skip


def _moved(told: dict[str, Any]) -> str:
    return (
        f"memwall: the host saw {told['pages_read']:,} pages read and {told['pages_written']:,} written, "
        f"{told['page_bytes']:,} bytes each"
    )


def _write_trace(path: Path, file: MapFile) -> None:
    ops, pages = file.store.trace.arrays()
    size = file.store.page_bytes
    temporary = path.with_name(f"{path.name}.new")
    with temporary.open("w", encoding="utf-8") as out:
        out.write("op,page,bytes\n")
        out.writelines(
            f"{'write' if op else 'read'},{page},{size}\n" for op, page in zip(ops.tolist(), pages, strict=True)
        )
    os.replace(temporary, path)


def _told(file: MapFile) -> dict[str, Any]:
    settings = file.map.settings
    private = settings.private_bytes()
    return {
        "map": str(file.path), "items": len(file.map), "capacity": settings.capacity,
        "value_bytes": file.settings.value_bytes, "bins": settings.bins, "private_bins": settings.private_bins,
        "pages": settings.num_pages, "page_bytes": settings.page_bytes, "items_per_page": settings.slots,
        "private_bytes": private, "private_bytes_together": sum(private.values()), "host_bytes": settings.host_bytes,
        "bytes_per_access": settings.bytes_per_access, "generation": file.generation,
        "private_items": file.map.private.count("private_items"), "pending_items": file.map.private.count("pending"),
        "private_items_bound": settings.private_bound, "pending_items_bound": settings.pending_bound,
    }  # fmt: skip


def _show(told: dict[str, Any]) -> None:
    from memwall.hardware.units import format_bytes

    typer.echo(
        f"{told['map']}  {told['items']:,} of {told['capacity']:,} items, values of up to {told['value_bytes']} bytes"
    )
    rows = [[name, format_bytes(taken)] for name, taken in told["private_bytes"].items()]
    rows += [
        ["private together", format_bytes(told["private_bytes_together"])],
        ["host", format_bytes(told["host_bytes"])],
    ]
    typer.echo(format_table(["part", "bytes"], rows, right=frozenset({1})))
    typer.echo(
        f"an access moves {told['bytes_per_access']:,.0f} visible bytes on average, in pages of {told['page_bytes']} "
        f"({told['items_per_page']} items)"
    )

"""`memwall stream`: serve a saved cache, chunk by chunk, to runs elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memwall.cli.command import AsJson, Debug, Quiet, add_command
from memwall.cli.printing import note, print_json


def register(app: typer.Typer) -> None:
    add_command(app, "stream", stream)


def stream(
    file: Annotated[
        Path,
        typer.Argument(help="Cache that `memwall run --save-cache FILE --cache-codec cachegen` wrote.", metavar="FILE"),
    ],
    *,
    port: Annotated[
        int, typer.Option(help="Port on this machine's loopback; 0 takes a free one.", min=0, max=65535)
    ] = 0,
    rate: Annotated[
        str | None,
        typer.Option(
            help="Send no faster, such as 100Mbit/s: an emulated slow link. Several rates joined by commas follow each "
            "other, --rate-seconds each, from the first on with every run.",
            metavar="RATES",
        ),
    ] = None,
    rate_seconds: Annotated[float, typer.Option(help="How long each of several rates lasts.", metavar="SECONDS")] = 1.0,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Serve the chunks of a saved cache at all its levels, until interrupted.

    `memwall run MODEL PROMPT --load-cache tcp://127.0.0.1:PORT` takes what the prompt begins with, each chunk as text
    or at the level that still arrives in time (--deadline).
    """
    from memwall.hardware.units import parse_rate
    from memwall.kv.link import ChunkServer, Trace
    from memwall.kv.saved import SavedCache

    rates = tuple(float(parse_rate(one)) for one in rate.split(",")) if rate is not None else ()
    trace = Trace(rates, rate_seconds) if rates else None
    with SavedCache(file) as saved:
        saved.verify()
        server = ChunkServer(saved, port=port, trace=trace)
        address = f"tcp://{server.address[0]}:{server.address[1]}"
        if json:
            print_json(
                {"address": address, "tokens": saved.num_tokens, "levels": server.levels, "emulated": bool(rate)}
            )
        else:
            typer.echo(address)
        note(f"serving {saved.num_tokens} tokens{f' at {rate} (emulated)' if rate else ''}; Ctrl-C ends", quiet=quiet)
        try:
            server.serve_forever()
        finally:
            server.close()

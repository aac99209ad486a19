"""What all verbs share: registration, errors as one clear paragraph, and the options that several of them take."""

from __future__ import annotations

import errno
import functools
import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand

from memwall.errors import MemwallError

INTERRUPTED = 130
CLOSED_PIPE = 141
"""What the shell reports for programs that a closed pipe ended."""
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What was to be written is right and merely does not fit."""


def add_command(app: typer.Typer, name: str, function: Callable[..., None]) -> None:
    """Register a verb. Its errors end the program with their own exit status; `--debug` shows where they came from."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
            # what is still in the buffer must meet a closed pipe here, not when Python ends
            sys.stdout.flush()
        except MemwallError as error:
            fail(error, error.exit_status, debug=kwargs.get("debug", False))
        except BrokenPipeError:
            # the reader (`head`, say) went away; keep Python from complaining again at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(CLOSED_PIPE) from None
        except MemoryError as error:
            fail(f"out of memory: {error or 'the system gave none'}", 1, debug=kwargs.get("debug", False))
        except OSError as error:
            status = 1 if error.errno in FULL_DISK else 2
            fail(describe_os_error(error), status, debug=kwargs.get("debug", False))
        except KeyboardInterrupt:
            fail("interrupted", INTERRUPTED, debug=kwargs.get("debug", False))

    class Verb(TyperCommand):
        """Recent releases of Click drop the help that Typer gives to arguments; it is put back from the function."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            hints = get_type_hints(function, include_extras=True)
            for parameter in self.params:
                told = getattr(hints.get(parameter.name or ""), "__metadata__", ())
                if told and getattr(parameter, "help", None) is None:
                    parameter.help = told[0].help

        def format_arguments(self, *args: Any) -> None:
            """Typer lists the arguments beside the options already."""

    app.command(name, cls=Verb)(guarded)


def fail(message: object, exit_status: int, *, debug: bool = False) -> None:
    """Print one paragraph on standard error and end with that status. Call it while the error is being handled."""
    if debug:
        import traceback

        traceback.print_exc()
    width = min(os.get_terminal_size(sys.stderr.fileno()).columns, 120) if sys.stderr.isatty() else 0
    text = f"memwall: {message}"
    typer.echo(textwrap.fill(text, width, break_long_words=False) if width else text, err=True)
    raise typer.Exit(exit_status)


def describe_os_error(error: OSError) -> str:
    """An error of the operating system in words: what could not be done to which file."""
    reason = error.strerror or str(error)
    return f"{error.filename}: {reason}" if error.filename is not None else reason


def complete_model(incomplete: str) -> Iterator[str]:
    """Shell completion of MODEL: the bundled model and directories."""
    if "demo".startswith(incomplete):
        yield "demo"
    folder, beginning = os.path.split(os.path.expanduser(incomplete))
    try:
        names = sorted(entry.name for entry in os.scandir(folder or ".") if entry.is_dir())
    except OSError:
        return
    for name in names:
        if name.startswith(beginning) and (not name.startswith(".") or beginning.startswith(".")):
            yield os.path.join(folder, name, "")


def complete_weights(incomplete: str) -> list[str]:
    """Shell completion of --weights."""
    return [name for name in WEIGHT_FORMATS if name.startswith(incomplete)]


def complete_kv(incomplete: str) -> list[str]:
    """Shell completion of --kv."""
    return [name for name in KV_POLICIES if name.startswith(incomplete)]


MOST_THREADS = 1024
# what completion offers; any other spec that formats.codec accepts may be written out
WEIGHT_FORMATS = (
    "auto", "float32", "float16", "bfloat16", "int8", "int4", "int3", "int2", "nf4", "nf4-dq", "fp4", "e2m1", "e4m3",
    "e5m2", "posit8", "posit4", "mxfp4", "mxfp6", "mxfp8", "mxint8", "bfp4", "bipolar3", "ternary", "binary2", "w4a8",
    "w2a8", "xr-npe", "W4A4KV4",
)  # fmt: skip
KV_POLICIES = (
    "auto",
    "float32",
    "float16",
    "bfloat16",
    "int8",
    "int4",
    "kivi",
    "kivi(4bit)",
    "kv4",
    "W4A4KV4",
    "bfp(4bit)",
    "snapkv(0.25)",
    "snapkv(0.25)+kivi(4bit)",
    "snapkv(0.25)+think(0.4)+kivi(2bit)",
    "think(0.4)",
    "vattention",
    "xquant",
    "xquant(4bit,cl=1)",
    "cskv(0.2)",
    "locret",
    "epicache",
    "instinfer",
    "instinfer(1)",
    "lambda(window=512)",
    "lambda(window=512)+kivi(4bit)",
)

Model = Annotated[
    str,
    typer.Argument(
        help="Directory of a Hugging Face model, ORG/NAME of one in the Hub's cache, or `demo`.",
        metavar="MODEL",
        autocompletion=complete_model,
    ),
]
ModelOrDemo = Annotated[
    str,
    typer.Argument(
        help="Directory of a Hugging Face model, ORG/NAME of one in the Hub's cache, or `demo` (the default).",
        metavar="MODEL",
        autocompletion=complete_model,
        show_default=False,
    ),
]
Memory = Annotated[
    str | None,
    typer.Option("--memory", help="Resident memory of the whole process, such as 200MB or 1.5GiB.", metavar="BYTES"),
]
BudgetOption = Annotated[
    str | None,
    typer.Option(
        "--budget",
        help="Budget per tier and link, such as gpu=11.5GiB,ram=24GiB,disk=80GiB,disk_rate=1GB/s.",
        metavar="TIERS",
    ),
]
Weights = Annotated[
    str,
    typer.Option(
        "--weights",
        help="Format of the weights: float16, bfloat16, int8 to int2, nf4, mxfp4, e4m3, posit8 and others "
        "(docs/number-formats.md), W4A4KV4 of a model that --method comet made, or auto (the best that fits; "
        "auto(e2m1,posit8) mixes these by layer).",
        metavar="FORMAT",
        autocompletion=complete_weights,
    ),
]
KV = Annotated[
    str,
    typer.Option(
        "--kv",
        help="Keys and values: float16, int8, int4, kivi(4bit), snapkv(0.25), think(0.4), joined by +; or auto.",
        metavar="POLICY",
        autocompletion=complete_kv,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", help="Threads to compute with (default: one per core).", min=1, max=MOST_THREADS),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON value on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no summary on standard error.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

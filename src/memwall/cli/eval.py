"""`memwall eval`: what a weight format or a cache costs in quality over a text file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memwall.cli.command import (
    AsJson,
    BudgetOption,
    Debug,
    Memory,
    Model,
    Quiet,
    Threads,
    add_command,
    complete_kv,
    complete_weights,
)
from memwall.cli.printing import print_json, progress_bar
from memwall.cli.run import parse_budget
from memwall.cli.w4a4kv4 import settled


def register(app: typer.Typer) -> None:
    add_command(app, "eval", evaluate)


Weights = Annotated[
    str | None,
    typer.Option(
        help="Format of the weights (default: as they are: float32 is a float model itself, saved a compressed one).",
        metavar="FORMAT",
        autocompletion=complete_weights,
        show_default=False,
    ),
]
Cache = Annotated[
    str | None,
    typer.Option(
        help="Decode through this cache, such as kivi(2bit) or snapkv(0.25)+think(0.4)+kivi(2bit) "
        "(default: one pass without a cache).",
        metavar="POLICY",
        autocompletion=complete_kv,
    ),
]
PromptTokens = Annotated[
    int | None,
    typer.Option(
        help="With --kv: tokens of each window of text that come as its prompt, the others one by one "
        "(default: half of the window).",
        min=1,
    ),
]
Reference = Annotated[
    str | None,
    typer.Option(
        help="The float model to compare with, where MODEL is a compressed one.",
        metavar="MODEL",
        show_default=False,
    ),
]
Adapter = Annotated[
    Path | None, typer.Option("--lora", help="An adapter that the form under test wears.", metavar="DIR")
]
Stream = Annotated[
    bool,
    typer.Option(
        "--stream", help="The whole text as one sequence, past the model's positions: with --kv lambda or locret."
    ),
]


def evaluate(
    model: Model,
    text: Annotated[Path, typer.Argument(help="Text file (UTF-8) to measure on.", metavar="TEXT")],
    *,
    memory: Memory = None,
    budget: BudgetOption = None,
    weights: Weights = None,
    kv: Cache = None,
    reference: Reference = None,
    lora: Adapter = None,
    prompt_tokens: PromptTokens = None,
    stream: Stream = False,
    limit: Annotated[int | None, typer.Option(help="Read at most this many tokens of the text.", min=2)] = None,
    threads: Threads = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure perplexity over a text file, and the divergence from the float model.

    Divergence (kl_nats) is the mean per token of KL(float model || this one); top1_agreement is how often both like the
    same token best. With --kv the first half of each window of text is the prompt, which policies may prune; only the
    other half, decoded through the cache token by token, is scored. kv_bits_per_value counts all bytes of the cache at
    its fullest over the keys and values of all tokens it took in.
    """
    from memwall.engine.quality import evaluate as measure
    from memwall.errors import InputError
    from memwall.formats.manifest import MANIFEST_NAME
    from memwall.models import model_directory

    if stream and kv is None:
        raise InputError("--stream feeds one endless sequence; give --kv POLICY, the cache that holds it")
    if prompt_tokens is not None and kv is None:
        raise InputError("--prompt-tokens says where decoding begins; give --kv POLICY, the cache to decode through")
    path = model_directory(model)
    if weights is None:
        weights = "saved" if (path / MANIFEST_NAME).is_file() else "float32"
    weights, kv = settled(model, weights, kv)
    with progress_bar("evaluating", quiet=quiet) as bar:
        result = measure(
            path,
            text,
            weights=weights,
            reference=None if reference is None else model_directory(reference),
            kv=kv,
            limit_tokens=limit,
            prompt_tokens=prompt_tokens,
            threads=threads,
            budget=parse_budget(memory, budget),
            lora=lora,
            stream=stream,
            progress=bar.counted,
        )
    keys = (
        "perplexity", "kl_nats", "top1_agreement", "tokens", "bits_per_weight", "kv_bits_per_value", "kv_bytes",
    )  # fmt: skip
    figures = {key: getattr(result, key) for key in keys}
    if json:
        print_json(figures)
        return
    for key, value in figures.items():
        shown = "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
        typer.echo(f"{key:18} {shown}")

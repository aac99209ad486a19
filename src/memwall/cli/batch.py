"""`memwall batch`: a file of requests in OpenAI's batch format, answered offline inside a memory budget."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memwall.cli.command import AsJson, Debug, Memory, Model, Quiet, Threads, Weights, add_command
from memwall.cli.printing import note, print_json, progress_bar
from memwall.cli.run import parse_budget, parse_context
from memwall.cli.serve import PagedKV, check_scheduler, paged_kv, start
from memwall.errors import InputError

if TYPE_CHECKING:
    from memwall.engine.serving import Serving
    from memwall.serve.batch import BatchRun

MOST_SEQUENCES = 256


class SchedulerName(StrEnum):
    """How a batch is run."""

    batchllm = "batchllm"
    fcfs = "fcfs"


def register(app: typer.Typer) -> None:
    add_command(app, "batch", batch)


def batch(
    model: Model,
    source: Annotated[Path, typer.Argument(help="Requests, one JSON object a line.", metavar="IN.jsonl")],
    target: Annotated[Path, typer.Argument(help="Answers; those already there are kept.", metavar="OUT.jsonl")],
    *,
    memory: Memory = None,
    weights: Weights = "auto",
    kv: PagedKV = "auto",
    context: Annotated[
        str | None, typer.Option(help="Longest request, prompt and answer, in tokens (default: what fits well).")
    ] = None,
    scheduler: Annotated[
        SchedulerName,
        typer.Option(help="batchllm plans sharing for the whole batch; fcfs runs in order and keeps recent prefixes."),
    ] = SchedulerName.batchllm,
    step_tokens: Annotated[
        int, typer.Option(help="Tokens computed in one step: long prompts come in chunks of it.", min=16, max=8192)
    ] = 512,
    name: Annotated[
        str | None, typer.Option(help="What the model is called in the requests (default: the name of its directory).")
    ] = None,
    threads: Threads = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Answer a file of requests in OpenAI's batch format, sharing what their prompts have in common.

    A run that was interrupted goes on where it was: the same command answers what has no answer yet. Lines that cannot
    be answered get an error line. Exit status: 0 all are answered, 1 some lines are errors, 2 all are.
    """
    _check_files(source, target)
    stored = paged_kv(kv)
    check_scheduler(stored, scheduler.value)
    from memwall.memory import peak_resident_bytes
    from memwall.serve.batch_file import BatchInput, BatchOutput
    from memwall.serve.settings import body_bytes

    output = BatchOutput(target.resolve())
    if target.exists():
        output.open()  # a wrong file is told before the model is loaded
    try:
        serving, settings, template = _load(
            model, memory, weights, stored, context, name, threads, scheduler, step_tokens, quiet=quiet
        )
        if not output.is_open:
            output.open()
        requests = BatchInput(source, body_bytes(serving.context_tokens))
        run = _run(serving, settings, template, requests, output, scheduler, quiet=quiet)
    finally:
        output.close()
    serving.close_books()
    report = {"model": settings.name, "scheduler": scheduler.value, **run.report()}
    report |= {"budget_bytes": serving.budget_bytes, "peak_resident_bytes": peak_resident_bytes()}
    report["ledger"] = serving.ledger.to_json()
    run.release()
    if json:
        print_json(report)
    _tell(report, target, quiet=quiet)
    if report["errors"]:
        raise typer.Exit(1 if report["errors"] < report["lines"] else 2)


def _check_files(source: Path, target: Path) -> None:
    if not source.is_file():
        why = "is a folder" if source.is_dir() else "there is no such file"
        raise InputError(f"{source}: {why}; give a file with one request a line")
    if target.exists() and target.samefile(source):
        raise InputError(f"{target}: requests and answers cannot be one file; choose another for the answers")


def _load(
    model: str,
    memory: str | None,
    weights: str,
    kv: str,
    context: str | None,
    name: str | None,
    threads: int | None,
    scheduler: SchedulerName,
    step_tokens: int,
    *,
    quiet: bool,
) -> tuple[Serving, Any, Any]:
    from memwall.engine.batchllm import BatchLLM
    from memwall.models import model_directory
    from memwall.models.chat import ChatTemplate
    from memwall.models.config import checked_directory
    from memwall.models.tokenizer import Tokenizer
    from memwall.serve import batch as _batch  # noqa: F401 - what it brings into the process counts from the start
    from memwall.serve.settings import ServerSettings

    path = checked_directory(model_directory(model))
    tokenizer, template = Tokenizer.from_directory(path), ChatTemplate.from_directory(path)
    template.render([{"role": "user", "content": "hello"}])
    planned = scheduler is SchedulerName.batchllm
    options: dict[str, Any] = {
        "max_sequences": min(MOST_SEQUENCES, step_tokens), "token_budget": step_tokens, "threads": threads,
        "swap_bytes": 0, "kv": kv, "keep_prefixes": not planned, "shared_prefixes": planned,
    }  # fmt: skip
    serving = start(
        path, parse_budget(memory, None), weights, parse_context(context), options, tokenizer, template, quiet=quiet
    )
    if planned:
        serving.engine.scheduler = BatchLLM()
    return serving, ServerSettings(name=name or path.name), template


def _run(
    serving: Serving, settings: Any, template: Any, requests: Any, output: Any, scheduler: SchedulerName, *, quiet: bool
) -> BatchRun:
    from memwall.serve.batch import BatchRun
    from memwall.serve.parse import Parser

    assert serving.tokenizer is not None
    parser = Parser(
        settings, serving.tokenizer, template, context=serving.context_tokens, vocab=serving.config.vocab_size,
        eos=serving.config.eos_token_ids,
    )  # fmt: skip
    run = BatchRun(serving, parser, requests, output, planned=scheduler is SchedulerName.batchllm)
    try:
        with progress_bar("batch", quiet=quiet) as bar:
            run.prepare(bar.staged)
            run.run(bar.staged)
    except KeyboardInterrupt:
        note(f"memwall: {len(output.answered)} answers are in {output.path}; the same command goes on", quiet=quiet)
        raise
    finally:
        requests.close()
    return run


def _tell(report: dict[str, Any], target: Path, *, quiet: bool) -> None:
    from memwall.hardware.units import format_bytes

    sharing, steps, budget = report["sharing"], report["steps"], report["budget_bytes"]
    kept = f" ({report['kept']:,} were there)" if report["kept"] else ""
    note(f"{target}: {report['answered'] + report['kept']:,} answers{kept}, {report['errors']:,} errors", quiet=quiet)
    if report["first_error"]:
        note(f"the first error: {report['first_error']}", quiet=quiet)
    note(
        f"{report['computed_prompt_tokens']:,} of {report['prompt_tokens']:,} prompt tokens computed "
        f"({sharing['groups']:,} groups of {sharing['mean_degree']:g} prompts, {sharing['saved']:.1%} planned to be "
        f"saved), {report['completion_tokens']:,} tokens made in {report['seconds']:.1f} s, "
        f"{steps['mean_tokens']:g} tokens a step",
        quiet=quiet,
    )
    within = f" of {format_bytes(budget)}" if budget else ""
    note(f"peak resident {format_bytes(report['peak_resident_bytes'])}{within}", quiet=quiet)

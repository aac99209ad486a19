"""`memwall serve`: an OpenAI-compatible server whose process stays inside the budget."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memwall.cli.command import Debug, Memory, Model, Quiet, Threads, Weights, add_command
from memwall.cli.fair import PrioritiesOption, UpdatesOption, fair_options
from memwall.cli.loras import AskedLoras, FirstToken, LoraBatch, LoraFolder, LoraOption, MostRank, read_loras
from memwall.cli.printing import format_table, note, print_json, progress_bar
from memwall.cli.run import parse_budget, parse_context
from memwall.cli.schedulers import (
    NanoBatches,
    RayOption,
    SchedulerName,
    SchedulerOption,
    SloFirst,
    SloToken,
    check_nano_batches,
    describe,
    finish,
    options_of,
)
from memwall.errors import BudgetExceeded, DoesNotFit, InputError, MissingDependency

if TYPE_CHECKING:
    from memwall.engine.serving import Serving, ServingSettings
    from memwall.memory import Budget
    from memwall.models.chat import ChatTemplate
    from memwall.models.tokenizer import Tokenizer

PAGED = {"auto": "float16", "float32": "float32", "float16": "float16", "int8": "int8", "int4": "int4", "kv4": "int4"}


def complete_paged_kv(incomplete: str) -> list[str]:
    from memwall.kv import POLICIES

    return [name for name in dict.fromkeys((*PAGED, *POLICIES)) if name.startswith(incomplete)]


PagedKV = Annotated[
    str,
    typer.Option(
        "--kv",
        help="Keys and values in pages: float16 (the same as auto), float32, int8 for about twice the tokens, or int4 "
        "(kv4 means the same here) for 2.7 times as many. vattention: in slots of addresses that pages are mapped "
        "behind, without page tables. Any other policy of docs/kv-caches.md, such as 'snapkv(0.25)+kivi(2bit)': in a "
        "cache of each request's own. All but pages are for --scheduler fcfs.",
        autocompletion=complete_paged_kv,
    ),
]


def register(app: typer.Typer) -> None:
    add_command(app, "serve", serve)


def serve(
    model: Model = "demo",
    *,
    memory: Memory = None,
    weights: Weights = "auto",
    kv: PagedKV = "auto",
    context: Annotated[
        str | None, typer.Option(help="Longest request, prompt and answer, in tokens (default: what fits well).")
    ] = None,
    max_sequences: Annotated[int, typer.Option(help="Requests worked together.", min=1, max=1024)] = 16,
    step_tokens: Annotated[
        int, typer.Option(help="Tokens computed in one step: long prompts come in chunks of it.", min=16, max=8192)
    ] = 256,
    scheduler: SchedulerOption = SchedulerName.fcfs,
    ray: RayOption = None,
    priorities: PrioritiesOption = None,
    priority_updates: UpdatesOption = None,
    swap: Annotated[str, typer.Option(help="Disk for requests set aside, such as 1GB; 0 for none.")] = "256MB",
    host: Annotated[str, typer.Option(help="Address to listen on; others than loopback are open to the network.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="Port to listen on; 0 for any free one.", min=0, max=65535)] = 8000,
    api_key: Annotated[
        str | None, typer.Option(help="Key that every route asks for.", envvar="MEMWALL_API_KEY", show_default=False)
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help="Keys, one a line, KEY or NAME KEY; read again on SIGHUP.", metavar="FILE", dir_okay=False),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What the model is called (default: the name of its directory).")
    ] = None,
    queue: Annotated[int, typer.Option(help="Requests that may wait beside those that run.", min=1)] = 128,
    connections: Annotated[int, typer.Option(help="Open connections.", min=1)] = 256,
    max_seconds: Annotated[float, typer.Option(help="Wall time of one request.", min=0.1)] = 600.0,
    drain_seconds: Annotated[float, typer.Option(help="How long requests may go on after SIGTERM.", min=0)] = 30.0,
    access_log: Annotated[
        bool, typer.Option("--access-log", help="A line for each request on standard error, with its id and tokens.")
    ] = False,
    vllm_metrics: Annotated[
        bool, typer.Option("--vllm-metrics", help="Metrics under vLLM's names too, for autoscalers that look for them.")
    ] = False,
    pooling: Annotated[
        str, typer.Option(help="/v1/embeddings: the last token's state, or the mean of all; auto: as the model says.")
    ] = "auto",
    lora: LoraOption = None,
    lora_dir: LoraFolder = None,
    max_lora_rank: MostRank = 64,
    lora_batch: LoraBatch = None,
    first_token_limit: FirstToken = None,
    slo_first: SloFirst = None,
    slo_token: SloToken = None,
    nano_batches: NanoBatches = 1,
    threads: Threads = None,
    json: Annotated[bool, typer.Option("--json", help="Print address and ledger as JSON at the start.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Serve a model over HTTP inside a memory budget: OpenAI's routes, metrics, and a live page of memory.

    SIGTERM and Ctrl-C end it once running requests are done; SIGUSR1 shrinks the budget by a fifth, SIGUSR2 lets it
    grow back, and so does POST /v1/budget.
    """
    stored = paged_kv(kv)
    check_scheduler(stored, scheduler.value)
    if pooling not in ("auto", "last", "mean"):
        raise InputError(f"--pooling {pooling}: choose last, mean or auto")
    try:
        from memwall.serve.app import Server
    except ImportError as error:
        raise MissingDependency(error.name or "starlette", "serve") from error
    from memwall.models import model_directory
    from memwall.models.chat import ChatTemplate
    from memwall.models.config import checked_directory
    from memwall.models.pooling import pooling_of
    from memwall.models.tokenizer import Tokenizer
    from memwall.serve.settings import ServerSettings, body_bytes, read_keys

    check_nano_batches(scheduler, nano_batches)
    keys = {} if api_key_file is None else read_keys(api_key_file)
    path = checked_directory(model_directory(model))
    how: Any = pooling_of(path) if pooling == "auto" else pooling
    budget = parse_budget(memory, None)
    fair = fair_options(scheduler, priorities, priority_updates, adapters=bool(lora or lora_dir))
    loras = read_loras(lora, lora_dir, max_lora_rank, path, name or path.name, quiet=quiet)
    tokenizer, template = Tokenizer.from_directory(path), ChatTemplate.from_directory(path)
    template.render([{"role": "user", "content": "hello"}])  # what it brings into the process counts from the start
    options: dict[str, Any] = {
        "max_sequences": max_sequences, "token_budget": max(step_tokens, max_sequences), "threads": threads,
        "swap_bytes": _swap_bytes(swap), "kv": stored,
    }  # fmt: skip
    options |= fair
    own = _lora_options(loras, path, stored, lora_batch, first_token_limit)
    if scheduler is not SchedulerName.fcfs:
        if lora_batch is not None or first_token_limit is not None:
            raise InputError(
                "--lora-batch and --first-token-limit are for the scheduler of adapters; leave out --scheduler"
            )
        own.pop("scheduler", None)
    options |= own
    options |= options_of(scheduler, slo_first, slo_token, adapters="lora" in options, threads=threads, ray=ray)
    serving = start(path, budget, weights, parse_context(context), options, tokenizer, template, quiet=quiet)
    loras.add_to(serving)
    finish(scheduler, serving, nano_batches)
    settings = ServerSettings(
        name=name or path.name,
        host=host,
        port=port,
        api_key=api_key,
        api_keys=keys,
        key_file=api_key_file,
        access_log=access_log,
        most_body_bytes=body_bytes(serving.context_tokens),
        queue=queue,
        connections=connections,
        seconds_per_request=max_seconds,
        drain_seconds=drain_seconds,
        lora_folder=lora_dir,
        pooling=how,
    )
    if not settings.local and not settings.guarded:
        note(f"memwall: {host} may be reached by others and no --api-key or --api-key-file is set", quiet=quiet)
    server = Server(serving, settings, template, alias_metrics=vllm_metrics)
    server.run(lambda where, at: _announce(serving, settings.name, where, at, json=json, quiet=quiet))
    if server.clean_end:
        serving.release()  # threads and processes of the engine end before the interpreter does
    note("memwall: ended", quiet=quiet)


def paged_kv(kv: str) -> str:
    """How keys and values are held, by the option's text: what pages hold, or a policy of slots or of own caches."""
    if kv in PAGED:
        return PAGED[kv]
    from memwall.kv import resolve

    return str(resolve(kv))


def check_scheduler(kv: str, scheduler: str) -> None:
    """InputError for schedulers that work with page tables, where there are none."""
    if kv not in PAGED and scheduler != "fcfs":
        raise InputError(
            f"--kv {kv} keeps no pages that lie anywhere, and --scheduler {scheduler} plans for such; "
            "add --scheduler fcfs"
        )


def start(
    path: Path,
    budget: Budget | None,
    weights: str,
    context: int | None,
    options: dict[str, Any],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    *,
    quiet: bool,
) -> Serving:
    """Chooses weights and context where they are left open, and loads. DoesNotFit says what would."""
    from memwall.engine.serving import ServingSettings, load_engine
    from memwall.plan.serving import choose

    scheduler, priorities = options.pop("scheduler", None), options.pop("priorities", None)
    ray = options.pop("ray", None)
    settings = choose(path, budget, ServingSettings(weights=weights, context_tokens=context, **options))
    try:
        if ray is not None:
            from memwall.engine.ray_serving import load_on_ray

            return load_on_ray(path, settings, ray, budget=budget, tokenizer=tokenizer)
        with progress_bar("loading", quiet=quiet) as bar:
            return load_engine(
                path, settings, budget=budget, tokenizer=tokenizer, scheduler=scheduler, priorities=priorities,
                progress=bar.counted,
            )  # fmt: skip
    except BudgetExceeded as refused:
        raise DoesNotFit(_advice(settings, budget, refused)) from refused


def _advice(settings: ServingSettings, budget: Budget | None, refused: BudgetExceeded) -> str:
    short = refused.requested_bytes - refused.free_bytes
    needed = (budget.ram if budget is not None and budget.ram is not None else 0) + short
    return (
        f"{settings.weights} weights and one request of {settings.context_tokens} tokens do not fit: {refused}. "
        f"Try --memory {needed}, a shorter --context, or --weights int4"
    )


def _lora_options(
    loras: AskedLoras, path: Path, kv: str, lora_batch: int | None, first_token_limit: float | None
) -> dict[str, Any]:
    from memwall.engine.s_lora import FIRST_TOKEN_SECONDS, SLora
    from memwall.engine.serving import LoraSettings, ServingSettings
    from memwall.models.config import ModelConfig

    asked = LoraSettings() if loras.adapters or loras.folder is not None else None
    page_tokens = ServingSettings(kv=kv, lora=asked).page_tokens
    settings = loras.settings(ModelConfig.from_directory(path), page_tokens, kv)
    if settings is None:
        if lora_batch is not None or first_token_limit is not None:
            raise InputError("--lora-batch and --first-token-limit need adapters: give --lora or --lora-dir")
        return {}
    scheduler = SLora(
        most_adapters=lora_batch,
        abort=first_token_limit is not None,
        first_token_seconds=first_token_limit or FIRST_TOKEN_SECONDS,
    )
    return {"lora": settings, "scheduler": scheduler}


def _swap_bytes(text: str) -> int:
    from memwall.hardware.units import parse_bytes

    return 0 if text.strip() == "0" else parse_bytes(text)


def _announce(serving: Serving, name: str, host: str, port: int, *, json: bool, quiet: bool) -> None:
    from memwall.engine.serving_parts import has_own
    from memwall.hardware.units import format_bytes

    serving.close_books()
    where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    pool, limits = serving.pool, serving.engine.limits
    tokens = serving.engine.wanted_pages * limits.page_tokens
    adapters = serving.adapters.names if serving.adapters is not None else []
    if json:
        print_json(
            {
                "url": where,
                "model": name,
                "weights": serving.settings.weights,
                "kv": serving.settings.kv,
                "context_tokens": serving.context_tokens,
                "budget_bytes": serving.budget_bytes,
                "kv_tokens": tokens,
                "adapters": adapters,
                "shares": describe(serving),
                "ledger": serving.ledger.to_json(),
            }
        )
        sys.stdout.flush()
        return
    rows = [(row.tier, row.owner, format_bytes(row.nbytes)) for row in serving.ledger.rows()]
    held = f"{serving.settings.kv} keys and values" if serving.settings.kv != "state" else "a state"
    if has_own(serving.settings.kv):
        largest = limits.pages(serving.context_tokens) * pool.page_bytes
        room = f"{held} for each request by itself, {format_bytes(largest)} at most, in "
        room += format_bytes(serving.engine.wanted_pages * pool.page_bytes)
    else:
        room = f"{held} in pages for {tokens:,} tokens of {format_bytes(pool.page_bytes)} per {limits.page_tokens}"
    note(format_table(("tier", "owner", "bytes"), rows, right=frozenset({2})), quiet=quiet)
    note(f"{name}: {serving.settings.weights} weights, context {serving.context_tokens:,}, {room}", quiet=quiet)
    if serving.adapters is not None:
        pages = "the same pages" if serving.prefill_pool is None else "the pages of both processes"
        note(f"{len(adapters):,} adapters in {pages}, read when they are asked for", quiet=quiet)
    if serving.workers is not None:
        shares = serving.workers.shares
        note(f"prompts and tokens in two processes: {shares.prefill} and {shares.decode} % of the cores", quiet=quiet)
    if serving.prefill_pool is not None:
        own = serving.prefill_pool.limit_pages * limits.page_tokens
        note(f"prompts have pages of their own for {own:,} tokens, and are handed over when done", quiet=quiet)
    note(f"memwall: listening on {where} (page of memory at /, OpenAI routes under /v1)", quiet=quiet)

"""`memwall run`: plan, load, generate; text to standard output, speed and ledger to standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memwall.cli.chunk_options import DEFAULT_POLICY, ChunkOptions, ChunkPolicy, Chunks, ChunkStoreFolder, ChunkTop
from memwall.cli.command import (
    KV,
    AsJson,
    BudgetOption,
    Debug,
    Memory,
    Quiet,
    Threads,
    Weights,
    add_command,
    complete_model,
)
from memwall.cli.neurons import with_window
from memwall.cli.printing import note, print_json, progress_bar
from memwall.cli.run_report import result_object, summary
from memwall.cli.saved_cache import (
    EXACT,
    CacheCodec,
    Deadline,
    LoadCache,
    SaveCache,
    adopted,
    check_options,
    check_saving,
    fed_tokens,
    load_into,
    open_saved,
    save_after,
)
from memwall.cli.w4a4kv4 import settled
from memwall.errors import BudgetExceeded, DoesNotFit, InputError

if TYPE_CHECKING:
    import numpy as np

    from memwall.engine import Sampling, Session
    from memwall.memory import Budget
    from memwall.models.tokenizer import Tokenizer
    from memwall.plan import Plan

DEMO = "demo"
GROWTH_STEP_BYTES = 512 * 1024
"""Growth of a process counts in such steps: the smallest budget named by one run is the smallest of the next."""
LEFT_FREE_BYTES = 256 * 1024
"""Of what a plan leaves free for a larger process, for what comes in after it was measured."""
MARKS = "0123456789-_."
"""What names of models have, and words do not."""


def register(app: typer.Typer) -> None:
    add_command(app, "run", run)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What was asked on the command line, checked as far as it can be without a model."""

    model: str
    prompt: str | None
    budget: Budget | None
    weights: str
    kv: str
    context: int | None
    threads: int | None
    sampling: Sampling
    chat: bool
    verbose: bool
    json: bool
    quiet: bool
    save_cache: Path | None = None
    load_cache: str | None = None
    deadline: float | None = None
    cache_codec: str = EXACT
    lora: Path | None = None
    window: int | None = None


def run(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Directory of a Hugging Face model, ORG/NAME of one in the Hub's cache, or `demo` (the default).",
            autocompletion=complete_model,
            metavar="MODEL",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Argument(help="Text to continue; standard input when absent.", metavar="PROMPT")
    ] = None,
    *,
    memory: Memory = None,
    budget: BudgetOption = None,
    weights: Weights = "auto",
    kv: KV = "auto",
    context: Annotated[
        str | None, typer.Option(help="Tokens the cache must hold, such as 4096 or 32k (default: what this run needs).")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from the K likeliest tokens only; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the smallest set of tokens with this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text; may be given several times.")] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on through the model's end-of-text token.")
    ] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Talk turn by turn; the cache is kept between turns.")] = False,
    save_cache: SaveCache = None,
    load_cache: LoadCache = None,
    deadline: Deadline = None,
    cache_codec: CacheCodec = EXACT,
    history: Annotated[
        Path | None,
        typer.Option(
            help="Conversation to answer questions about: JSON lines of speaker and text, or plain lines.",
            metavar="FILE",
        ),
    ] = None,
    lora: Annotated[
        Path | None,
        typer.Option(help="An adapter (PEFT's LoRA directory) that the model runs with.", metavar="DIR"),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            help="Tokens whose neurons stay in memory, of a model that streams them (default: 5, or as many as fit).",
            min=1,
            metavar="TOKENS",
        ),
    ] = None,
    chunks: Chunks = None,
    chunk_store: ChunkStoreFolder = None,
    chunk_top: ChunkTop = None,
    chunk_policy: ChunkPolicy = DEFAULT_POLICY,
    threads: Threads = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show the plan, and predicted beside measured bytes.")
    ] = False,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Generate text inside a memory budget, then show where every byte went.

    A lone positional argument is the MODEL if it is `demo`, an existing directory, a name on the Hub (ORG/NAME, in its
    cache or with a digit or a mark in it), or looks like a path (starts with / ./ ../ or ~ and has no spaces);
    otherwise it is the prompt, and the bundled demo model continues it.
    """
    from memwall.engine import Sampling

    model, prompt = split_positionals(model, prompt)
    weights, cache = settled(model, weights, kv)
    request = Request(
        model=model,
        prompt=prompt,
        budget=parse_budget(memory, budget),
        weights=weights,
        kv=cache or kv,
        context=parse_context(context),
        threads=threads,
        sampling=Sampling(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=tuple(stop or ()),
            ignore_eos=ignore_eos,
        ),
        chat=chat,
        verbose=verbose,
        json=json,
        quiet=quiet,
        save_cache=save_cache,
        load_cache=load_cache,
        deadline=deadline,
        cache_codec=cache_codec,
        lora=lora,
        window=window,
    )
    check_options(request)
    if lora is not None and (chunks or history or save_cache or load_cache):
        raise InputError("--lora goes with a prompt or --chat; caches that are kept belong to the model without it")
    options = ChunkOptions(paths=chunks or [], store=chunk_store, top=chunk_top, policy=chunk_policy)
    if options.given:
        others = {"--history": history, "--chat": chat, "--save-cache": save_cache, "--load-cache": load_cache}
        for name, value in others.items():
            if value:
                raise InputError(
                    f"--chunks makes the whole prompt of its chunks, and {name} does something else with it"
                )
        from memwall.cli.chunks import ask_chunks

        ask_chunks(request, options)
    elif history is not None:
        if chat:
            raise InputError("--history answers questions and --chat talks: give one of them")
        from memwall.cli.history import ask

        ask(request, history)
    elif chat:
        if json:
            raise InputError("--chat is a conversation and --json one object: give one of them")
        from memwall.cli.chat import talk

        talk(request)
    else:
        _complete(request)


def split_positionals(first: str | None, second: str | None) -> tuple[str, str | None]:
    """(MODEL, prompt) from the positional arguments; a lone one is whichever it looks like."""
    if second is not None or first is None:
        return first or DEMO, second
    from memwall.models.hub import cached, is_repository

    looks_like_path = first.startswith(("/", "./", "../", "~")) and not any(letter.isspace() for letter in first)
    # words may have a slash between them: and/or; names on the Hub that are not here mostly have a size or a version
    on_hub = is_repository(first) and (any(letter in MARKS for letter in first) or cached(first) is not None)
    if first == DEMO or looks_like_path or on_hub or Path(first).is_dir():
        return first, None
    return DEMO, first


def parse_budget(memory: str | None, budget: str | None) -> Budget | None:
    """One budget from --memory and --budget, which exclude each other since both may name the RAM."""
    if memory is not None and budget is not None:
        raise InputError(
            f"--memory {memory} and --budget {budget} are both given; write --budget ram={memory},... alone"
        )
    text = memory if memory is not None else budget
    if text is None:
        return None
    from memwall.memory import Budget

    return Budget.parse(text)


def parse_context(text: str | None) -> int | None:
    """`4096`, `32k` or `1M` as tokens, k being 1024 as in the names of models."""
    if text is None:
        return None
    from memwall.hardware.units import parse_count

    try:
        tokens = parse_count(text)
    except InputError:
        raise InputError(f"--context is {text!r}; write a count of tokens, such as 4096 or 32k (k is 1024)") from None
    if tokens < 1:
        raise InputError(f"--context is {text}; it must be at least 1 token")
    return tokens


def _read_prompt(request: Request) -> str:
    text = request.prompt if request.prompt is not None else _read_standard_input()
    if not text:
        raise InputError("the prompt is empty; give at least one word")
    return text


def _read_standard_input() -> str:
    if sys.stdin is None or sys.stdin.isatty():
        raise InputError('no prompt: give it as an argument (`memwall run "..."`), on standard input, or use --chat')
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not text: {error}") from error


def start(
    request: Request,
    *,
    needed_tokens: int | None,
    path: Path,
    tokenizer: Tokenizer,
    prompt_tokens: int | None = None,
    runtime_growth_bytes: int = 0,
    extra_bytes: Mapping[str, int] | None = None,
) -> tuple[Session, Plan]:
    """Plan for the tokens that this run needs (None: as many as are sensible), then load as planned.

    runtime_growth_bytes: what the caller has brought into the process that other runs have not. extra_bytes: by owner,
    what it will hold besides.
    """
    from memwall.engine import Settings, load
    from memwall.engine.elastic import fill_budget, watch_signals
    from memwall.models import ModelConfig
    from memwall.plan import RUNTIME, make_plan, sampling_bytes

    extra = {RUNTIME: runtime_growth_bytes, **(extra_bytes or {})}
    adapter = None
    if request.lora is not None:
        from memwall.engine.lone_lora import lone_bytes, wear
        from memwall.models.lora import LoraWeights

        adapter = LoraWeights.read(request.lora, ModelConfig.from_directory(path))
        extra |= lone_bytes(adapter, ModelConfig.from_directory(path))
    if request.sampling.temperature > 0:
        extra |= sampling_bytes(ModelConfig.from_directory(path))
    plan_for: Callable[..., Plan] = partial(
        make_plan,
        path,
        budget=request.budget,
        prompt_tokens=prompt_tokens,
        threads=request.threads,
        measure=False,
        profile=False,
    )
    choice = {"weights": request.weights, "kv": request.kv, "context": request.context or needed_tokens}
    if request.budget is not None and request.budget.ram is not None:
        extra[RUNTIME] += _unforeseen_bytes(path, runtime_growth_bytes, partial(plan_for, extra_bytes=extra, **choice))
    window, fitting = with_window(path, request.window, plan_for, extra, **choice)
    plan = fitting(**choice)
    settings = Settings(
        weights=plan.choice.weights,
        kv=plan.choice.kv,
        context_tokens=plan.choice.context,
        segment_tokens=plan.choice.segment_tokens,
        threads=request.threads,
        window=window,
    )
    try:
        with progress_bar("loading", quiet=request.quiet) as bar:
            session = load(path, settings, budget=request.budget, tokenizer=tokenizer, progress=bar.counted)
        if adapter is not None:
            wear(session, adapter)
        session.prepare(request.sampling)
        if request.weights == "auto" and request.budget is not None and request.budget.ram is not None:
            fill_budget(session)  # the plan allows for a larger program than this one may be
        watch_signals(session)
    except BudgetExceeded as refused:
        raise DoesNotFit(_what_would_fit(request, plan, fitting, refused)) from refused
    return session, plan


def _unforeseen_bytes(path: Path, runtime_growth_bytes: int, plan: Callable[[], object]) -> int:
    """What this process holds, ready to load, beyond what a plan foresees and leaves free.

    A plan's figure is that of another process, and libraries come in as they lie in the file cache, in pieces of up to
    2 MiB: a plan that fills its budget would end for want of them. plan: makes one, and so brings in what that needs.
    """
    from memwall.engine.loading import warm_up
    from memwall.memory import resident_bytes
    from memwall.memory.pages import round_up
    from memwall.models import ModelConfig
    from memwall.plan.predict import NEURON_LIBRARY_BYTES, RUNTIME_SPREAD_BYTES, measured_runtime_bytes

    with suppress(DoesNotFit):
        plan()
    warm_up({})
    streams = ModelConfig.from_directory(path).neurons is not None
    foreseen = measured_runtime_bytes(path) + runtime_growth_bytes + (NEURON_LIBRARY_BYTES if streams else 0)
    more = resident_bytes(exact=True) - foreseen - (RUNTIME_SPREAD_BYTES - LEFT_FREE_BYTES)
    return round_up(max(more, 0), GROWTH_STEP_BYTES)


def _what_would_fit(request: Request, plan: Plan, plan_for: Callable[..., Plan], refused: BudgetExceeded) -> str:
    """Why settings named by the user did not fit, and the nearest ones that do."""
    from memwall.hardware.units import format_bytes

    choice, needed = plan.choice, plan.peak_bytes["ram"]
    room = request.budget or "the memory that this machine has left"
    text = (
        f"{choice.weights} weights with a {choice.kv} cache for {choice.context} tokens "
        f"do not fit in {room}: {refused}. They need {format_bytes(needed)}"
    )
    if request.budget is None:
        return f"{text}; say with --memory what they may take, and a smaller form is chosen"
    text = f"{text}: try --memory {needed}"
    try:
        other = plan_for(context=choice.context)
    except DoesNotFit as smaller:
        return f"{text}. With weights and cache left to memwall: {smaller}"
    return f"{text}, or --weights {other.choice.weights} --kv '{other.choice.kv}', which fit in {request.budget}"


def _complete(request: Request) -> None:
    from memwall.kv import packs_positions
    from memwall.models import ModelConfig, model_directory
    from memwall.models.config import checked_directory
    from memwall.models.tokenizer import Tokenizer
    from memwall.plan.search import LONGEST_PACKED_TOKENS

    path = checked_directory(model_directory(request.model))
    text = _read_prompt(request)
    tokenizer = Tokenizer.from_directory(path)
    prompt = tokenizer.encode(text)
    packs = request.kv != "auto" and packs_positions(request.kv)
    longest = LONGEST_PACKED_TOKENS if packs else ModelConfig.from_directory(path).max_position
    if request.context is None and len(prompt) > longest:
        raise InputError(f"the prompt has {len(prompt):,} tokens, but the context of {path} is {longest:,}; shorten it")
    # a text that reaches the end of the context stops there, with a message, rather than being refused beforehand
    needed = min(len(prompt) + request.sampling.max_new_tokens, longest)
    with open_saved(request, path) as saved:
        request, fed = adopted(request, saved), fed_tokens(request, saved, prompt)
        session, plan = start(request, needed_tokens=needed, path=path, tokenizer=tokenizer, prompt_tokens=fed)
        check_saving(request, session)
        loaded = load_into(request, session, saved, prompt)
    stream(session, prompt[loaded:], request.sampling, show=not request.json)
    session.last.loaded_tokens = loaded
    save_after(request, session)
    _report(request, session, plan)


def stream(
    session: Session,
    prompt: list[int],
    sampling: Sampling,
    *,
    show: bool = True,
    feed: Callable[[list[int]], np.ndarray] | None = None,
) -> None:
    """Generate to the end, writing each piece of text as soon as it is there; the result is `session.last`."""
    for piece in session.generate(prompt, sampling, feed):
        if show:
            sys.stdout.write(piece)
            sys.stdout.flush()


def _report(request: Request, session: Session, plan: Plan) -> None:
    result = session.last
    if request.json:
        print_json(result_object(session, plan))
    else:
        typer.echo()
        if not request.quiet:
            note("\n" + summary(session, plan, request, verbose=request.verbose))
    if result.message:
        note(f"memwall: {result.message}", quiet=request.json and request.quiet)
    if result.stop_reason == "budget":
        raise typer.Exit(1)

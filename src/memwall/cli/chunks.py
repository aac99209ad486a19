"""`memwall run --chunks`: questions over texts whose keys and values are kept, and reused wherever they come up."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from memwall.cli.history import questions_of
from memwall.cli.printing import note, print_json
from memwall.cli.run import start, stream
from memwall.cli.run_report import result_object, summary
from memwall.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from memwall.cli.chunk_options import ChunkOptions
    from memwall.cli.run import Request
    from memwall.engine import Session
    from memwall.kv.cache_craft import CraftSettings
    from memwall.kv.chunk_prefill import Outcome
    from memwall.kv.chunk_prompt import ChunkPrompt
    from memwall.kv.chunk_store import ChunkStore
    from memwall.models.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class _Asked:
    """A question, the passages it is asked about, and the prompt that they make."""

    question: str
    sources: list[str]
    prompt: ChunkPrompt


def ask_chunks(request: Request, options: ChunkOptions) -> None:
    """Answers the question, or each line of standard input, over the chunks."""
    from memwall.kv.cache_craft import CraftSettings
    from memwall.kv.chunk_file import weights_of
    from memwall.kv.chunk_prompt import predict_stage_bytes
    from memwall.kv.table import resolve, technique
    from memwall.models import ModelConfig, model_directory
    from memwall.models.config import checked_directory
    from memwall.models.tokenizer import Tokenizer

    settings = CraftSettings.from_policy(options.policy)
    assert options.store is not None
    if request.weights == "auto":
        # another choice would make all that is kept useless
        request = replace(request, weights=weights_of(options.store) or "auto")
    if request.kv != "auto" and not technique(resolve(request.kv).name).plain_rows:
        raise InputError(f"--kv {request.kv}: cannot take rows of kept chunks; try --kv float16 or kivi(4bit)")
    path = checked_directory(model_directory(request.model))
    config, tokenizer = ModelConfig.from_directory(path), Tokenizer.from_directory(path)
    asked = _prompts(request, options, path, tokenizer)
    longest = max((each.prompt for each in asked), key=lambda prompt: len(prompt.tokens))
    size = len(longest.tokens)
    if request.context is None and size > config.max_position:
        raise InputError(
            f"chunks and question have {size:,} tokens, but the context of {path} is {config.max_position:,}; "
            "take fewer chunks (--chunk-top) or shorter ones"
        )
    from memwall.engine.loading import cache_shape

    # one question reads nothing twice: the memory tier is for those that wait
    ram_bytes = settings.ram_bytes if len(asked) > 1 else 0
    session, plan = start(
        request,
        needed_tokens=min(size + request.sampling.max_new_tokens, config.max_position),
        path=path,
        tokenizer=tokenizer,
        prompt_tokens=size,
        extra_bytes={"kv/chunks": predict_stage_bytes(cache_shape(config), longest), "chunks/ram": ram_bytes},
    )
    answers: list[dict[str, Any]] = []
    with _open_store(request, options, session, settings, ram_bytes) as store:
        alpha = _alpha(session, settings)
        for number, each in enumerate(asked):
            session.reset()
            feeding = _Feeding(session, store, each.prompt, alpha, asked[number + 1 : number + 2])
            stream(session, each.prompt.tokens, request.sampling, show=not request.json, feed=feeding)
            answers.append(_answer(request, session, store, each, feeding))
        if request.json:
            print_json({**result_object(session, plan), "answers": answers, "alpha": alpha})
        elif not request.quiet:
            note("\n" + summary(session, plan, request, verbose=request.verbose))
    if session.last.stop_reason == "budget":
        raise typer.Exit(1)


class _Feeding:
    """Takes a prompt in by its chunks; what the next question will need is brought into memory meanwhile."""

    def __init__(
        self, session: Session, store: ChunkStore, prompt: ChunkPrompt, alpha: float, waiting: list[_Asked]
    ) -> None:
        self.session, self.store, self.prompt, self.alpha, self.waiting = session, store, prompt, alpha, waiting
        self.outcome: Outcome | None = None

    def __call__(self, tokens: list[int]) -> np.ndarray:
        from memwall.kv.chunk_prompt import arrange

        self.outcome = self.session.prefill_chunks(self.store, self.prompt, alpha=self.alpha)
        for next_one in self.waiting:
            parts = arrange(self.store, next_one.prompt, self.alpha, self.session.settings.segment_tokens)
            self.store.preload([part.reuse.variant for part in parts if part.reuse.variant is not None])
        return self.outcome.logits


def _prompts(request: Request, options: ChunkOptions, path: Path, tokenizer: Tokenizer) -> list[_Asked]:
    from memwall.kv.chunk_prompt import ChunkPrompt
    from memwall.kv.chunk_text import Ranking, read_passages
    from memwall.kv.episodes import Turn

    passages = read_passages(options.paths)
    ranking = Ranking([passage.text for passage in passages])
    turn = Turn.of(path)
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    opening = tokenizer.encode(turn.opening, add_bos=False) if turn is not None else begin
    ending = turn.ending if turn is not None else ""
    asked = []
    for question in questions_of(request):
        which = range(len(passages)) if options.top is None else ranking.best(question, options.top)
        chosen = [passages[index] for index in which]
        chunks = [tokenizer.encode(f"{passage.text}\n", add_bos=False) for passage in chosen]
        prompt = ChunkPrompt(opening, chunks, tokenizer.encode(f"\n{question}{ending}", add_bos=False))
        asked.append(_Asked(question, [passage.source for passage in chosen], prompt))
    return asked


def _open_store(
    request: Request, options: ChunkOptions, session: Session, settings: CraftSettings, ram_bytes: int
) -> ChunkStore:
    from memwall.kv.chunk_store import ChunkStore

    assert options.store is not None
    budget = request.budget
    rate = budget.rates.get("disk") if budget is not None else None
    if rate is not None:
        note(f"memwall: kept chunks are read at {rate:,.0f} bytes/s at most, an emulated disk", quiet=request.quiet)
    return ChunkStore(
        options.store,
        session.origin(),
        session.cache.shape,
        session.arena,
        settings,
        ram_bytes=ram_bytes,
        disk_bytes=budget.tiers.get("disk") if budget is not None else None,
        rate_bytes_per_s=rate,
    )


def _alpha(session: Session, settings: CraftSettings) -> float:
    from memwall.kv.cache_craft import DEFAULT_ALPHA
    from memwall.kv.cache_craft_fit import fitted_alpha

    if settings.alpha is not None:
        return settings.alpha
    assert session.model is not None
    found = fitted_alpha(session.model)
    return DEFAULT_ALPHA if found is None else found


def _answer(request: Request, session: Session, store: ChunkStore, each: _Asked, feeding: _Feeding) -> dict[str, Any]:
    """Says how an answer's prompt came in, and gives the same for programs."""
    result, outcome = session.last, feeding.outcome
    facts: dict[str, Any] = {"question": each.question, "text": result.text}
    if outcome is not None:
        repaired = sum(len(part.reuse.repair) for part in outcome.parts if part.kept)
        kept = sum(len(part.tokens) for part in outcome.parts if part.kept)
        result.loaded_tokens = kept - repaired
        result.prompt_tokens = outcome.num_tokens - result.loaded_tokens
        result.timings.prefill_tokens_per_s = result.prompt_tokens / max(result.timings.prefill_seconds, 1e-9)
        named = [part for part in outcome.parts if not part.opening]
        facts["computed_share"] = outcome.share
        facts["loaded_bytes"], facts["preload_layers"] = outcome.loaded_bytes, outcome.preload
        facts["wait_seconds"] = outcome.wait_seconds
        facts["chunks"] = [
            {
                "source": source,
                "tokens": len(part.tokens),
                "kept": part.kept,
                "overhead": part.reuse.overhead,
                "repaired": len(part.reuse.repair) if part.kept else len(part.tokens),
            }
            for source, part in zip(each.sources, named)
        ]
        told = (
            f"{sum(part.kept for part in named)} of {len(named)} chunks were kept, {repaired} of their tokens repaired"
        )
        if not request.json:
            typer.echo()
            note(f"{told}; {outcome.share:.0%} of a full prefill computed", quiet=request.quiet)
    notes, store.notes[:] = list(store.notes), []
    for text in notes:
        note(f"memwall: {text}", quiet=request.quiet)
    if result.message:
        note(f"memwall: {result.message}", quiet=request.json and request.quiet)
    return facts

"""`memwall run --history`: questions about a conversation, each answered from the episode that it is about."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from memwall.cli.printing import note, print_json, progress_bar
from memwall.cli.run import start, stream
from memwall.cli.run_report import result_object, summary
from memwall.errors import InputError

if TYPE_CHECKING:
    from memwall.cli.run import Request
    from memwall.kv import Policy

EPISODES = 4  # paper: section 4.1


def with_episodes(kv: str) -> Policy:
    """The policy that keeps the conversation: `epicache`, with as many episodes as were asked for or the paper's."""
    from memwall.kv.table import resolve

    policy = resolve("epicache" if kv == "auto" else kv)
    if policy.name != "epicache":
        raise InputError(f"--history keeps a conversation in episodes: it works with --kv epicache(...), not {kv}")
    return replace(policy, settings={"episodes": str(EPISODES), **policy.settings})


def ask(request: Request, history: Path) -> None:
    """Reads the conversation once for each episode, then answers the question, or each line of standard input."""
    from memwall.engine.loading import cache_shape
    from memwall.kv.epicache import EpiCache, EpiSettings
    from memwall.kv.episodes import Turn, read_history
    from memwall.models import ModelConfig, model_directory
    from memwall.models.config import checked_directory
    from memwall.models.tokenizer import Tokenizer
    from memwall.plan.base import LONGEST_SEGMENT_TOKENS

    path = checked_directory(model_directory(request.model))
    policy, utterances = with_episodes(request.kv), read_history(history)
    questions = questions_of(request)
    config, tokenizer = ModelConfig.from_directory(path), Tokenizer.from_directory(path)
    turn = Turn.of(path)
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    # a chat model reads the history and the question as one turn of the user's
    opening = tokenizer.encode(turn.opening, add_bos=False) if turn is not None else begin
    size = len(opening) + len(tokenizer.encode("".join(each.line for each in utterances), add_bos=False))
    if size >= config.max_position:
        raise InputError(f"{history}: has {size:,} tokens, but the context of {path} is {config.max_position:,}")
    prompt = min(EpiSettings.from_policy(policy, cache_shape(config), size).prompt_tokens, LONGEST_SEGMENT_TOKENS)
    ending = turn.ending if turn is not None else ""
    asked = [tokenizer.encode(f"\n{question}{ending}", add_bos=False) for question in questions]
    most = max(prompt, max(map(len, asked)) + request.sampling.max_new_tokens)
    session, plan = start(
        replace(request, kv=str(policy)),
        needed_tokens=min(size + most, config.max_position),
        path=path,
        tokenizer=tokenizer,
        prompt_tokens=size,
    )
    cache = session.cache
    assert isinstance(cache, EpiCache)
    with progress_bar("reading the history", quiet=request.quiet) as bar:
        cache.remember(session.decoder, tokenizer, utterances, opening=opening, progress=bar.counted)
    answers: list[dict[str, Any]] = []
    for question, tokens in zip(questions, asked):
        episode = cache.match(question)
        moved = cache.recall(episode)
        stream(session, tokens, request.sampling, show=not request.json)
        answers.append({"question": question, "episode": episode, "moved_bytes": moved, "text": session.last.text})
        if not request.json:
            typer.echo()
            note(f"episode {episode + 1} of {len(cache.kept_episodes)}, {moved:,} bytes moved", quiet=request.quiet)
        if session.last.message:
            note(f"memwall: {session.last.message}", quiet=request.json and request.quiet)
    if request.json:
        print_json({**result_object(session, plan), "answers": answers})
    elif not request.quiet:
        note("\n" + summary(session, plan, request, verbose=request.verbose))
    if session.last.stop_reason == "budget":
        raise typer.Exit(1)


def questions_of(request: Request) -> list[str]:
    """PROMPT, or each line of standard input."""
    if request.prompt is not None:
        found = [request.prompt]
    elif sys.stdin is None or sys.stdin.isatty():
        raise InputError("no question: give it as an argument, or one a line on standard input")
    else:
        found = sys.stdin.read().splitlines()
    found = [line.strip() for line in found if line.strip()]
    if not found:
        raise InputError("the question is empty; give at least one word")
    return found

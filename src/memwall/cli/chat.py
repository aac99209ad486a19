"""`memwall run --chat`: turns at the terminal, with the cache kept between them."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import typer

from memwall.cli.printing import note
from memwall.cli.run import GROWTH_STEP_BYTES, start, stream
from memwall.cli.run_report import summary
from memwall.cli.saved_cache import adopted, check_saving, open_saved, save_after
from memwall.errors import InputError

if TYPE_CHECKING:
    from memwall.cli.run import Request
    from memwall.engine import Sampling, Session
    from memwall.kv.saved import SavedCache
    from memwall.models.chat import ChatTemplate
    from memwall.models.tokenizer import Tokenizer

ANSWER_SHARE = 4
"""At least this part of the context, or what is asked for, is left to an answer before old turns go."""
TURN_MESSAGES = 2
"""A question and its answer."""


class Conversation:
    """Messages so far, and the tokens that the session has seen of them."""

    def __init__(self, session: Session, tokenizer: Tokenizer, template: ChatTemplate, sampling: Sampling) -> None:
        self.session = session
        self.tokenizer = tokenizer
        self.template = template
        self.sampling = replace(sampling, stop=(*sampling.stop, *template.stop))
        self.forget()

    def forget(self) -> None:
        """Start over."""
        self.session.reset()
        self._messages: list[dict[str, str]] = []
        self._seen: list[int] = []

    def go_on_from(self, saved: SavedCache) -> None:
        """Take a saved cache as what was seen: as much of it stays as the conversation begins with."""
        seen = saved.tokens()
        self._seen = seen[: self.session.load_cache(saved, [*seen, -1])]

    def say(self, text: str) -> None:
        """One turn: the answer goes to standard output as it is made. What no longer fits the context, the oldest
        turns first, is left out. Ctrl-C ends the answer, not the conversation.
        """
        from memwall.kv.saved import num_shared

        self._messages.append({"role": "user", "content": text})
        ids = self._ids_that_fit()
        if ids is None:
            self._messages.pop()
            return
        # one token at least must be fed, to have logits to go on from
        # what was made and what the template writes of it may part: stop texts, blanks
        kept = self.session.rewind(min(num_shared(self._seen, ids), len(ids) - 1))
        try:
            stream(self.session, ids[kept:], self.sampling)
            self._seen = [*ids, *self.session.last.tokens]
        except KeyboardInterrupt:
            self.session.reset()  # a step may be half done: the next turn computes all again
            self._seen = []
        typer.echo()
        self._messages.append({"role": "assistant", "content": self.session.last.text.strip()})

    def _ids_that_fit(self) -> list[int] | None:
        """The conversation as tokens, with room for an answer; None, and nothing is left out, where the last message
        alone is too long.
        """
        context = self.session.settings.context_tokens
        room = context - min(self.sampling.max_new_tokens, context // ANSWER_SHARE)
        kept, dropped = self._messages, 0
        while True:
            ids = self.tokenizer.encode(self.template.render(kept), add_bos=False)
            if len(ids) <= room or len(kept) == 1:
                break
            kept = kept[TURN_MESSAGES:]
            dropped += 1
        if len(ids) > context:
            note(f"memwall: this message has {len(ids):,} tokens, but the context is {context:,}: it was not taken")
            return None
        self._messages = kept
        if dropped:
            turns = "turn" if dropped == 1 else f"{dropped} turns"
            note(f"memwall: the oldest {turns} left out: the context is {context:,} tokens (--context sets it)")
        return ids


def talk(request: Request) -> None:
    """Turns from standard input until it ends or `/bye`; `/reset` forgets the conversation."""
    from memwall.kv.saved import SavedCache
    from memwall.memory import resident_bytes
    from memwall.memory.pages import round_up
    from memwall.models import model_directory
    from memwall.models.chat import ChatTemplate
    from memwall.models.tokenizer import Tokenizer

    path = model_directory(request.model)
    tokenizer = Tokenizer.from_directory(path)
    if request.load_cache is not None and request.load_cache.startswith("tcp://"):
        raise InputError("--chat goes on from a file; --load-cache tcp://... is for single prompts")
    # rendered once ahead: the template library brings some megabytes that the plan must know of
    before_bytes = resident_bytes(exact=True)
    template = ChatTemplate.from_directory(path)
    template.render([{"role": "user", "content": request.prompt or "hello"}])
    # in whole steps, so that the smallest budget named by one run is the smallest of the next
    growth_bytes = round_up(max(resident_bytes(exact=True) - before_bytes, 0), GROWTH_STEP_BYTES)
    with open_saved(request, path) as saved:
        request = adopted(request, saved)
        session, plan = start(
            request, needed_tokens=None, path=path, tokenizer=tokenizer, runtime_growth_bytes=growth_bytes
        )
        conversation = Conversation(session, tokenizer, template, request.sampling)
        check_saving(request, session)
        if isinstance(saved, SavedCache):
            conversation.go_on_from(saved)
    interactive = sys.stdin.isatty() and not request.quiet
    if template.is_plain:
        note(
            "memwall: the model brings no chat template; turns are written as User: and Assistant:", quiet=request.quiet
        )
    note("Write a message and press Enter; /reset forgets, /bye or Ctrl-D ends.", quiet=not interactive)
    line = request.prompt if request.prompt is not None else _next_line(interactive)
    while line is not None and line.strip() != "/bye":
        if line.strip() == "/reset":
            conversation.forget()
        elif line.strip():
            conversation.say(line)
            if session.last.message:
                note(f"memwall: {session.last.message}")
            if session.last.stop_reason == "budget":
                raise typer.Exit(1)
        line = _next_line(interactive)
    save_after(request, session)
    if not request.quiet:
        note("\n" + summary(session, plan, request, verbose=request.verbose))


def _next_line(interactive: bool) -> str | None:
    if interactive:
        typer.echo("> ", nl=False, err=True)
    line = sys.stdin.readline()
    return line.removesuffix("\n") if line else None

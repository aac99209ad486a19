"""`--save-cache`, `--load-cache` and `--cache-codec`: a run that goes on from what an earlier one kept on disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memwall.cli.printing import note
from memwall.errors import InputError

if TYPE_CHECKING:
    from memwall.cli.run import Request
    from memwall.engine import Session
    from memwall.kv.remote import RemoteCache
    from memwall.kv.saved import SavedCache

EXACT = "exact"
REMOTE = "tcp://"
DEADLINE_SECONDS = 2.0
"""Of caches that come from elsewhere, unless said."""
CODECS = (EXACT, "cachegen", "cachegen(level=1)", "cachegen(level=2)", "cachegen(level=3)")


def complete_codec(incomplete: str) -> list[str]:
    """Shell completion of --cache-codec."""
    return [name for name in CODECS if name.startswith(incomplete)]


SaveCache = Annotated[
    Path | None,
    typer.Option("--save-cache", help="Write the cache of prompt and answer to this file at the end.", metavar="FILE"),
]
LoadCache = Annotated[
    str | None,
    typer.Option(
        "--load-cache",
        help="Go on from a saved cache, a file or tcp://HOST:PORT of `memwall stream`: what the prompt begins with and "
        "that holds needs no prefill.",
        metavar="FILE",
    ),
]
Deadline = Annotated[
    float | None,
    typer.Option(
        "--deadline",
        help="With --load-cache tcp://...: seconds in which the context should be there; chunks come as text or at the "
        "level that keeps it (default: 2).",
        metavar="SECONDS",
    ),
]
CacheCodec = Annotated[
    str,
    typer.Option(
        "--cache-codec",
        help="How --save-cache stores: exact (the cache's own form), cachegen (small, every level) or one level of it, "
        "cachegen(level=2); levels are 1 (coarse) to 3 (fine).",
        metavar="CODEC",
        autocompletion=complete_codec,
    ),
]


def check_options(request: Request) -> None:
    """What can be said of the options before a model is there."""
    if request.cache_codec != EXACT:
        if request.save_cache is None:
            raise InputError(
                f"--cache-codec {request.cache_codec} says how --save-cache FILE writes, which is not given"
            )
        from memwall.kv import table
        from memwall.kv.policy import parse

        table.codec(parse(request.cache_codec).name)
    if request.deadline is not None and not (request.load_cache or "").startswith(REMOTE):
        raise InputError(
            f"--deadline {request.deadline:g} says when a cache from elsewhere should be here, and goes with "
            "--load-cache tcp://HOST:PORT, which is not given"
        )
    if request.save_cache is not None:
        folder = request.save_cache.parent
        if not folder.is_dir() or request.save_cache.is_dir():
            raise InputError(f"--save-cache {request.save_cache}: must be a file in a folder that exists")
        if request.kv != "auto":
            from memwall.kv.saved import require_saving

            require_saving(request.kv, request.cache_codec)


@contextmanager
def open_saved(request: Request, model: Path) -> Iterator[SavedCache | RemoteCache | None]:
    """What --load-cache names, checked against the model and against its own digest; None without the option."""
    if request.load_cache is None:
        yield None
        return
    from memwall.models import Checkpoint

    with _source(request.load_cache, request.deadline) as saved:
        with Checkpoint(model) as checkpoint:
            saved.check_model(checkpoint.fingerprint())
        saved.verify()
        yield saved


def _source(name: str, deadline_seconds: float | None) -> SavedCache | RemoteCache:
    if name.startswith(REMOTE):
        from memwall.kv.remote import RemoteCache

        return RemoteCache(name, DEADLINE_SECONDS if deadline_seconds is None else deadline_seconds)
    from memwall.kv.saved import SavedCache

    return SavedCache(Path(name))


def adopted(request: Request, saved: SavedCache | RemoteCache | None) -> Request:
    """The request with weights and cache as the file was made with, where they are left to memwall."""
    if saved is None:
        return request
    weights = saved.weights if request.weights == "auto" else request.weights
    policy = saved.policy if request.kv == "auto" and saved.policy is not None else request.kv
    return replace(request, weights=weights, kv=policy)


def fed_tokens(request: Request, saved: SavedCache | RemoteCache | None, prompt: list[int]) -> int:
    """Tokens of the prompt that the cache will be handed at once."""
    if saved is None:
        return len(prompt)
    shared = saved.shared_tokens(prompt)
    if shared < 1:
        note(
            f"memwall: the prompt shares no beginning with {saved.path}; it is worked through whole",
            quiet=request.quiet,
        )
        return len(prompt)
    # coded chunks come in as prompts of their length do
    return min(max(len(prompt) - shared, saved.longest_append), len(prompt))


def load_into(request: Request, session: Session, saved: SavedCache | RemoteCache | None, prompt: list[int]) -> int:
    """Brings in what the prompt begins with; gives its tokens, and says how it came if it came over a link."""
    if saved is None:
        return 0
    loaded = session.load_cache(saved, prompt)
    came = getattr(saved, "request", None)
    if came is not None:
        forms = ", ".join("text" if sent.form == 0 else f"level {sent.form}" for sent in came.sent)
        late = "" if came.in_time else ", late"
        note(f"context in {came.seconds:.2f} s of {came.slo_seconds:g} s{late}: {forms}", quiet=request.quiet)
    return loaded


def check_saving(request: Request, session: Session) -> None:
    """Refuses before the run what --save-cache would refuse after it."""
    if request.save_cache is not None:
        session.check_saving(request.cache_codec)


def save_after(request: Request, session: Session) -> None:
    """Writes the file of --save-cache, if there is anything to write."""
    if request.save_cache is None:
        return
    if not session.held:
        note("memwall: nothing was taken into the cache, so none was saved")
        return
    nbytes = session.save_cache(request.save_cache, request.cache_codec)
    note(f"{request.save_cache}: {nbytes:,} bytes, {len(session.held)} tokens", quiet=request.quiet)

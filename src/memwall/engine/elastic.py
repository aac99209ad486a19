"""A budget that moves while a session runs: a model whose weights are a stack of blocks shrinks and grows with it.

Blocks are the first to go and the first to come back: what is left of a budget once the program, the fixed parts and
the cache at its planned length have theirs is the stack's. Changes are made between two tokens, so a budget may be
asked for from a signal's handler or another thread at any time.
"""

from __future__ import annotations

import signal
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from memwall import _native, kv
from memwall.engine.loading import RUNTIME_HEADROOM_BYTES, cache_shape
from memwall.errors import DoesNotFit
from memwall.hardware.units import format_bytes
from memwall.memory import resident_bytes

if TYPE_CHECKING:
    from memwall.engine.session import Session

STEP = 0.8
"""A signal makes the budget so much of what it was, or takes it back."""


def least_budget_bytes(session: Session) -> int:
    """What the process needs to go on to its planned context, with no block but the first of each matrix."""
    _native.give_back_freed_memory()
    held = _outside_bytes(session) + _fixed_bytes(session)
    return held + cache_growth_bytes(session) + RUNTIME_HEADROOM_BYTES


def set_budget(session: Session, nbytes: int) -> None:
    """The whole process keeps to `nbytes` from now on. DoesNotFit, with nothing changed, where that is too little."""
    _native.give_back_freed_memory()
    arena, stack = session.arena, session.decoder.weights.stack
    cap = nbytes - _outside_bytes(session) - RUNTIME_HEADROOM_BYTES
    fixed = _fixed_bytes(session)
    if cap < fixed:
        least = nbytes + fixed - cap
        raise DoesNotFit(
            f"a budget of {format_bytes(nbytes)} is too small for what this session holds with the fewest blocks; the "
            f"smallest that does is {least:,} bytes ({format_bytes(least)})"
        )
    if stack is not None:
        wanted = stack.longest(cap - fixed - cache_growth_bytes(session))
        if wanted > stack.num_blocks:
            arena.set_cap(max(cap, arena.used_bytes))
        stack.resize(wanted)
    arena.set_cap(max(cap, arena.used_bytes))
    session.budget_bytes = nbytes


def fill_budget(session: Session) -> None:
    """Takes as many blocks as the budget really has room for, where a model is a stack of them."""
    if session.decoder.weights.stack is not None and session.budget_bytes is not None:
        with suppress(DoesNotFit):  # as it was loaded, then: near the least there is nothing to fill
            set_budget(session, session.budget_bytes)


def cache_growth_bytes(session: Session) -> int:
    """What the cache will still take until it holds all the tokens that it was planned for."""
    policy, shape = session.settings.kv, cache_shape(session.config)
    elsewhere = kv.tiers(policy)
    predicted = {
        owner: nbytes
        for owner, nbytes in kv.predict(policy, shape, session.settings.context_tokens).items()
        if owner not in elsewhere
    }
    held = sum(row.nbytes for row in session.ledger.rows() if row.tier == "ram" and row.owner in predicted)
    return max(sum(predicted.values()) - held, 0)


def watch_signals(session: Session) -> None:
    """SIGUSR1 makes the budget smaller by a fifth, SIGUSR2 larger, up to the first one; between two tokens."""
    first = session.budget_bytes
    if first is None or session.decoder.weights.stack is None:
        return

    def smaller(*_: Any) -> None:
        session.ask_budget(int((session.asked_bytes or first) * STEP))

    def larger(*_: Any) -> None:
        session.ask_budget(min(int((session.asked_bytes or first) / STEP) + 1, first))

    for name, handler in (("SIGUSR1", smaller), ("SIGUSR2", larger)):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), handler)


def _fixed_bytes(session: Session) -> int:
    stack = session.decoder.weights.stack
    return session.arena.used_bytes - (stack.nbytes if stack is not None else 0)


def _outside_bytes(session: Session) -> int:
    return max(resident_bytes(exact=True) - session.arena.used_bytes, 0)

"""A trace replayed on the engine's virtual clock: who waits how long, and what context switches cost, part by part.

The machine is a model: steps of 20 ms, 0.1 ms a token and 0.2 us a cached token; pages of 2 MiB; a link of 25 GB/s that
needs 0.64 ms for a copy (LLaMA-8B on PCIe 4, 64 copies of 10 us a page; FastSwitch, arXiv 2411.18424). Figures show
what differs between schedulers on the same load, not what a machine does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from memwall.engine.arrivals import Load
from memwall.engine.base import Costs, Limits, Scheduler
from memwall.engine.chats import Chat, hold_chats
from memwall.engine.fastswitch import FastSwitch
from memwall.engine.fcfs import FirstComeFirstServed
from memwall.engine.priorities import FREQUENCY, make_priorities
from memwall.engine.simulated import StepCost, simulated_engine
from memwall.engine.stream import Link
from memwall.engine.switching import SwitchSettings
from memwall.errors import InputError
from memwall.hardware.units import MIB
from memwall.serve.bench import percentiles

PAGE_TOKENS = 16
GROUP_PAGES = 60
COST = StepCost(seconds=0.02, seconds_per_token=1e-4, seconds_per_cached_token=2e-7)
LINK = Link(bytes_per_s=25e9, seconds_per_copy=6.4e-4)
VARIANTS: dict[str, tuple[bool, SwitchSettings]] = {
    "single pages": (False, SwitchSettings(merge=False, overlap=False, keep_turns=True, link=LINK)),
    "+ groups": (False, SwitchSettings(group_pages=GROUP_PAGES, overlap=False, keep_turns=True, link=LINK)),
    "+ overlap": (True, SwitchSettings(group_pages=GROUP_PAGES, keep_turns=True, link=LINK)),
    "+ reuse": (True, SwitchSettings(group_pages=GROUP_PAGES, keep_turns=True, reuse=True, link=LINK)),
}


def chats_of(loads: Sequence[Load]) -> list[Chat]:
    """Conversations of a trace; requests without one are one of a single turn. A turn comes at its time, or when the
    one before it is answered.
    """
    if any(load.at is None for load in loads):
        raise InputError("the trace tells no times; give one that does")
    groups: dict[str, list[Load]] = {}
    for number, load in enumerate(loads):
        groups.setdefault(load.session or f"#{number}", []).append(load)
    chats = []
    for turns in groups.values():
        times, lengths, history = [], [], 0
        for load in turns:
            new = max(load.prompt_tokens - history, 1)
            lengths.append((new, load.output_tokens))
            history += new + load.output_tokens
            times.append(float(load.at or 0.0))
        chats.append(Chat(start=times[0], turns=tuple(lengths), think_seconds=0.0, times=tuple(times)))
    return chats


def replay_loads(
    loads: Sequence[Load],
    *,
    num_pages: int,
    priorities: str = "markov",
    frequency: float = FREQUENCY,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Figures of first come, first served, and of FastSwitch with each of its parts on top of those before."""
    chats = chats_of(loads)
    longest = max(sum(new + answer for new, answer in chat.turns) for chat in chats)
    if longest > num_pages * PAGE_TOKENS:
        raise InputError(
            f"{num_pages} pages hold {num_pages * PAGE_TOKENS:,} tokens, but one conversation comes to {longest:,}; "
            f"give {-(-longest // PAGE_TOKENS)} or more"
        )
    runs = []
    plain: tuple[Scheduler, SwitchSettings] = (FirstComeFirstServed(), SwitchSettings(link=LINK))
    schedulers: dict[str, tuple[Scheduler, SwitchSettings]] = {"fcfs": plain}
    schedulers |= {name: (FastSwitch(overlap=overlap), how) for name, (overlap, how) in VARIANTS.items()}
    for at, (name, (scheduler, settings)) in enumerate(schedulers.items()):
        if progress is not None:
            progress(at, len(schedulers))
        told = None if name == "fcfs" else make_priorities(priorities, frequency=frequency)
        page_seconds = 2 * MIB / LINK.bytes_per_s + LINK.seconds_per_copy / (1 if not settings.merge else 8)
        engine = simulated_engine(
            scheduler,
            num_pages=num_pages,
            page_bytes=2 * MIB,
            limits=Limits(token_budget=512, max_sequences=64, page_tokens=PAGE_TOKENS),
            context_tokens=max(longest + 1, 2),
            switch=settings,
            swap_pages=8 * num_pages,
            cost=COST,
            costs=Costs(seconds_per_token=1e-3, seconds_per_page=page_seconds, seconds_per_step=0.025),
            priorities=told,
            keep_prefixes=name == "fcfs",
        )
        turns = [one for one in hold_chats(engine, chats, vocabulary=30_000) if one.times]
        counts = engine.switch.counts
        runs.append(
            {
                "scheduler": name,
                "turns": len(turns),
                "seconds": engine.clock(),
                "first_token_seconds": percentiles([one.first_token_seconds for one in turns]),
                "between_tokens_seconds": percentiles([gap for one in turns for gap in one.gaps]),
                "preempted": dict(engine.totals.preempted),
                "copies": counts.out_copies + counts.in_copies,
                "moved_bytes": counts.out_bytes + counts.in_bytes,
                "reused_bytes": counts.clean_bytes,
                "stall_seconds": counts.stall_seconds,
                "conflicts": counts.conflicts,
            }
        )
    return runs

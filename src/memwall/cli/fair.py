"""`--scheduler fastswitch` and its options: who goes first, how often that changes, and how pages are swapped."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from memwall.cli.schedulers import SchedulerName
from memwall.errors import InputError

GROUP_PAGES = 60
"""Of the paper, for pages of 16 tokens."""


class PrioritiesName(StrEnum):
    """Where priorities come from."""

    fair = "fair"
    random = "random"
    markov = "markov"
    fixed = "fixed"


PrioritiesOption = Annotated[
    PrioritiesName | None,
    typer.Option(
        "--priorities",
        help="With fastswitch: fair (fewest tokens so far first, by user; the default), fixed (what requests say), or "
        "the traces random and markov, for measurements.",
        show_default=False,
    ),
]
UpdatesOption = Annotated[
    float | None,
    typer.Option(
        "--priority-updates",
        help="With fastswitch: updates of priorities per step, above 0 to 1 (default: 0.04, every 25 steps).",
        show_default=False,
    ),
]


def fair_options(
    scheduler: SchedulerName, priorities: PrioritiesName | None, updates: float | None, *, adapters: bool
) -> dict[str, Any]:
    """Settings of the engine. InputError where options do not go together."""
    if scheduler is not SchedulerName.fastswitch:
        if priorities is not None or updates is not None:
            raise InputError("--priorities and --priority-updates need --scheduler fastswitch")
        return {}
    if adapters:
        raise InputError(
            "--scheduler fastswitch serves no adapters: leave --lora and --lora-dir out, or the scheduler to fcfs"
        )
    from memwall.engine.fastswitch import FastSwitch
    from memwall.engine.priorities import FREQUENCY, make_priorities
    from memwall.engine.switching import SwitchSettings

    name = priorities or PrioritiesName.fair
    if updates is not None and name is PrioritiesName.fixed:
        raise InputError("--priority-updates: fixed priorities do not change; choose fair, random or markov")
    return {
        "scheduler": FastSwitch(),
        "priorities": make_priorities(name.value, frequency=FREQUENCY if updates is None else updates),
        "switch": SwitchSettings(group_pages=GROUP_PAGES, keep_turns=True, reuse=True),
    }

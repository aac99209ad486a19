"""`--scheduler` of the verbs that serve: who decides what runs when, and what that takes."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memwall.errors import InputError

if TYPE_CHECKING:
    from memwall.engine.serving import Serving

GROUP_PAGES = 16
"""Of one conversation that lie beside each other, where there is room for that."""
FIRST_SECONDS, TOKEN_SECONDS = 1.0, 0.1
"""Objectives where none are given."""
DECODE_SLACK = 2.0
"""Nexus' beta here. The paper's 1.1 is for devices on which decode is as fast with half of the compute; a quota of time
slows it down in proportion, and prefill would be left with a tenth.
"""


class SchedulerName(StrEnum):
    """Schedulers of a server."""

    fcfs = "fcfs"
    fastswitch = "fastswitch"
    semi_pd = "semi-pd"
    nexus = "nexus"
    distserve = "distserve"
    nanoflow = "nanoflow"


SchedulerOption = Annotated[
    SchedulerName,
    typer.Option(
        "--scheduler",
        help="fcfs: first come, first served; one worker, prompts in chunks beside tokens. fastswitch: by priorities "
        "that may change while requests run, whose pages are then swapped beside the steps of others. semi-pd: prompts "
        "and tokens in two processes over one memory, with shares of the cores that follow --slo-first and "
        "--slo-token. nexus: the same, with shares chosen ahead by what each phase was measured to cost. distserve: "
        "two processes that have half of the cores and a memory of their own each; finished prompts are handed over. "
        "nanoflow: batches of the same number of tokens, formed while the one before is computed, for requests that "
        "memory is predicted to hold; turns of conversations are written to the swap area as they are made.",
    ),
]
SloFirst = Annotated[
    float | None, typer.Option(help="Objective: seconds to the first token (semi-pd; default 1).", show_default=False)
]
NanoBatches = Annotated[
    int,
    typer.Option(
        help="With nanoflow: cut each batch in so many parts, of which one attends while another multiplies, on "
        "processor threads of their own; 1 leaves it whole.",
        min=1,
        max=8,
    ),
]
SloToken = Annotated[
    float | None, typer.Option(help="Objective: seconds per further token (semi-pd; default 0.1).", show_default=False)
]


RayOption = Annotated[
    str | None,
    typer.Option(
        "--ray",
        help="distserve: both workers as Ray actors, each with --memory and --threads of its own, on the cluster at "
        "this address, or `local` for one started here. The model's directory must be there on all machines.",
        metavar="ADDRESS",
        show_default=False,
    ),
]


def options_of(
    name: SchedulerName, first: float | None, token: float | None, *, adapters: bool, threads: int | None = None,
    ray: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What `ServingSettings` and `load_engine` get for a scheduler."""
    if ray is not None and name is not SchedulerName.distserve:
        raise InputError("--ray is for workers with a memory of their own each: add --scheduler distserve")
    if name is not SchedulerName.semi_pd and (first is not None or token is not None):
        raise InputError("--slo-first and --slo-token are for schedulers that follow them: add --scheduler semi-pd")
    if name in (SchedulerName.fcfs, SchedulerName.fastswitch):
        return {}
    if adapters and name not in (SchedulerName.semi_pd, SchedulerName.nexus, SchedulerName.distserve):
        raise InputError(f"--scheduler {name.value} serves no adapters; leave --lora out, or choose fcfs")
    if adapters and ray is not None:
        raise InputError("workers in a cluster serve no adapters; leave --lora out, or --ray")
    if name is SchedulerName.nanoflow:
        from memwall.engine.nanoflow import NanoFlow
        from memwall.engine.switching import SwitchSettings

        # turns go out as they are made and come back in one piece
        switch = SwitchSettings(group_pages=GROUP_PAGES, keep_turns=True, reuse=True, early=True, staged=True)
        return {"scheduler": NanoFlow(), "ahead": True, "switch": switch}
    from memwall.engine.phase_loading import PhaseSettings
    from memwall.engine.phases import FIRST_SHARES
    from memwall.engine.semi_pd import SemiPD
    from memwall.hardware import usable_processors

    if name is SchedulerName.distserve:
        if ray is not None:
            return {"ray": ray}
        return {"phases": PhaseSettings.apart(threads or usable_processors())}
    if name is SchedulerName.nexus:
        # a quota is changed in a worker that runs; who decides comes once costs were measured (`finish`)
        return {"phases": PhaseSettings(shares=FIRST_SHARES, fresh=False)}
    scheduler = SemiPD(
        first_seconds=FIRST_SECONDS if first is None else first, token_seconds=TOKEN_SECONDS if token is None else token
    )
    return {"scheduler": scheduler, "phases": PhaseSettings(shares=scheduler.start)}


def check_nano_batches(name: SchedulerName, parts: int) -> None:
    """InputError where the scheduler cuts no batches."""
    if parts > 1 and name is not SchedulerName.nanoflow:
        raise InputError(f"--nano-batches {parts} is for batches of nanoflow: add --scheduler nanoflow")


def finish(name: SchedulerName, serving: Serving, nano_batches: int = 1) -> None:
    """What a scheduler needs of a loaded engine: Nexus measures what both phases cost here, DistServe which batch of
    prompts fills the prefill process, NanoFlow cuts batches.
    """
    if name is SchedulerName.distserve:
        from memwall.engine.apart import ApartEngine
        from memwall.engine.saturation import measure, saturating_tokens

        engine = serving.engine
        assert isinstance(engine, ApartEngine)
        engine.fill(saturating_tokens(measure(engine)))
    if nano_batches > 1:
        from memwall import kernels
        from memwall.engine.nano_batches import alternating, nano_decoder, two_phases

        schedule = two_phases() if nano_batches == 2 else alternating(nano_batches)
        nano_decoder(serving, schedule, lanes={"compute": max(kernels.num_threads() - 1, 1), "memory": 1})
        serving.govern()
    if name is not SchedulerName.nexus:
        return
    from memwall.engine.nexus import Nexus
    from memwall.engine.phase_profile import SHARES, profile_serving

    serving.engine.scheduler = Nexus(costs=profile_serving(serving), beta=DECODE_SLACK, least=SHARES[0])


def describe(serving: Serving) -> dict[str, Any] | None:
    """Shares and processes, for the start; None where one worker does all."""
    from memwall.engine.ray_workers import RayWorkers

    workers = serving.workers
    if workers is None:
        return None
    shares = workers.shares
    told = {"prefill": shares.prefill, "decode": shares.decode, "processes": list(workers.pids)}
    if isinstance(workers, RayWorkers):
        told["actors"] = workers.told
    if serving.prefill_pool is not None:
        told["prefill_kv_tokens"] = serving.prefill_pool.limit_pages * serving.engine.limits.page_tokens
    return told

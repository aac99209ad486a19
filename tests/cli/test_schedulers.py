"""`--scheduler`: what each name makes, and what is refused."""

from __future__ import annotations

import pytest

from memwall.cli.schedulers import SchedulerName, check_nano_batches, finish, options_of
from memwall.engine import Sampling
from memwall.engine.nanoflow import NanoFlow
from memwall.engine.semi_pd import RELEASED, SemiPD
from memwall.engine.sequence import Request
from memwall.engine.serving import ServingSettings, load_engine
from memwall.errors import InputError
from memwall.models import DEMO_DIRECTORY


def test_names_make_what_they_say() -> None:
    assert options_of(SchedulerName.fcfs, None, None, adapters=True) == {}
    made = options_of(SchedulerName.semi_pd, 0.5, None, adapters=False)
    assert made["scheduler"] == SemiPD(first_seconds=0.5, token_seconds=0.1)
    assert made["phases"].shares == RELEASED
    assert made["phases"].fresh
    nexus = options_of(SchedulerName.nexus, None, None, adapters=False)
    assert "scheduler" not in nexus  # it comes once costs are measured
    assert not nexus["phases"].fresh
    apart = options_of(SchedulerName.distserve, None, None, adapters=False, threads=4)["phases"]
    assert (apart.shares.prefill, apart.shares.decode, apart.prefill_room) == (50, 50, 0.25)
    nano = options_of(SchedulerName.nanoflow, None, None, adapters=False)
    assert nano["scheduler"] == NanoFlow()
    assert nano["ahead"]
    assert nano["switch"].early


def test_nano_batches_are_cut_in_a_loaded_engine_and_change_no_token() -> None:
    told = {"weights": "int8", "context_tokens": 128, "max_sequences": 4, "token_budget": 32, "ahead": True}
    texts = []
    for parts in (1, 2, 3):
        held = load_engine(DEMO_DIRECTORY, ServingSettings(**told), scheduler=NanoFlow())  # type: ignore[arg-type]
        finish(SchedulerName.nanoflow, held, parts)
        sampling = Sampling(temperature=0.0, max_new_tokens=10, ignore_eos=True)
        made = [held.engine.submit(Request(prompt=tuple(range(9, 20 + n)), sampling=sampling)) for n in range(6)]
        while held.engine.busy:
            held.engine.step()
        texts.append([list(one.made) for one in made])
        held.release()
    assert texts[0] == texts[1] == texts[2]
    with pytest.raises(InputError, match="add --scheduler nanoflow"):
        check_nano_batches(SchedulerName.fcfs, 2)


def test_what_does_not_go_together_is_refused_by_name() -> None:
    for name in (SchedulerName.fcfs, SchedulerName.nexus):
        with pytest.raises(InputError, match="add --scheduler semi-pd"):
            options_of(name, 0.5, None, adapters=False)
    with pytest.raises(InputError, match="serves no adapters"):
        options_of(SchedulerName.nanoflow, None, None, adapters=True)
    with pytest.raises(InputError, match="in a cluster serve no adapters"):
        options_of(SchedulerName.distserve, None, None, adapters=True, ray="local")
    with pytest.raises(InputError, match="objectives of 0 s"):
        options_of(SchedulerName.semi_pd, 0, None, adapters=False)

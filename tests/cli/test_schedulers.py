"""`--scheduler`: what each name makes, and what is refused."""

from __future__ import annotations

import pytest

from memwall.cli.schedulers import SchedulerName, options_of
from memwall.engine.nanoflow import NanoFlow
from memwall.engine.semi_pd import RELEASED, SemiPD
from memwall.errors import InputError


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


def test_what_does_not_go_together_is_refused_by_name() -> None:
    for name in (SchedulerName.fcfs, SchedulerName.nexus):
        with pytest.raises(InputError, match="add --scheduler semi-pd"):
            options_of(name, 0.5, None, adapters=False)
    for name in (SchedulerName.semi_pd, SchedulerName.nexus, SchedulerName.distserve):
        with pytest.raises(InputError, match="serves no adapters"):
            options_of(name, None, None, adapters=True)
    with pytest.raises(InputError, match="objectives of 0 s"):
        options_of(SchedulerName.semi_pd, 0, None, adapters=False)

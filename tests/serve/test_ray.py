"""A server whose workers are Ray actors: answers as with one worker, also when an actor is killed, and a clean end."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from memwall.cli.schedulers import SchedulerName, options_of
from memwall.engine.ray_workers import check_address
from memwall.errors import InputError
from tests.serve.conftest import Running, Starter
from tests.serve.test_phases import PROMPTS, answers, lives

OPTIONS = ("--memory", "220MB", "--weights", "int8", "--context", "512", "--scheduler", "distserve", "--ray", "local")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
def test_actors_serve_as_one_worker_does(starter: Starter, server: Running) -> None:
    pytest.importorskip("ray", reason="needs ray: pip install 'memwall[ray]'")
    remote = starter(*OPTIONS)
    actors = remote.told["shares"]["actors"]
    assert all(220e6 > told["resident_bytes"] > told["pages"] * told["page_bytes"] for told in actors.values())
    expected = answers(server)
    assert answers(remote) == expected
    memory = remote.memory()
    assert memory["phases"]["apart"]["moved"]["requests"] == len(PROMPTS)
    assert any(row["owner"] == "worker/decode" and row["tier"] == "remote" for row in memory["ledger"])
    os.kill(actors["decode"]["pid"], signal.SIGKILL)
    assert answers(remote) == expected
    assert remote.memory()["phases"]["lost"] == 1
    refused = remote.post("/v1/budget", {"memory": "200MB"})
    assert refused.status_code == 400
    assert "start again with another --memory" in refused.text
    processes = remote.memory()["phases"]["processes"]
    remote.end()
    deadline = time.monotonic() + 60
    while any(map(lives, processes)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(lives, processes))


def test_an_address_at_which_nobody_listens_is_refused_at_once() -> None:
    with pytest.raises(InputError, match=r"no Ray cluster answers at 127.0.0.1:1: .*ray start --head"):
        check_address("127.0.0.1:1")
    check_address("auto")


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(InputError, match="add --scheduler distserve"):
        options_of(SchedulerName.fcfs, None, None, adapters=False, ray="local")
    assert options_of(SchedulerName.distserve, None, None, adapters=False, ray="local") == {"ray": "local"}

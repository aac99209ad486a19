"""The measuring process: jobs in forks of their own, progress, failures that are told, an end that is clean."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from memwall.errors import InputError
from memwall.studies.efficiency_worker import Worker

JOBS = """
import os
held = []
def count(request, report):
    held.append(1)
    report(1, 2, "counting")
    return {"held": len(held), "pid": os.getpid(), **request}
def refuse(request, report):
    from memwall.errors import InputError
    raise InputError("no such thing")
def fail(request, report):
    raise KeyError("lost")
def die(request, report):
    os._exit(7)
"""


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Worker:
    (tmp_path / "jobs_for_the_worker.py").write_text(JOBS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return Worker("jobs_for_the_worker", threads=1)


def test_jobs_do_not_see_each_other(worker: Worker) -> None:
    told: list[tuple[int, int, str]] = []
    with worker:
        first = worker.call("count", {"a": 1}, lambda *progress: told.append(progress))
        second = worker.call("count", {"a": 2})
    assert (first["held"], second["held"]) == (1, 1)
    assert (first["a"], second["a"]) == (1, 2)
    assert len({first["pid"], second["pid"], os.getpid()}) == 3
    assert told == [(1, 2, "counting")]


def test_failures_are_told_and_the_next_job_runs(worker: Worker) -> None:
    with worker:
        with pytest.raises(InputError, match="refuse: no such thing"):
            worker.call("refuse", {})
        with pytest.raises(InputError, match="KeyError: 'lost'"):
            worker.call("fail", {})
        with pytest.raises(InputError, match="ended with status 7"):
            worker.call("die", {})
        assert worker.call("count", {})["held"] == 1


def test_a_module_that_is_not_there(tmp_path: Path) -> None:
    with Worker("no_such_module_for_the_worker") as worker, pytest.raises(InputError, match="has ended"):
        worker.call("count", {})

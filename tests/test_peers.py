"""The process with other libraries: answers by name, errors in its own words, and an end that is told."""

from __future__ import annotations

import sys

import pytest

from memwall import peers


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program with the same protocol and without torch."""
    kept = peers.PROGRAM[peers.PROGRAM.index("steps = {}") :]
    library = """
import json, sys, time
job = json.loads(sys.stdin.readline())
def sleeper(form):
    if form == "none":
        raise ValueError("no such form")
    def step(tokens):
        if tokens > 9:
            sys.exit(3)
        print("noise of a library")
        time.sleep(0.01 * tokens)
    return step
"""
    monkeypatch.setattr(peers, "PROGRAM", library + kept)


def test_steps_are_timed_and_failures_reported_by_name(monkeypatch):
    small(monkeypatch)
    steps = {"good": {"library": "sleeper", "form": "a"}, "bad": {"library": "sleeper", "form": "none"}}
    with peers.Peers(sys.executable, steps, threads=1) as found:
        assert found.errors["good"] is None
        assert "no such form" in found.errors["bad"]
        assert found.seconds("good", 3) > 0.029


def test_an_ended_process_is_an_error_and_not_a_wait(monkeypatch):
    small(monkeypatch)
    steps = {"good": {"library": "sleeper", "form": "a"}}
    with peers.Peers(sys.executable, steps, threads=1) as found, pytest.raises(RuntimeError, match="ended"):
        found.seconds("good", 10)


def test_an_interpreter_without_the_libraries_is_an_error():
    with pytest.raises((RuntimeError, FileNotFoundError)):
        peers.Peers("/nonexistent/python", {}, threads=1)


def test_the_interpreter_is_named_by_the_environment(monkeypatch):
    monkeypatch.setenv(peers.VARIABLE, "/somewhere/python")
    assert peers.peer_python() == "/somewhere/python"
    monkeypatch.setenv(peers.VARIABLE, "")
    assert peers.peer_python() is None

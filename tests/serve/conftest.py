"""Servers in processes of their own, over real sockets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from openai import OpenAI


@dataclass
class Running:
    """A server process: where it listens, and what it said at its start."""

    process: subprocess.Popen[str]
    told: dict[str, Any]
    key: str | None = None

    @property
    def url(self) -> str:
        return str(self.told["url"])

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=self.key or "none", max_retries=0, timeout=60)

    def get(self, path: str, **options: Any) -> httpx.Response:
        self.check()
        return httpx.get(self.url + path, timeout=60, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        self.check()
        return httpx.post(self.url + path, json=body, timeout=60, **options)

    def check(self) -> None:
        """The process must be there; if it is not, say why."""
        if (status := self.process.poll()) is not None:
            pytest.fail(f"the server ended with status {status}: {self.process.communicate()[1]}")

    def memory(self) -> dict[str, Any]:
        found: dict[str, Any] = self.get("/memory").json()
        return found

    def end(self) -> str:
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.communicate(timeout=30)[1]
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


Starter = Callable[..., Running]


@pytest.fixture(scope="session")
def starter() -> Iterator[Starter]:
    """starter("--memory", "200MB", ...) -> a running server; all are ended with the tests."""
    started: list[Running] = []

    def start(*options: str, key: str | None = None, model: str = "demo") -> Running:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        command = [
            sys.executable,
            "-m",
            "memwall",
            "serve",
            model,
            "--port",
            "0",
            "--json",
            "--threads",
            "1",
            *options,
        ]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        assert process.stdout is not None
        text = ""
        while True:
            line = process.stdout.readline()
            text += line
            if line.startswith("}"):
                break
            assert line, process.communicate()[1]
        running = Running(process, json.loads(text), key)
        started.append(running)
        return running

    yield start
    for running in started:
        running.end()


@pytest.fixture(scope="session")
def server(starter: Starter) -> Running:
    return starter("--memory", "160MB", "--weights", "int8", "--context", "512")

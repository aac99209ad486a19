"""Runs of the command line: in this process where nothing is measured, in one of their own where memory is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from memwall.cli import app

DEMO = Path(__file__).resolve().parents[2] / "src" / "memwall" / "models" / "demo"


@pytest.fixture
def memwall() -> Callable[..., Any]:
    """memwall("run", "demo", ..., input="...") -> result with exit_code, stdout and stderr, run in this process."""

    def invoke(*arguments: str | Path, input: str | None = None) -> Any:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], input=input, prog_name="memwall")

    return invoke


@pytest.fixture
def spawn() -> Callable[..., subprocess.CompletedProcess[str]]:
    """The same in a process of its own, whose memory is that of memwall alone."""

    def invoke(*arguments: str | Path, input: str = "") -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, "-m", "memwall", *map(str, arguments)],
            input=input,
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )

    return invoke


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the demo model that a test may damage."""
    folder = tmp_path / "model"
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("README.md"))
    return folder

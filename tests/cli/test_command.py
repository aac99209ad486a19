"""What all verbs share: errors, interrupts, pipes, completion."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from memwall.cli.command import (
    KV_POLICIES,
    add_command,
    complete_kv,
    complete_model,
    complete_weights,
    describe_os_error,
)
from memwall.errors import BudgetExceeded, InputError, MissingDependency
from memwall.kv.table import POLICIES


def run_verb(error: BaseException, **options: Any) -> Any:
    app = typer.Typer()

    def verb(*, debug: bool = False) -> None:
        raise error

    add_command(app, "verb", verb)
    return CliRunner().invoke(app, ["--debug"] if options.get("debug") else [])


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InputError("no such format"), 2),
        (MissingDependency("torch", "torch"), 2),
        (BudgetExceeded("weights", 10, 5, 7), 1),
        (OSError(errno.ENOSPC, "No space left on device", "out"), 1),
        (FileNotFoundError(2, "No such file", "gone.txt"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_end_with_their_status_and_one_paragraph(error: BaseException, status: int) -> None:
    result = run_verb(error)
    assert result.exit_code == status
    assert result.stderr.startswith("memwall: ")
    assert "Traceback" not in result.stderr
    assert not result.stdout
    assert "Traceback" in run_verb(error, debug=True).stderr


def test_unexpected_errors_are_not_hidden() -> None:
    assert isinstance(run_verb(ZeroDivisionError()).exception, ZeroDivisionError)


def test_os_errors_name_the_file() -> None:
    assert describe_os_error(PermissionError(13, "Permission denied", "out/x")) == "out/x: Permission denied"
    assert describe_os_error(OSError("odd")) == "odd"


def test_completion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama").mkdir()
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / ".hidden").mkdir()
    monkeypatch.chdir(tmp_path)
    assert list(complete_model("")) == ["demo", "llama/"]
    assert list(complete_model("d")) == ["demo"]
    assert list(complete_model(f"{tmp_path}/l")) == [f"{tmp_path}/llama/"]
    assert complete_weights("int") == ["int8", "int4", "int3", "int2"]
    assert "kivi" in complete_kv("k")
    policies = {part.split("(")[0] for name in KV_POLICIES for part in name.split("+")} - {"auto", "W4A4KV4"}
    assert policies == set(POLICIES)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_can_be_completed(shell: str) -> None:
    words = {"COMP_WORDS": "memwall sys", "COMP_CWORD": "1", "_TYPER_COMPLETE_ARGS": "memwall sys"}
    done = subprocess.run(
        [sys.executable, "-m", "memwall"],
        env={
            **environment(),
            **words,
            "_MEMWALL_COMPLETE": f"complete_{shell}",
            "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert "systems" in done.stdout


def test_interrupt_ends_with_130_and_no_traceback() -> None:
    arguments = ["run", "demo", "The city", "--max-new-tokens", "1000", "--ignore-eos", "--context", "1024"]
    process = subprocess.Popen(
        [sys.executable, "-m", "memwall", *arguments, "--weights", "int4", "--kv", "float32", "--threads", "1"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.read(1)  # it writes, so it runs
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "interrupted" in errors


def test_an_interrupt_before_the_verbs_are_imported_is_as_quiet(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt\n")
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "memwall", "systems"], env=environment() | {"PYTHONPATH": paths}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 130
    assert done.stderr == "memwall: interrupted\n"


@pytest.mark.parametrize("verb", ["systems --json", "systems", "plan demo --memory 200MB --no-measure --context 128"])
def test_a_closed_pipe_is_no_error(verb: str) -> None:
    # the reader is gone before the first byte comes
    script = f"(sleep 0.2; {sys.executable} -m memwall {verb}) | exec true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 141
    assert "Error" not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_closed_streams_are_no_error(closed: str) -> None:
    command = f"{sys.executable} -m memwall run demo hello --max-new-tokens 2 {closed}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(["sh", "-c", command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr

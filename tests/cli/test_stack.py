"""`memwall compress --size`, and `memwall run` on a stack of blocks: budgets, signals, what is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.compress.tiny_model import make_model, make_stack

ASK = ("A city", "--ignore-eos", "--json", "--quiet")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("source") / "tiny", hidden_size=256, intermediate_size=512)


@pytest.fixture(scope="module")
def folder(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_stack(source, tmp_path_factory.mktemp("stack") / "out")


def test_run_says_how_many_blocks_there_are(memwall: Any, folder: Path) -> None:
    found = []
    for choice in ("stack-0", "stack-20", "saved"):
        result = memwall("run", folder, *ASK, "--max-new-tokens", "3", "--weights", choice)
        assert result.exit_code == 0, result.stderr
        found.append(json.loads(result.stdout)["stack"])
    assert [each["blocks"] for each in found] == [0, 20, found[0]["most_blocks"]]
    assert found[0]["bytes"] == found[0]["bytes_read"] == 0 < found[1]["bytes_read"] < found[2]["bytes_read"]
    told = memwall("run", folder, "A city", "--max-new-tokens", "3", "--weights", "stack-20")
    assert "stack: 20 of" in told.stderr


def test_more_memory_takes_more_blocks_and_never_more_memory(spawn: Any, folder: Path) -> None:
    refused = spawn("run", folder, *ASK, "--memory", "20MB")
    assert refused.returncode == 1
    least = int(refused.stderr.split("--memory ")[1].split()[0])
    found = []
    for more in (0, 600_000, 30_000_000):
        done = spawn("run", folder, *ASK, "--max-new-tokens", "8", "--memory", str(least + more))
        assert done.returncode == 0, done.stderr
        document = json.loads(done.stdout)
        assert document["peak_resident_bytes"] <= least + more
        found.append(document["stack"])
    assert found[0]["blocks"] <= found[1]["blocks"] <= found[2]["blocks"] == found[2]["most_blocks"]


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this system has no such signals")
def test_signals_shrink_and_grow_a_run(folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "memwall",
        "run",
        str(folder),
        "--memory",
        "120MB",
        "--context",
        "250",
        "--stop",
        "@@",
    ]
    command += ["--max-new-tokens", "240", *ASK]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        stack = f"/proc/{process.pid}/status"
        while "SigCgt" in (text := Path(stack).read_text()) and process.poll() is None:  # until it watches for signals
            if int(text.split("SigCgt:")[1].split()[0], 16) >> (signal.SIGUSR1 - 1) & 1:
                break
            time.sleep(0.002)
        for name in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGUSR1, signal.SIGUSR2):
            if process.poll() is None:
                process.send_signal(name)
        output, _ = process.communicate()
    assert process.returncode == 0
    document = json.loads(output)
    assert document["tokens"] > 8
    assert document["stack"]["budget_bytes"] <= 120_000_000


def test_compress_to_a_size(memwall: Any, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = memwall("compress", source, out, "--size", "2.2MB", "--method", "rtn", "--json")
    assert result.exit_code == 0, result.stderr
    held = sum(path.stat().st_size for path in out.iterdir())
    assert json.loads(result.stdout)["folder_bytes"] == held
    assert 0.99 * 2_200_000 <= held <= 2_200_000


@pytest.mark.parametrize(
    ("options", "status", "says"),
    [
        (("--size", "2.2MB", "--bits", "3.5"), 2, "leave one of them out"),
        (("--size", "2.2XB"), 2, "2.2XB"),
        (("--size", "100kB"), 1, "try --size"),
        (("--size", "5GB"), 2, "try --size"),
        (("--size", "2MB", "--method", "spqr"), 2, "bitstack"),
        (("--method", "bitstack", "--bits", "3"), 2, "--size"),
        (("--method", "bitstack", "--set", "rank=0"), 2, "rank"),
        (("--method", "bitstack", "--size", "1MB"), 1, "try --size"),
    ],
)
def test_bad_sizes(
    memwall: Any, source: Path, tmp_path: Path, options: tuple[str, ...], status: int, says: str
) -> None:
    result = memwall("compress", source, tmp_path / "out", *options)
    assert result.exit_code == status
    assert says in result.stderr
    assert not list(tmp_path.iterdir())

"""What the benchmark of compression counts, and that a killed process is measured as one."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from compress_cost import copy_speed, descendants, finish, layer_operations, markdown, measured
from random_models import SHAPES

SHAPE = replace(SHAPES["tiny"], num_layers=2)


def test_operations_by_hand() -> None:
    weights = 512 * 512 * 2 + 128 * 512 * 2 + 3 * 1536 * 512
    passes = 4 * 100 * weights
    assert layer_operations(SHAPE, 100, "awq") == passes
    inputs = (512, 512, 512, 1536)
    statistics = sum(100 * n * (n + 1) + n**3 / 3 for n in inputs)
    feedback = (2 * 512 + 2 * 128 + 2 * 1536) * 512**2 + 512 * 1536**2
    assert layer_operations(SHAPE, 100, "gptq") == pytest.approx(passes + statistics + feedback)


def test_a_process_is_measured_with_those_it_starts(tmp_path: Path) -> None:
    child = "import time; held = bytearray(60_000_000); time.sleep(0.8)"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    cost = measured([sys.executable, "-c", program], dict(os.environ), tmp_path)
    assert cost.status == 0
    assert cost.peak_bytes > 60_000_000
    assert descendants(2**22 + 1) == []
    killed = measured([sys.executable, "-c", "print(1, flush=True); import time; time.sleep(60)"], dict(os.environ),
                      tmp_path, lambda: True)  # fmt: skip
    assert killed.status == -signal.SIGKILL


def test_the_table_names_what_was_not_run() -> None:
    result: dict[str, Any] = {
        "date": "today", "hardware": {"cpu": "C", "cores": 2, "vector": ["avx2"]}, "threads": 1, "tokens": 100,
        "operations_per_s": 1e11, "copy_bytes_per_s": copy_speed(),
    }  # fmt: skip
    row = {
        "seconds": 9.0, "processor_seconds": 6.0, "peak_bytes": 7 << 30, "bytes_written": 10, "layers": 2,
        "layer_seconds": [3.0], "layer_processor_seconds": 2.0, "others_share": 0.5, "tokens": 100,
    }  # fmt: skip
    result["methods"] = {"gptq": finish(row, "gptq", result, SHAPE), "vptq": {"failed": "too slow"}}
    assert row["whole_processor_seconds"] == 2.0 + 16 * 2.0
    table = markdown(result)
    assert "| gptq | first 2 of 16 | 100 | 9 | 6 |" in table
    assert "| vptq | not run: too slow" in table
    assert "at most 6 GiB: no" in table

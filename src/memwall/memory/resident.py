"""What the operating system says this process holds, and how far the ledger is from it.

Linux first; no third-party library.
"""

from __future__ import annotations

import os
import re
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from memwall.hardware.units import KIB
from memwall.memory.arena import Charge
from memwall.memory.ledger import Entry, Ledger

RUNTIME_OWNER = "runtime"
"""Ledger owner of what no arena allocated: interpreter, libraries, compiled code, heap."""

_MAPPING = re.compile(r"[0-9a-f]+-[0-9a-f]+ ")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """Resident bytes by what stands behind them."""

    anonymous_bytes: int
    file_bytes: int
    """Pages of mapped files: libraries, and weights used where they lie.

    The system may drop them and read them again.
    """
    shared_bytes: int

    @property
    def total_bytes(self) -> int:
        """The resident set."""
        return self.anonymous_bytes + self.file_bytes + self.shared_bytes


class Unseen(Protocol):
    """Memory whose true size the resident set does not show."""

    @property
    def unseen_bytes(self) -> int:
        """Bytes held less bytes shown: positive for pages that no address maps, negative for pages mapped twice."""


_unseen: weakref.WeakSet[Unseen] = weakref.WeakSet()


def count_unseen(memory: Unseen) -> None:
    """From now on, as long as it lives, this memory's `unseen_bytes` are part of what the process holds."""
    _unseen.add(memory)


def resident_bytes(*, exact: bool = False) -> int:
    """Resident bytes of this process, memory that it holds without mapping it included (`count_unseen`).

    The quick figure may lag by some pages per core; `exact` walks the page tables (milliseconds).
    """
    unseen = sum(memory.unseen_bytes for memory in list(_unseen))
    if exact:
        rollup = _fields("/proc/self/smaps_rollup")
        if "Rss" in rollup:
            return rollup["Rss"] + unseen
    try:
        # by the bare calls, as decoding asks before every token: a text file object takes several times as long
        statm = os.open("/proc/self/statm", os.O_RDONLY)
        try:
            fields = os.read(statm, 256).split()
        finally:
            os.close(statm)
        return int(fields[1]) * _PAGE_BYTES + unseen
    except (OSError, IndexError, ValueError):
        return _resident_elsewhere()


def peak_resident_bytes() -> int:
    """The most this process has had resident, since it started or since `reset_peak_resident`."""
    status = _fields("/proc/self/status")
    if "VmHWM" in status:
        return max(status["VmHWM"], resident_bytes())
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * KIB  # macOS counts bytes, the others KiB


def reset_peak_resident() -> bool:
    """Makes the present resident set the peak; False where the system does not allow it (the peak then counts from the
    start).
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def resident_split() -> Resident | None:
    """Resident bytes split into anonymous, file-backed and shared; None where the system does not tell."""
    status = _fields("/proc/self/status")
    if "RssAnon" not in status:
        return None
    return Resident(
        anonymous_bytes=status["RssAnon"], file_bytes=status.get("RssFile", 0), shared_bytes=status.get("RssShmem", 0)
    )


def mapped_file_bytes(path: str | Path) -> int:
    """Resident bytes of this process's mappings of one file; 0 where the system does not tell.

    What a ledger row for weights used where they lie is measured with: the system reads such pages on demand and may
    drop them, so the row follows this figure and not the file's size.
    """
    wanted, total, inside = str(Path(path).resolve()), 0, False
    try:
        with open("/proc/self/smaps") as file:
            for line in file:
                if line.startswith("Rss:"):
                    total += int(line.split()[1]) * KIB if inside else 0
                elif _MAPPING.match(line):
                    inside = line.rstrip("\n").split(maxsplit=5)[5:] == [wanted]
    except OSError:
        return 0
    return total


def measure_runtime(ledger: Ledger, charge: Charge | None = None) -> Charge | Entry:
    """Puts what the ledger does not explain in its row `runtime`: the resident set less everything else on `ram`.

    Call it once the libraries are loaded and before the large buffers come, or at any time to close the books; each
    call measures anew. Never below zero, so buffers that are on the ledger without being resident still show as an
    error. With a `charge` (of an arena, owner `runtime`) the bytes count against that arena's cap, which can then be
    the budget of the whole process; BudgetExceeded when the runtime alone takes it over. The answer's `nbytes` is the
    figure.
    """
    others = ledger.total("ram") - _runtime_bytes(ledger)
    nbytes = max(resident_bytes(exact=True) - others, 0)
    if charge is None:
        return ledger.put(RUNTIME_OWNER, "ram", nbytes)
    charge.resize(nbytes)
    return charge


def ledger_error(ledger: Ledger) -> float:
    """(ledger total on ram - resident set) / resident set. Positive: the ledger claims more than there is."""
    resident = resident_bytes(exact=True)
    return (ledger.total("ram") - resident) / resident


def _runtime_bytes(ledger: Ledger) -> int:
    return sum(row.nbytes for row in ledger.rows() if row.owner == RUNTIME_OWNER and row.tier == "ram")


def _fields(path: str) -> dict[str, int]:
    """The `Name:  123 kB` lines of a file under /proc as bytes; empty where there is no such file."""
    found: dict[str, int] = {}
    try:
        with open(path) as file:
            for line in file:
                name, _, rest = line.partition(":")
                words = rest.split()
                if len(words) == 2 and words[1] == "kB":
                    found[name] = int(words[0]) * KIB
    except OSError:
        return {}
    return found


def _resident_elsewhere() -> int:
    """Where there is no /proc: what `ps` says; failing that the peak, which is never less."""
    import subprocess

    try:
        answer = subprocess.run(
            ["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, text=True, check=True
        )
        return int(answer.stdout) * KIB
    except (OSError, ValueError, subprocess.SubprocessError):
        return peak_resident_bytes()

"""Where joules come from: the processor's energy counters where the system lets us read them, else a declared model.

*Source*: RAPL counters of Linux' powercap; the model's constants are of "Computing's Energy Problem" (Mark Horowitz,
2014, ISSCC), figure 1.1.9: a DRAM access of 64 bits takes 1.3 to 2.6 nJ, a 32-bit multiplication and addition 4.6 pJ,
and what steers an instruction about 70 pJ.
*Idea*: energy invented on a machine without counters would look like a measurement. So the model counts work that the
program declares, takes fixed joules for each operation and byte, and says `modelled` wherever its figures appear.
*Units*: joules since the source was made; watts are differences over time.
*Holds when*: RAPL counts whole packages, other processes and idle cores too. The model counts declared work alone: no
idle power, no clock, no voltage; it compares techniques on one machine and is no reading of a meter.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from memwall.errors import InputError

POWERCAP = Path("/sys/class/powercap")
MODELLED = "modelled"

JOULES_PER_FLOP = 12e-12
"""(4.6 + 70 / 4) / 2 pJ: half of a multiply-add and of its share of an instruction that does four of them (model)."""
JOULES_PER_BYTE = 250e-12
"""The middle of 1.3 and 2.6 nJ for 8 bytes from DRAM (model)."""


class PowerSource(Protocol):
    """A counter of joules. name: as tables show it."""

    name: str

    def joules(self) -> float:
        """Joules since the source was made."""


class Rapl:
    """The packages' energy counters. Raises InputError where there are none that this process may read."""

    name = "rapl"

    def __init__(self, root: Path = POWERCAP) -> None:
        self._files = [folder / "energy_uj" for folder in sorted(root.glob("*-rapl:[0-9]*")) if _is_package(folder)]
        try:
            self._ranges = [int((file.parent / "max_energy_range_uj").read_text()) for file in self._files]
            self._last = self._read()
        except (OSError, ValueError) as error:
            raise InputError(f"{root}: its energy counters cannot be read: {error}") from None
        if not self._files:
            raise InputError(f"{root}: has no energy counters")
        self._total = 0.0

    def _read(self) -> list[int]:
        return [int(file.read_text()) for file in self._files]

    def joules(self) -> float:
        """A counter that is smaller than before has come round its range once."""
        now = self._read()
        for before, after, whole in zip(self._last, now, self._ranges, strict=True):
            self._total += (after - before if after >= before else after - before + whole) * 1e-6
        self._last = now
        return self._total


def _is_package(folder: Path) -> bool:
    """`intel-rapl:0` is a package; `intel-rapl:0:1` is a part of it and would be counted twice."""
    return folder.name.count(":") == 1


@dataclass(slots=True)
class WorkModel:
    """Joules of declared work. Programs call `add` as they work."""

    joules_per_flop: float = JOULES_PER_FLOP
    joules_per_byte: float = JOULES_PER_BYTE
    flop: float = 0.0
    nbytes: float = 0.0
    name: str = MODELLED

    def __post_init__(self) -> None:
        for field in ("joules_per_flop", "joules_per_byte"):
            if not 0 <= getattr(self, field) < 1:
                raise InputError(f"{field}={getattr(self, field)}: must be at least 0 and below 1 joule")

    def add(self, flop: float, nbytes: float) -> None:
        """Operations done and bytes moved between memory and processor since the last call."""
        self.flop += flop
        self.nbytes += nbytes

    def joules(self) -> float:
        return self.flop * self.joules_per_flop + self.nbytes * self.joules_per_byte


def power_source(work: WorkModel, root: Path = POWERCAP) -> PowerSource:
    """The counters, where they can be read; else the model over `work`."""
    try:
        return Rapl(root)
    except InputError:
        return work

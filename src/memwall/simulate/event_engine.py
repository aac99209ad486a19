"""Units that work side by side, each in order: when instructions start and end, and how long units wait.

Source: the instruction-level profiler of FlightLLM (Zeng 2024, arXiv 2401.03868, artifact): one in-order queue per kind
of unit; an instruction starts when its unit is free and every token it waits for has been released.
Idea: an instruction names those that it waits for; each of them releases a token when it ends. Loads wait for the
compute that frees their buffer, which is all that double buffering is; computes wait for their loads.
Units and shapes: seconds.
Differs from the paper: tokens are named by the instruction that releases them instead of counted by pairs of units, so
that a wait for what comes later in the same unit is refused at once instead of found as a deadlock.
Cost: one step per instruction.
Holds when: a unit's instructions are given in the order in which it takes them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from memwall.errors import InputError

UNITS = ("load", "compute", "special", "store")


@dataclass(slots=True)
class Timeline:
    """Instructions are put in one after another; `end` is when the last of them ends.

    busy: seconds of work by unit. waited: seconds in which a unit was free but its next instruction's tokens were not
    there, by unit.
    """

    end: float = 0.0
    busy: dict[str, float] = field(default_factory=lambda: dict.fromkeys(UNITS, 0.0))
    waited: dict[str, float] = field(default_factory=lambda: dict.fromkeys(UNITS, 0.0))
    count: int = 0
    _free: dict[str, float] = field(default_factory=lambda: dict.fromkeys(UNITS, 0.0))
    _ends: list[float] = field(default_factory=list)

    def put(self, unit: str, seconds: float, after: Iterable[int] = ()) -> int:
        """The next instruction of a unit, which waits for others (by number); gives its own number."""
        if unit not in self._free:
            raise InputError(f"no unit is called {unit!r}; there is {', '.join(UNITS)}")
        if seconds < 0:
            raise InputError(f"an instruction of {seconds} s: must not be negative")
        ready = 0.0
        for number in after:
            if not 0 <= number < self.count:
                raise InputError(f"instruction {self.count} waits for {number}, which has not been given: a deadlock")
            ready = max(ready, self._ends[number])
        free = self._free[unit]
        self.waited[unit] += max(ready - free, 0.0)
        end = max(free, ready) + seconds
        self._free[unit] = end
        self._ends.append(end)
        self.busy[unit] += seconds
        self.end = max(self.end, end)
        self.count += 1
        return self.count - 1

    def ends(self, number: int) -> float:
        """When an instruction ends."""
        return self._ends[number]

    def share(self, unit: str) -> float:
        """Part of the time that a unit works."""
        return self.busy[unit] / self.end if self.end else 0.0

"""How full the private parts of an oblivious map become: the process of `bolt` with counts alone, for long runs.

Keys, values and pages are left out, since what happens to loads does not depend on them; 10^7 accesses to 10^6 items
take about a second. The numbers that are drawn need not be secret here.

Units: items. Means are over the second half of the accesses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from memwall import _native
from memwall.errors import InputError
from memwall.retrieve.bolt import MapSettings

ORDERS = ("uniform", "sequential", "one")
"""Which keys are asked for: any alike, one after the other, always the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fullness:
    """The most (and the mean) that was seen of each, beside the bound that holds with high probability."""

    settings: MapSettings
    accesses: int
    max_load: int
    """Of all bins; `max_page_load`: of those that are pages."""
    max_page_load: int
    max_private: int
    """Items in private bins."""
    max_pending: int
    """Items that wait for their pages."""
    max_frames: int
    """Both."""
    mean_pending: float
    mean_private: float

    @property
    def bounds(self) -> dict[str, tuple[float, float]]:
        """Name to (seen, bound)."""
        settings = self.settings
        return {
            "load": (self.max_load, settings.load_bound),
            "private items": (self.max_private, settings.private_bound),
            "pending items": (self.max_pending, settings.pending_bound),
            "frames": (self.max_frames, settings.private_bound + settings.pending_bound),
        }

    @property
    def hold(self) -> bool:
        """Whether all bounds do."""
        return all(seen <= bound for seen, bound in self.bounds.values())

    def to_dict(self) -> dict[str, Any]:
        told = {name: {"most": seen, "bound": bound} for name, (seen, bound) in self.bounds.items()}
        return {"accesses": self.accesses, "mean_pending": self.mean_pending, "bounds": told, "hold": self.hold}


def fullness(
    settings: MapSettings, accesses: int, *, seed: int = 0, order: str = "uniform", items: int | None = None
) -> Fullness:
    """Simulates a full map, or one with so many items."""
    if order not in ORDERS:
        raise InputError(f"order {order!r}: one of {', '.join(ORDERS)}")
    if not 0 <= accesses < 1 << 40:
        raise InputError(f"accesses {accesses}: from 0 to 2^40")
    count = settings.capacity if items is None else items
    found = _native.simulate_bins(count, settings.bins, settings.private_bins, accesses, seed, order, None, None)
    return Fullness(settings=settings, accesses=accesses, **found)

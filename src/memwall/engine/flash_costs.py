"""What a token costs whose neurons are read from disk, before any is read.

Source: LLM in a flash (Keivan Alizadeh, 2023, arXiv 2312.11514), section 3: latency is the time of reads, of managing
memory and of arithmetic. Reads follow the drive's own table (`memory.read_profile`); managing takes a time per call and
per neuron looked up, arithmetic one per byte of the rows held. All of them are measured beforehand, apart from what is
predicted.

Units: seconds, bytes; counts are of one layer and token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from memwall.errors import InputError
from memwall.memory.read_profile import ReadProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class FlashCosts:
    """call_seconds: of a layer's bookkeeping whatever it does; key_seconds: more for each neuron that is looked up,
    comes or goes; held_bytes_per_s: of arithmetic over the rows held; other_seconds: of the layer's other work, such as
    attention and the predictor.
    """

    profile: ReadProfile
    depth: int
    call_seconds: float
    key_seconds: float
    held_bytes_per_s: float
    other_seconds: float = 0.0

    def __post_init__(self) -> None:
        least = min(self.call_seconds, self.key_seconds, self.other_seconds)
        if least < 0 or not self.held_bytes_per_s > 0 or self.depth < 1:
            raise InputError(f"{self}: times must not be below zero, the rate and the depth above")

    def read_seconds(self, loaded: float, row_bytes: int, pieces: int = 1) -> float:
        """Of so many neurons, in as many pieces each as they are stored in."""
        return self.profile.seconds(round(loaded * pieces), row_bytes // pieces, self.depth)

    def layer_seconds(
        self, *, predicted: float, loaded: float, held: float, row_bytes: int, pieces: int = 1
    ) -> dict[str, float]:
        """By part: `read`, `manage`, `compute` and `other`."""
        return {
            "read": self.read_seconds(loaded, row_bytes, pieces),
            "manage": self.call_seconds + self.key_seconds * (predicted + 2 * loaded),
            "compute": held * row_bytes / self.held_bytes_per_s,
            "other": self.other_seconds,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowCounts:
    """Means over tokens of one layer: neurons predicted, loaded, and held once they are there."""

    predicted: float
    loaded: float
    held: float


def window_counts(wanted: np.ndarray, window: int) -> WindowCounts:
    """Of tokens after the first `window` in booleans [T, F]: what each is predicted to wake."""
    if not 1 <= window < len(wanted):
        raise InputError(f"a window of {window} tokens over {len(wanted)}: must be from 1 to {len(wanted) - 1}")
    counts = np.add.accumulate(np.pad(wanted, ((1, 0), (0, 0))).astype(np.int32), axis=0)
    before = counts[window:-1] > counts[: -window - 1]  # of the `window` tokens before each
    now = wanted[window:]
    held = counts[window + 1 :] > counts[1 : len(counts) - window]
    return WindowCounts(
        predicted=float(now.sum(1).mean()), loaded=float((now & ~before).sum(1).mean()),
        held=float(held.sum(1).mean()),
    )  # fmt: skip

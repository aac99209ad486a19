"""How much each matrix suffers from few bits, measured: the loss that `allocate` weighs against bytes.

The loss of a matrix in a form is the squared error of its outputs over the calibration text relative to the outputs
themselves, trace(D H D^T) / trace(W H W^T) with D what rounding to nearest changes. A sample of rows is enough: the
share hardly differs between rows, and the codes of a row depend on that row alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from memwall.compress.allocate import Candidate
from memwall.compress.base import Statistics
from memwall.formats import Packed, codec

SAMPLE_ROWS = 256


def sample_rows(weight: np.ndarray) -> np.ndarray:
    """At most `SAMPLE_ROWS` rows [n, cols] float32, evenly spread."""
    return weight[_sampled(len(weight))].astype(np.float32)


def candidates(
    weight: np.ndarray, statistics: Statistics | None, specs: Sequence[str], *, weighting: float = 1.0
) -> list[Candidate]:
    """Every form of `specs` that a matrix may take, with its bytes and measured loss. No statistics: H = I."""
    rows = sample_rows(weight)
    whole = output_error(rows, statistics)
    found = []
    for spec in specs:
        coder = codec(spec)
        error = output_error(coder.decode(coder.encode(rows)) - rows, statistics)
        loss = weighting * error / whole if whole > 0 else 0.0
        found.append(Candidate(spec=spec, nbytes=coder.nbytes(weight.shape), loss=loss))
    return found


def relative_error(weight: np.ndarray, packed: Packed, statistics: Statistics | None) -> float:
    """Share of the outputs' squared size that the packed form loses, over a sample of rows."""
    rows = sample_rows(weight)
    whole = output_error(rows, statistics)
    if not whole > 0:
        return 0.0
    decoded = codec(packed.spec).decode(packed)[_sampled(len(weight))]
    return output_error(decoded - rows, statistics) / whole


def output_error(difference: np.ndarray, statistics: Statistics | None) -> float:
    """Squared error of the outputs for a change of the weights; no statistics: H = I."""
    if statistics is None:
        return float(np.einsum("ij,ij->", difference, difference, dtype=np.float64))
    return statistics.error(difference)


def _sampled(num_rows: int) -> np.ndarray:
    count = min(num_rows, SAMPLE_ROWS)
    return np.linspace(0, max(num_rows - 1, 0), count).astype(np.int64)

"""What an iteration of prefill or decode costs at a share of the compute, beside the other: Nexus' model, and its fit.

Source: Nexus, arXiv 2507.06608, section 4 (cost model). Each kind of operator takes the longer of its arithmetic and
its bytes. Arithmetic speeds up with the share up to `saturation`; beyond, a share counts only `decay` as much. The
attention of decode gets what bandwidth the prefill beside it leaves:
B_d = B [P_attn m_d / (m_d + m_p1) + (1 - P_attn) m_d / (m_d + m_p2)].

Differs from the paper: below a share `reach` an operator cannot draw all of the bandwidth. The bytes of prefill that
count against decode, m_p1 and m_p2, are scaled by a measured `contention` (1 is the paper's form): what matters is how
fast prefill reads them, which no byte count tells.

Units: flop, bytes, seconds; shares are fractions above 0 up to 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from memwall.engine.phase_device import ModelSize
from memwall.errors import InputError

GRID = tuple(step / 10 for step in range(1, 11))
REACHES = (0.0, 0.1, 0.2, 0.3, 0.35, 0.4, 0.5, 0.6, 0.8, 1.0)
CONTENTIONS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """A kind of operator. seconds_per_flop: at a share of 1 if nothing saturated; seconds_per_byte: at a share of
    `reach` or more, from which all of the bandwidth can be drawn.
    """

    seconds_per_flop: float
    seconds_per_byte: float = 0.0
    saturation: float = 1.0
    decay: float = 0.0
    reach: float = 0.0

    def useful(self, share: float) -> float:
        """What of a share counts."""
        over = max(share - self.saturation, 0.0)
        return share - over + self.decay * over

    def compute(self, flop: float, share: float) -> float:
        """Seconds of the arithmetic."""
        return flop * self.seconds_per_flop / self.useful(share)

    def seconds(self, flop: float, nbytes: float, share: float, slow: float = 1.0) -> float:
        """Seconds in all; slow: how many times as long its bytes take."""
        # a share below reach draws in proportion; what the other phase leaves may be less still
        slow = max(slow, self.reach / share)
        return max(self.compute(flop, share), nbytes * self.seconds_per_byte * slow)


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What both phases have to do. prefill_pairs: of a prompt's token and one it attends to; prefill_kv, decode_kv:
    tokens whose keys and values are read.
    """

    prefill_tokens: int = 0
    prefill_kv: int = 0
    prefill_pairs: float = 0.0
    decode_batch: int = 0
    decode_kv: int = 0

    @classmethod
    def of(cls, prefill: Sequence[tuple[int, int]], decode: Sequence[int]) -> Demand:
        """From (first, count) of each chunk, and the lengths of those that decode."""
        return cls(
            prefill_tokens=sum(count for _, count in prefill),
            prefill_kv=sum(first + count for first, count in prefill),
            prefill_pairs=sum(count * (first + (count + 1) / 2) for first, count in prefill),
            decode_batch=len(decode),
            decode_kv=sum(decode),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """The model. contention: of prefill's bytes against decode's, 1 for the paper's form, 0 for none."""

    size: ModelSize
    prefill_dense: Operator
    prefill_attention: Operator
    decode_dense: Operator
    decode_attention: Operator
    contention: float = 1.0

    def prefill(self, demand: Demand, share: float) -> float:
        """Seconds of the prefill iteration."""
        return sum(self._prefill_parts(demand, share))

    def attention_part(self, demand: Demand, share: float) -> float:
        """P_attn: the part of prefill's time that is attention."""
        dense, attention = self._prefill_parts(demand, share)
        return attention / (dense + attention) if dense + attention > 0 else 0.0

    def bandwidth_left(self, demand: Demand, share: float) -> float:
        """B_d / B for decode's attention while prefill has `share`."""
        mine = demand.decode_kv * self.size.kv_bytes
        if not demand.prefill_tokens or not mine:
            return 1.0
        part = self.attention_part(demand, share)
        keys = self.contention * demand.prefill_kv * self.size.kv_bytes
        weights = self.contention * self.size.weight_bytes
        return min(part * mine / (mine + keys) + (1 - part) * mine / (mine + weights), 1.0)

    def decode(self, demand: Demand, share: float, prefill_share: float | None = None) -> float:
        """Seconds of the decode iteration. prefill_share: what prefill has beside it; None for what is left."""
        if not demand.decode_batch:
            return 0.0
        size, beside = self.size, max(1 - share, 0.01) if prefill_share is None else prefill_share
        dense = self.decode_dense.seconds(2.0 * size.parameters * demand.decode_batch, size.weight_bytes, share)
        slow = 1 / self.bandwidth_left(demand, beside)
        flop, nbytes = size.attention_flop * demand.decode_kv, size.kv_bytes * demand.decode_kv
        return dense + self.decode_attention.seconds(flop, nbytes, share, slow)

    def _prefill_parts(self, demand: Demand, share: float) -> tuple[float, float]:
        if not demand.prefill_tokens:
            return 0.0, 0.0
        size = self.size
        dense = self.prefill_dense.seconds(2.0 * size.parameters * demand.prefill_tokens, size.weight_bytes, share)
        flop, nbytes = size.attention_flop * demand.prefill_pairs, size.kv_bytes * demand.prefill_kv
        return dense, self.prefill_attention.seconds(flop, nbytes, share)


def fit_operator(points: Sequence[tuple[float, float, float, float]]) -> Operator:
    """From (flop, bytes, share, seconds) at several shares: the least squares of logarithms over saturations, decays
    and whether a floor of bytes shows.
    """
    known = [point for point in points if point[0] > 0 and point[3] > 0]
    if not known:
        raise InputError("no measurement to fit an operator to; measure at two shares or more")
    floors = [(0.0, 0.0)]
    for reach in REACHES:
        each = [seconds / nbytes / max(reach / share, 1.0) for _, nbytes, share, seconds in known if nbytes > 0]
        floors += [(reach, min(each))] if each else []
    best, least = Operator(seconds_per_flop=known[0][3] / known[0][0]), math.inf
    for saturation in GRID:
        for decay in (0.0, *GRID) if saturation < 1 else (0.0,):
            for reach, floor in floors:
                shape = Operator(
                    seconds_per_flop=1.0, seconds_per_byte=floor, saturation=saturation, decay=decay, reach=reach
                )
                found, error = _scaled(shape, known)
                if error < least - 1e-9:
                    best, least = found, error
    return best


def _scaled(shape: Operator, points: Sequence[tuple[float, float, float, float]]) -> tuple[Operator, float]:
    bare = replace(shape, seconds_per_flop=0.0)
    above = [p for p in points if p[3] > 1.1 * bare.seconds(*p[:3])] or list(points)
    logs = [math.log(seconds * shape.useful(share) / flop) for flop, _, share, seconds in above]
    found = replace(shape, seconds_per_flop=math.exp(sum(logs) / len(logs)))
    error = sum(math.log(found.seconds(flop, nbytes, share) / seconds) ** 2 for flop, nbytes, share, seconds in points)
    return found, error


def fit_contention(costs: Costs, points: Sequence[tuple[Demand, float, float, float]]) -> Costs:
    """With the contention that explains decode beside prefill best: (demand, prefill's share, decode's, seconds)."""

    def error(contention: float) -> float:
        made = replace(costs, contention=contention)
        return sum(math.log(made.decode(d, rd, rp) / seconds) ** 2 for d, rp, rd, seconds in points)

    return replace(costs, contention=min(CONTENTIONS, key=error)) if points else costs

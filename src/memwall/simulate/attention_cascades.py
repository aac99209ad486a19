"""Ways to write attention, and some of its neighbours, as cascades of extended Einsums.

Ranks: p query positions, m key and value positions (m1 tiles of m0), e numbers of a head of Q and K, f of V, d the
numbers that a norm is over, n what a product after it gives, i steps of an iteration. A scale of the scores is the
queries' affair. Passes over m (or d) are not written here: `einsum_passes` finds them.

Source: FuseMax, Nayak 2024, arXiv 2406.10491, sections 3 and 4. `three-pass` is the usual stable softmax (what FLAT
fuses), `one-pass` FlashAttention-2's and the cascade that FuseMax maps; `one-pass-divided` keeps a divided output at
each step, as FlashAttention did; `split-keys` joins tiles at the end (Flash-Decoding).
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache

import numpy as np

from memwall.errors import InputError
from memwall.simulate.einsum_cascade import Cascade
from memwall.simulate.einsum_run import run_cascade
from memwall.simulate.einsum_text import parse_cascade

_SCORES = """
QK[m, p] = Q[e, p] * K[e, m]
GM[p] = max{m} QK[m, p]
SN[m, p] = exp(QK[m, p] - GM[p])
SD[p] = sum{m} SN[m, p]
"""
_DIVIDED = """
A[m, p] = SN[m, p] / SD[p]
AV[f, p] = A[m, p] * V[f, m]
"""
_DEFERRED = """
SNV[f, p] = SN[m, p] * V[f, m]
AV[f, p] = SNV[f, p] / SD[p]
"""
_TILES = """
split m = m1 * m0
BQK[m1, m0, p] = Q[e, p] * K[e, m1*M0+m0]
LM[m1, p] = max{m0} BQK[m1, m0, p]
"""
_LOCAL = """
SLN[m1, m0, p] = exp(BQK[m1, m0, p] - LM[m1, p])
SLD[m1, p] = sum{m0} SLN[m1, m0, p]
GM[p] = max{m1} LM[m1, p]
CF[m1, p] = exp(LM[m1, p] - GM[p])
SD[p] = SLD[m1, p] * CF[m1, p]
"""
_RUNNING = """
RM[0, p] = -inf
RM[m1+1, p] = max(RM[m1, p], LM[m1, p])
SLN[m1, m0, p] = exp(BQK[m1, m0, p] - RM[m1+1, p])
SLD[m1, p] = sum{m0} SLN[m1, m0, p]
SLNV[f, m1, p] = SLN[m1, m0, p] * V[f, m1*M0+m0]
PRM[m1, p] = exp(RM[m1, p] - RM[m1+1, p])
RD[0, p] = 0
SPD[m1, p] = RD[m1, p] * PRM[m1, p]
RD[m1+1, p] = SLD[m1, p] + SPD[m1, p]
RNV[f, 0, p] = 0
"""

TEXTS: dict[str, str] = {
    "three-pass": _SCORES + _DIVIDED,
    "three-pass-deferred": _SCORES + _DEFERRED,
    "two-pass": _TILES + _LOCAL + """
SN[m1, m0, p] = SLN[m1, m0, p] * CF[m1, p]
SNV[f, p] = SN[m1, m0, p] * V[f, m1*M0+m0]
AV[f, p] = SNV[f, p] / SD[p]
""",
    "two-pass-divided": _TILES + _LOCAL + """
A[m1, m0, p] = SLN[m1, m0, p] * CF[m1, p] / SD[p]
AV[f, p] = A[m1, m0, p] * V[f, m1*M0+m0]
""",
    "online-softmax": """
QK[m, p] = Q[e, p] * K[e, m]
RM[0, p] = -inf
RM[m+1, p] = max(RM[m, p], QK[m, p])
RD[0, p] = 0
RD[m+1, p] = RD[m, p] * exp(RM[m, p] - RM[m+1, p]) + exp(QK[m, p] - RM[m+1, p])
A[m, p] = exp(QK[m, p] - RM[M, p]) / RD[M, p]
AV[f, p] = A[m, p] * V[f, m]
""",
    "split-keys": _TILES + _LOCAL + """
SLNV[f, m1, p] = SLN[m1, m0, p] * V[f, m1*M0+m0]
SNV[f, p] = SLNV[f, m1, p] * CF[m1, p]
AV[f, p] = SNV[f, p] / SD[p]
""",
    "one-pass": _TILES + _RUNNING + """
SPNV[f, m1, p] = RNV[f, m1, p] * PRM[m1, p]
RNV[f, m1+1, p] = SLNV[f, m1, p] + SPNV[f, m1, p]
AV[f, p] = RNV[f, M1, p] / RD[M1, p]
""",
    "one-pass-divided": _TILES + _RUNNING + """
SPNV[f, m1, p] = RNV[f, m1, p] * SPD[m1, p]
RNV[f, m1+1, p] = (SLNV[f, m1, p] + SPNV[f, m1, p]) / RD[m1+1, p]
AV[f, p] = RNV[f, M1, p]
""",
    "linear": """
FK[e, m] = elu(K[e, m]) + 1
FQ[e, p] = elu(Q[e, p]) + 1
KV[e, f] = FK[e, m] * V[f, m]
KS[e] = sum{m} FK[e, m]
NV[f, p] = FQ[e, p] * KV[e, f]
ND[p] = FQ[e, p] * KS[e]
AV[f, p] = NV[f, p] / ND[p]
""",
    "two-normalisers": _SCORES + """
A[m, p] = SN[m, p] / SD[p]
AA[p] = sum{m} square(A[m, p])
B[m, p] = A[m, p] * rsqrt(AA[p])
AV[f, p] = B[m, p] * V[f, m]
""",
    "two-normalisers-deferred": """
QK[m, p] = Q[e, p] * K[e, m]
GM[p] = max{m} QK[m, p]
SN[m, p] = exp(QK[m, p] - GM[p])
SS[p] = sum{m} square(SN[m, p])
SNV[f, p] = SN[m, p] * V[f, m]
AV[f, p] = SNV[f, p] * rsqrt(SS[p])
""",
    "sinkhorn": """
QK[m, p] = Q[e, p] * K[e, m]
G[m, p] = exp(QK[m, p])
U[0, p] = 1
W[i, m] = G[m, p] * U[i, p]
R[i, m] = 1 / W[i, m]
C[i, p] = G[m, p] * R[i, m]
U[i+1, p] = 1 / C[i, p]
WL[m] = G[m, p] * U[I, p]
A[m, p] = G[m, p] * U[I, p] / WL[m]
AV[f, p] = A[m, p] * V[f, m]
""",
    "layernorm-textbook": """
MU[p] = sum{d} (X[d, p] / D)
DX[d, p] = X[d, p] - MU[p]
VA[p] = sum{d} (square(DX[d, p]) / D)
Y[d, p] = DX[d, p] * rsqrt(VA[p] + EPS)
Z[n, p] = Y[d, p] * W[d, n]
""",
    "layernorm-moments": """
SX[p] = sum{d} X[d, p]
SXX[p] = sum{d} square(X[d, p])
MU[p] = SX[p] / D
VA[p] = SXX[p] / D - square(MU[p])
Y[d, p] = (X[d, p] - MU[p]) * rsqrt(VA[p] + EPS)
Z[n, p] = Y[d, p] * W[d, n]
""",
    "layernorm-running": """
MU[0, p] = 0
MU[d+1, p] = MU[d, p] + (X[d, p] - MU[d, p]) / (d + 1)
M2[0, p] = 0
M2[d+1, p] = M2[d, p] + (X[d, p] - MU[d, p]) * (X[d, p] - MU[d+1, p])
XW[n, p] = X[d, p] * W[d, n]
SW[n] = sum{d} W[d, n]
Z[n, p] = (XW[n, p] - MU[D, p] * SW[n]) * rsqrt(M2[D, p] / D + EPS)
""",
}  # fmt: skip
"""Text of each, as `einsum_text` reads it."""

ATTENTION = (
    "three-pass", "three-pass-deferred", "two-pass", "two-pass-divided", "online-softmax", "split-keys", "one-pass",
    "one-pass-divided",
)  # fmt: skip
"""Those that compute softmax(Q K^T) V."""


@cache
def cascade(name: str) -> Cascade:
    """A cascade of this file; InputError names the nearest."""
    if name not in TEXTS:
        near = get_close_matches(name, TEXTS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"no cascade {name!r}: there are {', '.join(TEXTS)}{hint}")
    return parse_cascade(TEXTS[name])


def pass_rank(one: Cascade) -> str:
    """The rank whose passes are of interest: m where there is one, else the first that an Einsum reduces."""
    reduced = [rank for einsum in one.einsums for rank in einsum.reduced]
    if any(split.whole == "m" for split in one.splits) or "m" in one.ranks:
        return "m"
    return reduced[0] if reduced else one.ranks[0]


def attend(
    one: Cascade, q: np.ndarray, k: np.ndarray, v: np.ndarray, *, tile: int = 256, scale: float = 1.0
) -> np.ndarray:
    """Attention by a cascade with inputs Q, K, V and output AV: q [P, E], k [M, E], v [M, F] to [P, F].

    tile: points of m0, where m is split.
    """
    inputs: Mapping[str, np.ndarray] = {"Q": (q * q.dtype.type(scale)).T, "K": k.T, "V": v.T}
    sizes = {split.inner: min(tile, len(k)) for split in one.splits if split.whole == "m"}
    return run_cascade(one, inputs, sizes)["AV"].T

"""XR-NPE's layer-adaptive choice: 4-bit floats, 4-bit posits or 8-bit posits, layer by layer, by what errors cost.

Source: "XR-NPE" (2025, arXiv 2508.13049) and the mixed-precision notebook of the authors' repository (its state of
2025): layers sorted by sensitivity, the first 18 % in Posit-8, the others in FP4; first and last layer kept.

Idea: rounding a layer's weights to a format changes the loss by about half the sum of F (w - Q(w))^2, F the diagonal of
the Fisher information, the mean squared gradient over some text. Formats widen where that sum falls most per byte,
until the bytes are spent. The notebook's rule ranks layers by mean squared gradient and trace of the Hessian instead,
whatever the formats do to their weights.

Units and shapes: weights [rows, cols]; sensitivities in nats per token; bytes of the stored forms, scales included.
Differs from the paper: scales per group of columns, as products read them, not per output channel; posits use the
levels up to 2^(2^es), where they are densest; 16-bit posits are for the engine and for training, decoders keep the
first and last layer as floats (`ends`). The notebook does not say how it weighs its two terms: here both are divided by
their largest and added.
Cost: one pass forward and backward over the text, in torch, with all weights, gradients and Fisher sums as floats;
`sensitivity=measured` needs no torch: one probe per matrix on the CPU engine (see `sensitivity`).
Holds when: the text resembles what the model will read; rounding errors are small enough for a second order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from memwall import kernels
from memwall.compress.allocate import Candidate
from memwall.compress.base import MethodConfig, Statistics, Subject, WeightMethod
from memwall.errors import InputError
from memwall.formats import Packed, codec
from memwall.models.checkpoint import Checkpoint
from memwall.models.precision import LAYER_ADAPTIVE, LAYER_ADAPTIVE_LADDER, WIDE_SHARE

FORMS = ("e2m1-g64", "posit4es1-g64", "posit8es0-g64")
"""What a matrix may take, narrow ones first; 4-bit floats and posits take the same bytes."""
SENSITIVITIES = ("fisher", "notebook", "measured")


@dataclass(frozen=True, slots=True, kw_only=True)
class XrNpe(WeightMethod):
    """sensitivity: `fisher`, `notebook` or `measured` (see the module). share: of the matrices that the notebook's rule
    widens. qat_steps: training steps with rounded weights before they are stored (torch), 0 for none; rate: of them.
    """

    name: ClassVar[str] = "xr-npe"
    needs_statistics: ClassVar[bool] = False
    default_bits: ClassVar[str] = LAYER_ADAPTIVE
    adaptive: ClassVar[str | None] = LAYER_ADAPTIVE
    ladder: ClassVar[tuple[str, ...]] = FORMS
    keeps_ends: ClassVar[bool] = True

    sensitivity: str = "fisher"
    share: float = WIDE_SHARE
    qat_steps: int = 0
    rate: float = 3e-4

    def __post_init__(self) -> None:
        if self.sensitivity not in SENSITIVITIES:
            raise InputError(f"sensitivity={self.sensitivity}: it is one of {', '.join(SENSITIVITIES)}")
        if not 0 <= self.share <= 1:
            raise InputError(f"share={self.share:g}: the part of the matrices that are widened is between 0 and 1")
        if not 0 <= self.qat_steps <= 1_000_000:
            raise InputError(
                f"qat_steps={self.qat_steps}: give a count of training steps, such as 100; 0 trains nothing"
            )
        if not 0 < self.rate < 1:
            raise InputError(f"rate={self.rate:g}: a rate of learning lies between 0 and 1, such as 1e-4")

    def form(self, bits: float | str) -> str | None:
        if bits == LAYER_ADAPTIVE:
            return LAYER_ADAPTIVE
        return codec(bits).spec if isinstance(bits, str) else None

    def reads_text(self, bits: float | str) -> bool:
        return not isinstance(bits, str) or bits == LAYER_ADAPTIVE or self.qat_steps > 0

    def choose(self, subject: Subject, forms: Mapping[str, Sequence[str]], budget_bytes: int) -> dict[str, str] | None:
        if self.sensitivity == "measured":
            return None
        from memwall.compress import xr_npe_torch as torch_side

        names = [name for name, options in forms.items() if len(options) > 1]
        with torch_side.loaded(subject) as model:
            if self.sensitivity == "notebook":
                scores = torch_side.notebook_scores(model, subject, names)
                return {**{n: options[0] for n, options in forms.items()}, **by_share(scores, self.share)}
            fisher = torch_side.diagonal_fisher(model, subject, names)
            table = {
                name: candidates(np.asarray(subject.checkpoint.alone(name), np.float32), fisher[name], options)
                if name in fisher
                else [Candidate(spec=s, nbytes=codec(s).nbytes(subject.shape(name)), loss=0.0) for s in options]
                for name, options in forms.items()
            }
        return {
            name: chosen.spec for name, chosen in zip(table, greedy(list(table.values()), budget_bytes), strict=True)
        }

    def prepare(self, subject: Subject, specs: Mapping[str, str]) -> Checkpoint:
        if not self.qat_steps:
            return subject.checkpoint
        from memwall.compress import xr_npe_torch as torch_side

        return torch_side.trained_decoder(subject, specs, steps=self.qat_steps, rate=self.rate)

    def compress(self, weight: np.ndarray, statistics: Statistics | None, config: MethodConfig) -> Packed:
        return kernels.encode(config.spec, weight)

    def work_bytes(self, num_rows: int, num_columns: int) -> int:
        return 0


def sensitivity(weight: np.ndarray, fisher: np.ndarray, spec: str) -> float:
    """Half the sum of F (w - Q(w))^2: what the loss rises by, to second order. Both arrays [rows, cols]."""
    rounded = codec(spec).decode(kernels.encode(spec, weight))
    return 0.5 * float(np.einsum("ij,ij,ij->", fisher, weight - rounded, weight - rounded, dtype=np.float64))


def candidates(weight: np.ndarray, fisher: np.ndarray, specs: Sequence[str]) -> list[Candidate]:
    """Every form that a matrix may take, with its bytes and its sensitivity."""
    return [
        Candidate(spec=spec, nbytes=codec(spec).nbytes(weight.shape), loss=sensitivity(weight, fisher, spec))
        for spec in specs
    ]


def greedy(table: Sequence[Sequence[Candidate]], budget_bytes: int) -> list[Candidate]:
    """One candidate per matrix: from the smallest, the step of largest gain per byte that still fits, until none does.

    A step may be to any wider form. Raises InputError where the smallest are too large.
    """
    chosen = [min(options, key=lambda each: (each.nbytes, each.loss)) for options in table]
    left = budget_bytes - sum(each.nbytes for each in chosen)
    if left < 0:
        raise InputError(f"the smallest forms need {-left:,} bytes more than the {budget_bytes:,} allowed")
    while True:
        best, gain = None, 0.0
        for at, options in enumerate(table):
            for option in options:
                extra = option.nbytes - chosen[at].nbytes
                drop = chosen[at].loss - option.loss
                if 0 < extra <= left and drop / extra > gain:
                    best, gain = (at, option), drop / extra
        if best is None:
            return chosen
        left -= best[1].nbytes - chosen[best[0]].nbytes
        chosen[best[0]] = best[1]


def by_share(scores: Mapping[str, float], share: float) -> dict[str, str]:
    """The notebook's rule: the most sensitive `share` of the matrices in 8-bit posits, the others in 4-bit floats."""
    narrow, wide = LAYER_ADAPTIVE_LADDER
    order = sorted(scores, key=lambda name: -scores[name])
    return {name: wide if at < round(share * len(order)) else narrow for at, name in enumerate(order)}

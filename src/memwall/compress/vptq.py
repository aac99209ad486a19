"""VPTQ: an index for several rows of a column, chosen column by column while later columns make up for the error.

Source: "VPTQ: Extreme Low-bit Vector Post-Training Quantization for Large Language Models" (Yifei Liu, 2024, arXiv
2409.17066), sections 3 and 4, algorithm 1; official code: github.com/microsoft/VPTQ, branch `algorithm`.

Idea: at two bits a weight four levels are too few, but one index for eight rows buys 65,536 levels at the same price.
Codebooks come from k-means in which a column's vectors weigh what its inputs do (diag H: the main part of the output
error). As vectors lie along the outputs, each column is rounded alone and the next ones take its error in, as in GPTQ.
What the first stage leaves of the compensated weights makes a second, residual codebook; then all is swept again.

Units and shapes: weight [rows, cols] float, H [cols, cols] -> Packed of `formats.vptq`.
Differs from the paper: a number of bits is a bound on all that is stored, codebooks included, and the layout follows
from it and the matrix' shape (`formats.vptq`); codebooks learn from at most 256 vectors a centroid; where columns are
scaled, a vector's weight in k-means is diag H times the squared scale, as that is what its error costs. `refine` is
added: the centroids for fixed indices that lose least under the whole of H (`codebook_fit`), in place of gradient steps
per matrix, and sweeps with those centroids. Fine-tuning by blocks is `layer_tuning`, of the whole `model_tuning`.
Cost: k-means of rows * cols * k operations a round (at most 256 k^2 v), two sweeps where there are residuals, each that
of GPTQ and rows * cols * k for the search; resident beside weight and H: as GPTQ, 24 bytes a weight, 8 cols^2.
Holds when: as GPTQ; matrices are so large that codebooks are a small part of them (`memwall compress` says the bits).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from memwall import kernels
from memwall.compress import sweep
from memwall.compress.base import MethodConfig, Statistics, Trained, WeightMethod
from memwall.compress.codebook_fit import fitted
from memwall.compress.kmeans import INITS
from memwall.compress.layer_tuning import Schedule, require_torch, tuned
from memwall.compress.model_tuning import tuned_model
from memwall.compress.vector_columns import Books, Training, VectorColumns, learned
from memwall.errors import InputError
from memwall.formats import Packed, codec
from memwall.formats.vector_parts import checked_halves
from memwall.formats.vptq import VptqCodec, ranges

if TYPE_CHECKING:
    from collections.abc import Mapping

    from memwall.compress.calibration import LayerStream
    from memwall.models.checkpoint import Checkpoint

NORMS = ("none", "range", "deviation")


@dataclass(frozen=True, slots=True, kw_only=True)
class Vptq(WeightMethod):
    """The compensated sweep over vectors of rows.

    vector, codebook, residual: rows of a vector, centroids of its two stages (residual 1: one stage); groups: of
    columns, with codebooks of their own; 0: chosen for the bits. block: rows that share codebooks, 0 for all (others
    need `vector`). outliers: percent of the columns, those that meet the largest inputs, that have a codebook of
    outlier_codebook vectors of outlier_vector rows. order: columns with the largest inputs go first. norm: scale
    columns by their `range` or `deviation`, or not (`none`). init, iterations, seed: of k-means. refine: steps that fit
    the centroids to H once indices are fixed; rounds: so often, with a sweep in between. tune: steps of fine-tuning by
    whole layers, tune_model: by the whole model, both with learning rate tune_rate; they need torch.
    """

    name: ClassVar[str] = "vptq"
    needs_statistics: ClassVar[bool] = True
    # the official code adds a hundredth of H's mean diagonal twice: to H as it is collected, and in the sweep
    damping: ClassVar[float] = 0.02
    default_bits: ClassVar[str] = "2.25"

    vector: int = 0
    codebook: int = 0
    residual: int = 0
    groups: int = 0
    block: int = 0
    outliers: float = 0.0
    outlier_vector: int = 4
    outlier_codebook: int = 256
    order: bool = True
    norm: str = "none"
    init: str = "sampled"
    iterations: int = 100
    seed: int = 0
    refine: int = 20
    rounds: int = 3
    tune: int = 0
    tune_model: int = 0
    tune_rate: float = 1e-4

    def __post_init__(self) -> None:
        for name, value, known in (("norm", self.norm, NORMS), ("init", self.init, INITS)):
            if value not in known:
                raise InputError(f"{name} {value!r}: choose one of {', '.join(known)}")
        if not 0 <= self.outliers <= 50:
            raise InputError(f"outliers is {self.outliers:g}; it is a percentage of the columns, 0 to 50, such as 1")
        if (
            min(self.iterations, self.rounds) < 1
            or min(self.refine, self.tune, self.tune_model) < 0
            or not 0 < self.tune_rate < 1
        ):
            raise InputError(
                "iterations and rounds must be at least 1, refine and tune at least 0, tune_rate between 0 and 1"
            )
        if self.tune or self.tune_model:
            require_torch("tune" if self.tune else "tune_model")
        self._wanted(8)  # settings that fit no layout are refused before any text is read

    @property
    def keeps_budgets(self) -> bool:
        return not (self.tune or self.trains)

    def _wanted(self, bits: float) -> VptqCodec:
        permille = round(10 * self.outliers)
        return VptqCodec(
            bits=bits,
            vector=self.vector,
            codebook=self.codebook,
            residual=self.residual,
            groups=self.groups,
            block=self.block,
            outlier_permille=permille,
            outlier_vector=self.outlier_vector if permille else 0,
            outlier_codebook=self.outlier_codebook if permille else 0,
            ordered=self.order,
            norm=self.norm != "none",
        )

    def form(self, bits: float | str) -> str | None:
        return codec(bits).spec if isinstance(bits, str) else self._wanted(bits).spec

    def check(self, spec: str) -> None:
        if not isinstance(codec(spec), VptqCodec):
            raise InputError(
                f"vptq makes its own formats, not {spec}: give --bits 2.25, or --bits vptq-v8-k256-ordered"
            )

    def compress(self, weight: np.ndarray, statistics: Statistics | None, config: MethodConfig) -> Packed:
        coder = codec(config.spec)
        if not isinstance(coder, VptqCodec):
            return kernels.encode(config.spec, weight)  # embedding and head stay floats
        num_columns = weight.shape[1]
        if statistics is None:
            statistics = Statistics.identity(num_columns)
        if statistics.hessian.shape != (num_columns, num_columns):
            raise InputError(f"statistics of {len(statistics.hessian)} inputs do not fit a matrix of {num_columns}")
        form = coder.laid_out(weight.shape)
        factored = statistics.factor(config.damping, form.ordered)
        ordered = np.ascontiguousarray(weight[:, factored.order], np.float32)
        costs = statistics.hessian.diagonal()[factored.order].astype(np.float64)
        ordered[:, costs == 0] = 0  # what never fires need not be stored well
        columns = self._swept(form, ordered, costs, factored)
        best, least = columns.finish(), math.inf
        for index in range(self.rounds if self.refine else 0):
            if index:
                columns = VectorColumns(form, columns.shape, columns.books, order=columns.order, norm=columns.norm)
                sweep.sweep_columns(ordered, factored.arranged(), columns)
            columns.books, lost = fitted(columns, ordered, statistics, factored.order, config.damping, self.refine)
            if lost < least:
                best, least = columns.finish(), lost
        return best

    def finish_layer(self, stream: LayerStream, layer: int, made: dict[str, Packed]) -> dict[str, Packed]:
        if not self.tune:
            return made
        return tuned(stream, layer, made, Schedule(steps=self.tune, rate=self.tune_rate, seed=self.seed))

    @property
    def trains(self) -> bool:
        return self.tune_model > 0

    def train(
        self, checkpoint: Checkpoint, tokens: np.ndarray, made: Mapping[str, Packed], progress: Trained
    ) -> dict[str, Packed]:
        schedule = Schedule(steps=self.tune_model, rate=self.tune_rate, seed=self.seed)
        return tuned_model(checkpoint, tokens, made, schedule, progress)

    def _swept(self, form: VptqCodec, ordered: np.ndarray, costs: np.ndarray, factored: sweep.Factor) -> VectorColumns:
        """Codebooks and indices of a matrix whose columns are in order."""
        training = Training(init=self.init, iterations=self.iterations, seed=self.seed)
        order = factored.order if form.ordered else None
        norm, values = None, ordered
        if form.norm:
            norm = scales(ordered, self.norm)
            wide = norm.astype(np.float32)
            values = (ordered - wide[1]) / wide[0]
            costs = costs * np.square(wide[0], dtype=np.float64)
        outliers, rest = form.parts(ordered.shape[1])
        books: list[Books | None] = [
            None if part is None else Books(main=learned(part, values, costs, part.main_bits, training))
            for part in (outliers, rest)
        ]
        shape = (ordered.shape[0], ordered.shape[1])
        if rest.residual_bits:
            first = VectorColumns(replace(form, residual=0), shape, books, norm=norm, keep_left=True)
            sweep.sweep_columns(ordered, factored.arranged(), first)
            assert first.left is not None
            assert books[1] is not None
            books[1] = replace(books[1], residual=learned(rest, first.left, costs, rest.residual_bits, training))
        columns = VectorColumns(form, shape, books, order=order, norm=norm)
        sweep.sweep_columns(ordered, factored.arranged(), columns)
        return columns

    def work_bytes(self, num_rows: int, num_columns: int) -> int:
        # the ordered weights and their scaled form, points and costs of k-means, residuals; the fit's products and H
        return sweep.work_bytes(num_rows, num_columns) + 24 * num_rows * num_columns + 8 * num_columns**2


def scales(values: np.ndarray, norm: str) -> np.ndarray:
    """Scale and offset of each column, float16 [2, cols]."""
    if norm == "range" or not values.size:
        return ranges(values)
    spread = values.std(axis=0)
    return checked_halves(np.stack([np.where(spread > 2.0**-24, spread, 1), values.mean(axis=0)]), "a scale")

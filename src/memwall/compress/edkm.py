"""eDKM: each weight is one of 2^b values of its matrix' palette; training by differentiable clustering chooses both.

Source: "eDKM: An Efficient and Accurate Train-time Weight Clustering for Large Language Models" (Minsik Cho, 2023,
arXiv 2309.00964); the clustering layer is that of DKM (arXiv 2108.12659); official code: apple/coremltools,
`coremltools.optimize.torch.palettization`.

Idea: k-means after training puts entries where weights are, not where the loss wants them. Soft assignment makes
k-means differentiable, so weights, entries and assignments train together (`edkm_tuning_torch`), worked out once per
distinct 16-bit value (`edkm_torch`); at the end each weight takes its nearest entry.

Units and shapes: weight [rows, cols] float -> Packed of `formats.vptq` with vectors of one row (`vptq-v1-k8-g4-ordered`
is 3 bits): indices and a float16 palette per group of columns, which may stand in the order of their inputs' size, and
per block of rows where asked (`block=16`: `vptq-v1-k8-g4-b16-ordered`), as the official code's groups of channels.
Products look palettes up as they do vectors, so there is no format of its own. Embedding and head take 8 bits.
Differs from the paper: see `edkm_tuning_torch`. Training starts from palettes and indices that a compensated sweep
found (VPTQ's, vectors of one), each weight on its entry; `start=line` is the best clustering of a matrix' numbers,
`start=spread` the paper's k-means++, and both start from the float weights.
Cost: b bits a weight, each row's indices padded to 32 bits; 16 * 2^b bits per group and block, 16 a column where
ordered, and 96 bytes a matrix that products read past the ends. Training with blocks takes some times longer, as blocks
have hardly a weight twice.
Holds when: the calibration text resembles what the model will read, and there is time to train (`steps=0` does not).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from memwall import kernels
from memwall.compress.base import MethodConfig, Statistics, Trained, WeightMethod
from memwall.compress.kmeans import kmeans, on_a_line, on_lines
from memwall.compress.layer_tuning import require_torch
from memwall.compress.vptq import Vptq
from memwall.errors import InputError
from memwall.formats import Packed, codec
from memwall.formats.vector_parts import Coded, checked_halves
from memwall.formats.vptq import VptqCodec, pack

if TYPE_CHECKING:
    from memwall.models.checkpoint import Checkpoint

STARTS = ("swept", "line", "spread")
_SWEPT_ROUNDS, _SWEPT_REFINE, _SWEPT_ITERATIONS = 3, 20, 30
"""Of the start `swept`: see `vptq`."""
MOST_BITS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Edkm(WeightMethod):
    """steps: of training, 0 for none (then no torch is needed); rate, batch: of it (sequences of 128 tokens a step).
    tau: softness at first, as a share of a matrix' variance; rounds, epsilon: of the clustering in a step. groups: of
    columns with a palette each, for every so many rows (block; 0: all); order: columns with the largest inputs go first
    (where `swept`). start: `swept` (VPTQ's sweep with vectors of one makes up for errors over the text), `line` (the
    best clusters of a palette's numbers) or `spread` (k-means++); seed.
    """

    name: ClassVar[str] = "edkm"
    needs_statistics: ClassVar[bool] = False
    default_bits: ClassVar[str] = "3"
    makes: ClassVar[str] = "vptq"
    ends: ClassVar[str] = "int8-g64"

    steps: int = 100
    rate: float = 1e-3
    batch: int = 8
    tau: float = 0.05
    rounds: int = 3
    epsilon: float = 1e-4
    groups: int = 4
    block: int = 0
    order: bool = True
    start: str = "swept"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.start not in STARTS:
            raise InputError(f"start {self.start!r}: choose one of {', '.join(STARTS)}")
        if not 0 <= self.steps <= 1_000_000:
            raise InputError(
                f"steps is {self.steps}; give a count of training steps such as 100, or 0 to train nothing"
            )
        if not 0 < self.rate < 1 or not 0 < self.tau <= 100 or not 0 <= self.epsilon < 1:
            raise InputError(
                f"rate {self.rate:g}, tau {self.tau:g}, epsilon {self.epsilon:g}: rate lies between 0 and 1, tau is "
                "above 0 and at most 100, epsilon at least 0 and below 1"
            )
        if min(self.batch, self.rounds) < 1 or not 1 <= self.groups <= 4096:
            raise InputError(
                f"batch {self.batch}, rounds {self.rounds}, groups {self.groups}: each must be at least 1, groups at "
                "most 4096"
            )
        if not 0 <= self.block <= 1 << 20:
            raise InputError(f"block is {self.block}; give the rows that share palettes, such as 16, or 0 for all")
        if self.steps:
            require_torch("training (steps)", "or take steps=0, which stores the palettes as they begin and needs none")

    def form(self, bits: float | str) -> str | None:
        if isinstance(bits, str):
            return codec(bits).spec
        if bits not in range(1, MOST_BITS + 1):
            raise InputError(
                f"bits {bits:g}: edkm makes palettes of 2^bits values: --bits 3 (1 to {MOST_BITS}), no mean"
            )
        groups, ordered = self.groups if self.groups > 1 else 0, self.order and self.calibrates
        return VptqCodec(vector=1, codebook=1 << int(bits), groups=groups, block=self.block, ordered=ordered).spec

    def check(self, spec: str) -> None:
        form = codec(spec)
        if not isinstance(form, VptqCodec) or form != VptqCodec(
            vector=1, codebook=min(max(form.codebook, 2), 1 << MOST_BITS), groups=form.groups, block=form.block,
            ordered=form.ordered,
        ):  # fmt: skip
            raise InputError(
                f"edkm makes palettes such as vptq-v1-k8 or vptq-v1-k8-g4-ordered, not {spec}: give --bits 3"
            )

    def reads_text(self, bits: float | str) -> bool:
        return self.trains or self.calibrates

    @property
    def calibrates(self) -> bool:
        return self.start == "swept"

    @property
    def trains(self) -> bool:
        return self.steps > 0

    def train(
        self, checkpoint: Checkpoint, tokens: np.ndarray, made: Mapping[str, Packed], progress: Trained
    ) -> dict[str, Packed]:
        from memwall.compress.edkm_tuning_torch import Recipe, tuned_palettes

        recipe = Recipe(
            steps=self.steps, rate=self.rate, batch=self.batch, tau=self.tau, rounds=self.rounds,
            epsilon=self.epsilon, seed=self.seed, from_stored=self.start == "swept",
        )  # fmt: skip
        return tuned_palettes(checkpoint, tokens, made, recipe, progress)

    def compress(self, weight: np.ndarray, statistics: Statistics | None, config: MethodConfig) -> Packed:
        form = codec(config.spec)
        if not isinstance(form, VptqCodec):
            return kernels.encode(config.spec, weight)  # embedding and head
        if statistics is not None and self.start == "swept":
            return self._swept(form).compress(weight, statistics, config)
        part = form.parts(weight.shape[1])[1]
        values = np.asarray(weight, np.float32)
        main = np.zeros((part.books(len(values)), form.codebook, 1), np.float16)
        codes = np.zeros(weight.shape, np.uint32)
        for group in range(part.groups):
            places = [
                (part.in_block(block, len(values)), part.members(group)) for block in range(part.blocks(len(values)))
            ]
            palettes = self._palettes([values[place] for place in places], form.codebook)
            for block, (place, palette) in enumerate(zip(places, palettes, strict=True)):
                held = main[block * part.groups + group, :, 0] = checked_halves(palette, "a palette entry")
                middles = (held[1:].astype(np.float32) + held[:-1].astype(np.float32)) / 2
                codes[place] = np.searchsorted(middles, values[place])
        order = np.arange(weight.shape[1]) if form.ordered else None
        return pack(form, values.shape, Coded(codes=codes, main=main, residual=None), order=order)

    def _swept(self, form: VptqCodec) -> Vptq:
        return Vptq(
            vector=1, codebook=form.codebook, groups=form.groups, block=form.block, order=form.ordered,
            rounds=_SWEPT_ROUNDS, refine=_SWEPT_REFINE, iterations=_SWEPT_ITERATIONS, seed=self.seed,
        )  # fmt: skip

    def _palettes(self, pieces: list[np.ndarray], count: int) -> list[np.ndarray]:
        """Entries in order, [count] float32 each, for the numbers of each piece."""
        whole = [each for each in pieces if each.size == pieces[0].size]
        if self.start == "spread" or len(whole) == 1:
            return [self._palette(each, count) if each.size else np.zeros(count, np.float32) for each in pieces]
        found = list(on_lines(np.stack([each.reshape(-1) for each in whole]), count))
        return found + [self._palette(each, count) for each in pieces[len(whole) :]]  # a last block may be short

    def _palette(self, values: np.ndarray, count: int) -> np.ndarray:
        different, often = np.unique(values, return_counts=True)
        start = "spread" if self.start == "spread" else on_a_line(different, often, count)
        init = start if isinstance(start, str) else start[:, None]
        found = kmeans(
            different[:, None], count, weights=often, init=init, iterations=200, tolerance=1e-7, seed=self.seed
        )
        return np.sort(found.centroids[:, 0])

    def work_bytes(self, num_rows: int, num_columns: int) -> int:
        if self.calibrates:
            return self._swept(VptqCodec(vector=1, codebook=8)).work_bytes(num_rows, num_columns)
        return 36 * num_rows * num_columns  # different values, how often, and what k-means holds of them

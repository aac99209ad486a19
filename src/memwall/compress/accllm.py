"""AccLLM's weights: two of every four pruned, the model tuned with that mask, what is kept rounded to two bits.

Source: "AccLLM: Accelerating Long-Context LLM Inference Via Algorithm-Hardware Co-Design" (Yanbiao Liang, 2025, arXiv
2505.03745), its W2A8KV4 recipe. No official code known. Pruning scores: Wanda (arXiv 2306.11695), SparseGPT (arXiv
2301.00774).
Idea: prune -> fine-tune -> quantize. A two-bit code and a two-bit place for half of the weights are two bits a weight,
an eighth of float16, and half of the products. Pruning is compensated in the sweep (`pruning`); then the pruned model
learns, its mask held, to say what the float model says, first in floats (`tune_steps`), then rounded as it will be
stored (`aware_steps`); without the latter the kept weights are rounded in a second compensated sweep. Products round
their inputs to eight bits as every packed form here does (A8); `--kv 'lambda(...)+kivi(4bit,queries=int8)'` is the
rest: KV4, with queries and shares of eight bits.
Units and shapes: weight [rows, cols] float, H [cols, cols] -> Packed of `formats.sparse`, by default sparse2-g128-asym:
64 kept weights share a float16 scale and a zero point.
Differs from the paper: which score, tuning, group and quantizer it uses is not published; these are standard practice.
Tuning distils on the calibration text. Activations have a scale per token and group of columns instead of one per
token. Embedding and head have at least four bits. A key's scale goes to the query before this is rounded, with a step
for each head and block of keys.
Cost: 2 + 24 / 128 bits a weight; SparseGPT's sweep twice; tuning holds the model in torch twice, and two moments.
Holds when: inputs of a layer are multiples of four; the model is large, or tuning is long: half of the weights and two
bits are little.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from memwall.compress import sweep
from memwall.compress.base import MethodConfig, Statistics, Subject, WeightMethod
from memwall.compress.calibration import LayerStream, shared_input
from memwall.compress.gptq import LEAST_SHRINK
from memwall.compress.pruning import SCORES, PruningColumns, SparseColumns, fixed_mask
from memwall.compress.smoothquant import SmoothQuant
from memwall.compress.sparsegpt import SHRINKS, SparseGpt
from memwall.compress.transforms import Transform
from memwall.errors import InputError
from memwall.formats import Packed, codec
from memwall.formats.sparse import (
    DEFAULT_GROUP,
    KEPT,
    OF,
    Kept,
    SparseCodec,
    gather_kept,
    largest_pairs,
    positions_of,
)
from memwall.models.checkpoint import Checkpoint

RANGES = (1.0, 0.85, 0.7, 0.55, 0.4)
"""Shares of a group's range that training tries for a scale, by squared error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AccLlm(WeightMethod):
    """score: what makes a weight stay, see `pruning`. compensate: whether others make up for what is lost.

    shrinks: ranges tried for a scale where weights are rounded in a sweep. tune_steps: of training with the mask alone;
    aware_steps: with the rounding too; rate: of both. With no steps at all nothing needs torch. smooth: SmoothQuant's
    strength, by which large channels of inputs go into weights and norms first; 0 for none.
    """

    name: ClassVar[str] = "accllm"
    needs_statistics: ClassVar[bool] = True
    default_bits: ClassVar[str] = "2"
    transforms: ClassVar[bool] = True

    score: str = "hessian"
    compensate: bool = True
    shrinks: int = SHRINKS
    tune_steps: int = 100
    aware_steps: int = 200
    rate: float = 3e-4
    smooth: float = 0.0

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise InputError(f"score {self.score!r}: choose one of {', '.join(SCORES)}")
        if not 1 <= self.shrinks <= 1000:
            raise InputError(f"shrinks is {self.shrinks}; it must be from 1 to 1000, such as {SHRINKS}")
        for name in ("tune_steps", "aware_steps"):
            if not 0 <= getattr(self, name) <= 1_000_000:
                raise InputError(f"{name} is {getattr(self, name)}: give a count of training steps; 0 trains nothing")
        if not 0 < self.rate < 1:
            raise InputError(f"rate={self.rate:g}: a rate of learning lies between 0 and 1, such as 3e-4")
        if not 0 <= self.smooth <= 1:
            raise InputError(f"smooth is {self.smooth:g}; it must be between 0 (none) and 1, such as 0.5")

    @property
    def tuned(self) -> bool:
        """Whether the pruned model is trained."""
        return self.tune_steps + self.aware_steps > 0

    @property
    def keeps_budgets(self) -> bool:
        return not self.tuned  # nobody counts what torch holds

    def form(self, bits: float | str) -> str | None:
        if isinstance(bits, str):
            return codec(bits).spec
        if bits != int(bits) or not 2 <= bits <= 8:
            raise InputError(f"bits {bits:g}: accllm takes whole bits of a kept weight, 2 to 8, such as --bits 2")
        return f"sparse{int(bits)}-g{DEFAULT_GROUP}-asym"

    def check(self, spec: str) -> None:
        if not isinstance(codec(spec), SparseCodec):
            raise InputError(f"accllm makes formats such as sparse2-g128-asym, not {spec}: give --bits 2")

    def reads_text(self, bits: float | str) -> bool:
        return True

    def transform(self, stream: LayerStream, form_of: Callable[[str], str]) -> Transform:
        if not self.smooth:
            return Transform()
        return SmoothQuant(strength=self.smooth).transform(stream, form_of)

    def prepare(self, subject: Subject, specs: Mapping[str, str]) -> Checkpoint:
        if not self.tuned:
            return subject.checkpoint
        from memwall.compress import accllm_torch

        weights = self.pruned_weights(subject, specs)
        return accllm_torch.tuned_model(
            subject, weights, specs, steps=self.tune_steps, aware_steps=self.aware_steps, rate=self.rate
        )

    def pruned_weights(self, subject: Subject, specs: Mapping[str, str]) -> dict[str, np.ndarray]:
        """The matrices of sparse forms, pruned layer by layer on what the pruned layers before hand on; float32."""
        config, found = subject.checkpoint.config, {}
        names = [name for name, spec in specs.items() if isinstance(codec(spec), SparseCodec)]
        stream = LayerStream(config, subject.checkpoint, subject.tokens, subject.arena, dict.fromkeys(specs, "float32"))
        try:
            stream.embed()
            layers = {tensor.name: tensor.layer for tensor in config.tensors()}
            for layer in range(config.num_layers):
                own = [name for name in names if layers[name] == layer]
                collector = stream.collect(layer, own)
                try:
                    statistics = collector.finish()
                    made = {name: self._pruned(subject, name, statistics[shared_input(name)]) for name in own}
                finally:
                    collector.release()
                stream.advance(layer, made)
                found.update({name: np.asarray(codec("float32").decode(packed)) for name, packed in made.items()})
                subject.progress(layer + 1, config.num_layers)
        finally:
            stream.release()
        return found

    def _pruned(self, subject: Subject, name: str, statistics: Statistics) -> Packed:
        weight = np.asarray(subject.checkpoint.alone(name), np.float32)
        known = statistics if self.compensate else None
        factored = sweep.factor_for(known, weight.shape[1], self.damping, False)
        mask = fixed_mask(weight, statistics, self.score)
        return sweep.sweep(weight, factored, PruningColumns(weight.shape[0], weight.shape[1], mask))

    def compress(self, weight: np.ndarray, statistics: Statistics | None, config: MethodConfig) -> Packed:
        form, mask = codec(config.spec), mask_of(weight)
        if not isinstance(form, SparseCodec) or mask is None:
            plain = SparseGpt(score=self.score, compensate=self.compensate, shrinks=self.shrinks)
            return plain.compress(weight, statistics, config)
        if self.aware_steps:  # rounded as it was trained with: nothing is left to make up for
            return rounded_ranges(weight, mask.T, form)
        rows, columns = weight.shape
        factored = sweep.factor_for(statistics if self.compensate else None, columns, config.damping, False)
        tried = np.linspace(1, LEAST_SHRINK, self.shrinks) if self.shrinks > 1 else None
        return sweep.sweep(weight, factored, SparseColumns(form, rows, columns, mask, tried))

    def work_bytes(self, num_rows: int, num_columns: int) -> int:
        return SparseGpt().work_bytes(num_rows, num_columns)


def mask_of(weight: np.ndarray) -> np.ndarray | None:
    """Mask [cols, rows] of a weight [rows, cols] that has been pruned to two of every four; None where it has not."""
    rows, columns = weight.shape
    kept = np.zeros((rows, -(-columns // OF) * OF), bool)
    kept[:, :columns] = weight != 0
    if bool((kept.reshape(rows, -1, OF).sum(axis=-1) > KEPT).any()):
        return None
    return np.ascontiguousarray(largest_pairs(np.abs(np.asarray(weight, np.float32))).T)


def rounded_ranges(weight: np.ndarray, mask: np.ndarray, form: SparseCodec) -> Packed:
    """A weight [rows, cols] pruned by `mask`, rounded in the best of RANGES for each group: what training saw."""
    columns = weight.shape[1]
    positions = positions_of(mask)
    kept = gather_kept(np.asarray(weight, np.float32), positions)
    codes = np.empty(kept.shape, np.uint8)
    scales, zeros = [], []
    for members in form.members(columns):
        found = form.fit(kept[:, members], shrinks=np.array(RANGES, np.float32))
        codes[:, members] = form.quantize(kept[:, members], *found)
        scales.append(found[0])
        zeros.append(found[1])
    parts = Kept(
        codes=codes,
        positions=positions,
        scales=np.stack(scales, axis=1),
        zeros=None if form.symmetric else np.stack(zeros, axis=1),
    )
    return form.pack(parts, columns)

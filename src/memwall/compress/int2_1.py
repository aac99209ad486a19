"""INT2.1: fine-tuning with only integers resident, and low-rank correction of what low bits destroyed.

Source: "INT2.1: Towards Fine-Tunable Quantized LLMs with Error Correction through Low-Rank Adaptation" (Yuji Chai,
2023, arXiv 2306.08162), sections 3.1 (EMEF) and 3.2 (LREC); official code: stochasticai/xTuring, examples/int2-1.

Idea: the same trainable low-rank path serves twice. For a task (`MemoryFrugal`) it adapts a base of which no float copy
ever exists (`kernels.torch_frozen`). With a teacher (`ErrorCorrection`) it is trained on every projection to give the
float model's answers again: KL(teacher || student), summed over vocabulary and positions and divided by the windows of
the batch, plus the cross-entropy of the next token, mean per token, with weights 1 and 200. The sum grows with the
window, the mean does not: 200 is for 2,048 tokens, and shorter windows keep the published share with less (25 for 256).
Units and shapes: y = x Wq + (alpha / rank) B A dropout(x), Wq packed, A [rank, in], B [out, rank] float32; losses in
nats. Effective bits are the bytes of Wq and of the adapter as saved (float16) over the weights of Wq.
Differs from the paper: any packed form is a base, not GPTQ's alone; the base's embedding and head have at least four
bits here, the paper's are float16; numbers are float32, as processors compute in; the teacher's answers may be kept in
part (`teacher_top`, see `teacher`); 1e-7 is not added to logits. Going on for a task after a correction is `--lora`,
which trains the same adapter further; a second adapter beside the first is not made.
Cost: bits / 16 of a bfloat16 base and its scales; 16 bytes per adapter weight, 4 more to keep the best; one layer's
insides and a hidden state per layer; each layer is run twice.
Holds when: the base still works a little. What a correction restores it restores on text like that it was trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from memwall.compress.tuning import CrossEntropy, Objective, Share, TuneMethod
from memwall.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from memwall.compress.teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class MemoryFrugal(TuneMethod):
    """EMEF, with the published settings: queries and values, 144 windows a step worked one by one."""

    name: ClassVar[str] = "int2-1"
    base: ClassVar[str] = "int2-g64-asym"

    rank: int = 8
    alpha: float = 16.0
    targets: str = "q_proj,v_proj"
    batch: int = 144
    epochs: int = 3
    learning_rate: float = 3e-4

    @classmethod
    def taught(cls) -> type[TuneMethod]:
        return ErrorCorrection


@dataclass(frozen=True, kw_only=True)
class ErrorCorrection(TuneMethod):
    """LREC, with the published settings. ce_weight: of a mean beside a sum over the window, so in proportion to
    `context`. teacher_top: answers kept per position, 0 for all.
    """

    name: ClassVar[str] = "int2-1"
    base: ClassVar[str] = "int2-g64-asym"
    takes_teacher: ClassVar[bool] = True

    rank: int = 32
    alpha: float = 128.0
    batch: int = 4
    epochs: int = 20
    context: int = 2048
    learning_rate: float = 3e-4
    weight_decay: float = 1e-5
    save_every: int = 200
    keep_best: bool = True
    kl_weight: float = 1.0
    ce_weight: float = 200.0
    teacher_top: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.kl_weight, self.ce_weight) < 0 or self.kl_weight + self.ce_weight == 0:
            raise InputError(
                f"settings kl_weight={self.kl_weight:g}, ce_weight={self.ce_weight:g}: neither may be below zero, nor "
                "both zero"
            )
        if self.teacher_top < 0:
            raise InputError(f"setting teacher_top={self.teacher_top}: must be 0 (all) or a number of tokens")

    def objective(self, teacher: Teacher | None) -> Objective:
        if teacher is None:
            raise InputError("a correction learns from the float model: give --teacher MODEL")
        return Distillation(teacher, self.kl_weight, self.ce_weight)


class Distillation(Objective):
    """kl_weight * KL(teacher || student) per window + ce_weight * cross-entropy per token."""

    def __init__(self, teacher: Teacher, kl_weight: float, ce_weight: float) -> None:
        self.teacher, self.kl_weight, self.ce_weight = teacher, kl_weight, ce_weight

    def loss(self, logits: Tensor, targets: Tensor, window: int, first: int, share: Share) -> Tensor:
        total = self.ce_weight * CrossEntropy().loss(logits, targets, window, first, share)
        if not self.kl_weight:
            return total
        return total + self.kl_weight / share.sequences * self.divergence(logits, window, first)

    def divergence(self, logits: Tensor, window: int, first: int) -> Tensor:
        """KL(teacher || student) in nats, summed over the positions of `logits` [n, V]."""
        import numpy as np
        import torch
        from torch.nn import functional

        ours = functional.log_softmax(logits, dim=-1)
        if not self.teacher.top:
            answers = torch.from_numpy(self.teacher.rows(window, first, len(logits)).astype(np.float32))
            theirs = functional.log_softmax(answers, dim=-1)
            return functional.kl_div(ours, theirs, reduction="sum", log_target=True)
        found, tokens = self.teacher.kept(window, first, len(logits))
        theirs = torch.from_numpy(found.copy())
        ours = ours.gather(1, torch.from_numpy(tokens))
        kept = (theirs.exp() * (theirs - ours)).sum()
        # what is left of both, as one more token
        rest, left = ((1 - each.exp().sum(1)).clamp_min(1e-9) for each in (theirs, ours))
        total: Tensor = kept + (rest * (rest.log() - left.log())).sum()
        return total

"""LoRA and two ways to set its speed: rsLoRA scales the product otherwise, LoRA+ moves B faster than A.

Source: "LoRA: Low-Rank Adaptation of Large Language Models" (Edward Hu, 2021, arXiv 2106.09685), section 4.1; "A Rank
Stabilization Scaling Factor for Fine-Tuning with LoRA" (Damjan Kalajdzievski, 2023, arXiv 2312.03732), section 3;
"LoRA+: Efficient Low Rank Adaptation of Large Models" (Soufiane Hayou, 2024, arXiv 2402.12354), section 4.

Idea: a frozen product gets a trained one of low rank beside it. Its scale is alpha / rank in LoRA; with alpha /
sqrt(rank) what it adds does not fade as the rank grows. B starts at zero and A does not, so at one rate A learns too
little in wide models: B takes `rate_ratio` times the rate of A.
Units and shapes: y = W x + s B A dropout(x), A [rank, in], B [out, rank] float32. learning_rate is that of A.
Differs from the papers: any packed form is a base (`--weights`), unless one is named the checkpoint's own numbers.
Cost: 16 bytes per adapter weight (itself, gradient, two moments), 8 with `optimizer=paged`.
Holds when: the change that a task needs is of low rank. With rank 1 LoRA and rsLoRA are the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from memwall.compress.tuning import TuneMethod


@dataclass(frozen=True, kw_only=True)
class Lora(TuneMethod):
    """Rank 8 on every projection, as EfficientLLM's examples have it; their alpha is not known, 16 is common."""

    name: ClassVar[str] = "lora"

    dropout: float = 0.0
    batch: int = 8
    learning_rate: float = 1e-4


@dataclass(frozen=True, kw_only=True)
class RsLora(Lora):
    """The scale does not shrink with the rank but with its root."""

    name: ClassVar[str] = "rslora"
    told: ClassVar[dict[str, Any]] = {"use_rslora": True}

    @property
    def scale(self) -> float:
        return self.alpha / math.sqrt(self.rank)


@dataclass(frozen=True, kw_only=True)
class LoraPlus(Lora):
    """rate_ratio: learning rate of B over that of A."""

    name: ClassVar[str] = "lora-plus"

    rate_ratio: float = 16.0

    def rate(self, parameter: str) -> float:
        return self.rate_ratio if parameter.endswith("lora_B") else 1.0

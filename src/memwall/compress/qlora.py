"""QLoRA: adapters trained over a base in 4-bit NormalFloat whose scales are quantized a second time.

Source: "QLoRA: Efficient Finetuning of Quantized LLMs" (Tim Dettmers, 2023, arXiv 2305.14314), sections 3 and 4.1;
settings as in "How Good Are Low-bit Quantized LLaMA3 Models?" (Wei Huang, 2024, arXiv 2404.14047).

Idea: weights of a trained model are close to normal, so 4-bit codes at the quantiles of a normal distribution, one
scale per 64 weights, lose little; the scales (8 bits each, less their mean, one float32 per 256) then cost 0.127 bits
per weight. The base is frozen; adapters on every projection take the gradient, which passes through the base.
Units and shapes: y = W^ x + (alpha / rank) B A dropout(x), A [rank, in], B [out, rank] float32.
Differs from the paper: numbers are float32, as processors compute in (the paper's bfloat16 halves activations on a
GPU); moments page to a file instead of to the host's memory, and only where the budget asks for it.
Cost: base bits per weight 4.127; 16 bytes per adapter weight (itself, gradient, two moments), 8 with paged moments.
Holds when: the base alone, at 4 bits, is near the float model; adapters do not repair what coarser codes lose here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from memwall.compress.tuning import TuneMethod


@dataclass(frozen=True, kw_only=True)
class QLora(TuneMethod):
    """The published settings: rank 64 on every projection, paged AdamW at a constant rate."""

    name: ClassVar[str] = "qlora"
    base: ClassVar[str] = "nf4-dq"

    rank: int = 64
    alpha: float = 16.0
    dropout: float = 0.1
    batch: int = 16
    learning_rate: float = 2e-4
    max_grad_norm: float = 0.3
    optimizer: str = "paged"

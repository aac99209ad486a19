"""Low-rank predictors of a ReLU feed-forward's active neurons: trained on what layers read, judged on other text.

Source: LLM in a flash (Keivan Alizadeh, 2023, arXiv 2312.11514), section 3.1 and appendix: scores = up (down x) + bias,
without anything between the two matrices, trained with a logistic loss in which active neurons, which are few, weigh as
much as the others together. x is the normed output of the same layer's attention.

Training begins at the best approximation of that rank to the layer's own first matrix on the inputs seen (a singular
value decomposition of the matrix times the root of the inputs' second moments), which is near the goal already; the
paper begins at random and has a hundred times the text. The threshold of a layer is set on tokens that training did not
see, so that a given share of the active neurons is missed; the paper's is a probability of one half.

Shapes: x [N, H] float32; first [F, H]; down [r, H], up [F, r], bias [F]. NumPy only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from memwall.errors import InputError

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """steps over batches of `batch` tokens drawn at random; rate: Adam's largest, falling to zero. missed: share of the
    active neurons that thresholds let go. held_out: share of the tokens, the last ones, on which thresholds are set.
    """

    rank: int = 64
    steps: int = 300
    batch: int = 256
    rate: float = 3e-3
    missed: float = 0.03
    held_out: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1 or self.steps < 0 or self.batch < 1 or not self.rate > 0:
            raise InputError(f"{self}: rank and batch must be 1 or more, steps not below zero, the rate above it")
        if not 0 < self.missed < 1 or not 0 < self.held_out < 1:
            raise InputError(f"missed {self.missed:g} and held_out {self.held_out:g} must be between 0 and 1")


@dataclass(slots=True)
class Predictor:
    """Scores above the threshold mean active."""

    down: np.ndarray
    up: np.ndarray
    bias: np.ndarray
    threshold: float = 0.0

    def scores(self, x: np.ndarray) -> np.ndarray:
        """[N, F]."""
        return (x @ self.down.T) @ self.up.T + self.bias

    def active(self, x: np.ndarray) -> np.ndarray:
        """[N, F] booleans."""
        return self.scores(x) > self.threshold


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """Against truth on other tokens. missed_weight: the missed neurons' share of the sum of activations."""

    active: float
    predicted: float
    recall: float
    precision: float
    missed_weight: float


def judge(predicted: np.ndarray, activations: np.ndarray) -> Judgement:
    """predicted [N, F] booleans; activations [N, F], zero where a neuron is not active."""
    active = activations != 0
    both = int((predicted & active).sum())
    size = np.abs(activations)
    return Judgement(
        active=float(active.mean()),
        predicted=float(predicted.mean()),
        recall=both / max(int(active.sum()), 1),
        precision=both / max(int(predicted.sum()), 1),
        missed_weight=float((size * ~predicted).sum() / max(float(size.sum()), 1e-30)),
    )


def best_low_rank(first: np.ndarray, x: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """(down, up) of that rank with the least squared error of up (down x) to first x over the inputs seen."""
    moments = (x.T @ x).astype(np.float64) / len(x)
    values, vectors = np.linalg.eigh(moments)
    roots = np.sqrt(np.maximum(values, 1e-9 * values[-1]))
    # directions of first * root that carry most: from the smaller of the two Gram matrices
    scaled = first.astype(np.float64) @ (vectors * roots)
    sizes, turns = np.linalg.eigh(scaled.T @ scaled)
    chosen = turns[:, np.argsort(sizes)[::-1][:rank]]
    down = (vectors / roots) @ chosen
    return np.ascontiguousarray(down.T, np.float32), (scaled @ chosen).astype(np.float32)


def train(
    first: np.ndarray,
    bias: np.ndarray | None,
    x: np.ndarray,
    settings: Training,
    *,
    cut: float = 0.0,
    inputs: np.ndarray | None = None,
    progress: Progress | None = None,
) -> Predictor:
    """A predictor of where first x + bias is above `cut`. inputs [N, H]: what it reads, if not x (for comparison).

    progress(done, steps).
    """
    rank = min(settings.rank, *first.shape)
    apart = max(int(settings.held_out * len(x)), 1)
    if len(x) < 2 * apart or len(x) < 64:
        raise InputError(f"{len(x)} tokens are too few to train a predictor on; give a longer text")
    shift = np.zeros(len(first), np.float32) if bias is None else bias.astype(np.float32)
    seen = x if inputs is None else inputs
    if inputs is None:
        down, up = best_low_rank(first, x[:-apart], rank)
        predictor = Predictor(down, up, shift - np.float32(cut))
    else:
        draw = np.random.default_rng(settings.seed + 1)
        down = (draw.standard_normal((rank, seen.shape[1])) / np.sqrt(seen.shape[1])).astype(np.float32)
        predictor = Predictor(down, np.zeros((len(first), rank), np.float32), np.zeros(len(first), np.float32))
    _descend(predictor, first, shift - np.float32(cut), x[:-apart], seen[:-apart], settings, progress)
    hits = predictor.scores(seen[-apart:])[x[-apart:] @ first.T + shift > cut]
    predictor.threshold = float(np.quantile(hits, settings.missed)) if len(hits) else 0.0
    return predictor


def _descend(
    predictor: Predictor, first: np.ndarray, shift: np.ndarray, x: np.ndarray, seen: np.ndarray,
    settings: Training, progress: Progress | None,
) -> None:  # fmt: skip
    """Adam on the balanced logistic loss, in place."""
    parts = [predictor.down, predictor.up, predictor.bias]
    moments = [(np.zeros_like(part), np.zeros_like(part)) for part in parts]
    draw = np.random.default_rng(settings.seed)
    scale = 1.0 / np.sqrt(np.mean(np.square(predictor.scores(seen[: settings.batch]))) + 1e-9)
    predictor.up *= scale  # logits of about one, wherever they began
    predictor.bias *= scale
    for step in range(1, settings.steps + 1):
        batch = draw.integers(0, len(x), min(settings.batch, len(x)))
        labels = x[batch] @ first.T + shift > 0
        inputs = seen[batch]
        low = inputs @ predictor.down.T
        scores = low @ predictor.up.T + predictor.bias
        share = max(float(labels.mean()), 1e-4)
        np.clip(scores, -30, 30, out=scores)
        error = 1 / (1 + np.exp(-scores)) - labels
        weights = np.array([0.5 / (1 - share), 0.5 / share], np.float32) / len(labels)  # float64 would slow all below
        error *= weights[labels.astype(np.int8)]
        slopes = [(error @ predictor.up).T @ inputs, error.T @ low, error.sum(0)]
        rate = settings.rate * (1 - (step - 1) / settings.steps)
        for part, slope, (mean, square) in zip(parts, slopes, moments, strict=True):
            mean += 0.1 * (slope - mean)
            square += 0.01 * (slope * slope - square)
            ahead = mean / (1 - 0.9**step)
            part -= np.float32(rate) * ahead / (np.sqrt(square / (1 - 0.99**step)) + 1e-8)
        if progress is not None:
            progress(step, settings.steps)

"""DoRA over a frozen base of any form: what each output of an adapted product is lengthened by.

Source: "DoRA: Weight-Decomposed Low-Rank Adaptation" (Shih-Yang Liu, 2024, arXiv 2402.09353), section 4.1, equation 5;
rows and names as in PEFT, whose `lora_magnitude_vector` has one length for each output.

Idea: the adapted weight is m (W + s B A) / ||W + s B A||, row by row. The fraction m / || || is one number for each
output once the adapter is trained, so the product is (m / || ||) (W x + s B A x): nothing is merged and W stays packed.
The lengths are those of the base at hand, as its codes decode, which is how PEFT takes them for quantized bases.
Units and shapes: float32 [layers, 2, out] for each target: y becomes y + rows[layer, 0] y + rows[layer, 1]; the second
takes back what the first did to the bias.
Cost: 8 bytes for each output. Made once, from a slab of decoded rows at a time.
Holds when: the base does not change its form while the adapter is worn.
"""

from __future__ import annotations

import numpy as np

from memwall import kernels
from memwall.kernels import Matrix
from memwall.kernels.lora import TARGETS
from memwall.models.config import ModelConfig
from memwall.models.lora import LoraWeights
from memwall.models.weights import Weights

SLAB_VALUES = 1 << 18
"""Weights that are decoded at once: one mebibyte."""


def row_bytes(adapter: LoraWeights, config: ModelConfig) -> int:
    """Bytes of what `row_changes` gives; 0 for a plain adapter."""
    return 8 * config.num_layers * sum(outputs for _, _, outputs in adapter.shapes.values()) if adapter.dora else 0


def row_changes(adapter: LoraWeights, weights: Weights, config: ModelConfig) -> dict[str, np.ndarray]:
    """By target; empty for a plain adapter."""
    if not adapter.dora:
        return {}
    found = {
        name: np.zeros((config.num_layers, 2, outputs), np.float32) for name, (_, _, outputs) in adapter.shapes.items()
    }
    for (layer, target), magnitude in adapter.magnitudes().items():
        factors = adapter.factors(layer, target)
        assert factors is not None
        parent = "self_attn" if target in TARGETS[:4] else "mlp"
        name = f"model.layers.{layer}.{parent}.{target}"
        lengths = row_lengths(weights.matrices[f"{name}.weight"], *factors, adapter.scale)
        found[target][layer, 0] = magnitude / np.maximum(lengths, 1e-30) - 1
        bias = weights.vectors.get(f"{name}.bias")
        if bias is not None:
            found[target][layer, 1] = -found[target][layer, 0] * bias
    return found


def row_lengths(matrix: Matrix, a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    """||W + scale B A|| of each row, float32 [out]; a [rank, in], b [out, rank]."""
    step = max(min(SLAB_VALUES // max(matrix.cols, 1), matrix.rows), 1)
    slab, found = np.empty((step, matrix.cols), np.float32), np.empty(matrix.rows, np.float32)
    for start in range(0, matrix.rows, step):
        rows = slab[: min(step, matrix.rows - start)]
        kernels.gather_rows(matrix, np.arange(start, start + len(rows)), rows)
        rows += (np.float32(scale) * b[start : start + len(rows)]) @ a
        found[start : start + len(rows)] = np.sqrt(np.einsum("ij,ij->i", rows, rows))
    return found

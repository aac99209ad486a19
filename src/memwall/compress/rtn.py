"""Round to nearest: every weight to the closest level of its group, no data needed.

Source: the baseline of every quantization paper; as in "How Good Are Low-bit Quantized LLaMA3 Models?" (W. Huang,
2024, arXiv 2404.14047), section 2.

Idea: the codec's own encoding. It is the yardstick: what a method with calibration must beat, and what it must become
when the inputs carry no information (H = I).

Units and shapes: weight [rows, cols] -> Packed of the codec.
Differs from the paper: groups of 64 by default, scales in float16, a symmetric form from 4 bits on.
Cost: one pass over the weights; resident, the packed form and a slab of float32.
Holds when: 4 bits or more; below that errors of neighbouring weights add up in the outputs.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from memwall import kernels
from memwall.compress.base import MethodConfig, Statistics, WeightMethod
from memwall.formats import Packed


class RoundToNearest(WeightMethod):
    """The codec's own encoding."""

    name: ClassVar[str] = "rtn"
    needs_statistics: ClassVar[bool] = False

    def compress(self, weight: np.ndarray, statistics: Statistics | None, config: MethodConfig) -> Packed:
        return kernels.encode(config.spec, weight)

    def work_bytes(self, num_rows: int, num_columns: int) -> int:
        return 0

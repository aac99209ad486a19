"""SmoothQuant: move the outliers of activations into the weights, where 8 bits hold both.

Source: "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models" (Guangxuan Xiao,
2022, arXiv 2211.10438), section 4, equation 4; official code: github.com/mit-han-lab/smoothquant. As in "How Good Are
Low-bit Quantized LLaMA3 Models?" (W. Huang, 2024, arXiv 2404.14047).

Idea: a few channels of a layer's inputs are a hundred times larger than others and take all of an 8-bit range; weights
are even. Inputs are divided by s = max|X|^strength / max|W|^(1 - strength) per channel, which the preceding norm takes
in, and weights are multiplied by it. Then both are rounded to nearest.

Units and shapes: peaks of a layer's inputs [cols] -> a scale at the inputs of attention and of the feed-forward block.
Differs from the paper: weights have a scale per group of columns instead of one per output (int8, groups of 64 unless
the format says so), and products round activations with one per group of columns as they come, which is finer than the
paper's per token; there is no static variant. o and down keep their inputs, as in the paper.
Cost: nothing at run time; while compressing, one pass of the float model over the calibration text.
Holds when: 6 bits or more on both sides; the calibration text shows the channels that are large.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from memwall import kernels
from memwall.compress.base import MethodConfig, Statistics, WeightMethod
from memwall.compress.calibration import LayerStream, shared_input
from memwall.compress.transforms import Scale, Site, Transform, sites
from memwall.errors import InputError
from memwall.formats import Packed, codec
from memwall.formats.integer import IntegerCodec

LEAST_FACTOR = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class SmoothQuant(WeightMethod):
    """strength: how much of the activations' spread moves to the weights (alpha of the paper), 0 to 1."""

    name: ClassVar[str] = "smoothquant"
    needs_statistics: ClassVar[bool] = True
    transforms: ClassVar[bool] = True
    default_bits: ClassVar[str] = "int8"

    strength: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise InputError(f"strength is {self.strength:g}; it must be between 0 and 1, such as 0.5")

    def check(self, spec: str) -> None:
        if not isinstance(codec(spec), IntegerCodec):
            raise InputError(f"smoothquant makes integer formats such as int8, not {spec}: add --method rtn")

    def transform(self, stream: LayerStream, form_of: Callable[[str], str]) -> Transform:
        transform = Transform()
        for layer in range(stream.config.num_layers):
            found = [site for site in sites(stream.config, layer) if site.kind in ("attention", "mlp")]
            readers = linear_readers(stream, found)
            collector = stream.collect(layer, readers, advance=True)
            try:
                statistics = collector.finish()
                for site in found:
                    peaks = [statistics[shared_input(name)].peak for name in site.readers if name in readers]
                    weights = [stream.checkpoint.alone(name) for name in site.readers if name in readers]
                    transform.put(site, Scale(self.factors(peaks, weights)))
            finally:
                collector.release()
        return transform

    def factors(self, peaks: list[np.ndarray | None], weights: list[np.ndarray]) -> np.ndarray:
        """Equation 4 over all matrices that read the same inputs: peaks [cols] of |X|, weights [rows, cols]."""
        inputs = np.max([peak for peak in peaks if peak is not None], axis=0).clip(LEAST_FACTOR)
        largest = np.max([np.abs(weight).max(axis=0) for weight in weights], axis=0).astype(np.float32)
        factors = inputs**self.strength / largest.clip(LEAST_FACTOR) ** (1 - self.strength)
        return np.asarray(factors.clip(LEAST_FACTOR), np.float32)

    def compress(self, weight: np.ndarray, statistics: Statistics | None, config: MethodConfig) -> Packed:
        return kernels.encode(config.spec, weight)

    def work_bytes(self, num_rows: int, num_columns: int) -> int:
        return 0


def linear_readers(stream: LayerStream, found: list[Site]) -> list[str]:
    """Readers of the sites whose inputs are observed: all but routers."""
    linear = {tensor.name for tensor in stream.config.tensors() if tensor.role in ("linear", "expert")}
    return [name for site in found for name in site.readers if name in linear]

"""AWQ: scale up the input channels that matter before rounding, and clip what matters least.

Source: "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration" (Ji Lin, 2023, arXiv
2306.00978), section 3, equations 4 and 5; official code: github.com/mit-han-lab/llm-awq. As in "How Good Are Low-bit
Quantized LLaMA3 Models?" (W. Huang, 2024, arXiv 2404.14047).

Idea: weights that meet large activations should be rounded finely. Multiplying their channel by s before rounding, and
dividing the activations by it, makes their error smaller as long as the group's range hardly grows. s = mean|X|^ratio,
with the ratio that changes outputs least; 1/s goes into whatever comes before. Then each group's range is shrunk as far
as that helps outputs.

Units and shapes: mean |X| [cols] and X^T X -> a scale per site of a layer; weights to integer codes.
Differs from the paper: outputs of attention and of the gates are compared at the end of their decoder layer, over one
sequence; o and down, which are read alone, by trace(D H D^T) over all of the text, and so is clipping. Where heads
share values their channels share a factor; the published code leaves o as it is then.
Cost: nothing at run time; while compressing, 40 layers of one sequence each, and 12 bytes per weight of a layer.
Holds when: 3 or 4 bits, groups of 128 or fewer, activations whose channels differ in size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from memwall import kernels
from memwall.compress.base import MethodConfig, Statistics, WeightMethod
from memwall.compress.calibration import LayerStream, shared_input
from memwall.compress.smoothquant import linear_readers
from memwall.compress.transforms import TRANSFORM_BYTES, Scale, Site, Transform, scaled, sites
from memwall.errors import InputError
from memwall.formats import Packed, codec
from memwall.formats.integer import IntegerCodec

RATIOS = tuple(step / 20 for step in range(20))
CLIP_STEPS = 10
LEAST_FACTOR = 1e-4
# queries and keys meet in a product whose error their own outputs do not tell: they are not clipped
UNCLIPPED = ("q_proj", "k_proj")
OWNER = "compress"


@dataclass(frozen=True, slots=True, kw_only=True)
class Awq(WeightMethod):
    """clip: whether ranges are shrunk."""

    name: ClassVar[str] = "awq"
    needs_statistics: ClassVar[bool] = True
    transforms: ClassVar[bool] = True
    default_bits: ClassVar[str] = "int4-g128-asym"

    clip: bool = True

    def check(self, spec: str) -> None:
        _integers(spec)

    # -- scales ----------------------------------------------------------------------------------------------------

    def transform(self, stream: LayerStream, form_of: Callable[[str], str]) -> Transform:
        transform = Transform()
        for layer in range(stream.config.num_layers):
            found = scaled(sites(stream.config, layer))
            readers = linear_readers(stream, found)
            sizes = {
                t.name: t.shape[0] * t.shape[1]
                for t in stream.config.tensors()
                if t.layer == layer and len(t.shape) == 2
            }
            charge = stream.arena.charge(OWNER, TRANSFORM_BYTES * sum(sizes.values()))
            collector = stream.collect(layer, readers)
            try:
                statistics = collector.finish()
                layer_outputs = _LayerOutputs(stream, layer)
                for site in found:
                    held = {n: statistics[shared_input(n)] for n in site.readers if n in readers}
                    if all(each.num_tokens for each in held.values()):
                        transform.put(site, self.best_scale(site, held, layer_outputs, form_of))
            finally:
                collector.release()
                charge.release()
            stream.advance(layer)
        return transform

    def best_scale(
        self, site: Site, held: Mapping[str, Statistics], outputs: _LayerOutputs, form_of: Callable[[str], str]
    ) -> Scale:
        """The scale whose ratio changes outputs least once the site's readers are rounded. held: by reader."""
        weights = {name: np.asarray(outputs.stream.checkpoint.alone(name), np.float32) for name in held}
        means = np.mean([_means(each) for each in held.values()], axis=0)
        if site.repeats > 1:
            means = means.reshape(site.heads, site.repeats, -1).mean(axis=1).reshape(-1)
        best, least = Scale(np.ones(site.width, np.float32)), np.inf
        for ratio in RATIOS:
            scale = Scale(factors(means, ratio))
            reading = scale.repeated(site.heads, site.repeats) if site.kind == "values" else scale
            rounded = {name: _rounded(weight, reading, form_of(name)) for name, weight in weights.items()}
            if site.kind in ("attention", "mlp"):
                error = outputs.error(rounded)
            else:
                error = sum(held[name].error(rounded[name] - weight) for name, weight in weights.items())
            if error < least:
                best, least = scale, error
        return best

    # -- one matrix --------------------------------------------------------------------------------------------------

    def compress(self, weight: np.ndarray, statistics: Statistics | None, config: MethodConfig) -> Packed:
        form = _integers(config.spec)
        if statistics is None or not self.clip or any(part in config.tensor for part in UNCLIPPED):
            return kernels.encode(config.spec, weight)
        rows, columns = weight.shape
        groups = form.num_groups(columns)
        codes = np.empty((rows, columns), np.uint8)
        scales = np.empty((rows, groups), np.float16)
        mins = None if form.symmetric else np.empty((rows, groups), np.float16)
        for group in range(groups):
            members = slice(group * form.group, min((group + 1) * form.group, columns))
            values = np.asarray(weight[:, members], np.float32)
            hessian = statistics.hessian[members, members]
            least = np.full(rows, np.inf, np.float32)
            for step in range(CLIP_STEPS):
                shrunk = values * np.float32(1 - step / (2 * CLIP_STEPS))
                scale, low = form.fit(shrunk)
                found = form.quantize(values, scale, low)
                change = form.dequantize(found, scale, low) - values
                cost = np.einsum("ij,ij->i", change @ hessian, change)
                better = cost < least
                least[better], scales[better, group] = cost[better], scale[better]
                codes[better, members] = found[better]
                if mins is not None and low is not None:
                    mins[better, group] = low[better]
        return form.pack(codes, scales, mins)

    def work_bytes(self, num_rows: int, num_columns: int) -> int:
        return num_rows * (4 * num_columns + 6 * 4 * 128)


class _LayerOutputs:
    """What one layer makes of a calibration sequence, to compare changed matrices with."""

    def __init__(self, stream: LayerStream, layer: int) -> None:
        self.stream = stream
        self.layer = layer
        self._inputs = stream.hidden[:1].copy()
        self._expected = self._run({})

    def _run(self, packed: Mapping[str, Packed]) -> np.ndarray:
        states = self._inputs.copy()
        self.stream.run_layer(self.layer, states, packed)
        return states

    def error(self, rounded: Mapping[str, np.ndarray]) -> float:
        """Squared error of the layer's outputs with these matrices [rows, cols] in place."""
        found = self._run({name: codec("float32").encode(weight) for name, weight in rounded.items()})
        found -= self._expected
        return float(np.einsum("sij,sij->", found, found, dtype=np.float64))


def factors(means: np.ndarray, ratio: float) -> np.ndarray:
    """mean|X|^ratio [cols], so scaled that the largest and the smallest multiply to one."""
    found = np.maximum(means**ratio, LEAST_FACTOR)
    return np.asarray(found / np.sqrt(found.max() * found.min()), np.float32)


def _means(statistics: Statistics) -> np.ndarray:
    assert statistics.magnitude is not None
    return np.asarray(statistics.magnitude / statistics.num_tokens)


def _rounded(weight: np.ndarray, reading: Scale, spec: str) -> np.ndarray:
    """What rounding makes of the scaled weight, scaled back."""
    decoded = codec(spec).decode(kernels.encode(spec, reading.read(weight)))
    return np.asarray(reading.produce(decoded), np.float32)


def _integers(spec: str) -> IntegerCodec:
    form = codec(spec)
    if not isinstance(form, IntegerCodec):
        raise InputError(f"awq makes integer formats such as int4-g128-asym, not {spec}: add --method rtn")
    return form

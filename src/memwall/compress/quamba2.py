"""Quamba2: Mamba models in 4 or 8-bit weights, with activations and state of 8 bits on scales fixed beforehand.

Source: "Quamba2: A Robust and Scalable Post-training Quantization Framework for Selective State Space Models"
(Hung-Yueh Chiang, 2025, ICML, arXiv 2503.22879), section 4; official code: github.com/enyac-group/Quamba. Of Mamba-1,
the clipping of "Quamba" (Hung-Yueh Chiang, 2024, arXiv 2410.13229).

Idea: errors in what a scan reads add up along the sequence, and a few channels are large. But channels keep their order
from in_proj to out_proj, and the same ones are large whatever the text: so they are put in order once, offline, in
ranges of like size with a scale each (`sort_cluster`); B and C get one per SSD group. The rest is turned by Hadamard
matrices, which spread outliers, and weights are rounded by GPTQ.

Forms: w8a8 (`static8`), w4a8 (`static4`), w4a16 (int4 in groups), w4ax (w4a8 but for the layers that suffer most).
Units and shapes: one layer's tensors, float32 -> packed matrices, vectors and scales; scale = largest / 127.
Differs from the paper: layers are calibrated on what compressed layers before them hand on, as elsewhere in this house;
calibration reads 32 sequences of 512 tokens of the given text unless told (512 there); w4ax takes layers by their
measured error, greedily (the paper searches by evolution). Mamba-1's x_proj and dt_proj stay in 8 and 16 bits.
Cost: 8 or 4 + 16 / group bits per weight; state and inputs of the convolution one byte a number. GPTQ's time.
Holds when: widths are 1, 12 or 20 times a power of two (`kernels.scan`); calibration resembles what will be read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from memwall.compress import sweep
from memwall.compress.base import MethodConfig, Statistics, WeightMethod
from memwall.compress.gptq import Gptq
from memwall.compress.sort_cluster import Order, sort_and_cluster
from memwall.compress.ssm_run import Seen
from memwall.compress.static_columns import StaticColumns
from memwall.errors import InputError
from memwall.formats import Packed, codec
from memwall.formats.static8 import GROUPS, StaticCodec
from memwall.models.ssm_config import Quantized, SsmConfig
from memwall.models.ssm_tables import channel_ranges

LEAST_SCALE = 1e-6
MIXED = "w4ax"
FORMS = ("w8a8", "w4a8", "w4a16", MIXED)
X_SCALES, BC_SCALES, ROUNDINGS = ("clusters", "tensor", "percentile"), ("groups", "tensor"), ("gptq", "rtn")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quamba2(WeightMethod):
    """head_ranges, channel_ranges: clusters of heads in a group, and ranges of channels in each (n_h, n_d).

    x_scales: clusters, or for comparison one per tensor of the largest value or of the `percentile` (0: 0.9995; always
    of Mamba-1). bc_scales: groups or tensor. rounding: gptq or rtn. state: int8 or float32. samples: sequences of 512
    tokens of calibration. a16_share: layers of w4ax that keep 16-bit activations (14 of 56 in the paper's 8B model).
    """

    name: ClassVar[str] = "quamba2"
    needs_statistics: ClassVar[bool] = True
    default_bits: ClassVar[str] = "w4a16"

    head_ranges: int = 4
    channel_ranges: int = 4
    x_scales: str = "clusters"
    bc_scales: str = "groups"
    rounding: str = "gptq"
    state: str = "int8"
    percentile: float = 0.9995
    samples: int = 32
    a16_share: float = 0.25

    def __post_init__(self) -> None:
        choices = {"x_scales": X_SCALES, "bc_scales": BC_SCALES, "rounding": ROUNDINGS, "state": ("int8", "float32")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name}={getattr(self, name)}: one of {', '.join(allowed)}")
        for name, low, high in (("head_ranges", 1, 64), ("channel_ranges", 1, 64), ("samples", 1, 1 << 20)):
            if not low <= getattr(self, name) <= high:
                raise InputError(f"{name}={getattr(self, name)}: a whole number from {low} to {high}")
        for name in ("percentile", "a16_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name}={getattr(self, name)}: a share from 0 to 1")

    def form(self, bits: float | str) -> str:
        name = bits.lower() if isinstance(bits, str) else {8.0: "w8a8", 4.0: "w4a16"}.get(bits, f"{bits:g}")
        if name not in FORMS:
            raise InputError(f"bits {bits}: quamba2 makes {', '.join(FORMS)}")
        return name

    def check(self, spec: str) -> None:
        raise InputError("quamba2 compresses Mamba models; of models with attention use gptq or another method")

    def compress(self, weight: np.ndarray, statistics: Statistics | None, config: MethodConfig) -> Packed:
        form = codec(config.spec)
        if self.rounding == "rtn":
            return form.encode(weight.astype(np.float32))
        if not isinstance(form, StaticCodec):
            return Gptq().compress(weight, statistics, config)
        factor = sweep.factor_for(statistics, weight.shape[1], config.damping, config.activation_order)
        return sweep.sweep(weight, factor, StaticColumns(form, weight.astype(np.float32)))

    def work_bytes(self, num_rows: int, num_columns: int) -> int:
        return sweep.work_bytes(num_rows, num_columns)

    # -- one layer ----------------------------------------------------------------------------------------------------

    def order(self, ssm: SsmConfig, seen: Seen) -> Order:
        """The order of channels and heads, from what the layer showed as it was (Mamba-2)."""
        return sort_and_cluster(seen.means, ssm.num_heads, ssm.num_groups, self.head_ranges, self.channel_ranges)

    def quantized(self, ssm: SsmConfig, layers: tuple[str, ...], head: str) -> Quantized:
        """What the configuration of the compressed model says."""
        first = ssm.is_first
        ranges = (1, 1) if first else (self.head_ranges, self.channel_ranges)
        return Quantized(layers=layers, head=head, state=self.state, head_ranges=ranges[0], channel_ranges=ranges[1])

    def scales(self, ssm: SsmConfig, seen: Seen, order: Order | None) -> dict[str, np.ndarray]:
        """The fixed scales of a layer by name; ssm: of the quantized model; seen: of the layer in its new order."""
        assert ssm.quantized is not None
        sizes: dict[str, np.ndarray] = {}
        if order is not None:
            sizes = {"heads": order.head_sizes.reshape(-1), "channels": order.channel_sizes.reshape(-1)}
        ranges = channel_ranges(ssm, sizes)
        total = ssm.num_groups * ssm.quantized.ranges
        x = _largest(seen.channels[: ssm.inner_size], ranges, total)
        if ssm.is_first or self.x_scales == "percentile":
            x = np.full(total, np.mean(seen.clipped))
        elif self.x_scales == "tensor":
            x = np.full(total, x.max())
        if ssm.is_first:
            b, c = np.array([seen.parts["b"]]), np.array([seen.parts["c"]])
            sizes["dt"] = _scale(np.array([seen.parts["dt"]]))
        else:
            behind = seen.channels[ssm.inner_size :].reshape(2, ssm.num_groups, -1).max(axis=2)
            b, c = (row if self.bc_scales == "groups" else np.full_like(row, row.max()) for row in behind)
        made = {
            "input": _scale(np.array([seen.peaks["mixer.in_proj.weight"]])),
            "proj": _scale(np.array([seen.parts[part] for part in ssm.proj_parts])),
            "x": _scale(x),
            "b": _scale(b),
            "c": _scale(c),
            "state": _scale(_largest(seen.states, ranges, total)),
            "out": _scale(np.array([seen.peaks["mixer.out_proj.weight"]])),
            **sizes,
        }
        return {f"mixer.scales.{name}": values.astype(np.float32) for name, values in made.items()}

    def pack(
        self, ssm: SsmConfig, form: str, tensors: Mapping[str, np.ndarray], statistics: Mapping[str, Statistics]
    ) -> dict[str, Packed]:
        """A layer's tensors in a form: matrices packed, the others as floats. `float`: matrices too."""
        made = {}
        for name, tensor in tensors.items():
            spec = "float32"
            if name in ("mixer.in_proj.weight", "mixer.out_proj.weight"):
                spec = matrix_spec(form, tensor.shape[1])
            elif form != "float" and name in ("mixer.x_proj.weight", "mixer.dt_proj.weight"):
                spec = "int8-g64" if "x_proj" in name else "float16"
            if spec.startswith("float") or name == "mixer.x_proj.weight":
                made[name] = codec(spec).encode(np.ascontiguousarray(tensor))
            else:
                made[name] = self.compress(tensor, statistics.get(name), MethodConfig(spec=spec, tensor=name))
        return made


def matrix_spec(form: str, num_columns: int) -> str:
    """The format of a matrix of so many inputs; InputError where no group divides them."""
    if form == "float":
        return "float32"
    if form == "w4a16":
        return "int4-g128"
    group = next((size for size in reversed(GROUPS) if num_columns % size == 0), None)
    if group is None:
        raise InputError(f"{form}: {num_columns} inputs of a matrix are no multiple of 32; use --bits w4a16")
    return "static8" if form == "w8a8" else f"static4-g{group}"


def _scale(peak: np.ndarray) -> np.ndarray:
    return np.maximum(np.asarray(peak, np.float64) / 127, LEAST_SCALE)


def _largest(values: np.ndarray, ranges: np.ndarray, total: int) -> np.ndarray:
    """Of the channels of each range, along the first axis; zero where a range has none."""
    most = np.zeros((total, *values.shape[1:]), np.float64)
    np.maximum.at(most, ranges, values)
    return most

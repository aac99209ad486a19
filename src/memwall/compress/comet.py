"""COMET's FMPQ: 4-bit weights, and for each block of channels the bits that activations need there.

Source: "COMET: Towards Practical W4A4KV4 LLMs Serving" (Lian Liu, 2024, ASPLOS 2025, arXiv 2410.12168), fine-grained
mixed-precision quantization; no official code was found.

Idea: in some channels activations are many times larger than in the rest, the same ones for every token. Channels are
sorted by how large they get over the calibration text, so that these fill few blocks, and a product reads its weights'
columns in the same order. The order is put into the tensors around where that changes nothing (`transforms`): one order
of the residual stream for the whole model, one inside each feed-forward block. Where an input has outliers that no such
order gathers, it is gathered when it is rounded. All blocks begin at 4 bits; the block whose promotion to 8 takes away
the most error of the outputs per added work is promoted, until what is left is small.

Units and shapes: weight [rows, cols] -> Packed of `formats.comet`; peaks [cols] of |X|; errors are shares of the
squared outputs of all matrices that read an input together.
Differs from the paper: threshold, quantile and search are not published there; the threshold of six medians and the
search follow what others report of outliers. Weights are swept as in GPTQ unless weights=rtn; the paper leaves open how
they are rounded. Embedding and head stay in half precision.
Cost: at run time none for what is folded, one indexed read per number for what is gathered. While compressing, one
pass for peaks, one per layer for samples of its inputs, and per input a product of the sample with its readers.
Holds when: the calibration text shows the channels that are large; inputs have at most 65,536 channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from memwall import kernels
from memwall.compress import sweep
from memwall.compress.base import MethodConfig, Statistics, WeightMethod
from memwall.compress.calibration import LayerStream, shared_input
from memwall.compress.gptq import Gptq
from memwall.compress.transforms import Permute, Transform, of_kind, residual, sites
from memwall.errors import InputError
from memwall.formats import Packed, codec
from memwall.formats.comet import CometCodec, with_wide
from memwall.kernels.comet import rounded

SAMPLE_ROWS = 256
WEIGHTS, WIDTHS = ("gptq", "rtn"), ("search", "outliers", "narrow", "wide")


@dataclass(frozen=True, slots=True, kw_only=True)
class Comet(WeightMethod):
    """weights: how they are rounded. permute: sort channels; gather: also where an order cannot be folded. outlier: a
    channel whose peak is so many times the median peak is one. widths: `search`, every block with an outlier wide
    (`outliers`), or all alike (`narrow`, `wide`). tolerance: error that the search leaves above that of 8 bits. most:
    share of wide blocks.
    """

    name: ClassVar[str] = "comet"
    needs_statistics: ClassVar[bool] = True
    transforms: ClassVar[bool] = True
    default_bits: ClassVar[str] = "comet"

    weights: str = "gptq"
    permute: bool = True
    gather: bool = True
    outlier: float = 6.0
    widths: str = "search"
    tolerance: float = 0.01
    most: float = 1.0

    def __post_init__(self) -> None:
        for what, found, known in (("weights", self.weights, WEIGHTS), ("widths", self.widths, WIDTHS)):
            if found not in known:
                raise InputError(f"{what} {found!r}: choose one of {', '.join(known)}")
        if not self.outlier > 1:
            raise InputError(f"outlier is {self.outlier:g}; it counts medians and must be above 1, such as 6")
        if not 0 <= self.tolerance <= 1 or not 0 <= self.most <= 1:
            raise InputError("tolerance and most are shares: give numbers between 0 and 1, such as 0.01")

    def form(self, bits: float | str) -> str | None:
        if isinstance(bits, str):
            return codec(bits).spec
        if bits != 4:
            raise InputError(f"bits {bits:g}: comet makes weights of 4 bits: leave --bits out, or give comet-g64")
        return codec(self.default_bits).spec

    def check(self, spec: str) -> None:
        if not isinstance(codec(spec), CometCodec):
            raise InputError(f"comet makes its own formats, such as comet-g128 and comet-g64, not {spec}")

    # -- permutation -------------------------------------------------------------------------------------------------

    def transform(self, stream: LayerStream, form_of: Callable[[str], str]) -> Transform:
        transform = Transform()
        if not self.permute:
            return transform
        config = stream.config
        ratios = np.zeros(config.hidden_size, np.float32)
        for layer in range(config.num_layers):
            found = sites(config, layer)
            linear = {tensor.name for tensor in config.tensors() if tensor.role in ("linear", "expert")}
            names = [name for site in found for name in site.readers if name in linear]
            sampler = stream.sample(layer, names, 1, advance=True)
            try:
                for site in found:
                    peaks = [sampler.peaks[shared_input(name)] for name in site.readers if name in linear]
                    if site.kind in ("attention", "mlp"):
                        np.maximum(ratios, over_median(np.max(peaks, axis=0)), out=ratios)
                for site in of_kind(found, "inner"):
                    transform.put(site, Permute(descending(sampler.peaks[shared_input(site.readers[0])])))
            finally:
                sampler.release()
        transform.put(residual(config), Permute(descending(ratios)))
        return transform

    def order(self, peaks: np.ndarray | None, group: int) -> np.ndarray | None:
        """The order in which a matrix gathers its inputs; None where theirs has as few blocks with outliers."""
        if peaks is None or not (self.permute and self.gather):
            return None
        outliers = over_median(peaks) > self.outlier
        held = np.count_nonzero(blockwise(outliers, group).any(axis=1))
        return descending(peaks) if held > -(-np.count_nonzero(outliers) // group) else None

    # -- weights -----------------------------------------------------------------------------------------------------

    def compress(self, weight: np.ndarray, statistics: Statistics | None, config: MethodConfig) -> Packed:
        form = codec(config.spec)
        if not isinstance(form, CometCodec):
            return kernels.encode(config.spec, weight)  # embedding and head
        order = None if statistics is None else self.order(statistics.peak, form.group)
        if order is not None:
            weight = np.ascontiguousarray(weight[:, order])
        if self.weights == "rtn" or statistics is None:
            inner = kernels.encode(form.inner.spec, weight)
        else:
            seen = statistics
            if order is not None:
                seen = Statistics(np.ascontiguousarray(seen.hessian[np.ix_(order, order)]), seen.num_tokens)
            inner = Gptq().compress(weight, seen, replace(config, spec=form.inner.spec))
        narrow = np.zeros(form.blocks(weight.shape[1]), np.uint8)
        return replace(form, wide=0, gather=order is not None).around(inner, narrow, order)

    def work_bytes(self, num_rows: int, num_columns: int) -> int:
        swept = sweep.work_bytes(num_rows, num_columns) if self.weights == "gptq" else 0
        return swept + 4 * num_columns * (num_rows + num_columns)

    # -- widths of blocks ----------------------------------------------------------------------------------------------

    def finish_layer(self, stream: LayerStream, layer: int, made: dict[str, Packed]) -> dict[str, Packed]:
        """The same weights with the widths that this layer's inputs ask for."""
        readers: dict[str, list[str]] = {}
        for name, packed in made.items():
            if isinstance(codec(packed.spec), CometCodec):
                readers.setdefault(shared_input(name), []).append(name)
        names = [name for found in readers.values() for name in found]
        if not names:
            return made
        found = dict(made)
        sampler = stream.sample(layer, names, SAMPLE_ROWS)
        try:
            for source, together in readers.items():
                held = [made[name] for name in together]
                order = held[0].buffers.get("order")
                x, peaks = sampler.sample(source), sampler.peaks[source]
                if order is not None:
                    x, peaks = np.ascontiguousarray(x[:, order]), peaks[order]
                work_bytes = 4 * sum(each.size for each in held) + 16 * len(x) * sum(each.shape[0] for each in held)
                charge = stream.arena.charge("compress", work_bytes)
                try:
                    wide = self.wide_blocks(x, peaks, held)
                finally:
                    charge.release()
                found.update({name: with_wide(made[name], wide) for name in together})
        finally:
            sampler.release()
        return found

    def wide_blocks(self, x: np.ndarray, peaks: np.ndarray, readers: Sequence[Packed]) -> np.ndarray:
        """Which blocks take 8 bits, bool [blocks]. x [rows, cols], peaks in stored order; readers: of x, all."""
        form = CometCodec.parse(readers[0].spec)
        blocks = form.blocks(x.shape[1])
        if self.widths in ("narrow", "wide"):
            return np.full(blocks, self.widths == "wide")
        most = int(self.most * blocks)
        if self.widths == "outliers" or not len(x):
            ratios = over_median(peaks)
            largest = blockwise(ratios, form.group).max(axis=1)
            wide = largest > self.outlier
            return wide & (np.argsort(np.argsort(-largest, kind="stable"), kind="stable") < most)
        weights = np.concatenate([CometCodec.parse(each.spec).stored(each) for each in readers])
        return promoted(x, weights, form.group, self.tolerance, most)


def descending(sizes: np.ndarray) -> np.ndarray:
    """Places of the largest first; equal ones stay in their order."""
    return np.argsort(-sizes, kind="stable")


def over_median(peaks: np.ndarray) -> np.ndarray:
    """How many times the median peak each channel's is."""
    return np.asarray(peaks / max(float(np.median(peaks)), 1e-12), np.float32)


def blockwise(values: np.ndarray, group: int) -> np.ndarray:
    """values [cols] -> [blocks, group], a short last block filled with zeros."""
    blocks = -(-len(values) // group)
    padded = np.zeros(blocks * group, values.dtype)
    padded[: len(values)] = values
    return padded.reshape(blocks, group)


def promoted(x: np.ndarray, weights: np.ndarray, group: int, tolerance: float, most: int) -> np.ndarray:
    """The search: blocks from 4 to 8 bits, by error taken away per column, until what is left is at most `tolerance` of
    the outputs' square above what 8 bits everywhere leave, or `most` blocks are wide.

    x [rows, cols], weights [outputs, cols] -> bool [blocks].
    """
    blocks = -(-x.shape[1] // group)
    wide = np.zeros(blocks, bool)
    narrow_x, wide_x = (x - rounded(x, group, np.full(blocks, each)) for each in (False, True))

    def error(difference: np.ndarray, block: int) -> np.ndarray:
        part = slice(block * group, (block + 1) * group)
        return np.asarray(difference[:, part] @ weights[:, part].T)

    left, least = np.zeros((2, len(x), len(weights)), np.float32)
    gains = np.zeros(blocks)
    for block in range(blocks):
        narrow, promoted_error = error(narrow_x, block), error(wide_x, block)
        left += narrow
        least += promoted_error
        columns = min(group, x.shape[1] - block * group)
        gains[block] = (_square(narrow) - _square(promoted_error)) / columns
    allowed = tolerance * _square(x @ weights.T) + _square(least)
    for block in descending(gains)[:most]:
        if _square(left) <= allowed:
            break
        wide[block] = True
        left += error(wide_x, block) - error(narrow_x, block)
    return wide


def _square(values: np.ndarray) -> float:
    return float(np.einsum("ij,ij->", values, values, dtype=np.float64))


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """What was made of a model. Work counts multiplications of linear layers."""

    wide_blocks: int
    all_blocks: int
    narrow_work: float
    gathered_inputs: int
    all_inputs: int


def shares(packed: Mapping[str, Packed]) -> Shares:
    """Counts over the compressed tensors of a model, name -> Packed."""
    held = {name: each for name, each in packed.items() if isinstance(codec(each.spec), CometCodec)}
    inputs = {shared_input(name): each for name, each in held.items()}
    wide_work = all_work = 0
    for each in held.values():
        form = CometCodec.parse(each.spec)
        columns = blockwise(np.ones(each.shape[1], np.int64), form.group).sum(axis=1)
        all_work += each.size
        wide_work += each.shape[0] * int(columns[each.buffers["wide"] != 0].sum())
    return Shares(
        wide_blocks=sum(int(each.buffers["wide"].sum()) for each in inputs.values()),
        all_blocks=sum(len(each.buffers["wide"]) for each in inputs.values()),
        narrow_work=1 - wide_work / max(all_work, 1),
        gathered_inputs=sum("order" in each.buffers for each in inputs.values()),
        all_inputs=len(inputs),
    )

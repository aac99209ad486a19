"""BitStack: matrices taken apart into blocks of about one bit per weight, of which any number can be loaded.

Source: "BitStack: Fine-Grained Size Control for Compressed LLMs in Variable Memory Environments" (Xinghao Wang, 2024,
arXiv 2410.23918), sections 3.1 and 3.2; official code: github.com/xinghaow99/BitStack.

Idea: channels are scaled by how large their inputs are, so that what matters is taken apart first; signs and low-rank
magnitudes of what is left are stored block by block (`formats.bitstack`). Blocks of all matrices are then put in one
order (`stack_order`) and written as one stack (`stack_job`): a model of any size is a first part of it.

Units and shapes: inputs [tokens, cols] of a sequence -> s [cols]; weight [rows, cols] -> Packed of `formats.bitstack`.
Differs from the paper: the residual is taken with the factors as stored in float16; where several heads read the same
values (grouped queries) o_proj is scaled too, by the mean over these heads; experts' norms are taken over all their
tokens at once, as these do not come by sequences; models narrower than 2048 take a lower rank than 16 unless told, so
that factors take a quarter of the signs' bytes.
Cost: `blocks` times 2 * rank * 18 operations per weight; resident beside a weight, 20 bytes a weight.
Holds when: matrices are large beside the rank, which is chosen so: factors take 16 * rank * (rows + cols) / (rows *
cols) bits per weight and block, 0.125 for 4096 x 4096 at rank 16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from memwall import kernels
from memwall.compress.base import MethodConfig, Statistics, WeightMethod
from memwall.compress.calibration import LayerStream, shared_input
from memwall.compress.smoothquant import linear_readers
from memwall.compress.transforms import Scale, Site, Transform, scaled, sites
from memwall.errors import InputError
from memwall.formats import Packed, codec
from memwall.formats.bitstack import DEFAULT_RANK, MOST_BLOCKS, BitStackCodec
from memwall.models.config import ModelConfig

# added to every norm, so that a channel that never fires can be scaled back (the official code's)
LEAST_NORM = 1e-3
WORK_BYTES = 20
FULL_WIDTH = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class BitStack(WeightMethod):
    """rank: of the magnitudes of a block, 0 for the one by the model's width; blocks: of each matrix; scale: by
    activations.

    sort_tokens: calibration tokens that the order of blocks is measured on, in sequences of the calibration's length.
    sort_levels: levels that are measured, which takes as many runs of the model as there are matrices each; later ones
    take the order of the last.
    """

    name: ClassVar[str] = "bitstack"
    needs_statistics: ClassVar[bool] = True
    transforms: ClassVar[bool] = True
    default_bits: ClassVar[str] = "bitstack"
    stacks: ClassVar[bool] = True

    rank: int = 0
    blocks: int = MOST_BLOCKS
    scale: bool = True
    sort_tokens: int = 2048
    sort_levels: int = MOST_BLOCKS - 1

    def __post_init__(self) -> None:
        BitStackCodec(rank=self.rank or 1, blocks=self.blocks)
        for name, usual in (("sort_tokens", 2048), ("sort_levels", MOST_BLOCKS - 1)):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1, such as {usual}")

    def for_model(self, config: ModelConfig) -> BitStack:
        """The paper's rank from 2048 columns on; below, factors keep at most a quarter of the signs' bytes."""
        by_width = round(DEFAULT_RANK * config.hidden_size / FULL_WIDTH)
        return self if self.rank else replace(self, rank=min(max(by_width, 1), DEFAULT_RANK))

    def form(self, bits: float | str) -> str | None:
        if isinstance(bits, str) and not isinstance(codec(bits), BitStackCodec):
            raise InputError(f"bitstack makes its own format, not {bits}: leave --bits out, or give a --size")
        if not isinstance(bits, str):
            raise InputError(f"bits {bits:g}: bitstack stores all its blocks; leave --bits out, or give a --size")
        form = BitStackCodec.parse(bits)
        return BitStackCodec(rank=self.rank, blocks=self.blocks).spec if bits == "bitstack" else form.spec

    def check(self, spec: str) -> None:
        if not isinstance(codec(spec), BitStackCodec):
            raise InputError(f"bitstack makes its own format, not {spec}: leave --bits out")

    def transform(self, stream: LayerStream, form_of: Callable[[str], str]) -> Transform:
        transform = Transform()
        for layer in range(stream.config.num_layers if self.scale else 0):
            found = scaled(sites(stream.config, layer))
            norms = InputNorms({shared_input(name) for name in linear_readers(stream, found)}, stream.tokens.shape[1])
            stream.observe(layer, norms)
            for site in found:
                scales = norms.scales(site)
                if scales is not None:
                    transform.put(site, Scale(scales))
        return transform

    def compress(self, weight: np.ndarray, statistics: Statistics | None, config: MethodConfig) -> Packed:
        form = codec(config.spec)
        return form.encode(weight) if isinstance(form, BitStackCodec) else kernels.encode(config.spec, weight)

    def work_bytes(self, num_rows: int, num_columns: int) -> int:
        return WORK_BYTES * num_rows * num_columns


class InputNorms:
    """Observer of a decoder: of each channel that a linear reads, the mean over sequences of its norm over a sequence.

    names: as `shared_input` gives them; length: tokens of a sequence.
    """

    def __init__(self, names: set[str], length: int) -> None:
        self._length = length
        self._names = names
        self._rows = dict.fromkeys(names, 0)
        self._squares: dict[str, np.ndarray] = {}
        self._norms: dict[str, list[np.ndarray]] = {name: [] for name in names}

    def __call__(self, name: str, x: np.ndarray) -> None:
        if name not in self._names:
            return
        squares = np.einsum("ij,ij->j", x, x)
        self._squares[name] = self._squares[name] + squares if name in self._squares else squares
        self._rows[name] += len(x)
        if self._rows[name] == self._length:
            self._norms[name].append(np.sqrt(self._squares.pop(name)))
            self._rows[name] = 0

    def of(self, name: str) -> np.ndarray | None:
        """The mean norms [cols] of what a linear reads; None where nothing came."""
        whole, rest = self._norms[name], self._squares.get(name)
        found = [*whole, *([] if rest is None else [np.sqrt(rest)])]
        return np.asarray(np.mean(found, axis=0) + LEAST_NORM, np.float32) if found else None

    def scales(self, site: Site) -> np.ndarray | None:
        """What the channels of a site are scaled by: one for all its readers."""
        found = [norms for name in site.readers if shared_input(name) in self._names
                 for norms in [self.of(shared_input(name))] if norms is not None]  # fmt: skip
        if not found:
            return None
        scales = np.mean(found, axis=0)
        if site.kind == "values":
            scales = scales.reshape(site.heads, site.repeats, -1).mean(axis=1).reshape(-1)
        return np.asarray(scales, np.float32)

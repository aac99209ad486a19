"""A model as a chain of cells: what is planned for serving is one block, and the plan's cost grows with their number
only in a factor.

A *cell* is a set of identical tasks that can be split over devices: attention heads (a query group stays with its KV
head), feed-forward filters, experts. `Cell.share(devices, template)` says what the fullest device holds.

Source: the model IR of APEX (Lin 2024, arXiv 2411.17651, section 3). Quantities: parameters as counts, formats as
specs of `memwall.formats`; bytes follow from the codec, scales included.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

from memwall.errors import InputError
from memwall.formats import codec
from memwall.models.config import ModelConfig

Template = Literal["heads", "filters", "tensor", "expert"]
ALIASES = {"float8": "e4m3", "fp8": "e4m3", "half": "float16"}
_TYPICAL = (1024, 1024)


@cache
def bits_of(spec: str) -> float:
    """Bits per number of a format, scales included, on a matrix of usual size."""
    return 8 * codec(ALIASES.get(spec, spec)).nbytes(_TYPICAL) / (_TYPICAL[0] * _TYPICAL[1])


def number_type(spec: str) -> str:
    """What a device would have to compute with to use numbers of this format as they are."""
    name, bits = ALIASES.get(spec, spec), bits_of(spec)
    if bits > 16:
        return "float32"
    if bits > 10:
        return "bfloat16" if name == "bfloat16" else "float16"
    if bits > 6:
        return "int8" if "int" in name else "float8"
    return "int4"


_PRECISION = ("int4", "int8", "float8", "bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Formats:
    """Formats of weights, keys and values, and activations."""

    weights: str = "float16"
    kv: str = "float16"
    activations: str = "float16"

    def __post_init__(self) -> None:
        for name in ("weights", "kv", "activations"):
            try:
                bits_of(getattr(self, name))
            except InputError as error:
                raise InputError(f"{name}: {error}") from None

    @property
    def weight_bytes(self) -> float:
        """Bytes per weight."""
        return bits_of(self.weights) / 8

    @property
    def kv_bytes(self) -> float:
        """Bytes per number of keys and values."""
        return bits_of(self.kv) / 8

    @property
    def activation_bytes(self) -> float:
        """Bytes per number that is sent to other devices."""
        return bits_of(self.activations) / 8

    @property
    def compute(self) -> str:
        """Number type of the products: the widest of all three (the paper's rule for mixed precision)."""
        names = [number_type(spec) for spec in (self.weights, self.kv, self.activations)]
        return max(names, key=_PRECISION.index)

    @property
    def attention(self) -> str:
        """Number type of attention: the wider of cache and activations."""
        return max(number_type(self.kv), number_type(self.activations), key=_PRECISION.index)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadShare:
    """Heads of the fullest device."""

    heads: int
    kv_heads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Attention heads over a hidden state; MHA, MQA and GQA differ in `kv_heads` only."""

    hidden: int
    heads: int
    kv_heads: int
    head_size: int

    def templates(self, devices: int) -> tuple[Template, ...]:
        """Ways to split it: none where there are more devices than heads."""
        return ("heads",) if devices <= self.heads else ()

    def share(self, devices: int) -> HeadShare:
        """Query groups split evenly, those left over one to a device; KV heads are copied where they are fewer than the
        devices, and a group's queries then split.
        """
        if devices <= self.kv_heads:
            groups = -(-self.kv_heads // devices)
            return HeadShare(heads=groups * (self.heads // self.kv_heads), kv_heads=groups)
        # whole devices for each KV head, as even as can be: the fullest serves a head with the fewest
        return HeadShare(heads=-(-self.heads // self.kv_heads // (devices // self.kv_heads)), kv_heads=1)

    def parameters(self, devices: int = 1) -> int:
        """Weights of the fullest device: query, key, value and output products."""
        share = self.share(devices)
        return self.hidden * self.head_size * (2 * share.heads + 2 * share.kv_heads)

    def kv_values(self, devices: int = 1) -> int:
        """Numbers kept for each token, keys and values."""
        return 2 * self.share(devices).kv_heads * self.head_size


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedForward:
    """Filters of a feed-forward network; matrices: 2 (MLP), 3 with a gate (GLU, SwiGLU)."""

    hidden: int
    filters: int
    matrices: int = 3

    def templates(self, devices: int) -> tuple[Template, ...]:
        """See `Attention.templates`."""
        return ("filters",) if devices <= self.filters else ()

    def parameters(self, devices: int = 1) -> int:
        """Weights of the fullest device."""
        return self.matrices * self.hidden * -(-self.filters // devices)


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """Experts of which each token takes `chosen`. Split all of them over all devices (tensor) or give whole ones to
    each (expert).
    """

    hidden: int
    filters: int
    experts: int
    chosen: int
    matrices: int = 3

    def templates(self, devices: int) -> tuple[Template, ...]:
        """See `Attention.templates`."""
        tensor: tuple[Template, ...] = ("tensor",) if devices <= self.filters else ()
        expert: tuple[Template, ...] = ("expert",) if 1 < devices <= self.experts else ()
        return tensor + expert

    def parameters(self, devices: int = 1, template: Template = "tensor") -> int:
        """Weights of the fullest device, the router's included, which every device has."""
        one = self.matrices * self.hidden
        if template == "expert":
            return -(-self.experts // devices) * one * self.filters + self.hidden * self.experts
        return self.experts * one * -(-self.filters // devices) + self.hidden * self.experts

    def active(self, tokens: float, held: int) -> float:
        """How many of `held` experts so many tokens meet, if each chooses at random."""
        return held * (1.0 - (1.0 - self.chosen / self.experts) ** tokens)


Cell = Attention | FeedForward | Experts


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A chain of equal blocks between an embedding and a head."""

    name: str
    hidden: int
    vocabulary: int
    blocks: int
    cells: tuple[Cell, ...]
    tied: bool = False
    formats: Formats = Formats()

    @staticmethod
    def of(config: ModelConfig, name: str, formats: Formats) -> ServedModel:
        """From a Hugging Face configuration; sliding windows count as whole attention."""
        attention = Attention(
            hidden=config.hidden_size,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_size=config.head_dim,
        )
        network: Cell = FeedForward(
            hidden=config.hidden_size, filters=config.intermediate_size, matrices=3 if config.gated else 2
        )
        if config.num_experts:
            network = Experts(
                hidden=config.hidden_size,
                filters=config.intermediate_size,
                experts=config.num_experts,
                chosen=config.num_experts_per_token,
            )
        return ServedModel(
            name=name,
            hidden=config.hidden_size,
            vocabulary=config.vocab_size,
            blocks=config.num_layers,
            cells=(attention, network),
            tied=config.tie_word_embeddings,
            formats=formats,
        )

    @property
    def parameters(self) -> int:
        """Weights of the whole model (norms and biases left out)."""
        ends = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.blocks * sum(cell.parameters() for cell in self.cells) + ends

    @property
    def active_parameters(self) -> float:
        """Weights that a token is multiplied with, the embedding's look-up left out."""
        used = sum(
            cell.chosen * cell.matrices * cell.hidden * cell.filters if isinstance(cell, Experts) else cell.parameters()
            for cell in self.cells
        )
        return self.blocks * used + self.vocabulary * self.hidden

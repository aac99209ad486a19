"""State space models (Mamba, Mamba-2): what their `config.json` says, and the tensors that follow from it.

Tensors go by names like those of other families (`model.layers.0.mixer.in_proj.weight`); `known_as` makes them of the
names in Hugging Face's files (`backbone.layers.0...`). A model that Quamba2 compressed carries its choices in the same
configuration (`quamba2`) and its fixed scales as further tensors.

Sizes: d hidden; E inner (heads H times P channels); N state per channel; G groups that share B and C;
W rows of in_proj.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from memwall.formats.checked_json import Fields
from memwall.kernels.scan import MOST_STATE, MOST_TAPS

Kind = Literal["mamba", "mamba2"]
FAMILIES: tuple[Kind, ...] = ("mamba", "mamba2")
SETTINGS = "quamba2"
"""Where a compressed model's configuration says how."""
LAYER_FORMS = ("w8a8", "w4a8", "w4a16", "float")
STATES = ("int8", "float32")
_NAMES = {
    "backbone.embeddings.weight": "model.embed_tokens.weight",
    "backbone.embedding.weight": "model.embed_tokens.weight",
    "backbone.norm_f.weight": "model.norm.weight",
}
_BODY = "backbone.layers."

Row = tuple[str, tuple[int, ...], str]
"""Name inside a layer, shape, role."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """How Quamba2 stored a model. layers: a form each; head: of lm_head; state: of layers with 8-bit activations.

    head_ranges, channel_ranges: of heads in each SSD group, and of channels in each of these, that have their own
    scale of x (the method's n_h and n_d).
    """

    layers: tuple[str, ...]
    head: str
    state: str
    head_ranges: int
    channel_ranges: int

    @property
    def ranges(self) -> int:
        """Scales of x in each SSD group."""
        return self.head_ranges * self.channel_ranges

    def to_dict(self) -> dict[str, Any]:
        """As the configuration has it."""
        sizes = {"head_ranges": self.head_ranges, "channel_ranges": self.channel_ranges}
        return {"layers": list(self.layers), "head": self.head, "state": self.state, **sizes}


@dataclass(frozen=True, slots=True, kw_only=True)
class SsmConfig:
    """Sizes of the mixers. Mamba-1 counts as E heads of one channel in one group, with a decay per state number."""

    kind: Kind
    hidden_size: int
    num_heads: int
    head_dim: int
    state_size: int
    num_groups: int
    conv_taps: int
    conv_bias: bool
    proj_bias: bool
    dt_rank: int
    dt_limits: tuple[float, float]
    chunk_tokens: int
    quantized: Quantized | None = None

    @property
    def is_first(self) -> bool:
        """Mamba-1."""
        return self.kind == "mamba"

    @property
    def inner_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def bc_size(self) -> int:
        """Numbers of B, or of C, per token."""
        return self.num_groups * self.state_size

    @property
    def conv_size(self) -> int:
        """Channels of the convolution: x, and in Mamba-2 also B and C."""
        return self.inner_size if self.is_first else self.inner_size + 2 * self.bc_size

    @property
    def proj_parts(self) -> dict[str, int]:
        """What in_proj makes, in order, and how many rows each has."""
        if self.is_first:
            return {"x": self.inner_size, "z": self.inner_size}
        return {"z": self.inner_size, "x": self.inner_size, "b": self.bc_size, "c": self.bc_size, "dt": self.num_heads}

    @property
    def proj_size(self) -> int:
        return sum(self.proj_parts.values())

    def form(self, layer: int) -> str:
        """How a layer is stored: `float`, or one of LAYER_FORMS."""
        return "float" if self.quantized is None else self.quantized.layers[layer]

    def is_static(self, layer: int) -> bool:
        """Whether a layer works on 8-bit activations of fixed scales."""
        return self.form(layer).endswith("a8")

    def rows(self, layer: int) -> Iterator[Row]:
        """Tensors of a layer, by the name behind `model.layers.N.`."""
        inner = self.inner_size
        yield "norm.weight", (self.hidden_size,), "norm"
        yield "mixer.in_proj.weight", (self.proj_size, self.hidden_size), "linear"
        if self.proj_bias:
            yield "mixer.in_proj.bias", (self.proj_size,), "bias"
        yield "mixer.conv1d.weight", (self.conv_size, 1, self.conv_taps), "other"
        if self.conv_bias:
            yield "mixer.conv1d.bias", (self.conv_size,), "bias"
        if self.is_first:
            yield "mixer.x_proj.weight", (self.dt_rank + 2 * self.state_size, inner), "linear"
            yield "mixer.dt_proj.weight", (inner, self.dt_rank), "linear"
            yield "mixer.dt_proj.bias", (inner,), "bias"
            yield "mixer.A_log", (inner, self.state_size), "other"
            yield "mixer.D", (inner,), "other"
        else:
            yield "mixer.dt_bias", (self.num_heads,), "bias"
            yield "mixer.A_log", (self.num_heads,), "other"
            yield "mixer.D", (self.num_heads,), "other"
            yield "mixer.norm.weight", (inner,), "norm"
        yield "mixer.out_proj.weight", (self.hidden_size, inner), "linear"
        if self.proj_bias:
            yield "mixer.out_proj.bias", (self.hidden_size,), "bias"
        if self.is_static(layer):
            yield from self._scales()

    def _scales(self) -> Iterator[Row]:
        assert self.quantized is not None
        total = self.num_groups * self.quantized.ranges
        shapes: dict[str, tuple[int, ...]] = {
            "input": (1,),
            "proj": (len(self.proj_parts),),
            "x": (total,),
            "b": (self.num_groups,),
            "c": (self.num_groups,),
            "state": (total, self.state_size),
            "out": (1,),
        }
        if self.is_first:
            shapes |= {"dt": (1,)}
        else:
            # how many heads, and channels of a head, each range has: whole numbers, in the one type of small tensors
            shapes |= {"heads": (self.num_groups * self.quantized.head_ranges,), "channels": (total,)}
        for name, shape in shapes.items():
            yield f"mixer.scales.{name}", shape, "other"


def known_as(stored: str) -> str:
    """The name here of a tensor in a Hugging Face file."""
    if stored.startswith(_BODY):
        return "model.layers." + stored.removeprefix(_BODY)
    return _NAMES.get(stored, stored)


def read(fields: Fields, kind: Kind, hidden_size: int, num_layers: int) -> SsmConfig:
    """From a checked `config.json`; InputError names a field that is wrong."""
    expand = fields.number("expand", 0.01, 64.0, 2.0)
    inner = int(expand * hidden_size)
    if kind == "mamba":
        inner = fields.integer("intermediate_size", 1, 2**22, inner)
        heads, head_dim, groups = inner, 1, 1
    else:
        heads = fields.integer("num_heads", 1, 2**20, 128)
        head_dim = fields.integer("head_dim", 1, 2**14, 64)
        groups = fields.integer("n_groups", 1, heads, 8)
        if heads * head_dim != inner:
            wanted = f"such that num_heads * head_dim is expand * hidden_size ({inner})"
            raise fields.error("head_dim", head_dim, wanted)
        if heads % groups:
            raise fields.error("n_groups", groups, f"a divisor of num_heads ({heads})")
    bias, made = fields.flag("use_bias", False), _quantized(fields, num_layers) if fields.has(SETTINGS) else None
    if bias and made is not None and any(form.endswith("a8") for form in made.layers):
        raise fields.error("use_bias", True, "false: layers on 8-bit activations add no biases")
    rank = fields.values.get("time_step_rank")
    automatic = rank in (None, "auto")
    return SsmConfig(
        kind=kind,
        hidden_size=hidden_size,
        num_heads=heads,
        head_dim=head_dim,
        state_size=fields.integer("state_size", 1, MOST_STATE, 16 if kind == "mamba" else 128),
        num_groups=groups,
        conv_taps=fields.integer("conv_kernel", 2, MOST_TAPS, 4),
        conv_bias=fields.flag("use_conv_bias", True),
        proj_bias=bias,
        dt_rank=math.ceil(hidden_size / 16) if automatic else fields.integer("time_step_rank", 1, hidden_size),
        dt_limits=(0.0, math.inf) if kind == "mamba" else _limits(fields),
        chunk_tokens=fields.integer("chunk_size", 1, 2**20, 256),
        quantized=made,
    )


def _limits(fields: Fields) -> tuple[float, float]:
    """Bounds of a time step; the upper one may be infinite, in any of the forms in which JSON is made to say so."""
    name = "time_step_limit"
    values = fields.items(name, 2, [0.0, "Infinity"])
    read_as = [math.inf if value in ("Infinity", {"__float__": "Infinity"}) else value for value in values]
    good = len(read_as) == 2 and all(type(value) in (int, float) and value >= 0 for value in read_as)
    if not good or read_as[0] > read_as[1]:
        raise fields.error(name, values, "two numbers, the least and the most, such as [0.0, Infinity]")
    return float(read_as[0]), float(read_as[1])


def _quantized(fields: Fields, num_layers: int) -> Quantized:
    made = Fields(fields.mapping(SETTINGS), f"{fields.source}: {SETTINGS}")
    made.only("layers", "head", "state", "head_ranges", "channel_ranges")
    layers = made.items("layers", num_layers)
    if len(layers) != num_layers or any(form not in LAYER_FORMS for form in layers):
        raise made.error("layers", layers, f"{num_layers} times one of {', '.join(LAYER_FORMS)}")
    return Quantized(
        layers=tuple(layers),
        head=made.text("head", None, LAYER_FORMS),
        state=made.text("state", None, STATES),
        head_ranges=made.integer("head_ranges", 1, 64),
        channel_ranges=made.integer("channel_ranges", 1, 64),
    )


def with_quantized(source: Mapping[str, Any], quantized: Quantized) -> dict[str, Any]:
    """The configuration of a compressed model: its head no longer is its embedding."""
    return {**source, "tie_word_embeddings": False, SETTINGS: quantized.to_dict()}

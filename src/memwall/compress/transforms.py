"""Equivalent transforms: what may be done to neighbouring tensors without changing what the model computes.

Between two linear maps with nothing but a diagonal, an attention over tokens or a product by elements in between, an
invertible map may be put in on one side and taken out on the other:

    site      produced by                    read by             what may be put in
    attention input_layernorm (and bias)     q, k, v             scale
    values    v (rows, bias)                 o                   scale, permute and rotate inside a head
    mlp       post_attention_layernorm       gate, up, router    scale
    inner     up (rows, bias), gate's order  down                scale (where up is gated), permute
    residual  embedding, o and down          all norms and all   permute; one order for the whole model (`residual`)
                                             that reads them

Where attention and feed-forward share a norm, gate and up are read at `attention` too and there is no `mlp`.
A reader's columns are multiplied by the map, a producer's rows by its inverse. Where several heads read one head's
values they all get its map. One test, that logits stay what they were, holds for every site and map; a scale far from
one plants outliers in a model, which tests of methods against them start from.

Units and shapes: a map acts on `width` channels; tensors are [rows, cols] = [outputs, inputs] or vectors. Everything is
worked in float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from memwall.errors import InputError
from memwall.formats import codec
from memwall.formats.quip import Factors
from memwall.models.checkpoint import Checkpoint
from memwall.models.config import ModelConfig, TensorSpec

TRANSFORM_BYTES = 12
"""Per weight of a layer, while maps are sought: scaled, rounded and decoded copies of its matrices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A place between tensors. producers and readers: names; heads: how many blocks of `width` channels maps stay in.

    ordered: producers that follow a permutation only (their output is multiplied by that of the producers). scales:
    whether a scale has a place; it has none where an activation lies between that scales no output with its input.
    repeats: how many readers' heads read each head.
    """

    kind: str
    layer: int
    width: int
    producers: tuple[str, ...]
    readers: tuple[str, ...]
    ordered: tuple[str, ...] = ()
    heads: int = 1
    repeats: int = 1
    scales: bool = True


class Map(ABC):
    """An invertible map of channels; arrays have channels along their last axis."""

    kinds: frozenset[str]
    """Sites that it may be put in."""

    @abstractmethod
    def width(self) -> int:
        """Channels."""

    @abstractmethod
    def read(self, columns: np.ndarray) -> np.ndarray:
        """A reader's columns [..., width] with the map multiplied in."""

    @abstractmethod
    def produce(self, rows: np.ndarray) -> np.ndarray:
        """A producer's outputs [..., width] with its inverse multiplied in."""

    def repeated(self, heads: int, repeats: int) -> Map:
        """The same for readers of whom `repeats` read each head."""
        raise NotImplementedError


@dataclass(frozen=True)
class Scale(Map):
    """Reader's channel c times factors[c], producer's through it."""

    factors: np.ndarray
    kinds = frozenset({"attention", "values", "mlp", "inner"})

    def __post_init__(self) -> None:
        if not (np.isfinite(self.factors).all() and (self.factors > 0).all()):
            raise InputError("the factors of a scale must be positive and finite")

    def width(self) -> int:
        return len(self.factors)

    def read(self, columns: np.ndarray) -> np.ndarray:
        return columns * self.factors

    def produce(self, rows: np.ndarray) -> np.ndarray:
        return rows / self.factors

    def repeated(self, heads: int, repeats: int) -> Scale:
        return Scale(np.repeat(self.factors.reshape(heads, -1), repeats, axis=0).reshape(-1))


@dataclass(frozen=True)
class Permute(Map):
    """Channel order[i] comes to place i."""

    order: np.ndarray
    kinds = frozenset({"values", "inner", "residual"})

    def __post_init__(self) -> None:
        if not np.array_equal(np.sort(self.order), np.arange(len(self.order))):
            raise InputError("a permutation names each channel once")

    def width(self) -> int:
        return len(self.order)

    def read(self, columns: np.ndarray) -> np.ndarray:
        return columns[..., self.order]

    def produce(self, rows: np.ndarray) -> np.ndarray:
        return rows[..., self.order]

    def repeated(self, heads: int, repeats: int) -> Permute:
        size = len(self.order) // heads
        within = self.order.reshape(heads, size) - size * np.arange(heads)[:, None]
        if within.min() < 0 or within.max() >= size:
            raise InputError("a permutation of values must stay inside each head")
        within = np.repeat(within, repeats, axis=0)
        return Permute((within + size * np.arange(heads * repeats)[:, None]).reshape(-1))


@dataclass(frozen=True)
class Rotate(Map):
    """Blocks of channels turned by an orthogonal matrix [block, block]; `count` blocks."""

    matrix: np.ndarray
    count: int
    kinds = frozenset({"values"})

    def __post_init__(self) -> None:
        product = self.matrix @ self.matrix.T
        if np.abs(product - np.eye(len(self.matrix))).max() > 1e-4:
            raise InputError("a rotation's matrix must be orthogonal")

    def width(self) -> int:
        return self.count * len(self.matrix)

    def read(self, columns: np.ndarray) -> np.ndarray:
        blocks = columns.reshape(*columns.shape[:-1], self.count, len(self.matrix))
        return np.asarray((blocks @ self.matrix).reshape(columns.shape), np.float32)

    def produce(self, rows: np.ndarray) -> np.ndarray:
        return self.read(rows)  # Q^T p by channel is p Q along the last axis, and Q^-1 = Q^T

    def repeated(self, heads: int, repeats: int) -> Rotate:
        if self.count % heads:
            raise InputError("a rotation of values must stay inside each head")
        return Rotate(self.matrix, self.count * repeats)


@dataclass(frozen=True)
class Turn(Map):
    """A turn made of two small factors in a random order. It has no place between tensors, as it does not stay inside
    heads or under gates: a form that is read through one turns activations as they come (`formats.quip`).
    """

    factors: Factors
    kinds = frozenset[str]()

    def width(self) -> int:
        return len(self.factors.order)

    def read(self, columns: np.ndarray) -> np.ndarray:
        return self.factors.turn(columns)

    def produce(self, rows: np.ndarray) -> np.ndarray:
        return self.factors.turn(rows)  # as of every orthogonal map


def hadamard(size: int) -> np.ndarray:
    """The orthogonal Hadamard matrix [size, size] float32; size: a power of two."""
    if size < 1 or size & (size - 1):
        raise InputError(f"a Hadamard matrix of {size} channels: the size must be a power of two")
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (matrix / np.sqrt(size)).astype(np.float32)


def sites(config: ModelConfig, layer: int) -> list[Site]:
    """The sites of one layer."""
    names = {tensor.name: tensor.shape for tensor in config.tensors() if tensor.layer == layer}
    prefix = f"model.layers.{layer}."
    attention, mlp, moe = prefix + "self_attn.", prefix + "mlp.", prefix + "block_sparse_moe."

    def held(*wanted: str) -> tuple[str, ...]:
        return tuple(name for name in wanted if name in names)

    def normed(name: str) -> tuple[str, ...]:
        return held(f"{prefix}{name}.weight", f"{prefix}{name}.bias")

    experts = [[f"{moe}experts.{e}.{w}.weight" for w in ("w1", "w3", "w2")] for e in range(config.num_experts)]
    parts = ("gate_proj", "up_proj", "down_proj") if config.gated else ("up_proj", "down_proj")
    inner = experts or [[f"{mlp}{w}.weight" for w in parts]]
    gates = tuple(name for each in inner for name in each[:-1])
    hidden, values = config.hidden_size, config.num_kv_heads * config.head_dim
    qkv = tuple(f"{attention}{each}_proj.weight" for each in "qkv")
    found = [
        Site(
            kind="attention", layer=layer, width=hidden, producers=normed("input_layernorm"),
            readers=qkv + (gates if config.shared_norm else ()),
        ),
        Site(
            kind="values", layer=layer, width=values,
            producers=held(attention + "v_proj.weight", attention + "v_proj.bias"),
            readers=(attention + "o_proj.weight",),
            heads=config.num_kv_heads, repeats=config.num_heads // config.num_kv_heads,
        ),
    ]  # fmt: skip
    if not config.shared_norm:
        found.append(
            Site(
                kind="mlp", layer=layer, width=hidden, producers=normed("post_attention_layernorm"),
                readers=held(moe + "gate.weight", *gates),
            )
        )  # fmt: skip
    for *gate, up, down in inner:
        found.append(
            Site(
                kind="inner", layer=layer, width=names[up][0], producers=held(up, _bias(up)), readers=(down,),
                ordered=held(*gate, *map(_bias, gate)), scales=config.gated,
            )
        )  # fmt: skip
    return found


def _bias(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"


def residual(config: ModelConfig) -> Site:
    """The stream that all layers add to: embedding (a row is a token), norms and their readers have its channels as
    columns, what adds to it has them as rows.
    """
    written = ("o_proj.weight", "o_proj.bias", "down_proj.weight", "down_proj.bias", ".w2.weight")
    producers, readers = [], []
    for tensor in config.tensors():
        inside = "q_norm" in tensor.name or "k_norm" in tensor.name
        if tensor.name.endswith(written):
            producers.append(tensor.name)
        elif (
            tensor.shape[-1] == config.hidden_size and (len(tensor.shape) == 2 or "norm" in tensor.name) and not inside
        ):
            readers.append(tensor.name)
    return Site(kind="residual", layer=-1, width=config.hidden_size, producers=tuple(producers), readers=tuple(readers))


class Transform:
    """Maps put in at sites. `apply` gives any tensor of the model as it stands with all of them."""

    def __init__(self) -> None:
        self._maps: dict[str, list[Callable[[np.ndarray], np.ndarray]]] = {}

    def put(self, site: Site, each: Map) -> None:
        """Put a map in; InputError where its kind or width has no place there."""
        if site.kind not in each.kinds:
            raise InputError(f"a {type(each).__name__.lower()} has no place at the {site.kind} of a layer")
        if isinstance(each, Scale) and not site.scales:
            raise InputError(f"a scale has no place at the {site.kind} of a layer whose activation has no gate")
        if each.width() != site.width:
            raise InputError(f"a map of {each.width()} channels does not fit the {site.width} of the {site.kind}")
        reading = each.repeated(site.heads, site.repeats) if site.kind == "values" else each
        for name in site.readers:
            self._maps.setdefault(name, []).append(reading.read)
        for name in site.producers + (site.ordered if isinstance(each, Permute) else ()):
            self._maps.setdefault(name, []).append(lambda tensor, each=each: each.produce(tensor.T).T)  # type: ignore[misc]

    def changes(self, name: str) -> bool:
        """Whether a tensor is another one now."""
        return name in self._maps

    def apply(self, name: str, tensor: np.ndarray) -> np.ndarray:
        """float32 form of a tensor of the model."""
        tensor = np.asarray(tensor, np.float32)
        for each in self._maps.get(name, ()):  # in the order in which they were put in: a norm is read and produces
            tensor = each(tensor)
        return np.ascontiguousarray(tensor)


class Transformed(Checkpoint):
    """A checkpoint seen through a transform: changed tensors are float32, made when they are asked for."""

    def __init__(self, checkpoint: Checkpoint, transform: Transform) -> None:
        self.__dict__.update(checkpoint.__dict__)
        self._specs: dict[str, TensorSpec] = {tensor.name: tensor for tensor in checkpoint.config.tensors()}
        self._transform = transform

    def tensor(self, name: str) -> np.ndarray:
        return self._seen(name, super().tensor(name))

    def alone(self, name: str) -> np.ndarray:
        return self._seen(name, super().alone(name))

    def source_dtype(self, name: str) -> str:
        return "float32" if self._transform.changes(name) else super().source_dtype(name)

    def stored_bytes(self, name: str) -> int:
        if self._transform.changes(name):
            return codec("float32").nbytes(self._specs[name].shape)
        return super().stored_bytes(name)

    def close(self) -> None:
        """The checkpoint it looks at is closed by its owner."""

    def _seen(self, name: str, tensor: np.ndarray) -> np.ndarray:
        return self._transform.apply(name, tensor) if self._transform.changes(name) else tensor


def scaled(found: Sequence[Site]) -> list[Site]:
    """Sites that a scale may be put in."""
    return [site for site in found if site.scales]


def of_kind(found: Sequence[Site], kind: str) -> list[Site]:
    """Sites of one kind."""
    return [site for site in found if site.kind == kind]

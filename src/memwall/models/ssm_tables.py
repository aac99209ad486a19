"""What a state space layer's small tensors become before they can be used: decays, and one number per channel or row
of what the file holds per range.

All arrays of a model lie in one allocation, so that a plan can say its bytes beforehand (`table_bytes`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from memwall.errors import InputError
from memwall.kernels.scan import ScanTables
from memwall.memory import Arena
from memwall.memory.arena import allocated_bytes
from memwall.models.config import ModelConfig
from memwall.models.ssm_config import SsmConfig

OWNER = "weights/tables"
_FLOAT, _INDEX = np.dtype(np.float32), np.dtype(np.int32)


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticScales:
    """Of a layer on 8-bit activations. parts: the scale of each part of in_proj's output.

    proj_inverse [W]: one over the scale of each row of in_proj; conv_in, conv_inverse [channels]: likewise around the
    convolution. input, out: scales of what in_proj and out_proj read.
    """

    parts: Mapping[str, float]
    proj_inverse: np.ndarray
    conv_in: np.ndarray
    conv_inverse: np.ndarray
    scan: ScanTables
    input: float
    out: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTables:
    """decay: A, [H, 1] or [H, N], negative. static: None where activations are floats."""

    decay: np.ndarray
    static: StaticScales | None


def _shapes(ssm: SsmConfig, layer: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    shapes: dict[str, tuple[tuple[int, ...], np.dtype]] = {
        "decay": ((ssm.num_heads, ssm.state_size if ssm.is_first else 1), _FLOAT)
    }
    if ssm.is_static(layer):
        shapes |= {
            "proj_inverse": ((ssm.proj_size,), _FLOAT),
            "conv_in": ((ssm.conv_size,), _FLOAT),
            "conv_inverse": ((ssm.conv_size,), _FLOAT),
            "range": ((ssm.inner_size,), _INDEX),
        }
    return shapes


def _layer_bytes(ssm: SsmConfig, layer: int) -> int:
    return sum(_padded(math.prod(shape) * dtype.itemsize) for shape, dtype in _shapes(ssm, layer).values())


def _padded(nbytes: int) -> int:
    return -(-nbytes // 64) * 64


def table_bytes(config: ModelConfig) -> int:
    """What `Tables` holds."""
    assert config.ssm is not None
    return allocated_bytes(sum(_layer_bytes(config.ssm, layer) for layer in range(config.num_layers)))


class Tables:
    """The arrays of all layers, made of a model's vectors."""

    def __init__(self, config: ModelConfig, vectors: Mapping[str, np.ndarray], arena: Arena) -> None:
        assert config.ssm is not None
        self._arena = arena
        self._held = arena.allocate(
            OWNER, (sum(_layer_bytes(config.ssm, i) for i in range(config.num_layers)),), np.uint8
        )
        self.layers: list[LayerTables] = []
        at = 0
        try:
            for layer in range(config.num_layers):
                arrays: dict[str, np.ndarray] = {}
                for name, (shape, dtype) in _shapes(config.ssm, layer).items():
                    nbytes = math.prod(shape) * dtype.itemsize
                    arrays[name] = self._held[at : at + nbytes].view(dtype).reshape(shape)
                    at += _padded(nbytes)
                self.layers.append(_layer(config.ssm, f"model.layers.{layer}.mixer.", vectors, arrays))
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Gives the memory back."""
        self.layers = []
        self._arena.free(self._held)


def _layer(
    ssm: SsmConfig, prefix: str, vectors: Mapping[str, np.ndarray], arrays: dict[str, np.ndarray]
) -> LayerTables:
    decay = arrays["decay"]
    np.exp(vectors[prefix + "A_log"].reshape(decay.shape), out=decay)
    np.negative(decay, out=decay)
    if "range" not in arrays:
        return LayerTables(decay=decay, static=None)
    scale = {
        name.removeprefix(prefix + "scales."): values
        for name, values in vectors.items()
        if name.startswith(prefix + "scales.")
    }
    for name, values in scale.items():
        if not (np.isfinite(values).all() and (values > 0).all()) and name not in ("heads", "channels"):
            raise InputError(f"{prefix}scales.{name}: scales must be positive numbers")
    arrays["range"][...] = channel_ranges(ssm, scale)
    parts = dict(zip(ssm.proj_parts, map(float, scale["proj"])))
    sizes = ssm.proj_parts
    arrays["proj_inverse"][...] = 1 / np.repeat(list(parts.values()), list(sizes.values()))
    x = scale["x"][arrays["range"]]
    names, outs = ["x"], [x]
    if not ssm.is_first:
        names += ["b", "c"]
        outs += [np.repeat(scale[name], ssm.state_size) for name in ("b", "c")]
    arrays["conv_in"][...] = np.repeat([parts[name] for name in names], [sizes[name] for name in names])
    arrays["conv_inverse"][...] = 1 / np.concatenate(outs)
    dt = float(scale["dt"][0]) if ssm.is_first else parts["dt"]
    assert ssm.quantized is not None
    state = scale["state"] if ssm.quantized.state == "int8" else None
    tables = ScanTables(range=arrays["range"], x=scale["x"], b=scale["b"], c=scale["c"], dt=dt, state=state)
    static = StaticScales(
        parts=parts,
        proj_inverse=arrays["proj_inverse"],
        conv_in=arrays["conv_in"],
        conv_inverse=arrays["conv_inverse"],
        scan=tables,
        input=float(scale["input"][0]),
        out=float(scale["out"][0]),
    )
    return LayerTables(decay=decay, static=static)


def channel_ranges(ssm: SsmConfig, scale: Mapping[str, np.ndarray]) -> np.ndarray:
    """The range [E] that each channel of x belongs to, from the ranges' sizes; InputError where they do not fit."""
    if ssm.is_first:
        return np.zeros(ssm.inner_size, np.int32)
    assert ssm.quantized is not None
    group_heads = ssm.num_heads // ssm.num_groups
    heads = scale["heads"].astype(np.int64).reshape(ssm.num_groups, -1)
    channels = scale["channels"].astype(np.int64).reshape(*heads.shape, -1)
    if (heads.sum(axis=1) != group_heads).any() or (channels.sum(axis=2) != ssm.head_dim).any() or (channels < 0).any():
        raise InputError(f"ranges of heads and channels do not add up to {group_heads} heads of {ssm.head_dim}")
    rows = []
    for place, count in enumerate(heads.reshape(-1)):
        sizes = channels.reshape(-1, channels.shape[2])[place]
        one_head = np.repeat(np.arange(len(sizes)) + place * len(sizes), sizes)
        rows.append(np.tile(one_head, count))
    return np.concatenate(rows).astype(np.int32)

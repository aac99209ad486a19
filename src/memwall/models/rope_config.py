"""Settings of rotary position embedding, read from a `config.json`.

Reads `rope_theta` and `rope_scaling` of transformers 4 and `rope_parameters` of transformers 5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from memwall.errors import InputError
from memwall.formats.checked_json import Fields

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
MAX_POSITION = 2**28


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding; fields that the type does not use keep their defaults.

    attention_factor multiplies cos and sin; it is resolved here (YaRN derives it from `factor` when the file names
    none).
    """

    type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    attention_factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


def read_rope(fields: Fields, family: str, max_position: int) -> RopeConfig:
    name = "rope_scaling" if fields.has("rope_scaling") else "rope_parameters"
    rope = Fields(fields.mapping(name, {}), f"{fields.source}: {name}")
    if any(isinstance(value, Mapping) for value in rope.values.values()):
        raise InputError(f"{rope.source}: settings per kind of layer are not supported; one for all layers is")
    theta = fields.number("rope_theta", 1.0001, 1e15, 1e6 if family == "mixtral" else 1e4)
    theta = rope.number("rope_theta", 1.0001, 1e15, theta)
    kind = rope.text("rope_type", rope.text("type", "default"), ROPE_TYPES)
    for place in (fields, rope):
        if place.number("partial_rotary_factor", 0.0, 1.0, 1.0) != 1.0:
            raise place.error(
                "partial_rotary_factor", place.values["partial_rotary_factor"], "1 (the whole head turns)"
            )
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(type=kind, theta=theta, factor=rope.number("factor", 1e-6, 1e6))
    # transformers lets the field at the top win over the one inside
    holder = fields if fields.has("original_max_position_embeddings") else rope
    original = holder.integer("original_max_position_embeddings", 1, MAX_POSITION, max_position)
    if kind == "llama3":
        low = rope.number("low_freq_factor", 1e-6, 1e6)
        high = rope.number("high_freq_factor", 1e-6, 1e6)
        if high <= low:
            raise rope.error("high_freq_factor", high, f"above low_freq_factor ({low:g})")
        return RopeConfig(
            type=kind,
            theta=theta,
            factor=rope.number("factor", 1e-6, 1e6),
            original_max_position=original,
            low_freq_factor=low,
            high_freq_factor=high,
        )
    return _yarn(rope, theta, original, max_position)


def _yarn(rope: Fields, theta: float, original: int, max_position: int) -> RopeConfig:
    factor = rope.number("factor", 1e-6, 1e6, max_position / original)
    attention_factor = rope.values.get("attention_factor")
    if attention_factor is None:
        scale, scale_all = rope.number("mscale", 0.0, 1e6, 0.0), rope.number("mscale_all_dim", 0.0, 1e6, 0.0)
        both = scale > 0 and scale_all > 0
        attention_factor = (
            _yarn_scale(factor, scale) / _yarn_scale(factor, scale_all) if both else _yarn_scale(factor, 1.0)
        )
    else:
        attention_factor = rope.number("attention_factor", 1e-6, 1e6)
    return RopeConfig(
        type="yarn",
        theta=theta,
        factor=factor,
        attention_factor=attention_factor,
        original_max_position=original,
        beta_fast=rope.number("beta_fast", 0.0, 1e6, 32.0) or 32.0,
        beta_slow=rope.number("beta_slow", 0.0, 1e6, 1.0) or 1.0,
        truncate=rope.flag("truncate", True),
    )


def _yarn_scale(factor: float, scale: float) -> float:
    """Temperature correction of YaRN (Peng 2023, equation 22)."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

"""The table of level formats: what a name stands for.

One `Named` per family: the pattern of its names, the levels, and what holds unless the spec says otherwise.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from memwall.errors import InputError
from memwall.formats import levels as level_sets
from memwall.formats.levels import LevelSet
from memwall.formats.scales import mean_scale, peak_scale, power_scale

Rule = Callable[..., object]
_RULES: dict[str, Rule] = {"peak": peak_scale, "mean": mean_scale, "power": power_scale}


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """One family. levels: of a match of the pattern; canonical: the full name of a match.

    group, scale: defaults; fixed: whether a spec may not change them. peak: largest level in use where that is not the
    format's largest.
    """

    pattern: str
    shown: str
    levels: Callable[[re.Match[str]], LevelSet]
    group: int = 64
    scale: str = "f16"
    rule: str = "peak"
    fixed: bool = False
    canonical: Callable[[re.Match[str]], str] = re.Match.group
    peak: Callable[[re.Match[str]], float] | None = None


def _posit_name(match: re.Match[str]) -> str:
    return f"posit{match['bits']}es{_posit_es(match)}"


def _posit_es(match: re.Match[str]) -> int:
    # the pairs of the XR-NPE paper: (4,1), (8,0), (16,1)
    return int(match["es"]) if match["es"] else 0 if match["bits"] == "8" else 1


def _mx_name(match: re.Match[str]) -> str:
    return "mxfp4" if match["bits"] == "4" else f"mxfp{match['bits']}{_mx_element(match)}"


def _mx_element(match: re.Match[str]) -> str:
    return match["element"] or {"4": "e2m1", "6": "e2m3", "8": "e4m3"}[match["bits"]]


def _element_levels(name: str) -> LevelSet:
    return level_sets.minifloat(int(name[1]), int(name[3]))


FAMILIES: dict[str, tuple[Named, ...]] = {
    "nf": (Named(pattern="nf4", shown="nf4", levels=lambda _: level_sets.nf4(), scale="f32"),),
    "fp": (Named(pattern="fp4", shown="fp4", levels=lambda _: level_sets.fp4(), scale="f32"),),
    "e": (
        Named(
            pattern=r"e(?P<e>[0-9])m(?P<m>[0-9])",
            shown="e2m1, e2m3, e3m2, e4m3, e5m2",
            levels=lambda match: _element_levels(match.group()),
        ),
    ),
    "posit": (
        Named(
            pattern=r"posit(?P<bits>[0-9]{1,2})(?:es(?P<es>[0-9]))?",
            shown="posit4es1, posit8es0",
            levels=lambda match: level_sets.posit(int(match["bits"]), _posit_es(match)),
            canonical=_posit_name,
            # up to 2^(2^es), where the fraction is longest: more levels for most numbers than up to the largest posit
            peak=lambda match: 2.0 ** (2 ** _posit_es(match)),
        ),
    ),
    "mxfp": (
        Named(
            pattern=r"mxfp(?P<bits>[468])(?P<element>(?<=6)e2m3|(?<=6)e3m2|(?<=8)e4m3|(?<=8)e5m2)?",
            shown="mxfp4, mxfp6, mxfp8",
            levels=lambda match: _element_levels(_mx_element(match)),
            group=32,
            scale="e8m0",
            fixed=True,
            canonical=_mx_name,
        ),
    ),
    "mxint": (
        Named(
            pattern="mxint8",
            shown="mxint8",
            # six bits after the point; -2 stays unused, as the specification allows, for levels alike on both sides
            levels=lambda _: level_sets.integers(8).within(127, 2.0**-6),
            group=32,
            scale="e8m0",
            fixed=True,
        ),
    ),
    "bfp": (
        Named(
            pattern=r"bfp(?P<bits>[2-8])",
            shown="bfp4",
            levels=lambda match: level_sets.integers(int(match["bits"])),
            group=32,
            scale="e8m0",
        ),
    ),
    "bipolar": (
        Named(
            pattern=r"bipolar(?P<bits>[1-8])",
            shown="bipolar3",
            levels=lambda match: level_sets.bipolar(int(match["bits"])),
        ),
    ),
    "ternary": (Named(pattern="ternary", shown="ternary", levels=lambda _: level_sets.ternary(), rule="mean"),),
    "binary": (Named(pattern="binary", shown="binary", levels=lambda _: level_sets.bipolar(1), rule="mean"),),
}


def known_names() -> str:
    """The names for error messages."""
    return ", ".join(named.shown for family in FAMILIES.values() for named in family) + ", binary2"


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """A name with its levels as a codec uses them."""

    name: str
    levels: LevelSet
    named: Named

    def rule(self, scale: str) -> Rule:
        """How scales of a kind are chosen: powers of two have one rule."""
        return _RULES["power" if scale == "e8m0" else self.named.rule]


def resolve_name(name: str, scale: str | None) -> Resolved:
    """What a name stands for; levels are scaled so that float scales are about as large as the numbers.

    (Were they left alone, the scale of a group of e5m2 would be 1/57344 of its numbers, and float16 has few digits
    there.) Powers of two keep the levels as they are published, and so do codes without a scale.
    """
    family = re.match(r"[a-z]*", name)
    for named in FAMILIES.get(family.group() if family else "", ()):
        match = re.fullmatch(named.pattern, name)
        if match is None:
            continue
        found = named.levels(match)
        peak = named.peak(match) if named.peak else found.largest
        if (scale or named.scale) in ("f16", "f32", "dq"):
            found = found.within(peak, 2.0 ** -math.ceil(math.log2(peak)))
        return Resolved(name=named.canonical(match), levels=found, named=named)
    raise InputError(f"unknown number format {name!r}; known are {known_names()}")

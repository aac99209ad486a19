"""Machines as typed data: tiers that hold bytes, links that move them, units that compute. Read from TOML, checked on
the way.

A figure without a source is worth nothing, so every tier, link and compute unit carries one; `derived` names the
fields that were worked out from others (bus width times clock) and `unsure` those that nobody stated firmly.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from memwall.errors import InputError
from memwall.hardware.units import (
    MIB,
    Bytes,
    BytesPerSecond,
    FlopPerSecond,
    Seconds,
    Watts,
    parse_bytes,
    parse_flop_rate,
    parse_rate,
    parse_seconds,
    parse_watts,
)

DTYPES = ("float64", "float32", "tfloat32", "bfloat16", "float16", "float8", "int8", "int4")
"""Number types that a compute unit can name."""

_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}", re.ASCII)
_LARGEST_FILE_BYTES = 1 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Tier:
    """A place that holds bytes. Where `count` is more than one the figures are those of one of them."""

    name: str
    capacity_bytes: Bytes
    read_bytes_per_s: BytesPerSecond
    write_bytes_per_s: BytesPerSecond
    latency_seconds: Seconds | None = None
    count: int = 1
    reference: str
    derived: tuple[str, ...] = ()
    unsure: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_name("tier", self.name)
        _check_positive(
            f"tier {self.name}",
            capacity=self.capacity_bytes,
            read=self.read_bytes_per_s,
            write=self.write_bytes_per_s,
            latency=self.latency_seconds,
            count=self.count,
        )
        _check_reference(f"tier {self.name}", self.reference)


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A way between two tiers. The bandwidth is that of one direction; `both_ways` says whether the other has as
    much.
    """

    source: str
    target: str
    bytes_per_s: BytesPerSecond
    latency_seconds: Seconds | None = None
    both_ways: bool = True
    reference: str
    derived: tuple[str, ...] = ()
    unsure: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        what = f"link {self.source} to {self.target}"
        _check_positive(what, bandwidth=self.bytes_per_s, latency=self.latency_seconds)
        _check_reference(what, self.reference)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """A processor: peak operations per second by number type (dense, no sparsity), working on the bytes of one tier.

    Where `count` is more than one the figures are those of one of them. watts: what it may draw at most, memory on its
    board included.
    """

    unit: str
    tier: str
    flop_per_s: Mapping[str, FlopPerSecond]
    count: int = 1
    watts: Watts | None = None
    reference: str
    derived: tuple[str, ...] = ()
    unsure: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        what = f"compute {self.unit}"
        _check_name("compute unit", self.unit)
        if not self.flop_per_s:
            raise InputError(f"{what}: no rate for any number type; known are {', '.join(DTYPES)}")
        for dtype in self.flop_per_s:
            if dtype not in DTYPES:
                raise InputError(f"{what}: unknown number type {dtype!r}; known are {', '.join(DTYPES)}")
        _check_positive(what, count=self.count, power=self.watts, **self.flop_per_s)
        _check_reference(what, self.reference)
        object.__setattr__(self, "flop_per_s", MappingProxyType(dict(self.flop_per_s)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One machine. `name` is the preset's file name; `kind` a word such as laptop, gpu, server, phone,
    microcontroller.
    """

    name: str
    title: str
    kind: str
    tiers: tuple[Tier, ...]
    links: tuple[Link, ...] = ()
    compute: tuple[Compute, ...] = ()
    notes: str = ""

    def __post_init__(self) -> None:
        if not self.tiers:
            raise InputError(f"machine {self.name}: it has no tier")
        known = [tier.name for tier in self.tiers]
        for name in known:
            if known.count(name) > 1:
                raise InputError(f"machine {self.name}: tier {name} is given twice")
        for link in self.links:
            for end in (link.source, link.target):
                if end not in known:
                    raise InputError(
                        f"machine {self.name}: a link names tier {end!r}; its tiers are {', '.join(known)}"
                    )
        for unit in self.compute:
            if unit.tier not in known:
                raise InputError(
                    f"machine {self.name}: compute {unit.unit} works on tier {unit.tier!r}; "
                    f"its tiers are {', '.join(known)}"
                )

    def tier(self, name: str) -> Tier:
        """The tier of that name; InputError names those there are."""
        for tier in self.tiers:
            if tier.name == name:
                return tier
        raise InputError(f"{self.name} has no tier {name!r}; it has {', '.join(tier.name for tier in self.tiers)}")

    def has_tier(self, name: str) -> bool:
        """Whether there is a tier of that name."""
        return any(tier.name == name for tier in self.tiers)

    def link(self, source: str, target: str) -> Link | None:
        """The fastest direct link that carries bytes that way, or None."""
        found = [
            link
            for link in self.links
            if (link.source, link.target) == (source, target)
            or (link.both_ways and (link.target, link.source) == (source, target))
        ]
        return max(found, key=lambda link: link.bytes_per_s, default=None)

    def bytes_per_s(self, source: str, target: str) -> float:
        """Bytes per second from one tier to another: the slowest of reading, the link (when there is one) and
        writing.
        """
        rates = [self.tier(source).read_bytes_per_s, self.tier(target).write_bytes_per_s]
        link = self.link(source, target)
        return min(rates if link is None else [*rates, link.bytes_per_s])

    def flop_per_s(self, unit: str, dtype: str) -> float:
        """Peak rate of one unit; InputError names what is known."""
        for compute in self.compute:
            if compute.unit == unit:
                if dtype in compute.flop_per_s:
                    return compute.flop_per_s[dtype]
                raise InputError(f"{self.name}: no {dtype} rate for {unit}; known are {', '.join(compute.flop_per_s)}")
        raise InputError(f"{self.name} has no {unit!r}; it has {', '.join(compute.unit for compute in self.compute)}")

    def to_json(self) -> dict[str, Any]:
        """Plain data with units in the names; `Machine.from_json` gives an equal machine."""
        return {
            "name": self.name,
            "title": self.title,
            "kind": self.kind,
            "notes": self.notes,
            "tiers": [_plain(tier) for tier in self.tiers],
            "links": [_plain(link) for link in self.links],
            "compute": [_plain(unit) for unit in self.compute],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Machine:
        """The machine that `to_json` described; InputError when a field is missing, unknown or out of range."""
        try:
            return cls(
                name=data["name"],
                title=data["title"],
                kind=data["kind"],
                notes=data.get("notes", ""),
                tiers=tuple(Tier(**_tuples(row)) for row in data["tiers"]),
                links=tuple(Link(**_tuples(row)) for row in data["links"]),
                compute=tuple(Compute(**_tuples(row)) for row in data["compute"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"not a machine description: {error}") from None

    @classmethod
    def from_toml(cls, text: str, name: str) -> Machine:
        """A machine from the text of a preset; `name` is used in messages."""
        try:
            data = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise InputError(f"machine {name}: not valid TOML: {error}") from None
        _known_keys(name, data, {"title", "kind", "notes", "tier", "link", "compute"})
        return cls(
            name=name,
            title=_text(name, data, "title"),
            kind=_text(name, data, "kind"),
            notes=str(data.get("notes", "")),
            tiers=tuple(_read_tier(name, row) for row in _rows(name, data, "tier")),
            links=tuple(_read_link(name, row) for row in _rows(name, data, "link")),
            compute=tuple(_read_compute(name, row) for row in _rows(name, data, "compute")),
        )


def preset_names() -> list[str]:
    """Names of the machines that come with the package."""
    folder = resources.files("memwall.hardware") / "presets"
    return sorted(item.name.removesuffix(".toml") for item in folder.iterdir() if item.name.endswith(".toml"))


def load_machine(name_or_path: str | Path) -> Machine:
    """A preset by name, or the description in a TOML file. InputError names the nearest presets when there is
    neither.
    """
    text = str(name_or_path)
    if isinstance(name_or_path, str) and not text.endswith(".toml"):
        if text in preset_names():
            folder = resources.files("memwall.hardware") / "presets"
            return Machine.from_toml((folder / f"{text}.toml").read_text(encoding="utf-8"), text)
        near = difflib.get_close_matches(text, preset_names(), n=3, cutoff=0.4)
        hint = f"nearest are {' and '.join(near)}" if near else f"known are {', '.join(preset_names())}"
        raise InputError(f"unknown machine {text!r}; {hint}, or give a .toml file")
    path = Path(text)
    try:
        if path.stat().st_size > _LARGEST_FILE_BYTES:
            raise InputError(f"{path}: {path.stat().st_size:,} bytes is too large for a machine description")
        return Machine.from_toml(path.read_text(encoding="utf-8"), path.stem)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the machine description {path}: {error}") from None


def _read_tier(machine: str, row: Mapping[str, Any]) -> Tier:
    where = f"machine {machine}, tier {row.get('name', '?')}"
    _known_keys(where, row, {"name", "capacity", "read", "write", "latency", "count", "source", "derived", "unsure"})
    read = _parsed(where, row, "read", parse_rate)
    return Tier(
        name=_text(where, row, "name"),
        capacity_bytes=_parsed(where, row, "capacity", parse_bytes),
        read_bytes_per_s=read,
        write_bytes_per_s=_parsed(where, row, "write", parse_rate) if "write" in row else read,
        latency_seconds=_parsed(where, row, "latency", parse_seconds) if "latency" in row else None,
        count=_count(where, row),
        reference=_text(where, row, "source"),
        derived=_fields_named(where, row, "derived"),
        unsure=_fields_named(where, row, "unsure"),
    )


def _read_link(machine: str, row: Mapping[str, Any]) -> Link:
    where = f"machine {machine}, link {row.get('from', '?')} to {row.get('to', '?')}"
    _known_keys(where, row, {"from", "to", "bandwidth", "latency", "both_ways", "source", "derived", "unsure"})
    both_ways = row.get("both_ways", True)
    if not isinstance(both_ways, bool):
        raise InputError(f"{where}: both_ways must be true or false, not {both_ways!r}")
    return Link(
        source=_text(where, row, "from"),
        target=_text(where, row, "to"),
        bytes_per_s=_parsed(where, row, "bandwidth", parse_rate),
        latency_seconds=_parsed(where, row, "latency", parse_seconds) if "latency" in row else None,
        both_ways=both_ways,
        reference=_text(where, row, "source"),
        derived=_fields_named(where, row, "derived"),
        unsure=_fields_named(where, row, "unsure"),
    )


def _read_compute(machine: str, row: Mapping[str, Any]) -> Compute:
    where = f"machine {machine}, compute {row.get('unit', '?')}"
    _known_keys(where, row, {"unit", "tier", "count", "power", "source", "derived", "unsure", *DTYPES})
    return Compute(
        unit=_text(where, row, "unit"),
        tier=_text(where, row, "tier"),
        flop_per_s={dtype: _parsed(where, row, dtype, parse_flop_rate) for dtype in DTYPES if dtype in row},
        count=_count(where, row),
        watts=_parsed(where, row, "power", parse_watts) if "power" in row else None,
        reference=_text(where, row, "source"),
        derived=_fields_named(where, row, "derived"),
        unsure=_fields_named(where, row, "unsure"),
    )


def _rows(where: str, data: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    rows = data.get(key, [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"machine {where}: {key} must be a list of tables, written [[{key}]]")
    return rows


def _text(where: str, row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: {key} is missing or not a text")
    return value


_Quantity = TypeVar("_Quantity")


def _parsed(where: str, row: Mapping[str, Any], key: str, parse: Callable[[str], _Quantity]) -> _Quantity:
    try:
        return parse(_text(where, row, key))
    except InputError as error:
        raise InputError(f"{where}: {key}: {error}") from None


def _count(where: str, row: Mapping[str, Any]) -> int:
    count = row.get("count", 1)
    if not isinstance(count, int) or isinstance(count, bool):
        raise InputError(f"{where}: count must be a whole number, not {count!r}")
    return count


def _fields_named(where: str, row: Mapping[str, Any], key: str) -> tuple[str, ...]:
    names = row.get(key, [])
    if not isinstance(names, list) or any(name not in row for name in names):
        raise InputError(f"{where}: {key} must be a list of fields given in the same table, not {names!r}")
    return tuple(names)


def _known_keys(where: str, row: Mapping[str, Any], known: set[str]) -> None:
    for key in row:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
            raise InputError(f"{where}: unknown field {key!r}; {hint}")


def _check_name(what: str, name: str) -> None:
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise InputError(f"{what} name {name!r}: must be a short word in small letters, digits and _")


def _check_positive(what: str, **figures: float | None) -> None:
    for name, value in figures.items():
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"{what}: {name} is {value}; must be more than zero")


def _check_reference(what: str, reference: str) -> None:
    if not reference.strip():
        raise InputError(f"{what}: no source; say where the figures come from")


def _plain(item: Tier | Link | Compute) -> dict[str, Any]:
    row = {name: getattr(item, name) for name in item.__dataclass_fields__}
    return {key: dict(value) if isinstance(value, Mapping) else value for key, value in row.items()}


def _tuples(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}

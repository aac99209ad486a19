"""Budgets: how many bytes each tier may hold, how fast the slow links may be used. Absolute figures, never fractions.

A budget is written `2GB` (the resident memory of the process) or tier by tier:
`gpu=11.5GiB,ram=24GiB,disk=80GiB,disk_rate=1GB/s`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from types import MappingProxyType
from typing import TypeVar

from memwall.errors import InputError
from memwall.hardware.units import format_bytes, parse_bytes, parse_rate

TIERS = ("gpu", "ram", "cxl", "disk", "net")
"""Tiers a budget can name; GPUs may be numbered (`gpu0`, `gpu1`, ...)."""

_KNOWN = (
    "gpu (or gpu0, gpu1, ...), ram, cxl, disk, net, "
    "and a rate for each: gpu_rate, ram_rate, cxl_rate, disk_rate, net_rate"
)
_FORMS = (
    "write one size for the process (2GB), "
    "or tiers such as gpu=11.5GiB,ram=24GiB,disk=80GiB,disk_rate=1GB/s,net_rate=100Mbit/s"
)
_TIER = re.compile(r"gpu[0-9]{0,3}|ram|cxl|disk|net", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Limits per tier in bytes, and per link in bytes per second. A tier that is not named has no limit."""

    tiers: Mapping[str, int]
    rates: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, num_bytes in self.tiers.items():
            _check_tier(name, name)
            if num_bytes <= 0:
                raise InputError(f"budget {name}={num_bytes}: must be more than zero")
        for name, bytes_per_s in self.rates.items():
            _check_tier(name, f"{name}_rate")
            if not bytes_per_s > 0:
                raise InputError(f"budget {name}_rate={bytes_per_s}: must be more than zero")
        if "gpu" in self.tiers and any(re.fullmatch(r"gpu[0-9]+", name) for name in self.tiers):
            raise InputError(
                "budget names both gpu and numbered GPUs; use gpu for one card, gpu0, gpu1, ... for several"
            )
        object.__setattr__(self, "tiers", MappingProxyType(dict(self.tiers)))
        object.__setattr__(self, "rates", MappingProxyType(dict(self.rates)))

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Reads `2GB` or `gpu=11.5GiB,ram=24GiB,disk_rate=1GB/s`; InputError names the piece that is wrong."""
        pieces = [piece.strip() for piece in text.split(",")]
        if pieces == [""]:
            raise InputError(f"the budget is empty: {_FORMS}")
        if len(pieces) == 1 and "=" not in pieces[0]:
            try:
                return cls(tiers={"ram": _positive(pieces[0], parse_bytes(pieces[0]))})
            except InputError as error:
                raise InputError(f"budget {text!r}: {error}; or name tiers, as in ram=2GB,disk=80GiB") from None
        tiers: dict[str, int] = {}
        rates: dict[str, float] = {}
        for piece in pieces:
            name, equals, value = (part.strip() for part in piece.partition("="))
            name = name.lower()
            if not equals or not value:
                raise InputError(f"budget piece {piece!r} is not name=value: {_FORMS}")
            tier = name.removesuffix("_rate")
            _check_tier(tier, piece)
            is_rate = name != tier
            if tier in (rates if is_rate else tiers):
                raise InputError(f"budget piece {piece!r}: {name} is given twice")
            try:
                if is_rate:
                    rates[tier] = _positive(piece, parse_rate(value))
                else:
                    tiers[tier] = _positive(piece, parse_bytes(value))
            except InputError as error:
                raise InputError(f"budget piece {piece!r}: {error}") from None
        return cls(tiers=tiers, rates=rates)

    @property
    def ram(self) -> int | None:
        """Bytes of resident memory the process may have; None when it was not limited."""
        return self.tiers.get("ram")

    def __str__(self) -> str:
        """The canonical form; `Budget.parse` gives an equal budget."""
        sizes = [f"{name}={format_bytes(size, exact=True).replace(' ', '')}" for name, size in self.tiers.items()]
        return ",".join(sizes + [f"{name}_rate={Decimal(rate):f}B/s" for name, rate in self.rates.items()])

    def to_json(self) -> dict[str, dict[str, float]]:
        """Plain data: `{"tiers": {"ram": bytes}, "rates": {"disk": bytes per second}}`."""
        return {"tiers": dict(self.tiers), "rates": dict(self.rates)}


def _check_tier(tier: str, piece: str) -> None:
    if _TIER.fullmatch(tier) is None:
        raise InputError(f"budget piece {piece!r}: unknown tier {tier!r}; known are {_KNOWN}")


_Number = TypeVar("_Number", int, float)


def _positive(piece: str, value: _Number) -> _Number:
    if value <= 0:
        raise InputError("zero; a budget must be more than zero")
    return value

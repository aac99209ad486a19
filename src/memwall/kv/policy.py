"""Policy strings: `float16`, `kivi`, `kivi(2bit)`, `kivi(bits=2,group=32,residual=128)`.

A policy is a name and settings in brackets. A setting is `key=value`; `2bit` is short for `bits=2`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from memwall.errors import InputError

_POLICY = re.compile(r"\s*([a-z][a-z0-9_-]*)\s*(?:\(([^()]*)\))?\s*")
_BITS = re.compile(r"([0-9]+)\s*-?\s*bits?")
_SETTING = re.compile(r"([a-z_]+)\s*=\s*([a-z0-9_.]+)")


@dataclass(frozen=True, slots=True)
class Policy:
    """A parsed policy string: `str(policy)` is its canonical form."""

    name: str
    settings: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        inside = ",".join(f"{key}={value}" for key, value in self.settings.items())
        return f"{self.name}({inside})" if inside else self.name

    def integers(self, defaults: Mapping[str, int]) -> dict[str, int]:
        """The settings as integers over `defaults`; an unknown one or one that is no number is an error."""
        values = dict(defaults)
        for key, text in self.settings.items():
            if key not in defaults:
                raise InputError(f"policy {self}: unknown setting {key!r}; it takes {', '.join(defaults)}")
            if not text.isdecimal():
                raise InputError(f"policy {self}: {key}={text!r} is not a whole number")
            values[key] = int(text)
        return values


def parse(text: str) -> Policy:
    """Reads a policy string. Whether the name is known and the settings make sense is for its technique to say."""
    match = _POLICY.fullmatch(text.lower())
    if match is None:
        raise InputError(
            f"KV policy {text!r}: must look like float16, kivi(2bit) or kivi(bits=2,group=32,residual=128)"
        )
    name, inside = match.groups()
    settings: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in (inside or "").split(","))):
        if bits := _BITS.fullmatch(item):
            key, value = "bits", bits.group(1)
        elif setting := _SETTING.fullmatch(item):
            key, value = setting.groups()
        else:
            raise InputError(f"KV policy {text!r}: setting {item!r} must look like bits=2")
        if key in settings:
            raise InputError(f"KV policy {text!r}: {key} is given twice")
        settings[key] = value
    return Policy(name, settings)

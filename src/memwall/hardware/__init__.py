"""Machines as data: `units`, `machine` (tiers, links, compute; presets), and `probe()`, which measures this one.

This room is the lowest: every other room counts in its units. `measure` holds the probe,
`report` what it found, `probe_store` keeps that in the user's cache, `system` asks the operating system.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from memwall.hardware.units import (
    GB,
    GIB,
    KB,
    KIB,
    MB,
    MIB,
    Bytes,
    BytesPerSecond,
    FlopPerSecond,
    Seconds,
    format_bytes,
    format_flop_rate,
    format_rate,
    format_seconds,
    parse_bytes,
    parse_rate,
)

if TYPE_CHECKING:
    from memwall.hardware.machine import Compute, Link, Machine, Tier, load_machine, preset_names
    from memwall.hardware.measure import probe
    from memwall.hardware.probe_store import cache_file, load_cached, load_rates, store_rates
    from memwall.hardware.report import ProbeReport, ProbeRow
    from memwall.hardware.system import (
        System,
        available_memory_bytes,
        cache_directory,
        describe_system,
        usable_processors,
    )

# Units are needed by every room and cost nothing; the rest is loaded when it is first asked for, so that counting
# bytes does
# not cost the start-up of reading TOML.
_HOMES = {
    "machine": ("Compute", "Link", "Machine", "Tier", "load_machine", "preset_names"),
    "measure": ("probe",),
    "probe_store": ("cache_file", "load_cached", "load_rates", "store_rates"),
    "report": ("ProbeReport", "ProbeRow"),
    "system": ("System", "available_memory_bytes", "cache_directory", "describe_system", "usable_processors"),
}

__all__ = [
    "GB",
    "GIB",
    "KB",
    "KIB",
    "MB",
    "MIB",
    "Bytes",
    "BytesPerSecond",
    "Compute",
    "FlopPerSecond",
    "Link",
    "Machine",
    "ProbeReport",
    "ProbeRow",
    "Seconds",
    "System",
    "Tier",
    "available_memory_bytes",
    "cache_directory",
    "cache_file",
    "describe_system",
    "format_bytes",
    "format_flop_rate",
    "format_rate",
    "format_seconds",
    "load_cached",
    "load_machine",
    "load_rates",
    "parse_bytes",
    "parse_rate",
    "preset_names",
    "probe",
    "store_rates",
    "usable_processors",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(import_module(f"memwall.hardware.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

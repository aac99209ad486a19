"""Machines as data: units (`units`), tiers, links and compute (`machine`, presets), and `probe`, which measures one.

This room is the lowest: every other room counts in its units.
"""

from __future__ import annotations

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
    format_rate,
    parse_bytes,
    parse_rate,
)

__all__ = [
    "GB",
    "GIB",
    "KB",
    "KIB",
    "MB",
    "MIB",
    "Bytes",
    "BytesPerSecond",
    "FlopPerSecond",
    "Seconds",
    "format_bytes",
    "format_rate",
    "parse_bytes",
    "parse_rate",
]

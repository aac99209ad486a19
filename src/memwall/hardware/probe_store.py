"""Keeps the result of a probe, and rates that other rooms measured, in one file of the user's cache.

The file is named after processor, processor count, memory and memwall version: a home directory shared by several
machines keeps them apart, and an upgrade measures anew. It is written to a temporary name, flushed and renamed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from memwall import __version__
from memwall.errors import InputError
from memwall.hardware.report import ProbeReport
from memwall.hardware.system import System, cache_directory, describe_system, write_whole
from memwall.hardware.units import GIB, MIB

_LARGEST_FILE_BYTES = 4 * MIB


def cache_file(system: System | None = None) -> Path:
    """Where this machine's figures are kept."""
    system = system or describe_system()
    memory = round(system.memory_bytes / GIB)
    key = f"{system.processor}|{system.num_processors}|{memory}|{__version__}"
    return cache_directory() / f"probe-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def load_cached() -> ProbeReport | None:
    """The last result for this machine, with the stored rates; None when there is none or the file is damaged."""
    data = _load()
    if data.get("report") is None:
        return None
    try:
        return replace(ProbeReport.from_json(data["report"]), rates=_clean(data.get("rates")))
    except InputError:
        return None


def load_rates() -> dict[str, float]:
    """Named rates stored for this machine; empty when there are none."""
    return _clean(_load().get("rates"))


def store_rates(rates: Mapping[str, float]) -> bool:
    """Adds named rates (`linear/int4-g64/2 threads`: bytes or operations per second) to this machine's file.

    Rates of the same name are replaced, others stay. False when the cache cannot be written.
    """
    for name, rate in rates.items():
        if not name or not math.isfinite(rate) or rate <= 0:
            raise InputError(f"rate {name!r} is {rate}; must be a finite number above zero")
    data = _load()
    return _save({**data, "rates": {**_clean(data.get("rates")), **rates}})


def save_report(report: ProbeReport) -> bool:
    """Keeps a report, and the rates stored before. A quick one never replaces a thorough one. False when it cannot
    be written.
    """
    data = _load()
    kept = load_cached()
    if kept is not None and report.quick and not kept.quick:
        return True
    return _save({**data, "report": replace(report, rates={}).to_json()})


def _load() -> dict[str, Any]:
    path = cache_file()
    try:
        if path.stat().st_size > _LARGEST_FILE_BYTES:
            return {}
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _save(data: Mapping[str, Any]) -> bool:
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(data, indent=1))
    except OSError:
        return False
    return True


def _clean(rates: Any) -> dict[str, float]:
    if not isinstance(rates, dict):
        return {}
    return {
        str(name): float(rate)
        for name, rate in rates.items()
        if isinstance(rate, int | float) and not isinstance(rate, bool) and math.isfinite(rate) and rate > 0
    }

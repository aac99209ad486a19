"""What a server says of itself while it is measured: its queue and its pages over time, by its metrics.

Any server whose Prometheus names end as vLLM's do can be watched; of another one nothing is known.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from memwall.errors import InputError
from memwall.serve.bench import Target, fetch_bytes, percentiles

NAMES = {
    "waiting": ("num_requests_waiting",),
    "running": ("num_requests_running",),
    "pages": ("kv_cache_usage_perc", "gpu_cache_usage_perc"),
}
WATCH_SECONDS = 1.0


async def watch(target: Target, seconds: float = WATCH_SECONDS) -> list[dict[str, float]]:
    """Samples until it is cancelled: seconds since it began, requests that wait and run, share of the pages in use.

    It ends by itself where the server has no such metrics. A sample that fails is left out.
    """
    found: list[dict[str, float]] = []
    began = time.perf_counter()
    with suppress(asyncio.CancelledError):
        while True:
            try:
                told = sample((await fetch_bytes(target, "/metrics")).decode("utf-8", "replace"))
            except (InputError, ValueError):
                return found
            except (OSError, asyncio.IncompleteReadError):
                told = {}
            else:
                if not told:
                    return found
            if told:
                found.append({"at": time.perf_counter() - began, **told})
            await asyncio.sleep(seconds)
    return found


def sample(text: str) -> dict[str, float]:
    """The figures of `NAMES` in a page of metrics, summed over labels; those that it has."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        name, _, value = line.rpartition(" ")
        family = name.partition("{")[0].rpartition(":")[2]
        for key, names in NAMES.items():
            if family in names:
                with suppress(ValueError):
                    found[key] = found.get(key, 0.0) + float(value)
    return found


def queue_figures(samples: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Mean, percentiles and the most of each, and the samples themselves."""
    if not samples:
        return {}
    told = {}
    for key in NAMES:
        values = [one[key] for one in samples if key in one]
        told[key] = {**percentiles(values), "most": max(values)} if values else {}
    return {**told, "samples": list(samples)}

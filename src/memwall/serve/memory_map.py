"""What the page shows, as plain data: tiers and owners, pages, the queue, running requests, latencies."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from memwall.memory import peak_resident_bytes, resident_bytes

if TYPE_CHECKING:
    from memwall.serve.service import Service

MOST_ROWS = 200
MOST_CELLS = 4096
PERCENTILES = (50, 90, 99)


def memory_map(service: Service) -> dict[str, Any]:
    """Call it between two steps of the engine."""
    serving, engine = service.serving, service.serving.engine
    serving.close_books()
    pool, now = serving.pool, engine.clock()
    requests = [*engine.running.values(), *engine.swapped.values(), *engine.waiting.values()]
    return {
        "model": service.settings.name,
        "time": time.time(),
        "uptime_seconds": time.time() - service.started,
        "budget_bytes": serving.budget_bytes,
        "resident_bytes": resident_bytes(),
        "resident_peak_bytes": peak_resident_bytes(),
        "ledger": serving.ledger.to_json(),
        "pool": {
            "page_bytes": pool.page_bytes,
            "page_tokens": engine.limits.page_tokens,
            "limit_pages": pool.limit_pages,
            "wanted_pages": engine.wanted_pages,
            "committed_bytes": pool.committed_bytes,
            "used_pages": pool.used_pages,
            "peak_pages": pool.peak_pages,
            "tenants": pool.usage(),
            "cells": _cells(service),
        },
        "queue": {
            "running": len(engine.running),
            "waiting": len(engine.waiting),
            "swapped": len(engine.swapped),
            "room": service.settings.queue,
            "most_sequences": engine.limits.max_sequences,
        },
        "requests": [
            {
                "id": one.id,
                "status": one.status,
                "prompt_tokens": one.num_prompt,
                "made_tokens": one.num_made,
                "computed_tokens": one.computed,
                "cached_tokens": one.cached,
                "pages": len(one.pages) or len(one.places),
                "preemptions": one.preemptions,
                "priority": one.request.priority,
                "seconds": now - one.arrival,
            }
            for one in requests[:MOST_ROWS]
        ],
        "totals": {
            "steps": engine.totals.steps,
            "prompt_tokens": engine.totals.prompt_tokens,
            "made_tokens": engine.totals.made_tokens,
            "computed_tokens": engine.totals.computed_tokens,
            "prefix_hits": engine.totals.prefix_hits,
            "preempted": dict(engine.totals.preempted),
            "finished": dict(engine.totals.finished),
        },
        "latency": latencies(service),
    }


def latencies(service: Service) -> dict[str, dict[str, float]]:
    """Percentiles of the last answers, in seconds."""
    found: dict[str, dict[str, float]] = {}
    for place, name in enumerate(("first_token", "per_token", "whole")):
        values = sorted(row[place] for row in service.recent)
        if values:
            found[name] = {f"p{p}": values[min(len(values) * p // 100, len(values) - 1)] for p in PERCENTILES}
    return found


def _cells(service: Service) -> list[list[int]]:
    """Runs of pages that the same holder has: [request or a mark, length]. -1 free, -2 a kept beginning, -3 shared."""
    engine = service.serving.engine
    pool = service.serving.pool
    holder: dict[int, int] = {}
    for one in engine.running.values():
        for page in one.pages:
            holder[page] = -3 if page in holder else one.id
    runs: list[list[int]] = []
    for page in range(pool.limit_pages):
        mark = holder.get(page, -2 if pool.tenant(page) is not None else -1)
        if runs and runs[-1][0] == mark:
            runs[-1][1] += 1
        elif len(runs) == MOST_CELLS:
            break
        else:
            runs.append([mark, 1])
    return runs

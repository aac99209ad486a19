"""What the page shows, as plain data: tiers and owners, pages, the queue, running requests, latencies."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from memwall.engine.adapters import TENANT
from memwall.engine.phased import PhasedEngine
from memwall.engine.sequence import Sequence
from memwall.memory import peak_resident_bytes, resident_bytes

if TYPE_CHECKING:
    from memwall.serve.service import Service

MOST_ROWS = 200
MOST_CELLS = 2000
PERCENTILES = (50, 90, 99)
MARKS = {None: -1, TENANT: -4}


def memory_map(service: Service) -> dict[str, Any]:
    """Call it between two steps of the engine."""
    serving, engine = service.serving, service.serving.engine
    serving.close_books()
    pool, now = serving.pool, engine.clock()
    stride = -(-pool.limit_pages // MOST_CELLS) or 1
    requests = sorted(engine.everyone(), key=lambda one: (one.status == "waiting", one.id))
    counts = Counter(one.status for one in requests)
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
            "stride": stride,
            "cells": _cells(service, stride),
            **({pool.counts: pool.told()} if pool.counts else {}),
        },
        "queue": {
            "running": counts["running"],
            "waiting": counts["waiting"],
            "swapped": counts["swapped"] + counts["arriving"],
            "room": service.settings.queue,
            "most_sequences": engine.limits.max_sequences,
        },
        "adapters": _adapters(service),
        "phases": phases(service),
        "requests": [_row(one, now) for one in requests[:MOST_ROWS]],
        "totals": {
            "steps": engine.totals.steps,
            "prompt_tokens": engine.totals.prompt_tokens,
            "made_tokens": engine.totals.made_tokens,
            "computed_tokens": engine.totals.computed_tokens,
            "prefix_hits": engine.totals.prefix_hits,
            "preempted": dict(engine.totals.preempted),
            "switches": asdict(engine.switch.counts),
            "finished": dict(engine.totals.finished),
        },
        "latency": latencies(service),
    }


def _row(one: Sequence, now: float) -> dict[str, Any]:
    return {
        "id": one.id,
        "status": one.status,
        "prompt_tokens": one.num_prompt,
        "made_tokens": one.num_made,
        "computed_tokens": one.computed,
        "cached_tokens": one.cached,
        "pages": len(one.pages) or (len(one.copy.places) if one.copy is not None else 0),
        "preemptions": one.preemptions,
        "priority": one.request.priority,
        "level": one.level,
        "adapter": one.request.adapter,
        "seconds": now - one.arrival,
    }


def phases(service: Service) -> dict[str, Any] | None:
    """Shares of the two workers and their processes; None where one worker does all."""
    engine, workers = service.serving.engine, service.serving.workers
    if workers is None or not isinstance(engine, PhasedEngine):
        return None
    return {
        "prefill_percent": workers.shares.prefill,
        "decode_percent": workers.shares.decode,
        "preparing": workers.preparing is not None,
        "switches": engine.switches,
        "lost": workers.lost,
        "processes": list(workers.pids),
        "apart": _apart(engine),
    }


def _apart(engine: PhasedEngine) -> dict[str, Any] | None:
    """The prefill side's own memory, and what was handed over from it; None where both use one."""
    from memwall.engine.apart import ApartEngine

    if not isinstance(engine, ApartEngine):
        return None
    pool = engine.front.pages.pool
    return {
        "limit_pages": pool.limit_pages,
        "used_pages": pool.used_pages,
        "kept_pages": engine.front.pages.idle_pages,
        "offered": len(engine.offered),
        "batch_tokens": engine.front.limits.token_budget,
        "moved": asdict(engine.moves),
    }


def _adapters(service: Service) -> dict[str, Any] | None:
    """Adapters: how many are known, what they hold, and how reading them went; None where there are none."""
    adapters = service.serving.adapters
    if adapters is None:
        return None
    held = {"known": len(adapters.names), "pages": adapters.used_pages, "idle_pages": adapters.idle_pages}
    return {**held, **asdict(adapters.counts)}


def latencies(service: Service) -> dict[str, dict[str, float]]:
    """Percentiles of the last answers, in seconds."""
    found: dict[str, dict[str, float]] = {}
    for place, name in enumerate(("first_token", "per_token", "whole")):
        values = sorted(row[place] for row in service.recent)
        if values:
            found[name] = {f"p{p}": values[min(len(values) * p // 100, len(values) - 1)] for p in PERCENTILES}
    return found


def _cells(service: Service, stride: int) -> list[list[int]]:
    """Every `stride`th page, in runs: [request or mark, length]. -1 free, -2 kept beginning, -3 shared, -4 adapter."""
    engine = service.serving.engine
    pool = service.serving.pool
    holder: dict[int, int] = {}
    for one in (*engine.running.values(), *engine.swapped.values()):
        for page in one.pages:
            holder[page] = -3 if page in holder else one.id
    runs: list[list[int]] = []
    for page in pool.map()[::stride]:
        mark = holder.get(page, MARKS.get(pool.tenant(page), -2))
        if runs and runs[-1][0] == mark:
            runs[-1][1] += 1
        else:
            runs.append([mark, 1])
    return runs

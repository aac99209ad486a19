"""A client that measures a server: open loop (requests come when they come) or closed loop (so many at a time).

In the open loop a request is sent at its time whatever became of the others, so a server that stalls is seen to stall;
how late the client itself was is told beside (`send_lag`). Any OpenAI-compatible server can be measured.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import pvariance
from typing import Any
from urllib.parse import urlsplit

from memwall.engine.arrivals import Load
from memwall.errors import InputError

PERCENTILES = (50, 90, 99)
LONGEST_LINE_BYTES = 1 << 20
WINDOW_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where the server is. vocabulary: prompts are drawn from this many token ids (the first few left out)."""

    url: str
    model: str
    vocabulary: int
    api_key: str | None = None
    timeout_seconds: float = 600.0


@dataclass(slots=True)
class Outcome:
    """What became of one request; times in seconds of the client's clock."""

    load: Load
    due: float = 0.0
    sent: float = 0.0
    first: float | None = None
    last: float | None = None
    tokens: int = 0
    error: str | None = None
    timed_out: bool = False
    gaps: list[float] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)


async def measure(
    target: Target, loads: Sequence[Load], *, concurrency: int | None, seed: int = 0, shared_tokens: int = 0
) -> list[Outcome]:
    """Sends all; concurrency: closed loop with so many at a time, None: open loop by the loads' times.

    shared_tokens: how many tokens all prompts begin with alike. A turn of a conversation is sent when the one before it
    is answered, or later.
    """
    draw = random.Random(seed)
    opening = [draw.randrange(8, target.vocabulary) for _ in range(shared_tokens)]
    prompts = [
        (opening + [draw.randrange(8, target.vocabulary) for _ in range(load.prompt_tokens)])[: load.prompt_tokens]
        for load in loads
    ]
    outcomes = [Outcome(load) for load in loads]
    began = time.perf_counter()
    slots = asyncio.Semaphore(concurrency if concurrency is not None else len(loads) or 1)

    async def one(outcome: Outcome, prompt: list[int], before: asyncio.Task[list[int]] | None) -> list[int]:
        """All that was said in the end."""
        if before is not None:
            history = await before
            prompt = (history + prompt)[: outcome.load.prompt_tokens]
            outcome.due = time.perf_counter() + outcome.load.think_seconds
        if concurrency is None:
            at = outcome.load.at
            assert at is not None or before is not None
            outcome.due = max(outcome.due, began + at if at is not None else 0.0)
        await asyncio.sleep(max(outcome.due - time.perf_counter(), 0))
        async with slots:
            outcome.sent = time.perf_counter()
            if concurrency is not None:
                outcome.due = outcome.sent
            try:
                async with asyncio.timeout(target.timeout_seconds):
                    await _ask(target, prompt, outcome)
            except (OSError, ValueError, TimeoutError, asyncio.IncompleteReadError) as error:
                outcome.error = str(error)[:200] or type(error).__name__
                outcome.timed_out = isinstance(error, TimeoutError) and not str(error)
        return prompt + outcome.ids

    last: dict[str | None, asyncio.Task[list[int]]] = {}
    tasks = []
    for outcome, prompt in zip(outcomes, prompts):
        session = outcome.load.session
        tasks.append(asyncio.create_task(one(outcome, prompt, last.get(session))))
        if session is not None:
            last[session] = tasks[-1]
    await asyncio.gather(*tasks)
    return outcomes


async def fetch(target: Target, path: str) -> dict[str, Any]:
    """A JSON object from the server."""
    found = json.loads(await fetch_bytes(target, path))
    assert isinstance(found, dict)
    return found


async def fetch_bytes(target: Target, path: str) -> bytes:
    """What the server answers. InputError where it answers anything but 200."""
    reader, writer = await _connect(target)
    try:
        await _send(writer, target, "GET", path, b"")
        status = await _head(reader)
        body = await reader.read()
    finally:
        writer.close()
    if status != 200:
        raise InputError(f"{target.url}{path} answers {status}: {body[:200].decode('utf-8', 'replace')}")
    return body


async def _ask(target: Target, prompt: list[int], outcome: Outcome) -> None:
    asked = {
        "model": target.model,
        "prompt": prompt,
        "max_tokens": outcome.load.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if outcome.load.session is not None:
        asked |= {"prompt_cache_key": outcome.load.session, "return_token_ids": True}
    reader, writer = await _connect(target)
    try:
        await _send(writer, target, "POST", "/v1/completions", json.dumps(asked).encode())
        status = await _head(reader)
        if status != 200:
            raise ValueError(f"status {status}: {(await reader.read(300)).decode('utf-8', 'replace')}")
        while line := await reader.readline():
            if not line.startswith(b"data: {"):
                continue
            piece = json.loads(line[6:])
            if "error" in piece:
                raise ValueError(str(piece["error"].get("message")))
            if piece.get("usage"):
                outcome.tokens = int(piece["usage"]["completion_tokens"])
            if piece.get("choices"):
                now = time.perf_counter()
                if outcome.last is not None:
                    outcome.gaps.append(now - outcome.last)
                outcome.ids += piece["choices"][0].get("token_ids") or []
                outcome.first = outcome.first if outcome.first is not None else now
                outcome.last = now
        if not outcome.tokens:
            raise ValueError("the answer ended early")
    finally:
        writer.close()


async def _connect(target: Target) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    parts = urlsplit(target.url)
    if parts.scheme != "http" or not parts.hostname:
        raise InputError(f"--url {target.url}: write it as http://HOST:PORT")
    return await asyncio.open_connection(parts.hostname, parts.port or 80, limit=LONGEST_LINE_BYTES)


async def _send(writer: asyncio.StreamWriter, target: Target, method: str, path: str, body: bytes) -> None:
    parts = urlsplit(target.url)
    # 1.0: the answer then comes as it is, not in chunks with their sizes between
    lines = [f"{method} {parts.path.rstrip('/')}{path} HTTP/1.0", f"Host: {parts.netloc}"]
    if target.api_key:
        lines.append(f"Authorization: Bearer {target.api_key}")
    if body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    writer.write("\r\n".join([*lines, "", ""]).encode() + body)
    await writer.drain()


async def _head(reader: asyncio.StreamReader) -> int:
    """The status; the headers are read past."""
    words = (await reader.readline()).split()
    if len(words) < 2 or not words[1].isdigit():
        raise ValueError("no HTTP answer")
    while (await reader.readline()).strip():
        pass
    return int(words[1])


def report(
    outcomes: Sequence[Outcome], *, slo_first: float, slo_token: float, window_seconds: float = WINDOW_SECONDS
) -> dict[str, Any]:
    """Figures of a run: throughput, latencies, goodput (requests a second that met both objectives), failures; the same
    by windows of time, and how much they vary.
    """
    good = [one for one in outcomes if one.error is None and one.first is not None and one.last is not None]
    failed = [one for one in outcomes if one not in good]
    if not good:
        raise InputError(
            f"no request succeeded; the first one says: {failed[0].error if failed else 'nothing was sent'}"
        )
    began, ended = min(one.due for one in outcomes if one.due), max(one.last or 0.0 for one in good)
    seconds = max(ended - began, 1e-9)
    first = [(one.first or 0.0) - one.due for one in good]
    whole = [(one.last or 0.0) - one.due for one in good]
    per_token = [((one.last or 0.0) - (one.first or 0.0)) / (one.tokens - 1) for one in good if one.tokens > 1]
    meets = sum(_meets(one, slo_first, slo_token) for one in good)
    parts = windows(outcomes, slo_first=slo_first, slo_token=slo_token, seconds=window_seconds)
    return {
        "requests": len(outcomes),
        "failed": len(failed),
        "timed_out": sum(one.timed_out for one in failed),
        "errors": sorted({str(one.error) for one in failed})[:5],
        "seconds": seconds,
        "requests_per_s": len(good) / seconds,
        "output_tokens_per_s": sum(one.tokens for one in good) / seconds,
        "prompt_tokens_per_s": sum(one.load.prompt_tokens for one in good) / seconds,
        "goodput_per_s": meets / seconds,
        "slo_share": meets / len(outcomes),
        "slo": {"first_token_seconds": slo_first, "per_token_seconds": slo_token},
        "first_token_seconds": percentiles(first),
        "per_token_seconds": percentiles(per_token),
        "between_tokens_seconds": percentiles([gap for one in good for gap in one.gaps]),
        "whole_seconds": percentiles(whole),
        "normalised_seconds": percentiles([each / max(one.tokens, 1) for each, one in zip(whole, good)]),
        "send_lag_seconds": percentiles([one.sent - one.due for one in outcomes if one.sent]),
        "windows": parts,
        "stability": stability(parts),
    }


def _meets(one: Outcome, slo_first: float, slo_token: float) -> bool:
    if one.error is not None or one.first is None or one.last is None:
        return False
    return one.first - one.due <= slo_first and one.last - one.first <= slo_token * max(one.tokens - 1, 1)


def windows(
    outcomes: Sequence[Outcome], *, slo_first: float, slo_token: float, seconds: float = WINDOW_SECONDS
) -> list[dict[str, Any]]:
    """The requests that were due in each stretch of time, empty ones left out: how many, how many a second, the share
    that met both objectives, that failed, and the mean time to the first token.
    """
    known = [one for one in outcomes if one.due]
    began = min((one.due for one in known), default=0.0)
    groups: dict[int, list[Outcome]] = {}
    for one in known:
        groups.setdefault(int((one.due - began) // seconds), []).append(one)
    return [
        {
            "begin": number * seconds,
            "requests": len(some),
            "requests_per_s": len(some) / seconds,
            "slo_share": sum(_meets(one, slo_first, slo_token) for one in some) / len(some),
            "failed_share": sum(one.error is not None for one in some) / len(some),
            "first_token_seconds": percentiles([one.first - one.due for one in some if one.first is not None]),
        }
        for number, some in sorted(groups.items())
    ]


def stability(parts: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Variance over windows of attainment and of the mean time to the first token; the worst window's attainment."""
    shares = [part["slo_share"] for part in parts]
    firsts = [part["first_token_seconds"]["mean"] for part in parts if part["first_token_seconds"]]
    return {
        "slo_share_variance": pvariance(shares) if shares else 0.0,
        "slo_share_worst": min(shares, default=0.0),
        "first_token_variance": pvariance(firsts) if firsts else 0.0,
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Mean and percentiles; empty for no values."""
    if not values:
        return {}
    ordered = sorted(values)
    found = {f"p{p}": ordered[min(len(ordered) * p // 100, len(ordered) - 1)] for p in PERCENTILES}
    return {"mean": sum(ordered) / len(ordered), **found}

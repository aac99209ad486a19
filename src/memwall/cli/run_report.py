"""What `memwall run` says at its end: speed, ledger and peak, for a person or as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memwall.cli.neurons import figures, stream_of, told
from memwall.cli.printing import format_table

if TYPE_CHECKING:
    from memwall.cli.run import Request
    from memwall.engine import Generation, Session
    from memwall.plan import Plan


LARGEST_DIFFERENCE = 0.02
"""Of measured bytes from predicted ones, for the parts' savings to be told as those of this run."""


def ledger_rows(session: Session, plan: Plan) -> list[dict[str, Any]]:
    """Measured bytes by owner and tier, the predicted ones beside them."""
    predicted = {(row.owner, row.tier): row.nbytes for row in plan.rows}
    return [
        {
            "owner": row.owner,
            "tier": row.tier,
            "bytes": row.nbytes,
            "predicted_bytes": predicted.get((row.owner, row.tier)),
        }
        for row in session.ledger.rows()
    ]


def cache_object(session: Session) -> dict[str, Any] | None:
    """The cache's bytes beside those of float16 with the same tokens, and what each part of the policy saves of them.

    factors: None where turns came so that prediction does not say it. None for an empty cache.
    """
    from memwall.engine.loading import cache_shape
    from memwall.kv import savings

    cache, result = session.cache, session.last
    if not cache.length:
        return None
    prompt = min(result.prompt_tokens + result.loaded_tokens, cache.length)
    saved = savings(session.settings.kv, cache_shape(session.config), cache.length, prompt, cache.capacity_tokens)
    share = cache.nbytes / saved.plain_bytes
    return {
        "policy": cache.policy,
        "tokens": cache.length,
        "bytes": cache.nbytes,
        "float16_bytes": saved.plain_bytes,
        "share": share,
        "factors": dict(saved.factors) if abs(share / saved.product - 1) < LARGEST_DIFFERENCE else None,
    }


def stack_object(session: Session) -> dict[str, Any] | None:
    """Of a model that is a stack of blocks: how many are here now, of how many, and what was read of them so far."""
    stack = session.decoder.weights.stack
    if stack is None:
        return None
    sizes = {"bytes": stack.nbytes, "bytes_read": stack.bytes_read}
    return {"blocks": stack.num_blocks, "most_blocks": stack.most_blocks, **sizes, "budget_bytes": session.budget_bytes}


def stack_line(session: Session) -> list[str]:
    """The same for a person."""
    from memwall.hardware.units import format_bytes

    told = stack_object(session)
    if told is None:
        return []
    sizes = f"{format_bytes(told['bytes'])} of them, {format_bytes(told['bytes_read'])} read"
    return [f"stack: {told['blocks']} of {told['most_blocks']} blocks beside the first ones, {sizes}"]


def cache_line(session: Session) -> list[str]:
    """The same for a person; nothing for a float16 cache."""
    from memwall.hardware.units import format_bytes

    told = cache_object(session)
    if told is None or told["share"] == 1:
        return []
    held, plain = (format_bytes(told[name]) for name in ("bytes", "float16_bytes"))
    factors = told["factors"] or {}
    parts = " x ".join(f"{part} {factor:.3f}" for part, factor in factors.items()) if len(factors) > 1 else ""
    where = " on all tiers" if session.cache.tiers else ""
    return [f"cache: {held}{where} where float16 takes {plain}: {f'{parts} = ' if parts else ''}{told['share']:.3f}"]


def result_object(session: Session, plan: Plan) -> dict[str, Any]:
    """The JSON form of a run."""
    from memwall.memory import peak_resident_bytes

    result = session.last
    timings = result.timings
    return {
        "text": result.text,
        "tokens": len(result.tokens),
        "prompt_tokens": result.prompt_tokens,
        "loaded_tokens": result.loaded_tokens,
        "stop_reason": result.stop_reason,
        "timings": {
            "load_seconds": timings.load_seconds,
            "prefill_seconds": timings.prefill_seconds,
            "decode_seconds": timings.decode_seconds,
            "prefill_tokens_per_s": timings.prefill_tokens_per_s,
            "tokens_per_s": timings.decode_tokens_per_s,
        },
        "stack": stack_object(session),
        "neurons": figures(stream) if (stream := stream_of(session)) is not None else None,
        "storage": session.cache.report() or None,
        "ledger": ledger_rows(session, plan),
        "cache": cache_object(session),
        "peak_resident_bytes": peak_resident_bytes(),
        "plan": plan.to_dict(),
    }


def summary(session: Session, plan: Plan, request: Request, *, verbose: bool) -> str:
    """Speed, ledger and peak for a person."""
    from memwall.hardware.units import format_bytes
    from memwall.memory import peak_resident_bytes

    headers = ("owner", "tier", "bytes", *(("predicted",) if verbose else ()))
    rows = []
    for row in ledger_rows(session, plan):
        cells = (row["owner"], row["tier"], format_bytes(row["bytes"]))
        guess = row["predicted_bytes"]
        rows.append((*cells, "-" if guess is None else format_bytes(guess)) if verbose else cells)
    peak = peak_resident_bytes()
    limit = request.budget.ram if request.budget is not None else None
    share = f" of {format_bytes(limit)} allowed ({peak / limit:.0%})" if limit else ""
    lines = [
        *([speed_line(session.last)] if session.last.stop_reason else []),  # a chat may end before its first turn
        *drive_lines(session.cache.report()),
        *([f"plan: {plan.choice.weights} weights, {plan.choice.kv} cache. {plan.explanation}"] if verbose else []),
        format_table(headers, rows, right=frozenset({2, 3})),
        *cache_line(session),
        *stack_line(session),
        *([told(stream)] if (stream := stream_of(session)) is not None else []),
        f"peak resident {format_bytes(peak)}{share}",
    ]
    return "\n".join(lines)


def drive_lines(report: dict[str, Any]) -> list[str]:
    """What storage processes did for the cache, one line each."""
    from memwall.hardware.units import format_bytes

    lines = []
    emulated = " (emulated)" if report.get("emulated") else ""
    for drive in report.get("drives", ()):
        link, pages = drive["link"], drive["token_pages_read"] + drive["channel_pages_read"]
        how = "direct I/O" if drive["direct"] else f"through the page cache: {drive['note'] or 'direct=0'}"
        lines.append(
            f"storage process {drive['pid']}: {format_bytes(link['down_bytes'])} down and "
            f"{format_bytes(link['up_bytes'])} up the link{emulated}; read {pages:,} pages of {drive['page_bytes']} B, "
            f"wrote {drive['pages_written']:,} ({how}, {drive['directory']})"
        )
    return lines


def speed_line(result: Generation) -> str:
    """How fast it went."""
    timings = result.timings
    loaded = f"{result.loaded_tokens} tokens from the saved cache, " if result.loaded_tokens else ""
    return (
        f"{loaded}{result.prompt_tokens} prompt tokens in {timings.prefill_seconds:.2f} s, {len(result.tokens)} new at "
        f"{timings.decode_tokens_per_s:.1f} tokens/s; loaded in {timings.load_seconds:.2f} s; "
        f"ended by {result.stop_reason}"
    )

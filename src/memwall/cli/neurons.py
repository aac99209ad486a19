"""Models whose neurons stream from disk, on the command line: the window that a budget has room for, figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memwall.errors import DoesNotFit, InputError

if TYPE_CHECKING:
    from memwall.engine import Session
    from memwall.engine.llm_in_a_flash import NeuronStream
    from memwall.plan import Plan

PlanFor = Callable[..., "Plan"]


def with_window(
    path: Path, window: int | None, plan_for: PlanFor, extra: Mapping[str, int], **choice: Any
) -> tuple[int | None, PlanFor]:
    """The window asked for, or the longest up to the default with which `choice` fits, and `plan_for` with it."""
    from memwall.models import ModelConfig

    config = ModelConfig.from_directory(path)
    if config.neurons is None:
        if window is not None:
            raise InputError(
                f"--window {window} is for models that stream their neurons; make one of {path} with "
                "memwall convert --stream-neurons"
            )
        return None, partial(plan_for, extra_bytes=extra)
    from memwall.engine.llm_in_a_flash import DEFAULT_WINDOW, OWNER, store_bytes

    refused: DoesNotFit | None = None
    for each in (window,) if window is not None else range(DEFAULT_WINDOW, 0, -1):
        fitting = partial(plan_for, extra_bytes={**extra, OWNER: store_bytes(config, each)})
        try:
            fitting(**choice)
        except DoesNotFit as error:
            refused = error
        else:
            return each, fitting
    assert refused is not None
    raise refused


def stream_of(session: Session) -> NeuronStream | None:
    """What streams a session's neurons, if any does."""
    from memwall.engine.llm_in_a_flash import NeuronStream

    found = getattr(session.decoder, "feed_forward", None)
    return found if isinstance(found, NeuronStream) else None


def figures(stream: NeuronStream) -> dict[str, Any]:
    """For JSON: what tokens after the prompt cost. Shares are of all neurons of all layers."""
    stats, layout = stream.stats, stream.layout
    whole = max(stats.tokens * layout.num_layers * layout.num_neurons, 1)
    return {
        "window_tokens": stream.window,
        "tokens": stats.tokens,
        "predicted_share": stats.predicted / whole,
        "loaded_share": stats.loaded / whole,
        "read_bytes_per_token": stats.read_bytes / max(stats.tokens, 1),
        "streamed_bytes": stats.streamed_bytes,
        "merged_over_neurons": stream.gap_rows,
        "direct": stream.reader.direct,
        "queued": stream.reader.queued,
        "seconds": {name: getattr(stats, f"{name}_seconds") for name in ("predict", "manage", "read", "compute")},
    }


def told(stream: NeuronStream) -> str:
    """The same in a line."""
    from memwall.hardware.units import format_bytes

    seen = figures(stream)
    parts = ", ".join(
        f"{name} {1e3 * seconds / max(stream.stats.tokens, 1):.2f} ms" for name, seconds in seen["seconds"].items()
    )
    size = format_bytes(round(seen["read_bytes_per_token"]))
    note = "" if stream.reader.note is None else f"; {stream.reader.note}"
    return (
        f"neurons: window of {stream.window} tokens; of the feed-forward {seen['predicted_share']:.1%} predicted and "
        f"{seen['loaded_share']:.1%} read per token ({size}); {parts}{note}"
    )

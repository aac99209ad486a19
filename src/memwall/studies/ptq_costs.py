"""Bytes and seconds of one weight format, in a process of its own: what the ledger and the operating system say of the
loaded model, time of a prompt, and tokens per second after the first, taken in turns with bfloat16.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from memwall.errors import InputError, MemwallError

PROMPT_TOKENS = 256


def costs_of(
    directory: Path, form: str, tokens: list[int], *, steps: int, repeats: int, threads: int
) -> dict[str, Any]:
    """Figures of a format. tokens: a text of at least PROMPT_TOKENS + steps tokens; steps: tokens decoded a repeat."""
    request = {"directory": str(directory), "form": form, "tokens": tokens, "steps": steps, "repeats": repeats,
               "threads": threads}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", __name__], input=json.dumps(request), capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise InputError(f"{form}: the process that measures bytes and time failed: {said[0]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """In the child. The model is loaded twice: the first time brings in code, and only the second is counted."""
    from memwall import _native, kernels
    from memwall.memory import resident_bytes
    from memwall.studies.ptq_models import BASE, FormatModel

    kernels.set_num_threads(request["threads"])
    directory, form, tokens = Path(request["directory"]), request["form"], request["tokens"]
    prompt, context = tokens[:PROMPT_TOKENS], PROMPT_TOKENS + request["steps"] + 1

    def loaded(name: str, *, exact: bool, tokenizer: Any = None) -> FormatModel:
        return FormatModel(directory, name, context_tokens=context, exact=exact, tokenizer=tokenizer)

    first = loaded(form, exact=False)
    Turns(first, tokens, 4).take()
    first.release()
    _native.give_back_freed_memory()
    before = resident_bytes(exact=True)
    model = loaded(form, exact=False, tokenizer=first.tokenizer)
    model.feed(prompt)
    _native.give_back_freed_memory()
    found: dict[str, Any] = {
        "resident_bytes": resident_bytes(exact=True) - before,
        "ledger_bytes": model.ledger.total(),
        "weight_bytes": model.weight_bytes,
        "bits_per_weight": model.bits_per_weight,
    }
    turns = {"as_run": Turns(model, tokens, request["steps"])}
    try:
        if form != BASE:
            turns["plain"] = Turns(loaded(BASE, exact=False), tokens, request["steps"])
        turns["float"] = Turns(loaded(form, exact=True), tokens, request["steps"])
    except MemwallError:
        pass  # no room for a second model: the format's own time is all there is
    for _ in range(request["repeats"] + 1):
        for turn in turns.values():
            turn.take()
    mine = turns["as_run"]
    plain, floats = turns.get("plain"), turns.get("float")
    return {
        **found,
        "prefill_tokens_per_s": len(prompt) / mine.prefill_seconds,
        "decode_tokens_per_s": 1 / mine.step_seconds,
        "float_tokens_per_s": 1 / floats.step_seconds if floats else None,
        "time_over_bf16": mine.step_seconds / plain.step_seconds if plain else 1.0 if form == BASE else None,
        "spread": mine.spread,
    }


class Turns:
    """Repeats of a prompt and some steps with one model; the first is a warm-up."""

    def __init__(self, model: Any, tokens: list[int], steps: int) -> None:
        self.model, self.tokens, self.num_steps = model, tokens, steps
        self._prefills: list[float] = []
        self._steps: list[float] = []

    def take(self) -> None:
        """One repeat; the first token after the prompt is not counted, as it comes with the prompt."""
        import numpy as np

        model = self.model
        began = time.perf_counter()
        model.decoder.logits(model.feed(self.tokens[:PROMPT_TOKENS]))
        self._prefills.append(time.perf_counter() - began)
        rest = self.tokens[PROMPT_TOKENS : PROMPT_TOKENS + self.num_steps]
        began = time.perf_counter()
        for token in rest:
            model.decoder.forward(np.asarray([token]), model.cache)
        self._steps.append((time.perf_counter() - began) / len(rest))

    @property
    def prefill_seconds(self) -> float:
        return statistics.median(self._prefills[1:])

    @property
    def step_seconds(self) -> float:
        return statistics.median(self._steps[1:])

    @property
    def spread(self) -> float:
        """(longest - shortest) over the median of a step's times."""
        return (max(self._steps[1:]) - min(self._steps[1:])) / self.step_seconds


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(json.loads(sys.stdin.read()))) + "\n")

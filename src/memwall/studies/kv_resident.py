"""Resident bytes of caches, as the operating system counts them: in a process of their own, so many sequences at once
that what the interpreter takes and gives back besides is small beside them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from memwall.errors import InputError

SEQUENCES = 8


def resident_bytes_of(
    directory: Path, weights: str, policy: str, num_tokens: int, text: str, sequences: int = SEQUENCES
) -> dict[str, Any]:
    """Growth of the process and of the ledger by `sequences` caches, each after a prompt of `num_tokens`."""
    request = {"directory": str(directory), "weights": weights, "policy": policy, "tokens": num_tokens,
               "sequences": sequences, "text": text}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", __name__], input=json.dumps(request), capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise InputError(f"{policy}: the process that measures resident bytes failed: {said[0]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """In the child: reads the same prompt through one cache to warm up, then through as many as asked."""
    from memwall.memory import Arena, Ledger, resident_bytes
    from memwall.studies.subjects import StudyModel

    model = StudyModel(Path(request["directory"]), request["weights"])
    tokens = np.array([*model.opening, *model.encode(request["text"])][: request["tokens"]])
    ledger = Ledger()
    arena = Arena(1 << 62, ledger)
    caches = []

    def read() -> Any:
        cache, begin = model.cache(request["policy"], arena), 0
        for size in cache.begin_prompt(len(tokens), model.decoder.segment_tokens):
            model.decoder.hidden(tokens[begin : begin + size], cache)
            begin += size
        return cache

    read().release()
    before = resident_bytes(exact=True), ledger.total()
    for _ in range(request["sequences"]):
        caches.append(read())
    after = resident_bytes(exact=True), ledger.total()
    return {
        "sequences": request["sequences"],
        "tokens": len(tokens),
        "resident_bytes": after[0] - before[0],
        "ledger_bytes": after[1] - before[1],
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(json.loads(sys.stdin.read()))) + "\n")

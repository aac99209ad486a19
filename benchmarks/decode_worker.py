"""One contender in a process of its own, told what to do by benchmarks/decode.py over pipes.

Each line on standard input is a JSON object {"do": operation, ...}; each is answered by one JSON line on the original
standard output (whatever the engines print goes to standard error). Timed work ends with the choice of the next token,
as in real use.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from decode_contenders import Contender, Memory, make_contender

SEED = 7


class Worker:
    """Holds the contender and the length of its sequence."""

    def __init__(self, contender: Contender, vocab: int) -> None:
        self.contender = contender
        self.vocab = vocab
        self.prompt = np.random.default_rng(SEED).integers(2, vocab, size=1 << 14)
        self.length = 0
        self.next_token = int(self.prompt[0])

    def load(self, model: str, threads: int, max_tokens: int) -> dict[str, Any]:
        before_bytes = memory_status()
        start = time.perf_counter()
        self.contender.load(Path(model), threads=threads, max_tokens=max_tokens)
        return {
            "seconds": time.perf_counter() - start,
            "before": before_bytes,
            "about": self.contender.about(),
            "weight_bits": self.contender.weight_bits,
            "kv_bytes_per_value": self.contender.kv_bytes_per_value,
        }

    def prepare(self, model: str, out: str) -> dict[str, Any]:
        start = time.perf_counter()
        self.contender.prepare(Path(model), Path(out))
        return {"seconds": time.perf_counter() - start}

    def fill(self, length: int) -> dict[str, Any]:
        """Brings the sequence to exactly `length` tokens; times only what had to be added."""
        if length < self.length:
            self.contender.truncate(length)
            self.length = length
        added = self.prompt[self.length : length]
        start = time.perf_counter()
        if len(added):
            self.next_token = int(np.argmax(self.contender.extend(added)))
        self.length = length
        return {"tokens": len(added), "seconds": time.perf_counter() - start}

    def decode(self, tokens: int) -> dict[str, Any]:
        """Greedy steps from the present length, undone afterwards."""
        token = self.next_token
        step_seconds = []
        for _ in range(tokens):
            start = time.perf_counter()
            token = int(np.argmax(self.contender.extend(np.array([token]))))
            step_seconds.append(time.perf_counter() - start)
        self.contender.truncate(self.length)
        return {"tokens": tokens, "seconds": sum(step_seconds), "median_step_seconds": float(np.median(step_seconds))}

    def sample_logits(self, tokens: int, count: int) -> dict[str, Any]:
        """Logits after a short prompt at fixed places of the vocabulary: do all contenders run the same model?"""
        self.fill(0)
        logits = np.array(self.contender.extend(self.prompt[:tokens]), np.float32)
        self.contender.truncate(0)
        return {"logits": logits[:: max(1, self.vocab // count)].tolist(), "finite": bool(np.isfinite(logits).all())}

    def memory(self) -> dict[str, Any]:
        return memory_status() | {"ledger": self.contender.ledger()}

    def bandwidth(self) -> dict[str, Any]:
        if not isinstance(self.contender, Memory):
            raise ValueError("only the contender 'memory' measures bandwidth")
        return {"bytes_per_s": self.contender.read_bytes_per_s()}


def memory_status() -> dict[str, int]:
    """Resident bytes of this process as the kernel counts them: now, at the peak, and by kind."""
    fields = {"VmRSS": "resident_bytes", "VmHWM": "peak_bytes", "RssAnon": "anonymous_bytes", "RssFile": "file_bytes"}
    found = {}
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        key, _, value = line.partition(":")
        if key in fields:
            found[fields[key]] = 1024 * int(value.split()[0])
    return found


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = Worker(make_contender(sys.argv[1]), vocab=int(sys.argv[2]))
    for line in sys.stdin:
        request = json.loads(line)
        operation = request.pop("do")
        try:
            answer = getattr(worker, operation)(**request)
        except Exception as error:  # reported to the parent, which decides
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()

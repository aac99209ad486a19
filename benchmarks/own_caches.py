"""Time of a server's step where each request has a cache of its own, beside pages that all share.

    python benchmarks/own_caches.py [--threads 2] [--requests 16] [--rounds 120] [--policies bfloat16 "kivi(4bit)" ...]

The demo model, weights in int8, requests of 200 to 300 tokens, one token of each a step. Policies take turns inside
each round, in one process; the least, the first quartile and the median of the rounds are printed, the median of the
ratios to float16 pages, and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import date

import numpy as np

from memwall.claims import describe_machine
from memwall.engine import Sampling
from memwall.engine.sequence import Request
from memwall.engine.serving import Serving, ServingSettings, load_engine
from memwall.models import DEMO_DIRECTORY

PAGES = "float16"
POLICIES = (
    "bfloat16", "kivi(2bit)", "kivi(4bit)", "kivi(4bit,queries=int8)", "kv4", "snapkv(0.25)",
    "lambda(sinks=4,window=512)", "lambda(sinks=4,window=192)+kivi(4bit)", "bfp(order=plain)", "think(0.4)",
    "xquant(4bit)",
)  # fmt: skip
CONTEXT, SHORTEST, LONGEST = 1024, 160, 240
"""Of prompts, so that with the tokens made they have 200 to 300."""


def busy(policy: str, threads: int, requests: int, steps: int) -> Serving:
    """A server with so many requests, all of which make tokens."""
    settings = ServingSettings(
        weights="int8", context_tokens=CONTEXT, token_budget=512, max_sequences=requests, threads=threads, kv=policy,
        keep_prefixes=False,
    )  # fmt: skip
    held = load_engine(DEMO_DIRECTORY, settings)
    held.engine.wanted_pages = requests * held.pool.limit_pages
    rng = np.random.default_rng(0)
    for length in rng.integers(SHORTEST, LONGEST, requests):
        prompt = tuple(int(token) for token in rng.integers(10, 900, length))
        held.engine.submit(Request(prompt=prompt, sampling=Sampling(max_new_tokens=steps, ignore_eos=True)))
    while held.engine.waiting or not all(one.num_made for one in held.engine.running.values()):
        held.engine.step()
    assert len(held.engine.running) == requests
    return held


def measure(policies: list[str], threads: int, requests: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of a step, by policy and round."""
    servers = {policy: busy(policy, threads, requests, 2 * rounds + 64) for policy in policies}
    times: dict[str, list[float]] = {policy: [] for policy in policies}
    for _ in range(rounds):
        for policy, held in servers.items():
            held.engine.step()  # what the one before left in the processor's caches is gone
            began = time.perf_counter()
            held.engine.step()
            times[policy].append(1e3 * (time.perf_counter() - began))
            assert len(held.engine.running) == requests
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    given = parser.parse_args()
    times = measure([PAGES, *given.policies], given.threads, given.requests, given.rounds)
    rows = {
        policy: [round(float(np.quantile(found, at)), 2) for at in (0, 0.25, 0.5)] for policy, found in times.items()
    }
    for policy, found in rows.items():
        ratio = np.median(np.array(times[policy]) / times[PAGES])
        name = f"{policy} pages" if policy == PAGES else policy
        print(f"{name:42} least {found[0]:7.2f} ms  quartile {found[1]:7.2f}  median {found[2]:7.2f}  x{ratio:.2f}")
    where = {"machine": describe_machine(), "date": date.today().isoformat(), **vars(given)}
    print(json.dumps({"least_quartile_median_ms": rows, **where}))


if __name__ == "__main__":
    main()

"""A server under mixed load for a long time: does a request fail, and is the budget ever crossed?

    python benchmarks/soak.py [--minutes 20] [--memory 130MB] [--model demo]

At the same time: steady streams, bursts, clients that leave in the middle, adapters of several ranks, bodies that are
wrong, and a budget that moves down and up. Every request that stays must be answered whole, wrong ones must get 400,
and the process may never hold more than its budget, sampled five times a second and by the kernel's own peak. Exit
status 1 when a request fails or the budget is crossed.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import datetime
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from decode import hardware, note

from memwall.hardware.units import parse_bytes
from memwall.models import ModelConfig, model_directory
from memwall.models.lora import tensor_name, write_lora

HERE = Path(__file__).resolve().parent
RANKS = (4, 8, 16, 32)
STEADY = 6
BURST = 24
WORDS = (
    "river",
    "city",
    "harbour",
    "stone",
    "bread",
    "winter",
    "letter",
    "number",
    "function",
    "class",
    "return",
    "road",
)


@dataclass
class Tally:
    """What became of the requests so far, and the most that was held."""

    ends: collections.Counter[str] = field(default_factory=collections.Counter)
    failures: list[str] = field(default_factory=list)
    tokens: int = 0
    most_bytes: int = 0
    over_bytes: int = 0
    budgets: int = 0


class Soak:
    """The load, against one server."""

    def __init__(self, url: str, pid: int, budget: int, models: list[str], end: float, context: int) -> None:
        self.url, self.pid, self.models, self.end, self.context = url, pid, models, end, context
        self.budget = self.first_budget = budget
        self.tally = Tally()
        self.draw = random.Random(0)
        self.client = httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=400))

    async def run(self) -> None:
        """All kinds at once, until the end; then what still runs may finish."""
        kinds = [self.steady() for _ in range(STEADY)]
        others = (self.bursts, self.leavers, self.wrong, self.budgets_move, self.watch, self.tell)
        await asyncio.gather(*kinds, *(kind() for kind in others))
        await self.client.aclose()

    def left(self) -> bool:
        return time.monotonic() < self.end

    def body(self) -> dict[str, Any]:
        words = self.draw.choices(WORDS, k=self.draw.randrange(3, self.context // 6))
        new = self.draw.randrange(1, self.context // 3)
        return {
            "model": self.draw.choice(self.models), "prompt": " ".join(words), "max_tokens": new, "ignore_eos": True,
            "temperature": self.draw.choice((0, 1)), "priority": self.draw.randrange(3),
        }  # fmt: skip

    async def ask(self, kind: str) -> None:
        """One request that stays to its end."""
        body = self.body()
        if self.draw.random() < 0.5:
            await self.ask_stream(kind, body)
            return
        try:
            answer = await self.client.post("/v1/completions", json=body)
            made = answer.json()["usage"]["completion_tokens"] if answer.status_code == 200 else -1
            self.count(kind, answer.status_code == 200 and made == body["max_tokens"], f"{answer.status_code}, {made}")
            self.tally.tokens += max(made, 0)
        except (httpx.HTTPError, ValueError) as error:
            self.count(kind, False, repr(error))

    async def ask_stream(self, kind: str, body: dict[str, Any]) -> None:
        whole = {**body, "stream": True, "stream_options": {"include_usage": True}}
        made, done, status = -1, False, 0
        try:
            async with self.client.stream("POST", "/v1/completions", json=whole) as answer:
                status = answer.status_code
                async for line in answer.aiter_lines():
                    done = done or line == "data: [DONE]"
                    if line.startswith("data: {"):
                        made = (json.loads(line[6:]).get("usage") or {}).get("completion_tokens", made)
            self.count(kind, status == 200 and done and made == body["max_tokens"], f"stream {status}, {made}, {done}")
            self.tally.tokens += max(made, 0)
        except (httpx.HTTPError, ValueError) as error:
            self.count(kind, False, repr(error))

    def count(self, kind: str, good: bool, told: str) -> None:
        self.tally.ends[f"{kind} {'answered' if good else 'failed'}"] += 1
        if not good and len(self.tally.failures) < 20:
            self.tally.failures.append(f"{kind}: {told}")

    async def steady(self) -> None:
        while self.left():
            await self.ask("steady")

    async def bursts(self) -> None:
        while self.left():
            await asyncio.sleep(self.draw.uniform(4, 20))
            await asyncio.gather(*(self.ask("burst") for _ in range(BURST)))

    async def leavers(self) -> None:
        """Clients that go after some pieces, or before the first one."""
        while self.left():
            after = self.draw.choice((0, 1, 5, 30))
            with contextlib.suppress(httpx.HTTPError, TimeoutError):
                async with asyncio.timeout(self.draw.uniform(0.05, 1.0)):
                    body = {**self.body(), "stream": True}
                    async with self.client.stream("POST", "/v1/completions", json=body) as answer:
                        async for _ in answer.aiter_lines():
                            after -= 1
                            if after < 0:
                                break
            self.tally.ends["left"] += 1

    async def wrong(self) -> None:
        """Bodies that must get 400 (or 404) and nothing else."""
        bodies = (
            b"{", b'{"prompt": "\xff"}', b'{"prompt": "a", "max_tokens": -1}', b'{"prompt": []}', b"[1]",
            b'{"prompt": "a", "temperature": 9}', b'{"prompt": "a", "nothing": 1}', b'{"model": "none", "prompt": "a"}',
            json.dumps({"prompt": "word " * 5000}).encode(),
        )  # fmt: skip
        while self.left():
            await asyncio.sleep(0.5)
            raw = self.draw.choice(bodies)
            headers = {"content-type": "application/json"}
            answer = await self.client.post("/v1/completions", content=raw, headers=headers)
            self.count("wrong", answer.status_code in (400, 404), f"{answer.status_code} for {raw[:60]!r}")

    async def budgets_move(self) -> None:
        """Between what is needed at least and the first budget."""
        least = (await self.client.get("/v1/budget")).json()["least_bytes"]
        while self.left():
            await asyncio.sleep(self.draw.uniform(10, 30))
            wanted = round(least + self.draw.choice((0.2, 0.5, 1.0)) * (self.first_budget - least))
            answer = await self.client.post("/v1/budget", json={"memory": wanted})
            if answer.status_code == 200:
                self.tally.budgets += 1
            elif wanted == self.first_budget:
                self.count("budget", False, answer.text[:200])
        await self.client.post("/v1/budget", json={"memory": self.first_budget})

    async def watch(self) -> None:
        """Resident bytes against the first budget, five times a second."""
        while self.left():
            held = status_bytes(self.pid, "VmRSS")
            self.tally.most_bytes = max(self.tally.most_bytes, held)
            self.tally.over_bytes = max(self.tally.over_bytes, held - self.first_budget)
            await asyncio.sleep(0.2)

    async def tell(self) -> None:
        while self.left():
            await asyncio.sleep(60)
            note(f"{dict(self.tally.ends)}, {self.tally.tokens:,} tokens, {self.tally.most_bytes / 1e6:.1f} MB at most")


def status_bytes(pid: int, name: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {name}")


def make_adapters(folder: Path, config: ModelConfig) -> list[str]:
    """One of each rank, over the attention's matrices."""
    draw = np.random.default_rng(0)
    width, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    for rank in RANKS:
        tensors = {}
        for layer in range(config.num_layers):
            for part, rows in (("q_proj", width), ("v_proj", keys)):
                a = draw.standard_normal((rank, config.hidden_size)) / config.hidden_size**0.5
                tensors[tensor_name(layer, part, "A")] = a.astype(np.float16)
                tensors[tensor_name(layer, part, "B")] = (0.1 * draw.standard_normal((rows, rank))).astype(np.float16)
        write_lora(folder / f"rank-{rank}", tensors, rank=rank, alpha=2.0 * rank, base="demo")
    return [f"rank-{rank}" for rank in RANKS]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--memory", default="130MB")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    budget = parse_bytes(arguments.memory)
    with tempfile.TemporaryDirectory() as folder:
        names = make_adapters(Path(folder), ModelConfig.from_directory(model_directory(arguments.model)))
        command = [
            sys.executable, "-m", "memwall", "serve", arguments.model, "--port", "0", "--json", "--memory", str(budget),
            "--weights", "int4", "--context", str(arguments.context), "--lora-dir", folder, "--queue", "2000",
        ]  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": str(HERE.parent / "src")}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdout is not None
        text = ""
        while not text.endswith("\n}\n"):
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"the server ended with status {process.wait()}")
            text += line
        url = json.loads(text)["url"]
        base = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
        began = time.monotonic()
        soak = Soak(url, process.pid, budget, [base, base, *names], began + 60 * arguments.minutes, arguments.context)
        asyncio.run(soak.run())
        totals = httpx.get(f"{url}/memory").json()["totals"]
        peak = status_bytes(process.pid, "VmHWM")
        process.terminate()
        status = process.wait(60)
    tally = soak.tally
    crossed = peak > budget or tally.over_bytes > 0
    failed = sum(count for end, count in tally.ends.items() if end.endswith("failed"))
    result = {
        "question": "soak", "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        "hardware": hardware(), "model": base, "minutes": (time.monotonic() - began) / 60, "budget_bytes": budget,
        "peak_bytes": peak, "ends": dict(tally.ends), "failures": tally.failures, "answered_tokens": tally.tokens,
        "budgets_set": tally.budgets, "preempted": totals["preempted"], "finished": totals["finished"],
        "exit_status": status, "holds": not crossed and not failed and status == 0,
    }  # fmt: skip
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = f"soak_{'-'.join(result['hardware']['cpu'].lower().split())}_{datetime.date.today():%Y%m}"
    text = json.dumps(result, indent=1)
    (arguments.out / f"{stem}.json").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0 if result["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())

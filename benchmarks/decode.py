"""Decode and prefill speed, peak resident set and start-up of memwall beside llama.cpp and transformers, in one run.

    python benchmarks/decode.py --peer-python VENV/bin/python --work FOLDER [--models 0.5b 1b] [--quick]

Random-weight Llama models (see random_models.py) at 4 bits, two threads, the same token ids for all. Every contender
lives in a process of its own; all are measured in turn, round by round, one at a time, with the memory's read-only
bandwidth taken in every round. Ratios are medians of the rounds' ratios. The peer interpreter needs llama-cpp-python,
gguf, torch and transformers; a contender that cannot run is reported with its reason. Results go to benchmarks/results
as JSON and as a Markdown table. Exit status 1 when a wanted figure is missed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from decode_report import agreement, markdown, wanted_rows
from random_models import SHAPES, Shape, make_directory

from memwall.peers import peer_environment

HERE = Path(__file__).resolve().parent
LLAMA_CPP = ("llama.cpp", "llama.cpp-unfused", "llama.cpp-unpacked")
MEMWALL = ("memwall", "memwall-kivi")
TRANSFORMERS = ("transformers-bfloat16", "transformers-float32")
ALONE = ("transformers-float32",)
CHECK_PROMPT_TOKENS = 8
CHECK_LOGITS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    models: tuple[str, ...] = ("0.5b", "1b")
    contenders: tuple[str, ...] = ("memwall", *LLAMA_CPP, *TRANSFORMERS)
    threads: int = 2
    contexts: tuple[int, ...] = (0, 1024, 4096)
    prefill_tokens: int = 512
    decode_tokens: int = 32
    rounds: int = 7
    slow_decode_tokens: int = 8
    slow_rounds: int = 3
    startups: int = 3


QUICK = {
    "models": ("tiny",),
    "contexts": (0, 128, 512),
    "decode_tokens": 16,
    "rounds": 3,
    "slow_rounds": 1,
    "startups": 1,
}
VECTOR_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_vbmi", "avx_vnni", "asimd")


class ContenderFailed(RuntimeError):
    """A contender's process reported an error or ended."""


class Process:
    """The parent's end of one benchmarks/decode_worker.py."""

    def __init__(self, name: str, python: str, shape: Shape, threads: int) -> None:
        self.name = name
        environment = peer_environment() | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        if name == "memory":  # it starts its own threads
            environment["OPENBLAS_NUM_THREADS"] = "1"
        if name.partition(":")[0] in ("memory", "products", *MEMWALL):
            environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent / "src"), environment.get("PYTHONPATH", "")])
        self.started = time.perf_counter()
        self.process = subprocess.Popen(
            [python, str(HERE / "decode_worker.py"), name, str(shape.vocab)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def ask(self, operation: str, **arguments: Any) -> dict[str, Any]:
        try:
            self.process.stdin.write(json.dumps({"do": operation, **arguments}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise ContenderFailed(f"{self.name}: the process ended during {operation!r}")
        answer = json.loads(line)
        if "error" in answer:
            raise ContenderFailed(f"{self.name}: {answer['error']}")
        return answer

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)


class ModelRun:
    """All measurements of one model."""

    def __init__(self, shape: Shape, settings: Settings, arguments: argparse.Namespace) -> None:
        self.shape = shape
        self.settings = settings
        self.peer_python = arguments.peer_python
        self.work = arguments.work
        self.max_tokens = max(settings.contexts) + max(settings.decode_tokens, settings.prefill_tokens)
        self.paths: dict[str, Path] = {}
        self.found: dict[str, dict[str, Any]] = {}
        self.live: dict[str, Process] = {}
        self.bandwidth_measure: dict[str, str] = {}

    def run(self) -> dict[str, Any]:
        self._prepare()
        self._startups()
        self._group([name for name in self.settings.contenders if name not in ALONE])
        for name in self.settings.contenders:
            if name in ALONE:
                self._group([name])
        return {
            "shape": asdict(self.shape),
            "num_matrix_weights": self.shape.num_matrix_weights,
            "kv_values_per_token": self.shape.kv_values_per_token,
            "bandwidth_measure": self.bandwidth_measure,
            "agreement": agreement(self.found),
            "contenders": self.found,
        }

    def _prepare(self) -> None:
        """Makes the model's files, each form by the interpreter that has the tools for it."""
        directory = make_directory(self.shape, self.work / f"llama-{self.shape.name}")
        for name in self.settings.contenders:
            self.found[name] = {}
            self.paths[name] = directory
            if name in MEMWALL:
                self._guard(name, partial(self._compress, name, directory))
        if any(name in LLAMA_CPP for name in self.settings.contenders):
            note("making the GGUF file if it is not there yet")
            command = [self.peer_python, str(HERE / "random_models.py"), "gguf", self.shape.name, str(self.work)]
            made = subprocess.run(command, capture_output=True, text=True)
            for name in set(LLAMA_CPP) & set(self.settings.contenders):
                self.paths[name] = self.work / f"llama-{self.shape.name}-q4_0.gguf"
                if made.returncode:
                    self.found[name]["not_run"] = f"no GGUF file: {made.stderr.strip().splitlines()[-1]}"

    def _compress(self, name: str, directory: Path) -> None:
        out = self.work / f"llama-{self.shape.name}-memwall-int4"
        process = self._start(name)
        try:
            process.ask("prepare", model=str(directory), out=str(out))
            self.paths[name] = out
        finally:
            process.close()

    def _start(self, name: str) -> Process:
        python = self.peer_python if name in LLAMA_CPP + TRANSFORMERS else sys.executable
        return Process(name, python, self.shape, self.settings.threads)

    def _load(self, process: Process) -> dict[str, Any]:
        path = self.paths.get(process.name, self.work)
        return process.ask("load", model=str(path), threads=self.settings.threads, max_tokens=self.max_tokens)

    def _guard(self, name: str, action) -> Any:
        """Runs one contender's part; a failure takes only that contender out."""
        if name != "memory" and "not_run" in self.found[name]:
            return None
        try:
            return action()
        except ContenderFailed as failure:
            if name == "memory":
                raise
            note(str(failure))
            self.found[name]["not_run"] = str(failure)
            return None

    def _startups(self) -> None:
        """Process start to first token, files warm in the page cache (the first time is not counted)."""
        for attempt in range(self.settings.startups + 1):
            for name in self.settings.contenders:
                seconds = self._guard(name, partial(self._startup_seconds, name))
                if attempt and seconds is not None:
                    self.found[name].setdefault("startup_seconds", []).append(seconds)

    def _startup_seconds(self, name: str) -> float:
        process = self._start(name)
        try:
            self._load(process)
            process.ask("fill", length=CHECK_PROMPT_TOKENS)
            return time.perf_counter() - process.started
        finally:
            process.close()

    def _group(self, names: list[str]) -> None:
        """Measures these contenders alternately."""
        self.live = {name: self._start(name) for name in ["memory", *names]}
        try:
            for name, process in self.live.items():
                note(f"{self.shape.name}: loading {name}")
                self._guard(name, partial(self._open, name, process))
            for context in self.settings.contexts:
                self._context(context, names)
        finally:
            for process in self.live.values():
                process.close()

    def _open(self, name: str, process: Process) -> None:
        loaded = self._load(process)
        if name == "memory":
            self.bandwidth_measure = loaded["about"]
            return
        record = self.found[name]
        record |= {key: loaded[key] for key in ("about", "weight_bits", "kv_bytes_per_value")}
        record["load_seconds"] = loaded["seconds"]
        record["memory"] = {"before_load": loaded["before"]}
        record["check_logits"] = process.ask("sample_logits", tokens=CHECK_PROMPT_TOKENS, count=CHECK_LOGITS)
        record |= {"decode": {}, "prefill": [], "bandwidth": {}}

    def _context(self, context: int, names: list[str]) -> None:
        """Fills every sequence up to `context`, warms up, then decodes from there in turns."""
        for name in names:
            note(f"{self.shape.name}: context {context}, {name}")
            self._guard(name, partial(self._warm_up, name, context))
        rounds = self.settings.slow_rounds if set(names) <= set(TRANSFORMERS) else self.settings.rounds
        for number in range(rounds):
            bandwidth = self.live["memory"].ask("bandwidth")["bytes_per_s"]
            turn = number % max(1, len(names))
            for name in names[turn:] + names[:turn]:
                if name in TRANSFORMERS and number >= self.settings.slow_rounds:
                    continue
                self._guard(name, partial(self._round, name, context, bandwidth))
        for name in names:
            status = self._guard(name, partial(self.live[name].ask, "memory"))
            if status:
                self.found[name]["memory"][f"context_{context}"] = status

    def _warm_up(self, name: str, context: int) -> None:
        process = self.live[name]
        filled = process.ask("fill", length=context)
        if filled["tokens"]:
            self.found[name].setdefault("fill", {})[str(context)] = filled
        process.ask("decode", tokens=4)

    def _round(self, name: str, context: int, bandwidth: float) -> None:
        process, record = self.live[name], self.found[name]
        tokens = self.settings.slow_decode_tokens if name in TRANSFORMERS else self.settings.decode_tokens
        decoded = process.ask("decode", tokens=tokens)
        record["decode"].setdefault(str(context), []).append(decoded["tokens"] / decoded["seconds"])
        record["bandwidth"].setdefault(str(context), []).append(bandwidth)
        if context == 0:
            filled = process.ask("fill", length=self.settings.prefill_tokens)
            process.ask("fill", length=0)
            record["prefill"].append(filled["tokens"] / filled["seconds"])


def hardware() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    fields = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = fields.get("flags", fields.get("Features", "")).split()
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": fields.get("model name", platform.processor()),
        "cores": os.cpu_count(),
        "memory_bytes": memory_bytes,
        "vector": [flag for flag in VECTOR_FLAGS if flag in flags],
        "system": f"{platform.system()}, Python {platform.python_version()}",
    }


def processor_seconds() -> tuple[float, float, float]:
    """Seconds so far of all processors: in all, busy, and busy for this process and its ended children."""
    fields = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:9]
    ticks = [int(field) for field in fields]
    idle_ticks = ticks[3] + ticks[4]
    per_s = os.sysconf("SC_CLK_TCK")
    times = os.times()
    own = times.user + times.system + times.children_user + times.children_system
    return sum(ticks) / per_s, (sum(ticks) - idle_ticks) / per_s, own


def others_share(before: tuple[float, float, float], after: tuple[float, float, float]) -> float:
    """Share of the processors' time that went to other processes between two calls of `processor_seconds`."""
    total, busy, own = (late - early for early, late in zip(before, after, strict=True))
    return max(0.0, busy - own) / total if total > 0 else 0.0


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, Settings]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has the peers")
    parser.add_argument("--work", type=Path, required=True, help="folder for the model files, kept between runs")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--label", help="hardware part of the result's file name; default: from the processor")
    parser.add_argument("--models", nargs="+", choices=SHAPES)
    parser.add_argument("--contenders", nargs="+", choices=MEMWALL + LLAMA_CPP + TRANSFORMERS)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--startups", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--contexts", type=int, nargs="+")
    parser.add_argument("--quick", action="store_true", help="a tiny model, short contexts: tries the benchmark out")
    arguments = parser.parse_args(argv)
    given = QUICK if arguments.quick else {}
    for name in ("models", "contenders", "rounds", "startups", "threads", "contexts"):
        value = getattr(arguments, name)
        if value is not None:
            given = given | {name: tuple(value) if isinstance(value, list) else value}
    return arguments, Settings(**given)


def main() -> int:
    arguments, settings = parse()
    machine = hardware()
    before = processor_seconds()
    result: dict[str, Any] = {
        "question": "decode",
        "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        "hardware": machine,
        "settings": asdict(settings),
        "models": {},
    }
    for model in settings.models:
        found = ModelRun(SHAPES[model], settings, arguments).run()
        found["wanted"] = wanted_rows(found)
        result["models"][model] = found
    result["others_share"] = others_share(before, processor_seconds())
    label = arguments.label or f"{'-'.join(machine['cpu'].lower().split())}-{machine['cores']}-cores"
    stem = f"decode_{'quick_' if arguments.quick else ''}{label}_{datetime.date.today():%Y%m}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = markdown(result)
    (arguments.out / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (arguments.out / f"{stem}.md").write_text(text, encoding="utf-8")
    print(text)
    return 0 if all(row["passed"] for found in result["models"].values() for row in found["wanted"]) else 1


if __name__ == "__main__":
    sys.exit(main())

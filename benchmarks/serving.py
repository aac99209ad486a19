"""memwall's server beside llama.cpp's, and beside transformers answering one request after another, in one run.

    python benchmarks/serving.py --llama-server PATH --peer-python VENV/bin/python --work FOLDER --trace AZURE.csv

Random-weight Llama models (see random_models.py) at 4 bits (int4 and Q4_0), two threads, the same prompts as token ids,
one client for both. The servers run in turn, round by round; the one that does not run idles. Three questions:

1. total tokens a second with 16 streams at a time (and of transformers, one request at a time, in the best of float32
   and bfloat16);
2. time to the first token where requests come as in a trace, so densely that the slower server would work at 80 % of
   what it can do with these lengths;
3. what both keep resident at most.

Results go to benchmarks/results as JSON and Markdown. Exit status 1 when a wanted figure is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from decode import hardware, note, others_share, processor_seconds
from random_models import SHAPES, Shape, make_directory, with_words

from memwall.engine.arrivals import Load, clipped, drawn_lengths, read_trace, scaled
from memwall.peers import peer_environment
from memwall.serve.bench import Target, measure, report

HERE = Path(__file__).resolve().parent
STREAMS = 16
SATURATION = 0.8
THROUGHPUT_RATIO = 1.0
SEQUENTIAL_RATIO = 3.0
START_SECONDS = 120
PARTS = ("streams", "trace", "transformers")
OBJECTIVES = {"slo_first": 2.0, "slo_token": 0.2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    models: tuple[str, ...] = ("demo", "0.5b")
    threads: int = 2
    context: int = 1024
    rounds: int = 3
    requests: int = 48
    prompt_tokens: int = 96
    output_tokens: int = 64
    trace_requests: tuple[int, ...] = (120, 40)
    trace_rounds: int = 2
    sequential: int = 3
    parts: tuple[str, ...] = PARTS


GIVEN = ("models", "rounds", "parts", "trace_rounds")
QUICK = {"models": ("demo",), "rounds": 1, "requests": 16, "trace_requests": (16,), "trace_rounds": 1, "sequential": 1}
SEQUENTIAL = """
import json, sys, time
import torch
from transformers import AutoModelForCausalLM
folder, threads, lengths = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
torch.set_num_threads(threads)
found = {}
for name in ("float32", "bfloat16"):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, name)).eval()
    made, began = 0, None
    for prompt, new in [lengths[0], *lengths]:  # the first one warms up
        ids = torch.randint(8, model.config.vocab_size, (1, prompt))
        with torch.inference_mode():
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
                           do_sample=False, pad_token_id=1)
        if began is None:
            began = time.perf_counter()
        else:
            made += new
        if began is not None and time.perf_counter() - began > 120:
            break
    found[name] = made / (time.perf_counter() - began) if made else None
    del model
print(json.dumps(found))
"""


class Running:
    """A server's process and where it listens."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], port: int, shape: Shape) -> None:
        self.name, self.process, self.shape = name, process, shape
        self.url = f"http://127.0.0.1:{port}"

    def wait(self) -> None:
        """Until it answers."""
        end = time.monotonic() + START_SECONDS
        while True:
            if self.process.poll() is not None:
                raise SystemExit(f"{self.name} ended with status {self.process.returncode}; see its output")
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                if answer.status == 200:
                    return
            if time.monotonic() > end:
                raise SystemExit(f"{self.name} does not answer after {START_SECONDS} s")
            time.sleep(0.1)

    def load(self, loads: list[Load], streams: int | None, seed: int) -> dict[str, Any]:
        """One measurement: closed loop with `streams`, or by the loads' times."""
        with urllib.request.urlopen(f"{self.url}/v1/models", timeout=10) as answer:
            model = json.load(answer)["data"][0]["id"]
        target = Target(url=self.url, model=model, vocabulary=self.shape.vocab, timeout_seconds=3600)
        return report(asyncio.run(measure(target, loads, concurrency=streams, seed=seed)), **OBJECTIVES)

    def peak_bytes(self) -> int:
        for line in Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
        raise AssertionError("no VmHWM")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


@contextlib.contextmanager
def servers(shape: Shape, settings: Settings, arguments: argparse.Namespace) -> Iterator[dict[str, Running]]:
    """Both, started and warm."""
    directory = with_words(make_directory(shape, arguments.work / f"llama-{shape.name}"), shape)
    command = [arguments.peer_python, HERE / "random_models.py", "gguf", shape.name, arguments.work, "--vocabulary"]
    subprocess.run(command, check=True)
    threads, ports = str(settings.threads), (free_port(), free_port())
    own = [
        sys.executable, "-m", "memwall", "serve", directory, "--port", str(ports[0]), "--weights", "int4",
        "--threads", threads, "--context", str(settings.context), "--max-sequences", str(STREAMS),
        "--queue", "1000", "--connections", "1200", "--max-seconds", "3600", "--quiet",
    ]  # fmt: skip
    peer = [
        arguments.llama_server, "-m", arguments.work / f"llama-{shape.name}-q4_0-vocabulary.gguf",
        "--port", str(ports[1]), "-t", threads, "-tb", threads, "-np", str(STREAMS),
        "-c", str(settings.context * STREAMS), "--log-disable",
    ]  # fmt: skip
    environment = {**peer_environment(), "PYTHONPATH": str(HERE.parent / "src")}
    started: dict[str, Running] = {}
    try:
        for name, line, port in (("memwall", own, ports[0]), ("llama.cpp", peer, ports[1])):
            quiet = subprocess.DEVNULL if name == "llama.cpp" else None
            process = subprocess.Popen(list(map(str, line)), stdout=subprocess.DEVNULL, stderr=quiet, env=environment)
            started[name] = Running(name, process, port, shape)
        for one in started.values():
            one.wait()
            one.load(drawn_lengths(32, 8, 4, 9), 4, 9)
        yield started
    finally:
        for one in started.values():
            one.process.terminate()
            one.process.wait(60)


def compare(shape: Shape, count: int, settings: Settings, arguments: argparse.Namespace) -> dict[str, Any]:
    """All measurements of one model."""
    found: dict[str, Any] = {"streams": {}, "trace": {}, "transformers": {}}
    loads = clipped(
        drawn_lengths(settings.prompt_tokens, settings.output_tokens, settings.requests, 0), settings.context
    )
    with servers(shape, settings, arguments) as both:
        for number in range(settings.rounds if "streams" in settings.parts else 0):
            for name in turn(list(both), number):
                note(f"{shape.name}: round {number + 1}, {STREAMS} streams, {name}")
                found["streams"].setdefault(name, []).append(both[name].load(loads, STREAMS, number))
        if arguments.trace is not None and "trace" in settings.parts:
            found["trace"] = replay(both, read_trace(arguments.trace, count), settings, shape)
        found["peak_bytes"] = {name: one.peak_bytes() for name, one in both.items()}
    if "transformers" not in settings.parts:
        return {**found, "wanted": wanted(found)}
    some = [(load.prompt_tokens, load.output_tokens) for load in loads[: settings.sequential]]
    note(f"{shape.name}: transformers, one at a time")
    command = [arguments.peer_python, "-c", SEQUENTIAL, arguments.work / f"llama-{shape.name}", settings.threads]
    done = subprocess.run([*map(str, command), json.dumps(some)], capture_output=True, text=True, check=False)
    found["transformers"] = json.loads(done.stdout) if done.returncode == 0 else {"not_run": done.stderr[-300:]}
    return {**found, "wanted": wanted(found)}


def turn(names: list[str], number: int) -> list[str]:
    """Who goes first changes from round to round."""
    return names[number % len(names) :] + names[: number % len(names)]


def replay(both: dict[str, Running], trace: list[Load], settings: Settings, shape: Shape) -> dict[str, Any]:
    """The trace's lengths in a closed loop give what each can do; then its arrivals, at SATURATION of the slower."""
    loads = clipped(trace, settings.context)
    able = {}
    for name, one in both.items():
        note(f"{shape.name}: what {name} can do with the trace's lengths")
        able[name] = one.load(loads, STREAMS, 5)["requests_per_s"]
    rate = SATURATION * min(able.values())
    span = max(load.at or 0.0 for load in loads)
    dense = scaled(loads, rate * span / (len(loads) - 1))
    found: dict[str, Any] = {"able_requests_per_s": able, "rate_per_s": rate, "runs": {}}
    for number in range(settings.trace_rounds):
        for name in turn(list(both), number):
            note(f"{shape.name}: trace, round {number + 1}, {name}")
            found["runs"].setdefault(name, []).append(both[name].load(dense, None, 6 + number))
    return found


def wanted(found: dict[str, Any]) -> list[dict[str, Any]]:
    """What is asked, what was measured, and whether it holds."""
    rows, own = [], []
    if found["streams"]:
        own, peer = (
            [run["output_tokens_per_s"] for run in found["streams"][name]] for name in ("memwall", "llama.cpp")
        )
        ratio = median(a / b for a, b in zip(own, peer, strict=True))
        rows.append(row(f"tokens a second with {STREAMS} streams, times llama.cpp's server", ratio, THROUGHPUT_RATIO))
    alone = [speed for speed in found["transformers"].values() if isinstance(speed, float)]
    if alone and own:
        rows.append(row("the same, times transformers one at a time", median(own) / max(alone), SEQUENTIAL_RATIO))
    if found["trace"]:
        own, peer = (
            [run["first_token_seconds"]["p99"] for run in found["trace"]["runs"][name]]
            for name in ("memwall", "llama.cpp")
        )
        ratio = median(a / b for a, b in zip(own, peer, strict=True))
        rows.append(
            {**row("p99 of the first token under the trace, times llama.cpp's", ratio, 1.0), "holds": ratio <= 1}
        )
    everything = [*found["streams"].values(), *found["trace"].get("runs", {}).values()]
    failed = sum(run["failed"] for runs in everything for run in runs)
    rows.append({"what": "requests that failed", "measured": failed, "wanted": 0, "holds": failed == 0})
    return rows


def row(what: str, measured: float, least: float) -> dict[str, Any]:
    return {"what": what, "measured": round(measured, 3), "wanted": least, "holds": measured >= least}


def markdown(result: dict[str, Any]) -> str:
    """The result as a page."""
    about = result["hardware"]
    lines = [
        "# memwall's server beside llama.cpp's and transformers", "",
        f"{result['date']}, {about['cpu']}, {about['cores']} cores, {', '.join(about['vector'])}; others used "
        f"{100 * result['others_share']:.0f} % of the processors. {result['versions']}. Random weights, 4 bits, "
        f"{result['settings']['threads']} threads, {STREAMS} streams, {result['settings']['rounds']} rounds in turn.",
    ]  # fmt: skip
    for name, found in result["models"].items():
        lines += ["", f"## {name}", "", "| | memwall | llama.cpp |", "|---|---|---|"]
        figures: list[tuple[str, Any]] = [
            ("tokens/s", lambda run: f"{run['output_tokens_per_s']:.1f}"),
            ("prompt tokens/s", lambda run: f"{run['prompt_tokens_per_s']:.1f}"),
            ("first token p50 / p99, ms", lambda run: _tail(run["first_token_seconds"])),
            ("between tokens p50 / p99, ms", lambda run: _tail(run["between_tokens_seconds"])),
        ]
        for part, told in (("streams", f"{STREAMS} streams"), ("trace", "trace")):
            runs = found[part].get("runs", {}) if part == "trace" else found[part]
            for what, show in figures if runs else ():
                cells = [", ".join(map(show, runs[who])) for who in ("memwall", "llama.cpp")]
                lines.append(f"| {told}: {what} | {cells[0]} | {cells[1]} |")
        peaks = [f"{found['peak_bytes'][who] / 1e6:.0f} MB" for who in ("memwall", "llama.cpp")]
        lines.append(f"| peak resident | {peaks[0]} | {peaks[1]} |")
        if found["trace"]:
            able = found["trace"]["able_requests_per_s"]
            lines += ["", f"Trace: {found['trace']['rate_per_s']:.2f} requests/s; with its lengths memwall answers "
                          f"{able['memwall']:.2f} and llama.cpp {able['llama.cpp']:.2f} requests/s."]  # fmt: skip
        if found["transformers"]:
            lines += ["", f"transformers, tokens/s, one request at a time: {json.dumps(found['transformers'])}"]
        lines += ["", "| wanted | measured | holds |", "|---|---|---|"]
        lines += [f"| {r['what']} ({r['wanted']}) | {r['measured']} | {r['holds']} |" for r in found["wanted"]]
    return "\n".join(lines) + "\n"


def _tail(figures: dict[str, float]) -> str:
    if not figures:
        return "in one piece"  # a server holds text back while its bytes are no whole character
    return f"{1e3 * figures['p50']:.1f} / {1e3 * figures['p99']:.1f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-server", required=True, help="llama.cpp's llama-server")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has gguf, torch, transformers")
    parser.add_argument("--work", type=Path, required=True, help="folder for the model files, kept between runs")
    parser.add_argument("--trace", type=Path, help="Azure's trace of conversations, as CSV")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--label", help="hardware part of the result's file name; default: from the processor")
    parser.add_argument("--models", nargs="+", choices=SHAPES)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="some of the questions; default: all")
    parser.add_argument("--trace-requests", type=int, help="of the trace; default: 120 for the first model, 40 others")
    parser.add_argument("--trace-rounds", type=int)
    parser.add_argument("--quick", action="store_true", help="the demo's shape and few requests: tries it out")
    arguments = parser.parse_args()
    settings = replace(Settings(), **(QUICK if arguments.quick else {}))
    given = {name: getattr(arguments, name) for name in GIVEN if getattr(arguments, name)}
    if arguments.trace_requests:
        given["trace_requests"] = [arguments.trace_requests]
    settings = replace(settings, **{name: tuple(v) if isinstance(v, list) else v for name, v in given.items()})
    before, machine = processor_seconds(), hardware()
    said = subprocess.run([arguments.llama_server, "--version"], capture_output=True, text=True, check=True)
    result: dict[str, Any] = {
        "question": "serving",
        "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        "hardware": machine,
        "settings": asdict(settings),
        "versions": f"llama.cpp {(said.stdout + said.stderr).strip().splitlines()[0]}",
        "models": {},
    }
    for place, name in enumerate(settings.models):
        count = settings.trace_requests[min(place, len(settings.trace_requests) - 1)]
        result["models"][name] = compare(SHAPES[name], count, settings, arguments)
    result["others_share"] = others_share(before, processor_seconds())
    label = arguments.label or f"{'-'.join(machine['cpu'].lower().split())}-{machine['cores']}-cores"
    stem = f"serving_{'quick_' if arguments.quick else ''}{label}_{datetime.date.today():%Y%m}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (arguments.out / f"{stem}.md").write_text(markdown(result), encoding="utf-8")
    print(markdown(result))
    return 0 if all(one["holds"] for found in result["models"].values() for one in found["wanted"]) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Decode speed of every number format on a random model, each beside llama.cpp's nearest type, in one run.

    python benchmarks/formats.py --peer-python VENV/bin/python --work FOLDER [--model 0.5b] [--formats nf4 mxfp4]

For each format the model is compressed (round to nearest) into FOLDER, and decoded by memwall and by llama.cpp in turn,
round by round, one token at a time from an empty context, with the memory's read-only bandwidth taken in every round.
The fraction of bandwidth is weight bytes per token times tokens per second over that. Ratios are medians of the rounds'
ratios. Results go to benchmarks/results as JSON and as a Markdown table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from decode import ContenderFailed, Process, hardware, note
from random_models import SHAPES, Shape, make_directory

HERE = Path(__file__).resolve().parent
MEGABYTE = 1e6
#: the type of llama.cpp with the nearest number of bits, of the same kind where it has one and its packer can make it
NEAREST = {
    "bfloat16": "BF16",
    **dict.fromkeys(("int8", "int7", "mxint8", "bfp8", "e4m3", "e5m2", "mxfp8", "posit8"), "Q8_0"),
    **dict.fromkeys(("int6", "int5", "e2m3", "e3m2", "mxfp6"), "Q5_0"),
    **dict.fromkeys(("int4", "int3", "nf4", "nf4-dq", "fp4", "posit4", "bfp4", "bipolar4"), "Q4_0"),
    **dict.fromkeys(("e2m1", "mxfp4"), "MXFP4"),
    **dict.fromkeys(("int2", "bipolar2", "ternary", "binary2", "binary"), "TQ2_0"),
}
START_TOKENS = 8


class FormatRun:
    """One model in all formats."""

    def __init__(self, shape: Shape, arguments: argparse.Namespace) -> None:
        self.shape = shape
        self.arguments = arguments
        self.directory = make_directory(shape, arguments.work / f"llama-{shape.name}")

    def run(self) -> list[dict[str, Any]]:
        memory = self._process("memory")
        try:
            memory.ask("load", model=str(self.directory), threads=self.arguments.threads, max_tokens=0)
            return [self._pair(form, memory) for form in self.arguments.formats]
        finally:
            memory.close()

    def _process(self, name: str) -> Process:
        peer = name.startswith("llama.cpp")
        return Process(name, self.arguments.peer_python if peer else sys.executable, self.shape, self.arguments.threads)

    def _pair(self, form: str, memory: Process) -> dict[str, Any]:
        """Both engines alternately; one that fails is reported and leaves the other."""
        note(f"{form}: preparing")
        kind = NEAREST[form]
        found: dict[str, Any] = {"format": form, "peer": kind, "rounds": []}
        live: dict[str, Process] = {}
        for name, prepare in ((f"memwall:{form}", self._saved), (f"llama.cpp:{kind}", self._gguf)):
            try:
                live[name] = self._process(name)
                path = prepare(live[name], name.partition(":")[2])
                tokens = START_TOKENS + self.arguments.tokens + 8
                loaded = live[name].ask("load", model=str(path), threads=self.arguments.threads, max_tokens=tokens)
                live[name].ask("fill", length=START_TOKENS)
                live[name].ask("decode", tokens=4)
                found[_engine(name)] = {"weight_bits": loaded["weight_bits"], "about": loaded["about"]}
            except ContenderFailed as failure:
                note(str(failure))
                found[_engine(name)] = {"not_run": str(failure)}
                live.pop(name).close()
        try:
            for number in range(self.arguments.rounds):
                found["rounds"].append(self._round(live, memory, number))
        finally:
            for process in live.values():
                process.close()
        return found | {"summary": self._summary(found)}

    def _round(self, live: dict[str, Process], memory: Process, number: int) -> dict[str, float]:
        speeds = {"bandwidth": memory.ask("bandwidth")["bytes_per_s"]}
        names = list(live) if number % 2 else list(live)[::-1]
        for name in names:
            decoded = live[name].ask("decode", tokens=self.arguments.tokens)
            speeds[_engine(name)] = decoded["tokens"] / decoded["seconds"]
        return speeds

    def _saved(self, process: Process, form: str) -> Path:
        out = self.arguments.work / f"llama-{self.shape.name}-memwall-{form}"
        process.ask("prepare", model=str(self.directory), out=str(out))
        return out

    def _gguf(self, process: Process, kind: str) -> Path:
        path = self.arguments.work / f"llama-{self.shape.name}-{kind.lower()}.gguf"
        program = (
            "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; import random_models as m; "
            "m.make_gguf(m.SHAPES[sys.argv[2]], Path(sys.argv[3]), Path(sys.argv[4]), sys.argv[5])"
        )
        command = [str(self.arguments.peer_python), "-c", program, str(HERE), self.shape.name, str(self.directory)]
        made = subprocess.run([*command, str(path), kind], capture_output=True, text=True, check=False)
        if made.returncode:
            raise ContenderFailed(f"llama.cpp:{kind}: no GGUF file: {made.stderr.strip().splitlines()[-1]}")
        return path

    def _summary(self, found: dict[str, Any]) -> dict[str, float]:
        """Medians: tokens per second, fraction of bandwidth, and what memwall is times its peer."""
        summary: dict[str, float] = {}
        for engine in ("memwall", "llama.cpp"):
            rounds = [one for one in found["rounds"] if engine in one]
            if not rounds:
                continue
            step_bytes = found[engine]["weight_bits"] * self.shape.num_matrix_weights / 8
            summary[f"{engine} tokens_per_s"] = statistics.median(one[engine] for one in rounds)
            summary[f"{engine} step_bytes"] = step_bytes
            fractions = [one[engine] * step_bytes / one["bandwidth"] for one in rounds]
            summary[f"{engine} bandwidth_fraction"] = statistics.median(fractions)
        both = [one["memwall"] / one["llama.cpp"] for one in found["rounds"] if {"memwall", "llama.cpp"} <= one.keys()]
        if both:
            summary["ratio"] = statistics.median(both)
        return summary


def _engine(name: str) -> str:
    return name.partition(":")[0]


def markdown(result: dict[str, Any]) -> str:
    """One row per format."""
    lines = [
        f"Decode steps of {result['model']} in every number format, {result['threads']} threads, "
        f"{result['hardware']['cpu']}, {result['date'][:10]}. Medians of {result['rounds']} alternating rounds.",
        "",
        "| format | bits | MB per step | tokens/s | of bandwidth | peer | bits | tokens/s | of bandwidth | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for found in result["formats"]:
        summary, cells = found["summary"], [f"`{found['format']}`"]
        for engine in ("memwall", "llama.cpp"):
            if engine == "llama.cpp":
                cells.append(found["peer"])
            bits = found[engine].get("weight_bits")
            cells.append("not run" if bits is None else f"{bits:.2f}")
            if engine == "memwall":
                cells.append(_shown(summary.get("memwall step_bytes"), "{:.0f}", 1 / MEGABYTE))
            cells.append(_shown(summary.get(f"{engine} tokens_per_s"), "{:.1f}"))
            cells.append(_shown(summary.get(f"{engine} bandwidth_fraction"), "{:.0%}"))
        cells.append(_shown(summary.get("ratio"), "{:.2f}"))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _shown(value: float | None, form: str, factor: float = 1.0) -> str:
    return "-" if value is None else form.format(value * factor)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter with llama-cpp-python and gguf")
    parser.add_argument("--work", type=Path, required=True, help="folder for the model files, kept between runs")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--label", default="", help="hardware part of the result's file name")
    parser.add_argument("--model", choices=SHAPES, default="0.5b")
    parser.add_argument("--formats", nargs="+", choices=NEAREST, default=list(NEAREST))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--quick", action="store_true", help="a tiny model and few rounds: tries the benchmark out")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.model, arguments.rounds, arguments.tokens = "tiny", 2, 8
    return arguments


def main() -> int:
    arguments = parse()
    shape = SHAPES[arguments.model]
    machine = hardware()
    result = {
        "question": "formats",
        "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        "hardware": machine,
        "model": shape.name,
        "shape": asdict(shape),
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "formats": FormatRun(shape, arguments).run(),
    }
    label = arguments.label or "-".join(machine["cpu"].lower().split()[:2])
    name = f"formats_{label}_{datetime.date.today():%Y%m}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (arguments.out / f"{name}.md").write_text(markdown(result), encoding="utf-8")
    print(markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Decode speed of every number format on a random model, each beside llama.cpp's nearest type, in parts of a minute.

    python benchmarks/formats.py --peer-python VENV/bin/python --work FOLDER [--model 1b] [--formats nf4 mxfp4 widths]

For each format a model of drawn weights (drawn_models.py) is decoded by memwall and by llama.cpp in turn, round by
round, one token at a time from an empty context, a third of a second or some steps at least, with the memory's
read-only bandwidth taken in every round. The fraction of bandwidth is weight bytes per token times tokens per second
over that. Ratios are medians of the rounds' ratios. `widths` holds int2 to int8 at once and decodes with each in turn.
`torchao:int4` and the like compare matrix products alone (product_contenders.py).

Every part is written to one JSON file (and a Markdown table) as soon as it is measured, and a part that is there is not
measured again (but with --again), so that a run can be cut in windows: --seconds ends before a part that would take
longer, and --prepare makes the model files beforehand. Exit status 1 when a wanted figure is missed, 3 when parts are
left to measure.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from decode import ContenderFailed, Process, hardware, note, others_share, processor_seconds
from random_models import SHAPES, Shape, _config

HERE = Path(__file__).resolve().parent
MEGABYTE = 1e6
#: the type of llama.cpp with the nearest number of bits, of the same kind where it has one
NEAREST = {
    "int8": "Q8_0",
    "int7": "Q6_K",
    "int6": "Q6_K",
    "int5": "Q5_K",
    "int4": "Q4_0",
    "int3": "Q3_K",
    "int2": "Q2_K",
    **dict.fromkeys(("nf4", "nf4-dq", "fp4"), "IQ4_NL"),
    **dict.fromkeys(("posit4", "bfp4", "bipolar4"), "Q4_0"),
    **dict.fromkeys(("e2m1", "mxfp4"), "MXFP4"),
    **dict.fromkeys(("e2m3", "e3m2", "mxfp6", "mxfp6e3m2"), "Q6_K"),
    **dict.fromkeys(("mxint8", "bfp8", "e4m3", "e5m2", "mxfp8", "posit8"), "Q8_0"),
    **dict.fromkeys(("bipolar2", "ternary", "binary2"), "TQ2_0"),
    "binary": "TQ1_0",
    "bfloat16": "BF16",
}
#: what libraries that have products and no engine are measured beside
LIBRARIES = {"torchao:int4": "int4-g128", "torchao:int8": "int8", "bitsandbytes:nf4": "nf4", "bitsandbytes:fp4": "fp4"}
WIDTHS = ("int2", "int3", "int4", "int5", "int6", "int7", "int8")
PARTS = ("widths", *NEAREST, *LIBRARIES)
START_TOKENS = 8
#: a turn: some steps that are not counted, then as many as take so long: in a tenth of a second threads may share a
#: processor all the while
SETTLING_TOKENS, TURN_SECONDS, MOST_TOKENS = 4, 0.3, 64


class Run:
    """One model in all formats."""

    def __init__(self, shape: Shape, arguments: argparse.Namespace) -> None:
        self.shape, self.arguments = shape, arguments

    def prepare(self, part: str) -> None:
        """Makes the files that a part needs."""
        for name in contenders(part):
            self._file(name)

    def measure(self, part: str) -> dict[str, Any]:
        """All contenders of a part in turn; one that fails is reported and leaves the others."""
        before, found = processor_seconds(), {"contenders": {}, "rounds": []}
        live: dict[str, Process] = {}
        memory = self._process("memory")
        try:
            memory.ask("load", model=str(self.arguments.work), threads=self.arguments.threads, max_tokens=0)
            for name in contenders(part):
                note(f"{part}: {name}")
                live[name] = self._process(name)
                try:
                    found["contenders"][name] = self._start(live[name], name)
                except ContenderFailed as failure:
                    note(str(failure))
                    found["contenders"][name] = {"not_run": str(failure)}
                    live.pop(name).close()
            for number in range(self.arguments.rounds):
                found["rounds"].append(self._round(live, memory, number))
        finally:
            for process in (memory, *live.values()):
                process.close()
        if not self.arguments.keep:
            self._forget(part)
        found["summary"] = {name: self._summary(found, name) for name in live}
        return found | {"others_share": others_share(before, processor_seconds())}

    def _process(self, name: str) -> Process:
        ours = name == "memory" or name.startswith(("memwall:", "products:"))
        python = sys.executable if ours else self.arguments.peer_python
        return Process(name, python, self.shape, self.arguments.threads)

    def _start(self, process: Process, name: str) -> dict[str, Any]:
        path, bits = self._file(name)
        tokens = START_TOKENS + max(self.arguments.tokens, MOST_TOKENS) + 8
        loaded = process.ask("load", model=str(path), threads=self.arguments.threads, max_tokens=tokens)
        process.ask("fill", length=START_TOKENS)
        process.ask("decode", tokens=3)
        return {"weight_bits": bits or loaded["weight_bits"], "about": loaded["about"]}

    def _round(self, live: dict[str, Process], memory: Process, number: int) -> dict[str, float]:
        """Steps per second of each, forwards and backwards in turn."""
        speeds = {"bandwidth": memory.ask("bandwidth")["bytes_per_s"]}
        for name in list(live) if number % 2 else list(live)[::-1]:
            settled = live[name].ask("decode", tokens=SETTLING_TOKENS)["median_step_seconds"]
            tokens = max(self.arguments.tokens, min(MOST_TOKENS, int(TURN_SECONDS / settled)))
            speeds[name] = 1 / live[name].ask("decode", tokens=tokens)["median_step_seconds"]
        return speeds

    def _path(self, name: str) -> Path:
        engine, _, form = name.partition(":")
        if engine in ("memwall", "llama.cpp"):
            return self.arguments.work / f"drawn-{self.shape.name}-{form}{'' if engine == 'memwall' else '.gguf'}"
        return self.arguments.work / f"drawn-{self.shape.name}"

    def _file(self, name: str) -> tuple[Path, float]:
        """The model that a contender loads, made if it is not there, and its bits where only its maker knows them."""
        path, (engine, _, form) = self._path(name), name.partition(":")
        if engine == "memwall":
            if not (path / "model.safetensors").exists():
                self._make(sys.executable, "draw_directory", path, form)
            return path, 0.0
        if engine == "llama.cpp":
            return path, float(self._make(self.arguments.peer_python, "draw_gguf", path, form))
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(_config(self.shape)), encoding="utf-8")
        return path, 0.0

    def _make(self, python: str, maker: str, path: Path, form: str) -> str:
        """Runs a function of drawn_models.py in the interpreter that has what it needs; returns what it returned."""
        program = (
            "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; import drawn_models as d; "
            f"import random_models as r; print(d.{maker}(r.SHAPES[sys.argv[2]], Path(sys.argv[3]), sys.argv[4]))"
        )
        paths = os.pathsep.join([str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"PYTHONPATH": paths}
        made = subprocess.run(
            [python, "-c", program, str(HERE), self.shape.name, str(path), form],
            capture_output=True, text=True, check=False, env=environment if python == sys.executable else None,
        )  # fmt: skip
        if made.returncode:
            raise ContenderFailed(f"{path.name} could not be made: {made.stderr.strip().splitlines()[-1]}")
        return made.stdout.split()[-1]

    def _forget(self, part: str) -> None:
        for name in contenders(part):
            path = self._path(name)
            shutil.rmtree(path, ignore_errors=True)
            path.unlink(missing_ok=True)

    def _summary(self, found: dict[str, Any], name: str) -> dict[str, float]:
        """Medians: steps per second, bytes of a step, fraction of bandwidth, and the first contender over this one."""
        rounds = [one for one in found["rounds"] if name in one]
        weights = self.shape.num_matrix_weights
        if not name.startswith(("memwall:", "llama.cpp:")):
            from product_contenders import LAYERS, matrix_shapes

            weights = LAYERS * sum(rows * cols for rows, cols in matrix_shapes(_config(self.shape)))
        step_bytes = found["contenders"][name]["weight_bits"] * weights / 8
        summary = {
            "steps_per_s": statistics.median(one[name] for one in rounds),
            "step_bytes": step_bytes,
            "bandwidth_fraction": statistics.median(one[name] * step_bytes / one["bandwidth"] for one in rounds),
        }
        first = next(iter(found["contenders"]))
        if name != first and all(first in one for one in rounds):
            summary["ratio"] = statistics.median(one[first] / one[name] for one in rounds)
        return summary


def contenders(part: str) -> list[str]:
    """Ours first."""
    if part == "widths":
        return [f"memwall:{width}" for width in WIDTHS]
    if part in LIBRARIES:
        return [f"products:{LIBRARIES[part]}", part]
    return [f"memwall:{part}", f"llama.cpp:{NEAREST[part]}"]


def wanted(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """What is wanted of formats, as far as it has been measured: figure and verdict."""
    rows = []
    summary = measured.get("widths", {}).get("summary", {})
    if len(summary) == len(WIDTHS):
        times = {width: 1e3 / summary[f"memwall:{width}"]["steps_per_s"] for width in WIDTHS}
        shown = ", ".join(f"{width} {value:.1f}" for width, value in times.items())
        rows.append(
            {
                "wanted": "a step's time falls with its bytes, for every width",
                "figure": f"{shown} ms",
                "passed": list(times.values()) == sorted(times.values()),
            }
        )
    for form in ("int4", "int8"):
        for name, one in measured.get(form, {}).get("summary", {}).items():
            if "ratio" in one:
                row = {"wanted": f"{form} at least even with {name}", "figure": f"{one['ratio']:.2f} times as fast"}
                rows.append(row | {"passed": one["ratio"] >= 1.0})
    return rows


def markdown(result: dict[str, Any]) -> str:
    """What was wanted, one row per format, then widths and libraries."""
    measured = result["measured"]
    others = max((one["others_share"] for one in measured.values()), default=0.0)
    lines = [
        f"Decode steps of {result['model']} in every number format, {result['threads']} threads, "
        f"{result['hardware']['cpu']}. Medians of alternating rounds; one part of the table is measured at a time. "
        f"Other programs took up to {others:.0%} of the processors.",
        "",
        *(f"- {'yes' if row['passed'] else '**no**'}: {row['wanted']}: {row['figure']}" for row in wanted(measured)),
        "",
        "| part | contender | bits | MB per step | ms per step | of bandwidth | memwall is times as fast |",
        "|---|---|---|---|---|---|---|",
    ]
    for part in (part for part in PARTS if part in measured):
        for name, held in measured[part]["contenders"].items():
            one = measured[part]["summary"].get(name)
            if one is None:
                lines.append(f"| `{part}` | {name} | not run | - | - | - | {held.get('not_run', '')[:80]} |")
                continue
            ratio = f"{one['ratio']:.2f}" if "ratio" in one and part != "widths" else "-"
            lines.append(
                f"| `{part}` | {name} | {held['weight_bits']:.2f} | {one['step_bytes'] / MEGABYTE:.0f} "
                f"| {1e3 / one['steps_per_s']:.2f} | {one['bandwidth_fraction']:.0%} | {ratio} |"
            )
    return "\n".join(lines) + "\n"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter with llama-cpp-python and gguf")
    parser.add_argument("--work", type=Path, required=True, help="folder for model files")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--label", default="", help="hardware part of the result's file name")
    parser.add_argument("--model", choices=SHAPES, default="1b")
    parser.add_argument("--formats", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=8, help="least steps of a turn")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end before a part that would take longer")
    parser.add_argument("--prepare", action="store_true", help="only make the model files")
    parser.add_argument("--keep", action="store_true", help="do not delete model files that were measured")
    parser.add_argument("--again", action="store_true", help="measure parts again that the results have")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few rounds: tries the benchmark out")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.model, arguments.rounds, arguments.tokens = "tiny", 2, 4
    return arguments


def stored(path: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The results so far, if they are of the same model and threads."""
    shape, machine = SHAPES[arguments.model], hardware()
    fresh = {
        "question": "formats",
        "hardware": machine,
        "model": shape.name,
        "shape": asdict(shape),
        "threads": arguments.threads,
        "measured": {},
    }
    if not path.exists():
        return fresh
    found = json.loads(path.read_text(encoding="utf-8"))
    if any(found[key] != fresh[key] for key in ("hardware", "model", "threads")):
        raise SystemExit(f"{path} is of another machine, model or number of threads: give another --label")
    return found


def write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)
    path.with_suffix(".md").write_text(markdown(result), encoding="utf-8")


def main() -> int:
    arguments = parse()
    machine, began, longest = hardware(), time.perf_counter(), 0.0
    label = arguments.label or f"{'-'.join(machine['cpu'].lower().split()[:2])}-{machine['cores']}-cores"
    name = f"formats_{'quick_' if arguments.quick else ''}{label}_{datetime.date.today():%Y%m}"
    path = arguments.out / f"{name}.json"
    result, run = stored(path, arguments), Run(SHAPES[arguments.model], arguments)
    arguments.work.mkdir(parents=True, exist_ok=True)
    left = [part for part in arguments.formats if arguments.again or part not in result["measured"]]
    while left and time.perf_counter() - began + longest < arguments.seconds:
        part, start = left.pop(0), time.perf_counter()
        if arguments.prepare:
            run.prepare(part)
            continue
        measured = run.measure(part)
        seconds = time.perf_counter() - start
        longest = max(longest, seconds)
        when = datetime.datetime.now().astimezone().isoformat(timespec="minutes")
        result["measured"][part] = measured | {"date": when, "seconds": round(seconds, 1)}
        write(path, result)
    if not arguments.prepare:
        print(markdown(result))
    if left:
        note(f"left to measure: {' '.join(left)}")
        return 3
    return 0 if all(row["passed"] for row in wanted(result["measured"])) else 1


if __name__ == "__main__":
    sys.exit(main())

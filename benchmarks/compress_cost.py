"""What compressing a model of Llama-3.2-1B's shape costs: wall and processor time, memory, bytes written, by method.

    python benchmarks/compress_cost.py --work FOLDER [--layers 2] [--methods rtn gptq ...] [--tokens 4096]
        [--peer-python VENV/bin/python --peer-path FOLDER]

Random weights in bfloat16 (see random_models.py), `--tokens` of the bundled calibration text in sequences of 512. Every
method runs as a user runs it, `memwall compress`, in a process of its own; what it holds is the kernel's own peak of
the process, maps of the model file included, with processes it starts sampled and added. With fewer than 16 layers the
model has the first ones only (and its whole embedding), and 16 layers are said to take as many times as long. A layer's
time is that between its file and the one before. The floor is what the multiplications need: two passes of the text
through a layer, H = X^T X below its diagonal, its Cholesky factor and the feedback of errors, at the speed of large
float32 products measured in the same run; or, where no text is read, the bytes at the speed of a copy.

`--kill` ends a run by SIGKILL in its middle, takes it up again, and compares every byte with the straight run's.

gptqmodel, where the peer interpreter has it, quantizes the same folder with GPTQ on the processor, its settings equal
where it has them (4 bits, groups of 64, order of activations, as many tokens). Results are kept as JSON and Markdown; a
method that is run again takes the place of its older figures, so slow methods can be added one call at a time.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from decode import hardware, note, others_share, processor_seconds
from random_models import SHAPES, Shape, make_directory

HERE = Path(__file__).resolve().parent
TEXT = HERE.parent / "src" / "memwall" / "compress" / "calibration.txt"
ALL_LAYERS, SEQUENCE = 16, 512
LIMIT_BYTES = 6 << 30
# method -> what is asked of it
BITS = {
    "rtn": "int4", "gptq": "int4", "awq": "int4-g128-asym", "smoothquant": "int8", "spqr": "4", "sparsegpt": "4",
    "vptq": "vptq-v4-k256-ordered", "billm": "1.1", "pb-llm": "1.7", "quip": "2",
}  # fmt: skip
WITHOUT_TEXT = ("rtn",)
SWEPT = ("gptq", "spqr", "vptq", "sparsegpt", "billm", "pb-llm", "quip")
PEER = "gptqmodel"
KILLED = "same_bytes_after_kill"


@dataclass(slots=True)
class Cost:
    """Of one process: seconds of the clock and of processors, most bytes resident, its exit status and its output."""

    seconds: float
    processor_seconds: float
    peak_bytes: int
    status: int
    output: str


def measured(
    command: list[str], environment: dict[str, str], folder: Path, until: Callable[[], bool] | None = None
) -> Cost:
    """Runs in `folder` to its end, or to SIGKILL once `until` says so."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, cwd=folder)
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    most, output = 0, b""
    while True:
        output = (output + (process.stdout.read() or b""))[-100_000:]
        found, status, usage = os.wait4(process.pid, os.WNOHANG)
        if found:
            break
        others = sum(resident(child) for child in descendants(process.pid))
        most = max(most, others and others + resident(process.pid))
        if until is not None and until():
            process.send_signal(signal.SIGKILL)
        time.sleep(0.1)
    output += process.stdout.read() or b""
    process.returncode = os.waitstatus_to_exitcode(status)
    return Cost(
        seconds=time.perf_counter() - began,
        processor_seconds=usage.ru_utime + usage.ru_stime,
        peak_bytes=max(most, usage.ru_maxrss << 10),
        status=process.returncode,
        output=output.decode(errors="replace"),
    )


def descendants(pid: int) -> list[int]:
    """Processes that a process started, and theirs."""
    try:
        text = " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    except OSError:
        return []
    found = [int(each) for each in text.split()]
    return found + [each for child in found for each in descendants(child)]


def resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


# ---- the floor -------------------------------------------------------------------------------------------------------


def product_speed(threads: int) -> float:
    """Operations a second of large float32 products on as many threads as the methods have, the best of a few.

    By processor time, so that others on the machine do not slow them.
    """
    program = (
        "import numpy as n,time\n"
        "a=n.ones((2048,2048),'f4');a@a;best=9e9\n"
        "for _ in range(8):\n t=time.process_time();a@a;best=min(best,time.process_time()-t)\n"
        "print(2*2048**3/best)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=threaded(threads)
    )
    return float(done.stdout) * threads


def copy_speed() -> float:
    """Bytes a second that are read and written again."""
    source = np.ones(1 << 26, np.uint8)
    target, best = source.copy(), 9e9
    for _ in range(4):
        began = time.perf_counter()
        np.copyto(target, source)
        best = min(best, time.perf_counter() - began)
    return 2 * source.nbytes / best


def layer_operations(shape: Shape, tokens: int, method: str) -> float:
    """Multiplications and additions of one layer."""
    query, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    hidden, inner = shape.hidden, shape.intermediate
    matrices = [(query, hidden), (kv, hidden), (kv, hidden), (hidden, query)]
    matrices += [(inner, hidden), (inner, hidden), (hidden, inner)]
    inputs = (hidden, query, hidden, inner)  # q, k, v read one input, gate and up another
    passes = 2 * 2 * tokens * sum(rows * columns for rows, columns in matrices)
    if method not in SWEPT:
        return passes
    statistics = sum(tokens * columns * (columns + 1) + columns**3 / 3 for columns in inputs)
    return passes + statistics + sum(rows * columns**2 for rows, columns in matrices)


# ---- runs ------------------------------------------------------------------------------------------------------------


def threaded(threads: int, **more: str) -> dict[str, str]:
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    return {**os.environ, **dict.fromkeys(names, str(threads)), "TOKENIZERS_PARALLELISM": "false", **more}


def command_of(method: str, arguments: argparse.Namespace, source: Path, out: Path) -> list[str]:
    words = [sys.executable, "-m", "memwall", "compress", str(source), str(out), "--method", method]
    words += ["--bits", BITS[method], "--threads", str(arguments.threads), "--jobs", str(arguments.jobs), "--json"]
    if method not in WITHOUT_TEXT:
        words += ["--calibration", str(arguments.work / f"text-{arguments.tokens}.txt")]
    return words


def run_ours(method: str, arguments: argparse.Namespace, shape: Shape, source: Path) -> dict[str, Any]:
    out = arguments.work / f"out-{method}-{shape.num_layers}"
    environment = threaded(arguments.threads, PYTHONPATH=str(HERE.parent / "src"))
    command = command_of(method, arguments, source, out)
    if not arguments.resume:
        for folder in (out, out.with_name(out.name + ".partial")):
            shutil.rmtree(folder, ignore_errors=True)
    cost = measured(command, environment, arguments.work)
    if cost.status:
        return {"failed": cost.output.strip().splitlines()[-1][-300:]}
    report = json.loads(cost.output[cost.output.index("{") :])
    stamps = [path.stat().st_mtime for path in sorted(out.glob("model-*.safetensors"))]
    layers = [late - early for early, late in pairwise(stamps)][: shape.num_layers]
    layers = layers[1:] or layers  # before the first there is none whose outputs have to be worked out
    row = figures(cost, sum(path.stat().st_size for path in out.iterdir()), layers, shape)
    row |= {"bits_per_weight": report["bits_per_weight"], "resumed_parts": report["num_resumed_parts"]}
    if row["resumed_parts"]:  # of the last piece alone, which also went through all earlier layers again
        row["layer_processor_seconds"] = None
    if arguments.kill:
        row[KILLED] = killed_and_resumed(command, environment, out)
    if not arguments.keep:
        shutil.rmtree(out)
    return row


def figures(cost: Cost, written: int, layers: list[float], shape: Shape) -> dict[str, Any]:
    return {
        "seconds": cost.seconds, "processor_seconds": cost.processor_seconds, "peak_bytes": cost.peak_bytes,
        "bytes_written": written, "layers": shape.num_layers, "layer_seconds": layers,
        "layer_processor_seconds": float(np.mean(layers)) * cost.processor_seconds / cost.seconds if layers else None,
    }  # fmt: skip


def killed_and_resumed(command: list[str], environment: dict[str, str], out: Path) -> bool:
    """Whether a run that was killed once its first layer was written ends in the same bytes."""
    wanted = digests(out)
    shutil.rmtree(out)
    partial = out.with_name(out.name + ".partial")
    killed = measured(command, environment, out.parent, lambda: len(list(partial.glob("model-*.safetensors"))) >= 2)
    ended = measured(command, environment, out.parent)
    return killed.status == -signal.SIGKILL and ended.status == 0 and digests(out) == wanted


def digests(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def run_peer(arguments: argparse.Namespace, shape: Shape, source: Path) -> dict[str, Any]:
    out = arguments.work / f"out-{PEER}-{shape.num_layers}"
    shutil.rmtree(out, ignore_errors=True)
    command = [arguments.peer_python, str(HERE / "compress_cost_peer.py"), str(source), str(out), str(arguments.tokens)]
    environment = threaded(arguments.threads, PYTHONPATH=arguments.peer_path or "", GPTQMODEL_CPU_WORKERS="2")
    cost = measured(command, environment, arguments.work)  # it leaves logs where it runs
    if cost.status:
        return {"failed": cost.output.strip().splitlines()[-1][-300:]}
    marks = json.loads(cost.output.rsplit("MEASURED ", 1)[1].splitlines()[0])
    written = sum(path.stat().st_size for path in out.iterdir())
    row = figures(cost, written, [marks["seconds"] / shape.num_layers] * shape.num_layers, shape)
    row |= {"layer_processor_seconds": marks["processor_seconds"] / shape.num_layers, "version": marks["version"]}
    shutil.rmtree(out)
    return row


def finish(row: dict[str, Any], method: str, result: dict[str, Any], shape: Shape) -> dict[str, Any]:
    """Adds the floor and what all layers would take."""
    if "failed" in row or not row["layer_seconds"]:
        return row
    if method in WITHOUT_TEXT:
        layer_bytes = 2 * shape.num_matrix_weights * 1.25 - shape.vocab * shape.hidden * 2.5
        row["floor_seconds"] = layer_bytes / shape.num_layers / result["copy_bytes_per_s"]
    else:
        known = "gptq" if method == PEER else method
        row["floor_seconds"] = layer_operations(shape, result["tokens"], known) / result["operations_per_s"]
    row["layer_median_seconds"] = float(np.median(row["layer_seconds"]))
    row["floor_share"] = row["floor_seconds"] / row["layer_median_seconds"]
    if row["layer_processor_seconds"]:
        row["floor_processor_share"] = row["floor_seconds"] * result["threads"] / row["layer_processor_seconds"]
        outside = max(0.0, row["processor_seconds"] - shape.num_layers * row["layer_processor_seconds"])
        row["whole_processor_seconds"] = outside + ALL_LAYERS * row["layer_processor_seconds"]
    return row


def markdown(result: dict[str, Any]) -> str:
    machine = result["hardware"]
    lines = [
        "# What compressing a model of Llama-3.2-1B's shape costs",
        "",
        f"{result['date']}, {machine['cpu']}, {machine['cores']} cores, {', '.join(machine['vector'])}. Random "
        f"weights, calibration in sequences of {SEQUENCE} tokens, {result['threads']} thread(s). Large float32 "
        f"products {result['operations_per_s'] / 1e9:.0f} GFLOP/s by processor time, copies "
        f"{result['copy_bytes_per_s'] / 1e9:.1f} GB/s. Others had the share of the processors named in each row: where "
        "it is large the clock says little, and processor seconds are what to compare.",
        "",
        "| method | layers | tokens | s | processor s | peak resident | written | s a layer | processor s a layer "
        "| floor, s a layer | floor / processor s | all 16 layers, processor s | others |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in result["methods"].items():
        if "failed" in row:
            lines.append(f"| {name} | not run: {row['failed']} " + "| " * 11 + "|")
            continue
        run = "all 16" if row["layers"] == ALL_LAYERS else f"first {row['layers']} of {ALL_LAYERS}"
        whole = f"{row['processor_seconds']:.0f}"
        if row["layers"] != ALL_LAYERS:
            whole = f"about {row['whole_processor_seconds']:.0f}"
        elif row.get("resumed_parts"):
            whole = f"not known: taken up again with {row['resumed_parts']} parts made"
        busy, share = row["layer_processor_seconds"], row.get("floor_processor_share")
        lines.append(
            f"| {name} | {run} | {row['tokens'] or 'none'} | {row['seconds']:.0f} | {row['processor_seconds']:.0f} "
            f"| {row['peak_bytes'] / 1e9:.2f} GB | {row['bytes_written'] / 1e6:.0f} MB "
            f"| {row['layer_median_seconds']:.1f} | {f'{busy:.1f}' if busy else '-'} | {row['floor_seconds']:.2f} "
            f"| {f'{share:.2f}' if share else '-'} | {whole} | {row['others_share']:.0%} |"
        )
    kills = [f"{name}: {'yes' if row[KILLED] else 'no'}" for name, row in result["methods"].items() if KILLED in row]
    most = max((row["peak_bytes"] for row in ours(result)), default=0)
    lines += [
        "",
        "Killed once the first layer was written and taken up again, the same bytes? "
        f"{', '.join(kills) or 'not tried'}.",
        f"Most resident of memwall's: {most / (1 << 30):.2f} GiB; at most 6 GiB: "
        f"{'yes' if most <= LIMIT_BYTES else 'no'}.",
    ]
    return "\n".join(lines) + "\n"


def ours(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for name, row in result["methods"].items() if name != PEER and "failed" not in row]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the model files, kept between runs")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--label", help="hardware part of the result's file name; default: from the processor")
    parser.add_argument("--model", default="1b", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=2, help="layers of the model that is compressed")
    parser.add_argument("--methods", nargs="*", default=["rtn", "gptq"], choices=(*BITS, PEER))
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--kill", action="store_true", help="also kill and resume each")
    parser.add_argument(
        "--resume", action="store_true", help="go on with runs that were cut off (their times are then parts)"
    )
    parser.add_argument("--keep", action="store_true", help="keep what is made")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--peer-path", help="PYTHONPATH of the peer")
    return parser.parse_args(argv)


def main() -> int:
    arguments, machine = parse(), hardware()
    arguments.work = arguments.work.resolve()
    arguments.work.mkdir(parents=True, exist_ok=True)
    shape = replace(SHAPES[arguments.model], num_layers=arguments.layers)
    source = make_directory(shape, arguments.work / f"llama-{shape.name}-{shape.num_layers}")
    # the random models' tokenizer has one token a byte
    (arguments.work / f"text-{arguments.tokens}.txt").write_bytes(
        TEXT.read_bytes()[: arguments.tokens].decode(errors="ignore").encode()
    )
    label = arguments.label or f"{'-'.join(machine['cpu'].lower().split())}-{machine['cores']}-cores"
    stem = arguments.out / f"compress_cost_{label}_{datetime.date.today():%Y%m}"
    result: dict[str, Any] = {"question": "compress cost", "methods": {}}
    if stem.with_suffix(".json").exists():
        result = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
    result |= {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"), "hardware": machine,
        "tokens": arguments.tokens, "threads": arguments.threads,
        "operations_per_s": product_speed(arguments.threads), "copy_bytes_per_s": copy_speed(),
    }  # fmt: skip
    arguments.out.mkdir(parents=True, exist_ok=True)
    for method in arguments.methods:
        note(f"{method}, {shape.num_layers} layers")
        before = processor_seconds()
        row = run_peer(arguments, shape, source) if method == PEER else run_ours(method, arguments, shape, source)
        row |= {"others_share": others_share(before, processor_seconds()), "jobs": arguments.jobs}
        row["tokens"] = 0 if method in WITHOUT_TEXT else arguments.tokens
        name = method if method == PEER or shape.num_layers != ALL_LAYERS else f"{method}, whole"
        result["methods"][name] = finish(row, method, result, shape)
        stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        stem.with_suffix(".md").write_text(markdown(result), encoding="utf-8")
    print(markdown(result))
    rows = ours(result)
    return 0 if all(row["peak_bytes"] <= LIMIT_BYTES and row.get(KILLED, True) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

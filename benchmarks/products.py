"""Speed of the weight kernels: what share of the memory's read rate one token reaches, and what rate many tokens reach.

    python benchmarks/products.py [--json] [--formats int4,int8,float32] [--paths amx,avx512,avx2] [--threads 2]

Decode: one token times a matrix that no cache holds (`--megabytes`); before each product the plain read rate of the
same number of threads is measured, and the share is the median over such pairs; where other programs disturb the
machine, look at the share of the best instead (best product over best reading). Prefill: `--tokens` tokens times a
matrix of 2,048 x 2,048; a multiplication and an addition count as two operations. Encode: bytes of bfloat16 read per
second while rounding to the format.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from memwall import _native, kernels
from memwall.formats import Packed, codec

COLUMNS = 2048
PATHS = ("amx", "avx512", "avx2", "portable")


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def read_bytes_per_s(nbytes: int) -> float:
    return statistics.median(_native.probe_memory("read", nbytes, kernels.num_threads(), [], 0.01))


def filled(spec: str, rows: int) -> Packed:
    """A matrix of plausible numbers, without the cost of encoding: every code byte is as likely as any other."""
    random = np.random.default_rng(0)
    buffers = {}
    for name, (shape, dtype) in codec(spec).buffers((rows, COLUMNS)).items():
        if dtype == np.uint8:
            buffers[name] = np.resize(random.integers(0, 256, 1 << 20, dtype=np.uint8), shape)
        else:
            buffers[name] = np.resize(random.standard_normal(1 << 18).astype(dtype), shape)
    return Packed(spec=codec(spec).spec, shape=(rows, COLUMNS), buffers=buffers)


def measure_decode(spec: str, paths: list[str], nbytes: int, repeats: int) -> dict[str, Any]:
    rows = int(nbytes / (codec(spec).nbytes((1024, COLUMNS)) / 1024)) // 16 * 16
    matrix = kernels.matrix(filled(spec, rows))
    x, out = np.random.default_rng(1).standard_normal((1, COLUMNS), dtype=np.float32), np.empty((1, rows), np.float32)
    reads: dict[str, list[float]] = {path: [] for path in paths}
    rates: dict[str, list[float]] = {path: [] for path in paths}
    for _ in range(repeats):
        for path in paths:
            kernels.force_isa(kernels.best_isa())
            reads[path].append(read_bytes_per_s(nbytes))
            kernels.force_isa(path)
            rates[path].append(matrix.nbytes / seconds_of(lambda: kernels.linear(x, [matrix], [out])))
    return {
        path: {
            "bytes_per_s": statistics.median(rates[path]),
            "read_bytes_per_s": statistics.median(reads[path]),
            "share_of_read": statistics.median(
                rate / read for rate, read in zip(rates[path], reads[path], strict=True)
            ),
            "share_of_best": max(rates[path]) / max(reads[path]),
        }
        for path in paths
    }


def measure_prefill(spec: str, paths: list[str], tokens: int, repeats: int) -> dict[str, float]:
    matrix = kernels.matrix(filled(spec, COLUMNS))
    x = np.random.default_rng(1).standard_normal((tokens, COLUMNS), dtype=np.float32)
    out = np.empty((tokens, COLUMNS), np.float32)
    times: dict[str, list[float]] = {path: [] for path in paths}
    for _ in range(repeats):
        for path in paths:
            kernels.force_isa(path)
            times[path].append(seconds_of(lambda: kernels.linear(x, [matrix], [out])))
    return {path: 2 * tokens * COLUMNS * COLUMNS / statistics.median(times[path]) for path in paths}


def measure_encode(spec: str, paths: list[str], repeats: int) -> dict[str, float]:
    values = np.random.default_rng(0).standard_normal((COLUMNS, COLUMNS), dtype=np.float32).astype(ml_dtypes.bfloat16)
    out = {name: np.zeros(shape, dtype) for name, (shape, dtype) in codec(spec).buffers(values.shape).items()}
    rates = {}
    for path in paths:
        kernels.force_isa(path)
        times = [seconds_of(lambda: kernels.encode(spec, values, out=out)) for _ in range(repeats)]
        rates[path] = values.nbytes / statistics.median(times)
    return rates


def measure(options: argparse.Namespace) -> dict[str, Any]:
    paths = [path for path in options.paths.split(",") if PATHS.index(path) >= PATHS.index(kernels.best_isa())]
    formats = {}
    for spec in options.formats.split(","):
        formats[spec] = {
            "decode": measure_decode(spec, paths, int(options.megabytes * 1e6), options.repeats),
            "prefill_operations_per_s": measure_prefill(spec, paths, options.tokens, 3),
            "encode_bytes_per_s": measure_encode(spec, paths, 3) if spec.startswith("int") else None,
        }
    kernels.force_isa(kernels.best_isa())
    return {
        "benchmark": "kernels",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": processor_name(),
        "best_isa": kernels.best_isa(),
        "threads": kernels.num_threads(),
        "tokens": options.tokens,
        "matrix_bytes": int(options.megabytes * 1e6),
        "formats": formats,
    }


def print_table(result: dict[str, Any]) -> None:
    print(f"{result['processor']}, {result['threads']} threads, {result['date']}")
    print(
        f"{'format':<16}{'path':<10}{'decode GB/s':>12}{'of reading':>12}{'of best':>9}"
        f"{'prefill GOP/s':>15}{'encode GB/s':>13}"
    )
    for spec, row in result["formats"].items():
        for path, decode in row["decode"].items():
            encode = f"{row['encode_bytes_per_s'][path] / 1e9:.1f}" if row["encode_bytes_per_s"] else "-"
            print(
                f"{spec:<16}{path:<10}{decode['bytes_per_s'] / 1e9:>12.1f}{decode['share_of_read']:>12.0%}"
                f"{decode['share_of_best']:>9.0%}{row['prefill_operations_per_s'][path] / 1e9:>15.0f}{encode:>13}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="int2,int3,int4,int5,int6,int8,float32,float16,bfloat16")
    parser.add_argument("--paths", default="amx,avx512,avx2")
    parser.add_argument("--threads", type=int, default=0, help="0: all")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--megabytes", type=float, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    options = parser.parse_args()
    if options.threads:
        kernels.set_num_threads(options.threads)
    result = measure(options)
    if options.json:
        print(json.dumps(result))
    else:
        print_table(result)


if __name__ == "__main__":
    main()

"""The numbers of this machine that a peak analysis needs, measured in a second or two: arithmetic of the engine's own
products, memory's read rate, and the rate at which keys and values go to the swap file and back.

Source: Fu 2024 (arXiv 2405.08944) takes them from data sheets; here they are what a processor reaches with nothing else
to do, so that an analysis tells how a model's steps depend on the context, and its errors are those of the formulas.
Units: FLOP/s, bytes per second.
Cost: 150 MB for a moment, and a temporary file of 64 MiB, which with its copy in memory no cache holds.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

from memwall import _native, kernels
from memwall.hardware import MIB, available_memory_bytes
from memwall.hardware.system import describe_system, processor_order
from memwall.models.decoder import BLOCK_ROWS
from memwall.simulate.context_model import Peak

NAME = "here"
"""Of this machine, where a machine's name is asked for."""
SHAPE = (4096, 2048)
MATRICES = 4
ROUNDS = 5
FILE_BYTES = 64 * MIB


def calibrate(weights: str = "bfloat16", *, folder: Path | None = None) -> Peak:
    """This machine. weights: the format whose products are timed; folder: where the file lies that users go to.

    memory_bytes is what is free now.
    """
    return Peak(
        name=NAME, memory_bytes=available_memory_bytes(), flop_per_s=product_flop_per_s(weights),
        bytes_per_s=read_bytes_per_s(), link_bytes_per_s=file_bytes_per_s(folder),
    )  # fmt: skip


def product_flop_per_s(weights: str) -> float:
    """FLOP/s of products with as many tokens as a prompt's block has."""
    random = np.random.default_rng(0)
    held = [kernels.matrix(kernels.encode(weights, random.standard_normal(SHAPE, np.float32))) for _ in range(MATRICES)]
    x = random.standard_normal((BLOCK_ROWS, SHAPE[1]), np.float32)
    out = np.empty((BLOCK_ROWS, SHAPE[0]), np.float32)

    def work() -> None:
        for one in held:
            kernels.linear(x, [one], [out])

    return 2.0 * SHAPE[0] * SHAPE[1] * BLOCK_ROWS * MATRICES / _seconds(work)


def read_bytes_per_s() -> float:
    """Bytes per second of wide reads by all threads over a buffer that no cache holds."""
    nbytes = max(128 * MIB, 4 * describe_system().last_cache_bytes)
    try:
        return median(_native.probe_memory("read", nbytes, kernels.num_threads(), processor_order(), 0.1))
    finally:
        _native.probe_release()


def file_bytes_per_s(folder: Path | None = None) -> float:
    """Bytes per second to a temporary file and back, the mean of both ways."""
    data = memoryview(np.random.default_rng(0).integers(0, 256, FILE_BYTES, np.uint8))  # type: ignore[arg-type]
    with tempfile.TemporaryFile(dir=folder, prefix="memwall-link-") as file:

        def work() -> None:
            done = 0
            while done < FILE_BYTES:
                done += os.pwrite(file.fileno(), data[done:], done)
            done = 0
            while done < FILE_BYTES:
                done += os.preadv(file.fileno(), [data[done:]], done)

        return 2 * FILE_BYTES / _seconds(work)


def _seconds(work: Callable[[], None]) -> float:
    """Median of a few rounds, after one that does not count."""
    work()
    taken = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return median(taken)

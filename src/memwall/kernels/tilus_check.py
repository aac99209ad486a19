"""Tilus's products held against the decoded weights on this machine's back ends, and timed beside memwall's own."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from memwall import kernels
from memwall.formats import codec
from memwall.kernels import tile_interpreter, tile_tune, tilus
from memwall.kernels.tile_build import build, find_compiler
from memwall.kernels.tile_program import TileProgram
from memwall.kernels.tile_types import tile_type
from memwall.kernels.tilus import Config, Weights
from memwall.kernels.tilus_weights import DEFAULT_GROUP

TOLERANCE = 1e-2
"""Relative to the largest result, of float16 weights and results against float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """same: bit for bit where the order of sums is the same, else within the tolerance; error: relative, largest."""

    what: str
    same: bool
    error: float


def random_weights(
    dtype: str, k: int, n: int, *, group: int = DEFAULT_GROUP, seed: int = 0, columns: int = 128
) -> Weights:
    """Every finite code as likely as any other, scales that keep results near 1."""
    random, form = np.random.default_rng(seed), tile_type(dtype)
    finite = np.flatnonzero(np.isfinite(form.values)).astype(np.uint8)
    codes = finite[random.integers(0, len(finite), (k, n))]
    spread = float(np.sqrt(np.mean(form.values[finite].astype(np.float64) ** 2)))
    scales = (random.uniform(0.5, 1.5, (-(-k // group), n)) / spread / np.sqrt(k)).astype(np.float16)
    return tilus.prepare(codes, scales, dtype, group=group, columns=columns)


def model_product(x: np.ndarray, weights: Weights, split_k: int = 1) -> np.ndarray:
    """x float16 [M, K] -> float32 [M, N]: weights rounded to float16, products added one by one in ascending k."""
    codes = tilus.unpack_weights(weights.packed, weights.dtype, weights.weight_tile)
    values = tile_type(weights.dtype).decode(codes).astype(np.float16)
    held = (values * np.repeat(weights.scales, weights.group, axis=0)).astype(np.float32)
    total = np.zeros((len(x), held.shape[1]), np.float32)
    length = len(held) // split_k
    for part in range(split_k):
        sums = np.zeros_like(total)
        for k in range(part * length, (part + 1) * length):
            sums += x[:, k : k + 1].astype(np.float32) * held[k]
        total = sums if part == 0 else total + sums
    return total


def product_arrays(x: np.ndarray, weights: Weights, out: type[np.generic]) -> dict[str, np.ndarray]:
    """The programs' parameters, results zero."""
    columns = weights.padded[1]
    return {
        "x": x,
        "packed": weights.packed,
        "scales": weights.scales,
        "out": np.zeros((len(x), columns), out),
        "partial": np.zeros((len(x), columns), np.float32),
    }


def check(dtype: str, *, group: int = DEFAULT_GROUP, config: Config | None = None) -> Iterator[Check]:
    """Compares the programs on a small random product; C++ on each instruction set of this processor."""
    stages, split = (config.num_stages, config.split_k) if config is not None else (3, 1)
    config = Config(warp_spatial=(1, 2), warp_repeat=(1, 2, 2), num_stages=stages, split_k=split)
    m, n = 5, 2 * config.block[1]
    k = max(group, config.block[2]) * config.split_k * 2
    weights = random_weights(dtype, k, n, group=group, columns=n)
    x = np.random.default_rng(1).normal(size=(m, k)).astype(np.float16)
    decoded = x.astype(np.float32) @ weights.decode()
    top = float(np.abs(decoded).max())
    want = model_product(x, weights, config.split_k).astype(np.float16)

    def compare(what: str, program: TileProgram, run: Callable[[dict[str, np.ndarray]], None]) -> Check:
        arrays = product_arrays(x, weights, np.float16)
        run(arrays)
        error = float(np.abs(arrays["out"].astype(np.float32) - decoded).max()) / top
        return Check(what=what, same=np.array_equal(arrays["out"], want) and error <= TOLERANCE, error=error)

    matmul = tilus.matmul_program(dtype, m, n, k, group=group, config=config)
    yield compare("matmul, byte by byte", matmul, lambda arrays: tile_interpreter.run(matmul, arrays))
    find_compiler()
    for isa in instruction_sets():
        compiled = build(matmul, isa=isa, fast=False)
        yield compare(f"matmul, C++ {isa}", matmul, compiled)
        single = tilus.matvec_program(dtype, m, n, k, group=group, config=Config(cpu_tiles=1))
        arrays = product_arrays(x.astype(np.float32), weights, np.float32)
        build(single, isa=isa, fast=False)(arrays)
        error = float(np.abs(arrays["out"] - decoded).max()) / top
        yield Check(what=f"matvec, C++ {isa}", same=error <= 1e-5, error=error)


def instruction_sets() -> list[str]:
    """Those of vectors that the kernels can be forced to on this processor."""
    now, found = kernels.isa(), []
    for isa in ("portable", "avx2", "avx512"):
        try:
            kernels.force_isa(isa)
        except ValueError:
            continue
        found.append(isa)
    kernels.force_isa(now)
    return found


def matvec(weights: Weights, tokens: int, config: Config) -> Callable[[np.ndarray, np.ndarray], None]:
    """x float32 [tokens, padded K], out float32 [tokens, padded N] -> the compiled product, as a function of both."""
    k, n = weights.padded
    program = tilus.matvec_program(weights.dtype, tokens, n, k, group=weights.group, config=config, by_columns=True)
    compiled = build(program)
    held = {"packed": weights.by_columns(), "scales": weights.scales}
    return lambda x, out: compiled({"x": x, "out": out, **held})


def measure(dtype: str, tokens: int, n: int, k: int, *, group: int = DEFAULT_GROUP) -> dict[str, Any]:
    """Median seconds of the tuned CPU programs and of memwall's hand-written integer kernel of that width, in turn.

    Activations of the second program are rounded to 8 bits, as those of the hand-written kernel are.
    """
    weights = random_weights(dtype, k, n, group=group)
    padded_k, padded_n = weights.padded
    x = np.random.default_rng(0).normal(size=(tokens, padded_k)).astype(np.float32)
    out = np.zeros((tokens, padded_n), np.float32)
    held = {"x": x, "packed": weights.by_columns(), "scales": weights.scales, "out": out}

    def make(settings: Config) -> TileProgram:
        return tilus.matvec_program(dtype, tokens, padded_n, padded_k, group=group, config=settings, by_columns=True)

    def runner(program: TileProgram) -> Callable[[], Any]:
        compiled = build(program)
        return lambda: compiled(held)

    key = f"matvec by columns {dtype} {tokens} {padded_n} {padded_k} {group} {kernels.isa()} {find_compiler()}"
    choice = tile_tune.tune(key, tile_tune.cpu_candidates(), make, runner)
    works: dict[str, tuple[Callable[[], Any], int]] = {
        f"tile program {dtype}": (runner(make(choice.settings)), weights.nbytes)
    }
    rounded = build(
        tilus.matvec_program(
            dtype, tokens, padded_n, padded_k, group=group, config=choice.settings, by_columns=True, rounded=True
        )
    )

    def round_first() -> None:
        codes, scales = tilus.round_activations(x, group)
        rounded({**held, "x": codes, "x_scales": scales})

    works[f"tile program {dtype}, x rounded"] = (round_first, weights.nbytes)
    bits = max(tile_type(dtype).bits, 2)
    own = kernels.matrix(codec(f"int{bits}-g{min(group, 128)}").encode(np.random.default_rng(0).normal(size=(n, k))))
    short, result = np.ascontiguousarray(x[:, :k]), np.zeros((tokens, n), np.float32)
    works[f"memwall int{bits}"] = (lambda: kernels.linear(short, [own], [result]), int(own.nbytes))
    works[f"memwall int{bits}, exact"] = (lambda: kernels.linear(short, [own], [result], exact=True), int(own.nbytes))
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(15):
        for name, (work, _) in works.items():
            began = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - began)
    rows = [
        {"kernel": name, "seconds": statistics.median(seconds[name]), "bytes": nbytes}
        for name, (_, nbytes) in works.items()
    ]
    return {"rows": rows, "cpu_tiles": choice.settings.cpu_tiles}

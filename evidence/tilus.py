"""Tilus's claims: the layout algebra against brute force, every type's product bit for bit, static costs, CPU speed.

Layouts are drawn at random and compared with tables filled element by element. Products run in the byte-exact
interpreter with random shapes and are compared with decoded weights multiplied in the same order. Costs are counted
from programs. Speed is that of the products of one token through a model of Llama-3.2-1B's shape with random weights,
all widths in turn; the quick form has one matrix shape only. `--data` takes a weight matrix [outputs, inputs] as a
.npy file for the comparison with memwall's own kernel; random numbers otherwise.
"""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from memwall import kernels
from memwall.claims import Claim, Progress, main, not_run
from memwall.errors import InputError
from memwall.formats import codec
from memwall.kernels import tile_interpreter, tilus
from memwall.kernels.tile_build import Compiled, NoCompiler, build, find_compiler
from memwall.kernels.tile_casts import cast_codes
from memwall.kernels.tile_cost import cost
from memwall.kernels.tile_cuda import emit as emit_cuda
from memwall.kernels.tile_infer import infer
from memwall.kernels.tile_layout import (
    MMA_A,
    MMA_B,
    MMA_C,
    Layout,
    column_local,
    column_spatial,
    local,
    replicated,
    spatial,
)
from memwall.kernels.tile_program import TileProgram
from memwall.kernels.tile_types import PUBLISHED, tile_type
from memwall.kernels.tilus import Config
from memwall.kernels.tilus_check import check, model_product, product_arrays, random_weights
from memwall.peers import Peers, peer_python

WIDTHS = (8, 7, 6, 5, 4, 3)
# inputs x outputs of a block of Llama-3.2-1B, q, k, v and gate, up joined; then the head
BLOCK = ((2048, 3072), (2048, 2048), (2048, 16384), (8192, 2048))
HEAD, BLOCKS = (2048, 128256), 16


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a run. layouts: random pairs; shapes: random products a type; rounds: times each width is timed."""

    layouts: int
    shapes: int
    rounds: int
    whole_model: bool
    triton: tuple[str, ...]
    cuda: tuple[str, ...]


QUICK = Sizes(600, 1, 5, False, ("i4", "f6e3m2"), ("u3",))
FULL = Sizes(5000, 4, 9, True, PUBLISHED, ("u1", "i2", "u3", "i4", "i5", "f6e3m2", "i7", "f8e4m3"))


def run(quick: bool, data: Path | None, progress: Progress | None = None) -> list[Claim]:
    """Measures and judges."""
    sizes = QUICK if quick else FULL
    steps: list[tuple[str, Callable[[], Iterator[Claim]]]] = [
        ("layouts", lambda: layouts(sizes.layouts)),
        ("types", types),
        ("products", lambda: products(sizes.shapes)),
        ("views and splits", views_and_splits),
        ("static costs", static_costs),
        ("C++", compiled_claims),
        ("Triton", lambda: triton_claims(sizes.triton)),
        ("CUDA", lambda: cuda_claims(sizes.cuda)),
        ("memwall's own kernel", lambda: hand_written(data)),
        ("speed", lambda: speed(sizes)),
        ("peers", lambda: peers(sizes.rounds)),
    ]
    claims: list[Claim] = []
    for index, (name, step) in enumerate(steps):
        if progress is not None:
            progress(index, len(steps), name)
        claims += step()
    return [*claims, *gpu_claims()]


# ---- layouts -------------------------------------------------------------------------------------------------------


def random_layout(random: np.random.Generator, rank: int = 2, most: int = 3) -> Layout:
    found = local(*[1] * rank)
    for _ in range(random.integers(1, most + 1)):
        if random.random() < 0.15:
            found = found.compose(replicated(int(random.integers(2, 4)), rank))
            continue
        make = (local, spatial, column_local, column_spatial)[random.integers(4)]
        found = found.compose(make(*random.integers(1, 5, rank).tolist()))
    return found


def replaced(f: Layout, g: Layout) -> np.ndarray:
    """Composition element by element: each element of f becomes a tile that g's threads and slots hold."""
    outer, inner = f.table(), g.table()
    rows, columns = f.num_threads * g.num_threads, f.num_slots * g.num_slots
    found = np.empty((rows, columns, len(f.shape)), np.int64)
    for t in range(f.num_threads):
        for i in range(f.num_slots):
            block = outer[t, i] * np.asarray(g.shape) + inner
            top, left = t * g.num_threads, i * g.num_slots
            found[top : top + g.num_threads, left : left + g.num_slots] = block
    return found


def layouts(count: int) -> Iterator[Claim]:
    random = np.random.default_rng(0)
    wrong = dict.fromkeys(("compose", "associative", "divide", "equality"), 0)
    for _ in range(count):
        f, g, h = (random_layout(random, most=2) for _ in range(3))
        both = f.compose(g)
        wrong["compose"] += not np.array_equal(both.table(), replaced(f, g))
        wrong["associative"] += not both.compose(h).same_as(f.compose(g.compose(h)))
        wrong["divide"] += not both.divide(g).same_as(f)
        alike = f.shape == g.shape and f.num_threads == g.num_threads and np.array_equal(f.table(), g.table())
        wrong["equality"] += f.same_as(g) != alike
    yield Claim(
        claim="composition equals brute-force tile replacement; it is associative; division undoes it; canonical forms "
        "are equal exactly where two layouts map alike",
        measured=f"{count:,} random triples; wrong: " + ", ".join(f"{name} {n}" for name, n in wrong.items()),
        required="none wrong",
        passed=not any(wrong.values()),
    )
    example = Layout((4, 6), (2, 2, 3, 2), (0, 2), (3, 1))
    right = all(
        tuple(example.table()[(i // 2) * 3 + j // 2, (j % 2) * 2 + i % 2]) == (i, j) for i in range(4) for j in range(6)
    )
    lanes = 0
    for lane in range(32):
        group, of = divmod(lane, 4)
        a = [[group + 8 * (i in (2, 3, 6, 7)), of * 2 + (i & 1) + 8 * (i >= 4)] for i in range(8)]
        b = [[of * 2 + (i & 1) + 8 * (i >= 2), group] for i in range(4)]
        c = [[group + 8 * (i >= 2), of * 2 + (i & 1)] for i in range(4)]
        lanes += [MMA_A.table()[lane].tolist(), MMA_B.table()[lane].tolist(), MMA_C.table()[lane].tolist()] == [a, b, c]
    yield Claim(
        claim="the worked example of the unified form, and the fragment tables of the PTX manual for mma.m16n8k16",
        measured=f"example {'as' if right else 'not as'} published, {lanes} of 32 lanes of A, B and C as in the manual",
        required="all",
        passed=right and lanes == 32,
    )


# ---- types ---------------------------------------------------------------------------------------------------------


def types() -> Iterator[Claim]:
    peers = {
        "f8e4m3": ml_dtypes.float8_e4m3fn, "f8e5m2": ml_dtypes.float8_e5m2, "f4e2m1": ml_dtypes.float4_e2m1fn,
        "f6e2m3": ml_dtypes.float6_e2m3fn, "f6e3m2": ml_dtypes.float6_e3m2fn,
    }  # fmt: skip
    wrong, largest = [], []
    for name in PUBLISHED:
        form = tile_type(name)
        codes = np.arange(1 << form.bits, dtype=np.uint8)
        found = cast_codes(form, codes).astype(np.float32)
        want = codes.view(peers[name]).astype(np.float32) if name in peers else form.values
        if not (np.array_equal(found, want, equal_nan=True) and np.array_equal(form.values, want, equal_nan=True)):
            wrong.append(name)
        if form.kind == "float" and form.exponent_bits != 5 and name != "f8e4m3":
            top = 2.0 ** ((2**form.exponent_bits - 1) - form.bias) * (2 - 2.0**-form.mantissa_bits)
            largest.append(form.largest == top)
    yield Claim(
        claim="every code of every type, converted two at a time by word operations, is exact",
        measured=f"{len(PUBLISHED)} types, wrong: {', '.join(wrong) or 'none'}; 5 of them against ml_dtypes; largest "
        f"values as published: {sum(largest)} of {len(largest)}",
        required="none wrong, all as published",
        passed=not wrong and all(largest),
    )
    k, n, off = 1024, 512, []
    for name in PUBLISHED:
        bits = tile_type(name).bits
        codes = np.random.default_rng(0).integers(0, 1 << bits, (k, n), np.uint8)
        packed = tilus.pack_weights(codes, name)
        same = np.array_equal(tilus.unpack_weights(packed, name), codes)
        if packed.nbytes * 8 != k * n * bits or not same:
            off.append(name)
    yield Claim(
        claim="packed weights take K N b / 8 bytes, 3, 5, 6 and 7 bits included, and unpack without loss",
        measured=f"{len(PUBLISHED)} types, off: {', '.join(off) or 'none'}",
        required="exactly, none off",
        passed=not off,
    )


# ---- products ------------------------------------------------------------------------------------------------------


def products(shapes: int) -> Iterator[Claim]:
    random = np.random.default_rng(0)
    different, worst, done = [], 0.0, 0
    for name in PUBLISHED:
        for _ in range(shapes):
            config = Config(
                warp_spatial=[(1, 1), (1, 2), (2, 1)][random.integers(3)],
                warp_repeat=[(1, 2, 1), (1, 2, 2), (2, 2, 1), (1, 4, 2)][random.integers(4)],
                num_stages=int(random.integers(2, 5)),
            )
            m, k = int(random.integers(1, 40)), 128 * int(random.integers(1, 4))
            n = config.block[1] * int(random.integers(1, 4))
            weights = random_weights(name, k, n, seed=int(random.integers(1 << 30)), columns=n)
            x = random.normal(size=(m, k)).astype(np.float16)
            arrays = product_arrays(x, weights, np.float16)
            tile_interpreter.run(tilus.matmul_program(name, m, n, k, config=config), arrays, seed=done)
            decoded = x.astype(np.float32) @ weights.decode()
            worst = max(worst, float(np.abs(arrays["out"] - decoded).max() / np.abs(decoded).max()))
            if not np.array_equal(arrays["out"], model_product(x, weights).astype(np.float16)):
                different.append(name)
            done += 1
    yield Claim(
        claim="one tile program multiplies every type of 1 to 8 bits: decoded weights multiplied in the same order, "
        "bit for bit, in a machine of bytes",
        measured=f"{done} products of random shape, {len(different)} differ; largest error against float32 {worst:.2e} "
        "of the largest result",
        required=f"none of {len(PUBLISHED)} types differs, errors at most 1e-2",
        passed=not different and worst <= 1e-2,
    )


def views_and_splits() -> Iterator[Claim]:
    weights = random_weights("u3", 16, 16, group=16, columns=16)
    held = tilus.thread_bytes("u3", (16, 16))
    results = []
    for layout in (tilus.flat_layout(held), spatial(32).compose(local(held))):
        p = TileProgram("view", grid=(1,))
        source, target = p.global_view("packed", "u8", (32 * held,)), p.global_view("y", "f32", (16, 16))
        codes = p.view(p.load_global(source, (0,), (32 * held,), layout=layout), "u3", tilus.tile_layout((16, 16)))
        p.store_global(target, p.cast(codes, "f32"), (0, 0))
        y = np.zeros((16, 16), np.float32)
        tile_interpreter.run(infer(p), {"packed": weights.packed.reshape(-1), "y": y})
        results.append(float((y != tilus.unpack_weights(weights.packed, "u3")).mean()))
    yield Claim(
        claim="a view is a real reinterpretation: the right layout of bytes gives the codes, a wrong one wrong numbers",
        measured=f"codes that differ: {results[0]:.0%} with the stored layout, {results[1]:.0%} with another",
        required="none, and more than half",
        passed=results[0] == 0 and results[1] > 0.5,
    )
    weights = random_weights("i4", 2048, 64, columns=64)
    x = np.random.default_rng(1).normal(size=(7, 2048)).astype(np.float16)
    decoded = x.astype(np.float32) @ weights.decode()
    off, errors = 0, {}
    for split in (1, 8):
        config = Config(warp_spatial=(1, 2), warp_repeat=(1, 4, 2), split_k=split)
        program = tilus.matmul_program("i4", 7, 64, 2048, config=config)
        for seed in (None, 1, 2, 3):
            arrays = product_arrays(x, weights, np.float16)
            tile_interpreter.run(program, arrays, seed=seed)
            off += not np.array_equal(arrays["out"], model_product(x, weights, split).astype(np.float16))
            errors[split] = float(np.abs(arrays["out"] - decoded).max() / np.abs(decoded).max())
    yield Claim(
        claim="k split over 8 blocks loses no update: partial sums are added in order under a semaphore, whatever the "
        "order of the blocks",
        measured=f"{off} of 8 runs differ from the ordered sum; errors {errors[1]:.1e} unsplit, {errors[8]:.1e} split",
        required="none differs, both errors at most 1e-2",
        passed=not off and max(errors.values()) <= 1e-2,
    )


# ---- static costs --------------------------------------------------------------------------------------------------


def static_costs() -> Iterator[Claim]:
    k, n, m = 4096, 4096, 16
    traffic, copies, conflicts, widths = [], set(), 0, {}
    for name in PUBLISHED:
        bits = tile_type(name).bits
        found = cost(tilus.matmul_program(name, m, n, k))
        traffic.append(found.read_bytes["packed"] == k * n * bits // 8)
        conflicts += sum(a.conflicts for a in found.accesses if a.op in ("ldmatrix",) or a.memory == "x")
        copies |= {a.vector_bytes for a in found.accesses if a.op == "copy_async" and a.memory == "packed"}
        wide = cost(tilus.matmul_program(name, m, n, k, weight_tile=(32, 32)))
        widths[bits] = next(a.vector_bytes for a in wide.accesses if a.op == "load_shared" and a.memory == "s1")
    held = {bits: tilus.thread_bytes(f"u{bits}", (32, 32)) for bits in widths}
    yield Claim(
        claim="weight traffic is proportional to bits",
        measured=f"{sum(traffic)} of {len(PUBLISHED)} types move K N b / 8 bytes of weights at {m} tokens",
        required="all",
        passed=all(traffic),
    )
    yield Claim(
        claim="weights come in 16-byte vectors at 4 and 8 bits, and as wide as a thread's bytes allow at odd widths",
        measured=f"copies from global memory: {sorted(copies)} bytes for every type; register loads of a 32 x 32 tile: "
        + ", ".join(f"{bits} bits {widths[bits]}" for bits in sorted(widths)),
        required="16 at 4 and 8 bits, gcd(bytes of a thread, 16) at the others",
        passed=copies == {16}
        and widths[4] == widths[8] == 16
        and all(w == np.gcd(held[b], 16) for b, w in widths.items()),
    )
    yield Claim(
        claim="no bank conflicts on swizzled activations",
        measured=f"{conflicts} extra cycles over {len(PUBLISHED)} types, copies and ldmatrix",
        required="0",
        passed=conflicts == 0,
    )


# ---- back ends -----------------------------------------------------------------------------------------------------


def compiled_claims() -> Iterator[Claim]:
    title = (
        "compiled as C++, the same programs on the same packed weights give the same bits (matmul) and sums (matvec)"
    )
    required = "all as the model, on every instruction set of this processor"
    try:
        find_compiler()
    except NoCompiler:
        yield not_run(title, required, "a C++ compiler")
        return
    rows = [(name, row) for name in ("u3", "i5", "f6e3m2") for row in check(name)]
    wrong = [f"{name} {row.what}" for name, row in rows if not row.same]
    yield Claim(
        claim=title,
        measured=f"{len(rows)} comparisons, wrong: {', '.join(wrong) or 'none'}",
        required=required,
        passed=not wrong,
    )


def triton_claims(names: tuple[str, ...]) -> Iterator[Claim]:
    title, required = "emitted Triton on the same packed weights agrees with decoded weights", "all within 1e-2"
    if find_spec("torch") is None or find_spec("triton") is None:
        yield not_run(title, required, "torch and triton")
        return
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
    from memwall.kernels.tile_triton_source import Launch

    errors = {}
    for name in names:
        weights = random_weights(name, 256, 128)
        x = np.random.default_rng(0).normal(size=(5, 256)).astype(np.float16)
        out = torch.zeros(5, 128, dtype=torch.float16, device=device)
        arrays = {"x": x, "packed": weights.packed, "scales": weights.scales}
        held = {key: torch.from_numpy(array).to(device) for key, array in arrays.items()}
        Launch(tilus.direct_program(name, 5, 128, 256))({**held, "out": out})
        decoded = x.astype(np.float32) @ weights.decode()
        errors[name] = float(np.abs(out.cpu().numpy() - decoded).max() / np.abs(decoded).max())
    yield Claim(
        claim=title,
        measured=f"{len(errors)} types on {'a GPU' if device == 'cuda' else 'its interpreter'}: largest error "
        f"{max(errors.values()):.1e}",
        required=required,
        passed=max(errors.values()) <= 1e-2,
    )


def cuda_claims(names: tuple[str, ...]) -> Iterator[Claim]:
    title, required = "emitted CUDA compiles for compute capability 8.0, without spilling registers", "all"
    if shutil.which("nvcc") is None:
        yield not_run(title, required, "nvcc")
        return
    registers = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "product.cu"
            source.write_text(emit_cuda(tilus.matmul_program(name, 16, 4096, 4096, config=Config(split_k=2))))
            command = ["nvcc", "-arch=sm_80", "-cubin", "-Xptxas", "-v", "-o", str(source) + "bin", str(source)]
            told = subprocess.run(command, capture_output=True, text=True, check=False).stderr
        found = re.search(r" 0 bytes spill stores.*Used ([0-9]+) registers", told, re.DOTALL)
        registers[name] = int(found[1]) if found else None
    yield Claim(
        claim=title,
        measured="registers: " + ", ".join(f"{name} {used}" for name, used in registers.items()),
        required=required,
        passed=None not in registers.values(),
    )


def hand_written(data: Path | None) -> Iterator[Claim]:
    """memwall's own 4- and 8-bit weights, handed over code by code."""
    title = "memwall's int8 and int4 weights as tile weights: the products of its own exact kernel"
    if data is not None and data.suffix != ".npy":
        raise InputError(f"--data {data}: a matrix [outputs, inputs] as a .npy file")
    w = np.load(data, allow_pickle=False) if data is not None else np.random.default_rng(0).normal(size=(512, 1024))
    if w.ndim != 2 or w.shape[1] % 128:
        raise InputError(
            f"--data {data}: a matrix [outputs, inputs] with inputs a multiple of 128, got {list(w.shape)}"
        )
    try:
        find_compiler()
    except NoCompiler:
        yield not_run(title, "within 1e-5 of the largest result", "a C++ compiler")
        return
    x = np.random.default_rng(1).normal(size=(2, w.shape[1])).astype(np.float32)
    errors = {}
    for bits in (8, 4):
        form = codec(f"int{bits}-g128")
        packed = form.encode(w.astype(np.float32))
        own = np.zeros((2, len(w)), np.float32)
        kernels.linear(x, [kernels.matrix(packed)], [own], exact=True)
        codes, scales, _ = form.unpack(packed)
        # from unsigned with a zero in the middle to two's complement
        signed = (codes ^ (1 << (bits - 1))).astype(np.uint8)
        weights = tilus.prepare(np.ascontiguousarray(signed.T), np.ascontiguousarray(scales.T), f"i{bits}")
        k, n = weights.padded
        arrays = product_arrays(x, weights, np.float32)
        build(tilus.matvec_program(f"i{bits}", 2, n, k), fast=False)(arrays)
        errors[bits] = float(np.abs(arrays["out"][:, : len(w)] - own).max() / np.abs(own).max())
    yield Claim(
        claim=title,
        measured=", ".join(f"int{bits}: largest difference {error:.1e}" for bits, error in errors.items()),
        required="within 1e-5 of the largest result",
        passed=max(errors.values()) <= 1e-5,
    )


# ---- speed ---------------------------------------------------------------------------------------------------------


class Model:
    """Packed random weights of all matrices at one width, and their compiled products."""

    def __init__(self, bits: int, shapes: list[tuple[int, int]]) -> None:
        random, name = np.random.default_rng(bits), f"i{bits}"
        held = 32 * tilus.thread_bytes(name, tilus.WEIGHT_TILE)
        fill = random.integers(0, 256, 1 << 24, np.uint8)
        self.nbytes, self.steps = 0, []
        programs = {
            (k, n): build(tilus.matvec_program(name, 1, n, k, by_columns=True, rounded=True)) for k, n in set(shapes)
        }
        for k, n in shapes:
            packed = np.resize(fill, (n // 16, k // 16, held))  # by columns
            scales = np.full((k // 128, n), 0.01, np.float16)
            arrays = {
                "x": random.normal(size=(1, k)).astype(np.float32), "packed": packed, "scales": scales,
                "out": np.zeros((1, n), np.float32),
            }  # fmt: skip
            self.nbytes += packed.nbytes + scales.nbytes
            self.steps.append((programs[k, n], arrays))

    def token(self) -> None:
        """Each product rounds its activations to 8 bits first, as memwall's own kernels and llama.cpp do."""
        for program, arrays in self.steps:
            codes, scales = tilus.round_activations(arrays["x"])
            program({**arrays, "x": codes, "x_scales": scales})


def speed(sizes: Sizes) -> Iterator[Claim]:
    title = "CPU, one token: time falls with bits, 8 over 4; 5, 6 and 7 bits land between"
    required = "t8 > t4, and t5, t6, t7 between them"
    try:
        find_compiler()
    except NoCompiler:
        yield not_run(title, required, "a C++ compiler")
        return
    shapes = [*BLOCK * BLOCKS, HEAD] if sizes.whole_model else [(2048, 8192)] * 6
    models = {bits: Model(bits, shapes) for bits in WIDTHS}
    seconds: dict[int, list[float]] = {bits: [] for bits in WIDTHS}
    for model in models.values():
        model.token()
    for _ in range(sizes.rounds):
        for bits, model in models.items():
            began = time.perf_counter()
            model.token()
            seconds[bits].append(time.perf_counter() - began)
    medians = {bits: statistics.median(each) for bits, each in seconds.items()}
    weights = sum(k * n for k, n in shapes)
    shown = ", ".join(
        f"{bits} bits {1e3 * medians[bits]:.1f} ms ({models[bits].nbytes / medians[bits] * 1e-9:.1f} GB/s)"
        for bits in WIDTHS
    )
    yield Claim(
        claim=title,
        measured=f"{weights / 1e9:.2f} billion weights, {kernels.num_threads()} threads, {kernels.isa()}: {shown}",
        required=required,
        passed=medians[8] > medians[4] and all(medians[4] <= medians[b] <= medians[8] for b in (5, 6, 7)),
    )
    sizes_of = {bits: model.nbytes for bits, model in models.items()}
    yield Claim(
        claim="3 bits take fewer bytes than 4, and 4 than 8",
        measured=", ".join(f"{bits} bits {sizes_of[bits]:,}" for bits in (3, 4, 8)),
        required="in that order",
        passed=sizes_of[3] < sizes_of[4] < sizes_of[8],
    )
    yield from against_decoding(sizes.rounds)


def against_decoding(rounds: int) -> Iterator[Claim]:
    """Tile products, memwall's own kernels, and decoding to float32 before a NumPy product, in turn."""
    k, n = 2048, 8192
    x = np.random.default_rng(0).normal(size=(1, k)).astype(np.float32)
    slower, shown = [], []
    for bits in (8, 4, 3):
        weights = random_weights(f"i{bits}", k, n)
        arrays = product_arrays(x, weights, np.float32) | {"packed": weights.by_columns()}
        program = build(tilus.matvec_program(f"i{bits}", 1, n, k, by_columns=True))
        rounded = build(tilus.matvec_program(f"i{bits}", 1, n, k, by_columns=True, rounded=True))

        def round_first(rounded: Compiled = rounded, arrays: dict[str, np.ndarray] = arrays) -> None:
            codes, scales = tilus.round_activations(x)
            rounded({**arrays, "x": codes, "x_scales": scales})

        own = kernels.matrix(codec(f"int{bits}-g128").encode(np.random.default_rng(0).normal(size=(n, k))))
        out = np.zeros((1, n), np.float32)
        works: dict[str, Callable[[], object]] = {
            "tile program": lambda program=program, arrays=arrays: program(arrays),
            "tile program, x rounded to 8 bits": round_first,
            "memwall": lambda own=own, out=out: kernels.linear(x, [own], [out]),
            "memwall exact": lambda own=own, out=out: kernels.linear(x, [own], [out], exact=True),
            "decode and multiply": lambda weights=weights: x @ weights.decode(),
        }
        times: dict[str, list[float]] = {name: [] for name in works}
        for turn in range(rounds):
            for name, work in works.items():
                if name.startswith("decode") and turn > 2:
                    continue
                began = time.perf_counter()
                work()
                times[name].append(time.perf_counter() - began)
        medians = {name: statistics.median(each) for name, each in times.items()}
        shown.append(f"{bits} bits: " + ", ".join(f"{name} {1e3 * each:.2f} ms" for name, each in medians.items()))
        if medians["tile program"] >= medians["decode and multiply"]:
            slower.append(bits)
    yield Claim(
        claim="the packed product is faster than decoding to float32 and multiplying (memwall's hand-written kernels "
        "beside it: activations rounded to 8 bits, and exact)",
        measured="; ".join(shown),
        required="at 8, 4 and 3 bits",
        passed=not slower,
    )


def gpu_claims() -> list[Claim]:
    return [
        not_run("GPU: at 1 to 16 tokens latency is ordered by bits", "u8 > u4 > u2, odd widths between neighbours"),
        not_run("GPU: u4 is close to Marlin, faster than cuBLAS float16 and Triton int4", "ratios as stated"),
        not_run("GPU: beside the authors' own package", "ratios shown"),
    ]


# ---- peers ---------------------------------------------------------------------------------------------------------

PEER_LAYERS = 4
PEER_MODEL = {
    "name": "four", "num_layers": PEER_LAYERS, "hidden": 2048, "num_heads": 32, "num_kv_heads": 8,
    "intermediate": 8192, "vocab": 2048,
}  # fmt: skip
# name -> (library, its form, the width of ours with which it is compared)
PEERS = {
    "torchao int4": ("torchao", "int4", 4), "torchao int8": ("torchao", "int8", 8),
    "llama.cpp Q4_0": ("llama_cpp", "Q4_0", 4), "llama.cpp Q5_K": ("llama_cpp", "Q5_K", 5),
    "llama.cpp Q6_K": ("llama_cpp", "Q6_K", 6),
}  # fmt: skip


def peers(rounds: int) -> Iterator[Claim]:
    """One token through the matrices of some layers, ours and theirs in turn; llama.cpp's are a whole small model."""
    title, required = "CPU: beside torchao's int4 and int8 and llama.cpp's Q4, Q5, Q6", "ratios shown"
    python, benchmarks = peer_python(), Path(__file__).parents[1] / "benchmarks"
    if not python or not (benchmarks / "drawn_models.py").is_file():
        yield not_run(title, required, needs="MEMWALL_PEER_PYTHON with torchao and llama-cpp-python")
        return
    try:
        find_compiler()
    except NoCompiler:
        yield not_run(title, required, "a C++ compiler")
        return
    shapes = [*BLOCK * PEER_LAYERS]
    models = {bits: Model(bits, shapes) for bits in sorted({bits for _, _, bits in PEERS.values()})}
    with tempfile.TemporaryDirectory() as folder:
        steps: dict[str, dict[str, Any]] = {
            name: {"library": library, "form": form, "shapes": [(n, k) for k, n in shapes]}
            if library == "torchao"
            else {"library": library, "form": form, "model": PEER_MODEL, "work": folder, "drawn": True}
            for name, (library, form, _) in PEERS.items()
        }
        with Peers(python, steps, threads=kernels.num_threads(), benchmarks=benchmarks) as theirs:
            times: dict[str, list[tuple[float, float]]] = {name: [] for name in PEERS if theirs.errors[name] is None}
            for _ in range(rounds + 1):
                for name in times:
                    began = time.perf_counter()
                    models[PEERS[name][2]].token()
                    times[name].append((time.perf_counter() - began, theirs.seconds(name, 1)))
            errors = [f"{name}: {error}" for name, error in theirs.errors.items() if error is not None]
    shown = []
    for name, pairs in times.items():
        ours, other = (statistics.median(each) for each in zip(*pairs[1:], strict=True))
        ratio = statistics.median(b / a for a, b in pairs[1:])
        shown.append(f"{name} {1e3 * other:.1f} ms, {PEERS[name][2]} bits {1e3 * ours:.1f} ms ({ratio:.2f} times)")
    if errors:
        yield not_run(title, required, f"peers that work: {'; '.join(errors)}")
        return
    yield Claim(claim=title, measured="; ".join(shown), required=required, passed=True)


if __name__ == "__main__":
    sys.exit(main("tilus", sys.modules[__name__]))

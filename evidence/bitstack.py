"""BitStack's claims: quality over size from one stored stack, what its parts are worth, and a budget that moves.

The model has 11.7 million weights (`models/wide-heads`; scripts/grow_wide_heads.py makes it). It is compressed once
into a stack, then scored at many sizes on held-out text in exact arithmetic. The claims are asked of models of 10 to 30
million weights; an earlier form of this file ran on the bundled demo model, which has 7.0 million in matrices as small
as 128 x 256. There the factors of a block, at the rank that the method takes for either model's width, 2, take 0.17 to
0.38 of its signs' bytes, and one claim failed: all 16 blocks were 0.58 to 0.80 % above the float model, where 0.5 % is
asked. Here they take 0.16 to 0.19, nearer to the published 0.125. The method, its rank, all settings and every
criterion are those of before.

Sizes of weights are bytes of the stored forms of the linear layers, factors and all; embedding and head are float16 in
every variant. Baselines of equal size: round-to-nearest, GPTQ and HQQ, and the singular vectors of the (scaled) signed
matrices. A server's budget goes up and down a staircase while it answers: its resident set is sampled from outside.
Speed is that of products with random blocks in the shapes of a model of a thousand million weights, taken alternately.

What 16 blocks leave: each takes away about the mean magnitude of what is left, half of it at first, so that the few
elements that are several times the mean are reached by the factors only: of the demo model's norms 7 % are left after
16 blocks at rank 1, 6 % at rank 2, 4 % at rank 4. That is the method's: at the published share of rank to size, 1 in
256, random normal matrices keep 6.4 to 7.5 %. Signs turned where factors come out negative, and factors fitted again to
them, win a fiftieth of it.

What all 16 blocks lose is judged on all of the held-out text: on its first 4,096 tokens, which all sizes are scored on,
it was +0.503 % once, where half a percent is allowed, and the sign of a thousandth is not known from as few.

Text: `--data` a UTF-8 file (its first half calibrates, the second is scored); the bundled texts otherwise.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memwall import kernels
from memwall.claims import Claim, Progress, main, not_run
from memwall.compress.base import MethodConfig
from memwall.compress.calibration import (
    BUNDLED_TEXT,
    CalibrationSettings,
    LayerStream,
    PromptCache,
    shared_input,
    token_sequences,
)
from memwall.compress.job_plan import Tuning
from memwall.compress.model import compress_model
from memwall.compress.rtn import RoundToNearest
from memwall.engine import Settings, load
from memwall.engine.quality import log_softmax
from memwall.errors import MissingDependency
from memwall.formats import Packed, codec
from memwall.formats.bitstack import BitStackCodec, blocks_of, first_blocks, top_factors, unpack_block
from memwall.memory import Arena, Ledger, resident_bytes
from memwall.models.checkpoint import Checkpoint
from memwall.models.config import ModelConfig
from memwall.models.decoder import Decoder
from memwall.models.precision import resolve
from memwall.models.stack_index import StackIndex
from memwall.models.tokenizer import Tokenizer
from memwall.models.weights import load_weights
from memwall.plan.choose import held_out_text
from memwall.systems import wide_heads

RANK = 2
"""What the method takes for 256 columns."""
WINDOW = 512
TOLERANCE = 1.01
"""Of perplexity, for curves that may not rise."""
SHAPES_1B = ((2048, 2048), (512, 2048), (8192, 2048), (2048, 8192))


def run(quick: bool, data: Path | None, progress: Progress | None = None) -> list[Claim]:
    """Measures and judges."""
    with tempfile.TemporaryDirectory() as folder:
        study = Study(Path(folder), data, quick)
        steps: list[tuple[str, Callable[[], list[Claim]]]] = [
            ("curve", lambda: curve(study)),
            ("equal bytes", lambda: equal_bytes(study)),
            ("parts", lambda: parts(study)),
            ("order", lambda: order(study)),
            ("budget", lambda: moving_budget(study)),
            ("server", lambda: live_server(study)),
            ("speed", lambda: fused(2 if quick else 9, 1 if quick else 3)),
        ]
        claims: list[Claim] = []
        for index, (name, step) in enumerate(steps):
            if progress is not None:
                progress(index, len(steps), name)
            claims += step()
        study.close()
    return [*claims, not_run("on a GPU fused products are several times faster than unfused ones", "at least 3 times")]


class Study:
    """The model, its stack, and held-out tokens."""

    def __init__(self, folder: Path, data: Path | None, quick: bool) -> None:
        self.quick, self.folder, self.source = quick, folder, wide_heads()
        self.config = ModelConfig.from_directory(self.source)
        tokenizer = Tokenizer.from_directory(self.source, self.config.vocab_size)
        text = None if data is None else data.read_text(encoding="utf-8")
        self.calibration_text: Path | None = None
        if text is not None:
            self.calibration_text = folder / "calibration.txt"
            self.calibration_text.write_text(text[: len(text) // 2], encoding="utf-8")
        read = CalibrationSettings(max_tokens=1024 if quick else 4096, sequence_tokens=WINDOW)
        scored, name = (held_out_text(), "bundled") if text is None else (text[len(text) // 2 :], str(data))
        self.scored = token_sequences(scored, tokenizer, self.config, read, name)
        whole = CalibrationSettings(max_tokens=1 << 20, sequence_tokens=WINDOW)
        self.all_scored = token_sequences(scored, tokenizer, self.config, whole, name)
        self.tuning = Tuning(
            calibration=CalibrationSettings(max_tokens=2048 if quick else 16_384, sequence_tokens=WINDOW)
        )
        calibration = (self.calibration_text or BUNDLED_TEXT).read_text(encoding="utf-8")
        self.calibration = token_sequences(calibration, tokenizer, self.config, self.tuning.calibration, "calibration")
        self.blocks = 4 if quick else 16
        self.options = {"blocks": str(self.blocks), "sort_tokens": "512" if quick else "1024"}
        self.stack = folder / "stack"
        self.compress("bitstack", self.stack, self.options)
        self.linears = [t for t in self.config.tensors() if t.role == "linear"]
        self.num_weights = sum(t.size for t in self.linears)
        self.checkpoint = Checkpoint(self.stack, self.config)
        index = StackIndex.of(self.checkpoint)
        assert index is not None
        self.index = index
        self.whole = {t.name: form for t in self.linears if (form := self.checkpoint.packed(t.name)) is not None}
        self.float = self.perplexity(self.source, "float16", {})
        self._decoded: dict[str, tuple[int, Packed]] = {}

    def close(self) -> None:
        self.checkpoint.close()

    def compress(
        self, method: str, out: Path, options: Mapping[str, str] | None = None, bits: str | None = None
    ) -> None:
        compress_model(
            self.source, out, bits=bits, method=method, options=options, calibration_text=self.calibration_text,
            tuning=self.tuning,
        )  # fmt: skip

    def perplexity(self, folder: Path, weights: str, forms: Mapping[str, Packed]) -> float:
        """Of the held-out tokens with these matrices in place, in exact arithmetic."""
        return float(np.exp(self.losses(folder, weights, forms, self.scored).mean()))

    def losses(
        self, folder: Path, weights: str, forms: Mapping[str, Packed], windows: Sequence[np.ndarray]
    ) -> np.ndarray:
        """The same, token by token, in nats."""
        arena = Arena(1 << 40, Ledger())
        with Checkpoint(folder, self.config) as checkpoint:
            held = load_weights(self.config, checkpoint, resolve(self.config, weights, checkpoint), arena)
        for name, form in forms.items():
            held.replace(name, form)
        decoder = Decoder(self.config, held, arena, segment_tokens=WINDOW, logit_rows=WINDOW, exact=True)
        found = []
        for window in windows:
            logits = decoder.forward(window[:-1], PromptCache(self.config), all_logits=True)
            found.append(-log_softmax(logits)[np.arange(len(window) - 1), window[1:]].astype(np.float64))
        decoder.release()
        held.release()
        return np.concatenate(found)

    def at(self, counts: Mapping[str, int]) -> float:
        """Perplexity of the stack's model with so many blocks of each matrix."""
        return self.perplexity(self.stack, "stack-0", self.decoded(counts))

    def decoded(self, counts: Mapping[str, int]) -> dict[str, Packed]:
        """So many first blocks of each matrix as floats.

        In exact arithmetic products of the stored blocks are those of what they decode to, bit for bit, so each first
        part of a matrix is decoded once and not for every window of text.
        """
        for name, count in counts.items():
            if name not in self._decoded or self._decoded[name][0] != count:
                form = first_blocks(self.whole[name], count)
                self._decoded[name] = (count, codec("float32").encode(codec(form.spec).decode(form)))
        return {name: self._decoded[name][1] for name in counts}

    def nbytes(self, counts: Mapping[str, int]) -> int:
        return sum(first_blocks(self.whole[name], count).nbytes for name, count in counts.items())

    def bits(self, nbytes: int) -> float:
        return 8 * nbytes / self.num_weights

    def within(self, nbytes: int) -> dict[str, int] | None:
        """The longest first part of the stack that takes at most so many bytes."""
        best = None
        for count in range(self.index.num_blocks + 1):
            counts = self.index.counts(count)
            if self.nbytes(counts) > nbytes:
                return best
            best = counts
        return best


# ---- quality over size -----------------------------------------------------------------------------------------------


def curve(study: Study) -> list[Claim]:
    num = 12 if study.quick else 101
    steps = np.unique(np.linspace(0, study.index.num_blocks, num).astype(int))
    found = [study.at(study.index.counts(int(step))) for step in steps]
    worst = max(value / min(found[: at + 1]) for at, value in enumerate(found))
    sizes = [study.bits(study.nbytes(study.index.counts(int(step)))) for step in steps]
    shown = ", ".join(f"{found[i]:.1f} at {sizes[i]:.1f}" for i in np.linspace(0, len(found) - 1, 8).astype(int))
    wanted = len(found) if study.quick else 100
    full = study.index.counts(study.index.num_blocks)
    stack = study.losses(study.stack, "stack-0", study.decoded(full), study.all_scored)
    plain = study.losses(study.source, "float16", {}, study.all_scored)
    above = np.exp((stack - plain).mean()) - 1
    error = (stack - plain).std() / math.sqrt(len(plain))
    top = Claim(
        claim="with all blocks perplexity is within 0.5 % of the float model's",
        measured=f"{np.exp(stack.mean()):.3f} against {np.exp(plain.mean()):.3f} over {len(plain):,} tokens "
        f"({above:+.2%} +- {error:.2%})",
        required="at most +0.5 %", passed=bool(above <= 0.005),
    )  # fmt: skip
    if study.quick:
        top = Claim(claim=top.claim, measured=f"not run: needs all 16 blocks, made without --quick ({top.measured})",
                    required=top.required, passed=None)  # fmt: skip
    return [
        Claim(claim="from one stored stack, perplexity falls as blocks are added",
              measured=f"{len(found)} sizes: {shown} bits; at most {worst - 1:.2%} above the best smaller one",
              required=f"at least {wanted} sizes, none more than 1 % above a smaller one",
              passed=len(found) >= wanted and worst <= TOLERANCE),
        top,
    ]  # fmt: skip


def equal_bytes(study: Study) -> list[Claim]:
    """Widths of integers against as large a part of the stack, and the singular vectors of the same scaled matrices."""
    rows = {}
    for spec in ("int2-g64-asym", "int4-g64") if study.quick else ("int2-g64-asym", "int3-g64-asym", "int4-g64"):
        rounded = {
            t.name: RoundToNearest().compress(source_weight(study, t.name), None, MethodConfig(spec=spec))
            for t in study.linears
        }
        size = sum(form.nbytes for form in rounded.values())
        study.compress("gptq", study.folder / spec, bits=spec)
        with Checkpoint(study.folder / spec, study.config) as made:
            swept = {t.name: form for t in study.linears if (form := made.packed(t.name)) is not None}
            gptq = study.perplexity(study.source, "float16", swept)
        ours = study.within(size)
        assert ours is not None
        rows[spec] = (study.perplexity(study.source, "float16", rounded), gptq, study.at(ours), study.bits(size),
                      study.bits(study.nbytes(ours)))  # fmt: skip
    floor = study.index.counts(0)
    small = {study.bits(study.nbytes(c)): (study.at(c), singular(study, c))
             for c in (floor, study.within(int(2.5 * study.num_weights / 8)) or floor)}  # fmt: skip

    def shown(spec: str) -> str:
        rtn, gptq, ours, bits, held = rows[spec]
        return f"{spec} ({bits:.2f} bits): rounding {rtn:.1f}, GPTQ {gptq:.1f}, stack {ours:.1f} at {held:.2f} bits"

    low = "; ".join(f"{ours:.1f} against {svd:.1f} at {bits:.2f} bits" for bits, (ours, svd) in small.items())
    two = rows["int2-g64-asym"]
    return [
        Claim(claim="at 2.5 bits a stack beats rounding to nearest in as many bytes", measured=shown("int2-g64-asym"),
              required="lower perplexity in at most its bytes", passed=two[2] < two[0] and two[4] <= two[3]),
        beside_hqq(study, two[2], two[4]),
        Claim(claim="up to 2.5 bits it beats the singular vectors of as many bytes by a wide margin", measured=low,
              required="at most half their perplexity at each size", passed=all(o <= s / 2 for o, s in small.values())),
        Claim(claim="beside GPTQ in as many bytes (reported: the paper's claim is of large models at extreme sizes)",
              measured="; ".join(map(shown, rows)), required="none", passed=None),
    ]  # fmt: skip


def beside_hqq(study: Study, ours: float, held: float) -> Claim:
    """HQQ's own search for zero points, 2 bits in groups of 64 along the inputs: a scale and a zero of 16 bits each."""
    claim = "at 2.5 bits it beats HQQ's 2-bit form in as many bytes"
    required = "lower perplexity in at most its bytes"
    if any(importlib.util.find_spec(name) is None for name in ("torch", "hqq")):
        return not_run(claim, required, "the libraries torch and hqq")
    import torch
    from hqq.core.quantize import Quantizer

    forms, size = {}, 0
    for tensor in study.linears:
        weight = torch.from_numpy(source_weight(study, tensor.name))
        codes, meta = Quantizer.quantize(weight, nbits=2, group_size=64, axis=1, device="cpu",
                                         compute_dtype=torch.float32)  # fmt: skip
        for each in ("scale", "zero"):
            meta[each] = meta[each].half()  # as it is stored
        size += codes.numel() * codes.element_size() + 2 * (meta["scale"].numel() + meta["zero"].numel())
        for each in ("scale", "zero"):
            meta[each] = meta[each].float()
        forms[tensor.name] = codec("float32").encode(Quantizer.dequantize(codes, meta).numpy())
    theirs, bits = study.perplexity(study.source, "float16", forms), study.bits(size)
    return Claim(claim=claim, measured=f"HQQ {theirs:.1f} at {bits:.2f} bits, stack {ours:.1f} at {held:.2f} bits",
                 required=required, passed=ours < theirs and held <= bits)  # fmt: skip


def source_weight(study: Study, name: str) -> np.ndarray:
    with Checkpoint(study.source, study.config) as checkpoint:
        return checkpoint.alone(name).astype(np.float32)


def scaled_weight(study: Study, name: str) -> np.ndarray:
    """What the stack was made of: all its blocks together, which is within its last residual of it."""
    return codec(study.whole[name].spec).decode(study.whole[name])


def singular(study: Study, counts: Mapping[str, int]) -> float:
    """Perplexity with each matrix as singular vectors in float16 that take as many bytes as its blocks."""
    forms = {}
    for name, count in counts.items():
        weight = scaled_weight(study, name)
        rank = max(first_blocks(study.whole[name], count).nbytes // (2 * sum(weight.shape)), 1)
        left, right = (each.astype(np.float16).astype(np.float32) for each in top_factors(weight, rank))
        forms[name] = codec("float32").encode(left @ right.T)
    return study.perplexity(study.stack, "stack-0", forms)


# ---- parts of the mechanism ------------------------------------------------------------------------------------------


def parts(study: Study) -> list[Claim]:
    depth = 4 if study.quick else 8
    lower, margins = True, []
    for tensor in study.linears[: 7 if study.quick else None]:
        weight = source_weight(study, tensor.name)
        residual, size = weight.copy(), float(np.linalg.norm(weight))
        form = BitStackCodec(rank=RANK, blocks=1)
        for count, block in enumerate(blocks_of(weight, RANK, depth), 1):
            residual -= block.decode()
            rank = count * form.nbytes(weight.shape) // (2 * sum(weight.shape))
            if rank >= min(weight.shape):
                break  # as many singular vectors as there are hold all of it
            left, right = (each.astype(np.float16).astype(np.float32) for each in top_factors(weight, rank))
            ours, theirs = float(np.linalg.norm(residual)), float(np.linalg.norm(weight - left @ right.T))
            lower &= ours < theirs
            margins.append((ours / size, theirs / size))
    mean = np.mean(margins, axis=0)
    return [
        Claim(claim="absolute value decomposition leaves a smaller residual than singular vectors of equal bytes",
              measured=f"{len(margins)} cases up to {depth} blocks, mean {mean[0]:.3f} against {mean[1]:.3f}",
              required="in every one", passed=lower),
        scaling(study),
    ]  # fmt: skip


def scaling(study: Study) -> Claim:
    """Two blocks of each matrix with its columns scaled by its inputs' norms, and without."""
    layers = 2 if study.quick else study.config.num_layers
    stream = LayerStream(
        study.config, Checkpoint(study.source, study.config), study.calibration, Arena(1 << 40, Ledger())
    )
    stream.embed()
    outputs, weights = np.zeros(2), np.zeros(2)
    better = count = 0
    for layer in range(layers):
        names = [t.name for t in study.linears if t.layer == layer]
        collector = stream.collect(layer, names, advance=True)
        statistics = collector.finish()
        for name in names:
            held, weight = statistics[shared_input(name)], source_weight(study, name)
            norms = np.sqrt(held.hessian.diagonal() / len(study.calibration)) + 1e-3
            errors = []
            for factors in (norms, np.ones_like(norms)):
                blocks = sum(block.decode() for block in blocks_of(weight * factors, RANK, 2)) / factors
                errors.append(
                    (
                        held.error(blocks - weight) / held.error(weight),
                        np.sum((blocks - weight) ** 2) / np.sum(weight**2),
                    )
                )
            better += errors[0][0] < errors[1][0]
            count += 1
            outputs += [errors[0][0], errors[1][0]]
            weights += [errors[0][1], errors[1][1]]
        collector.release()
    outputs, weights = outputs / count, weights / count
    return Claim(
        claim="scaling by inputs lowers the error of outputs, whatever it does to that of weights",
        measured=f"outputs {outputs[0]:.4f} against {outputs[1]:.4f} without, lower in {better} of {count} matrices; "
        f"weights {weights[0]:.4f} against {weights[1]:.4f}",
        required="lower on average", passed=outputs[0] < outputs[1],
    )  # fmt: skip


def order(study: Study) -> list[Claim]:
    """Blocks of each level in the measured order, in that of layers, and in random ones."""
    names, size = list(study.index.tensors), len(study.index.tensors)
    levels = [list(study.index.order[at : at + size]) for at in range(0, study.index.num_blocks, size)]
    levels = levels[: 2 if study.quick else 4]
    random = np.random.default_rng(0)
    orders = {"sorted": levels, "by layer": [sorted(level) for level in levels]}
    for number in range(1 if study.quick else 3):
        orders[f"random {number + 1}"] = [[int(at) for at in random.permutation(size)] for _ in levels]
    total = study.nbytes(study.index.counts(size * len(levels)))
    floor = study.nbytes(study.index.counts(0))
    budgets = np.linspace(floor, total, 5 if study.quick else 13).astype(int)[1:-1]
    found = {name: [study.at(filled(study, names, each, int(b))) for b in budgets] for name, each in orders.items()}
    logs = {name: float(np.mean(np.log(values))) for name, values in found.items()}
    worst = max(ours / other for name in found for ours, other in zip(found["sorted"], found[name], strict=True))
    shown = "; ".join(f"{name} {np.exp(value):.2f}" for name, value in logs.items())
    least = all(logs["sorted"] < value for name, value in logs.items() if name != "sorted")
    return [
        Claim(claim="blocks in the measured order are worth more than in that of layers or in random ones",
              measured=f"mean over {len(budgets)} sizes: {shown}; at worst {worst - 1:+.2%} at one size",
              required="the least mean of all, at no size more than 1 % above another order",
              passed=least and worst <= TOLERANCE),
    ]  # fmt: skip


def filled(study: Study, names: Sequence[str], levels: Sequence[Sequence[int]], nbytes: int) -> dict[str, int]:
    """Blocks in this order until the next one would go over."""
    counts = dict.fromkeys(names, 1)
    held = study.nbytes(counts)
    for at in (at for level in levels for at in level):
        size = study.whole[names[at]].buffers["block0"].nbytes
        if held + size > nbytes:
            break
        held += size
        counts[names[at]] += 1
    return counts


# ---- budgets that move -----------------------------------------------------------------------------------------------


def moving_budget(study: Study) -> list[Claim]:
    """A session whose budget goes down and up a staircase: bytes read, logits, and the delay of the next token."""
    settings = Settings(weights="saved", context_tokens=256, segment_tokens=32)
    session = load(study.stack, settings)
    stack = session.decoder.weights.stack
    assert stack is not None
    tokens, depth = np.arange(20, 36), stack.most_blocks
    steps = [int(depth * share) for share in (0.6, 0.2, 0.5, 0.0, 0.9, 0.35, 1.0)]
    equal, exact, held, delays, transfers = True, True, True, [], []
    before = resident_bytes(exact=True) - stack.nbytes
    for step in steps:
        read, was = stack.bytes_read, stack.num_blocks
        began = time.perf_counter()
        stack.resize(step)
        transfers.append(time.perf_counter() - began)
        session.reset()
        session.decoder.forward(tokens[:1], session.cache)
        delays.append(time.perf_counter() - began)
        wanted = study.nbytes(study.index.counts(step)) - study.nbytes(study.index.counts(was)) if step > was else 0
        equal &= stack.bytes_read - read == wanted
        held &= resident_bytes(exact=True) - stack.nbytes - before < 1_500_000
        session.reset()
        found = session.decoder.forward(tokens, session.cache).copy()
        fresh = load(
            study.stack, Settings(weights=f"stack-{step}", context_tokens=256, segment_tokens=32), beside=session
        )
        exact &= np.array_equal(found, fresh.decoder.forward(tokens, fresh.cache))
        fresh.release()
    session.release()
    began = time.perf_counter()
    load(study.folder / "int4-g64", Settings(weights="saved", context_tokens=256, segment_tokens=32)).release()
    reload = time.perf_counter() - began
    return [
        Claim(claim="when blocks are added or dropped, bytes read are those of the difference, and none for less",
              measured=f"{len(steps)} steps between 0 and {depth} blocks, {'each equal' if equal else 'not equal'}; "
              f"resident bytes {'follow' if held else 'do not follow'}",
              required="equal at every step, pages given back", passed=equal and held),
        Claim(claim="a model that shrank or grew computes what one loaded at that size does, bit for bit",
              measured="equal at every step" if exact else "different", required="equal", passed=exact),
        Claim(claim="the first token after a change waits for the transfer only",
              measured=f"transfers {1e3 * np.median(transfers):.1f} ms (at most {1e3 * max(transfers):.1f}), with the "
              f"token {1e3 * np.median(delays):.1f} ms; loading a 4-bit file instead {1e3 * reload:.0f} ms",
              required="transfer and token in less time than loading another file",
              passed=bool(np.median(delays) < reload)),
    ]  # fmt: skip


def live_server(study: Study) -> list[Claim]:
    """`memwall serve` on the stack, with answers under way, while its budget moves."""
    claim, required = (
        "a live server's resident bytes never exceed a budget that moves",
        "never above it once it is in force",
    )
    try:
        with Server(study.stack, 130_000_000) as server:
            shares = (0.5, 0.0, 1.0, 0.3) if study.quick else (0.5, 0.1, 0.8, 0.0, 1.0, 0.3, 0.6, 0.05, 1.0)
            whole = study.index.counts(study.index.num_blocks)
            over, blocks, answers = [], [], 0
            for share in shares:
                # the least moves with what the process holds; a megabyte is for what it may gain until then
                budget = server.get("/v1/budget")["least_bytes"] + 1_000_000 + int(share * study.nbytes(whole))
                answer = server.post("/v1/budget", {"memory": budget})
                worst, count = server.busy_for(1.0 if study.quick else 2.0)
                over.append(worst / budget)
                answers += count
                blocks.append(server.get("/v1/budget")["blocks"]["held"] if answer else 0)
    except MissingDependency as error:
        return [Claim(claim=claim, measured=f"not run: {error}", required=required, passed=None)]
    return [
        Claim(claim=claim, measured=f"{len(shares)} budgets, {answers} answers, blocks held {blocks}; "
              f"at most {max(over):.1%} of the budget",
              required=required + ", blocks move both ways",
              passed=max(over) <= 1 and answers > 0 and len(set(blocks)) > 2),
    ]  # fmt: skip


class Server:
    """`memwall serve` in a process of its own."""

    def __init__(self, model: Path, memory_bytes: int) -> None:
        arguments = [sys.executable, "-m", "memwall", "serve", str(model), "--memory", str(memory_bytes), "--port", "0"]
        self._process = subprocess.Popen([*arguments, "--context", "256", "--json", "--quiet"], stdout=subprocess.PIPE)
        self._url, self._name = "", model.name

    def __enter__(self) -> Server:
        assert self._process.stdout is not None
        text = ""
        while "}\n" not in text or text.count("{") > text.count("}"):
            line = self._process.stdout.readline().decode()
            if not line:
                raise MissingDependency("starlette", "serve")
            text += line
        self._url = json.loads(text)["url"]
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(60)

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self._url + path, timeout=60) as answer:
            return json.load(answer)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        request = urllib.request.Request(
            self._url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    def resident_bytes(self) -> int:
        return int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def busy_for(self, seconds: float) -> tuple[int, int]:
        """The most that was resident while it answered for so long, and how many answers there were."""
        worst, answers = self.resident_bytes(), 0
        asking = True

        def ask() -> None:
            nonlocal answers
            while asking:
                body = {"model": self._name, "prompt": "The history of", "max_tokens": 24, "ignore_eos": True}
                self.post("/v1/completions", body)
                answers += 1

        asker = threading.Thread(target=ask)
        asker.start()
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            worst = max(worst, self.resident_bytes())
            time.sleep(0.005)
        asking = False
        asker.join()
        return worst, answers


# ---- speed -----------------------------------------------------------------------------------------------------------


def fused(rounds: int, blocks: int) -> list[Claim]:
    """One token times matrices of a large model: on the blocks, and by way of a decoded matrix."""
    random = np.random.default_rng(0)
    form = BitStackCodec(blocks=blocks)
    ratios, largest = [], 0
    for shape in SHAPES_1B if rounds > 2 else SHAPES_1B[:2]:
        halves = (random.standard_normal(sum(shape) * form.rank) * 0.1).astype(np.float16).view(np.uint8)
        size = form.nbytes(shape) // blocks
        held = {
            f"block{i}": np.concatenate([halves, random.integers(0, 256, size - len(halves), np.uint8)])
            for i in range(blocks)
        }
        packed = Packed(spec=form.spec, shape=shape, buffers=held)
        matrix, x = kernels.matrix(packed), random.standard_normal((1, shape[1]), np.float32)
        out, largest = np.empty((1, shape[0]), np.float32), max(largest, 4 * shape[0] * shape[1])

        def on_blocks(x: np.ndarray = x, matrix: kernels.Matrix = matrix, out: np.ndarray = out) -> None:
            kernels.linear(x, [matrix], [out])

        def decoded(x: np.ndarray = x, packed: Packed = packed) -> None:
            scratch = np.zeros(packed.shape, np.float32)
            for block in packed.buffers.values():
                scratch += unpack_block(block, packed.shape, form.rank).decode()
            x @ scratch.T

        times: list[list[float]] = [[], []]
        for _ in range(rounds):
            for each, action in zip(times, (on_blocks, decoded), strict=True):
                began = time.perf_counter()
                action()
                each.append(time.perf_counter() - began)
        ratios.append(float(np.median(times[1]) / np.median(times[0])))
    return [
        Claim(claim="products on the blocks are faster than by way of a decoded matrix, and hold less than one matrix",
              measured=f"{min(ratios):.1f} to {max(ratios):.1f} times as fast, {blocks} blocks of rank {form.rank}; "
              f"scratch {kernels.scratch_bytes():,} bytes, the largest matrix {largest:,}",
              required="faster in each shape; scratch at most one matrix",
              passed=min(ratios) > 1 and kernels.scratch_bytes() <= largest),
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main("bitstack", sys.modules[__name__]))

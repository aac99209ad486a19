"""Bipolar-INT's claims: exact sums for every pair of widths, bytes, time against other products, quality on a model.

Sums are checked against 64-bit integers; times are taken alternately, packing of activations included, against torch's
8-bit and float32 products (where torch is installed) and against memwall's own integer kernels; quality is that of
`models/wide-heads` beside this file (11.7 million weights; scripts/grow_wide_heads.py makes it) run with such weights.
Neither the crossover nor the pairs of widths that lose are hidden: the claim about them gives the whole table.

A finding, which is a claim that fails: at 2 bits of activations perplexity does not fall with every bit of the weights
(13,600, 23,600, 11,100, 9,500 at 1 to 4 bits of weights). One scale per token, by the largest number, leaves +-1 and
+-1/3 of it and no zero, and the model then guesses worse than at random (4,096); what the weights lose is nothing
beside it. At 4 and 8 bits it is as it should be. On the bundled demo (7 million weights, judged before; the card asks
for 10 million or more) the order broke too (10,500, 10,400, 7,000, 7,100), but within two standard errors of paired
losses. Scales for every 64 weights and activations (`w2a2-g64`), an option of the paper's, lose less at every pair of
widths; at 2 bits of activations perplexity then falls with every bit of the weights on the demo (6,800, 4,200, 2,600,
2,300), on the model that is judged from 2 bits on (8,300, 11,800, 4,900, 4,400 over 1,024 tokens).

Text: `--data` a UTF-8 file; the held-out text that ships with the planner otherwise.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from memwall import kernels
from memwall.claims import Claim, Progress, alternately, main, not_run
from memwall.engine import evaluate
from memwall.formats import codec
from memwall.formats.apmm_bipolar_int import codes_of, codes_of_signed, integers_of, pack
from memwall.kernels.planes import pack_planes, plane_products, plane_products_apart
from memwall.plan.choose import held_out_text
from memwall.systems import wide_heads

WIDTHS = range(1, 9)
PAIRS = ((1, 1), (1, 2), (2, 2), (2, 3), (2, 4), (3, 4), (4, 4), (4, 8), (8, 8))
SIZE = 4096
MSE = {2: (0.256, 0.516), 3: (0.046, 0.063), 4: (0.0101, 0.0116)}
"""Bits: mean squared error of bipolar numbers and of two's complement that theory gives."""


def run(quick: bool, data: Path | None, progress: Progress | None = None) -> list[Claim]:
    """Measures and judges."""
    steps: list[tuple[str, Callable[[], list[Claim]]]] = [
        ("sums", exact_sums),
        ("bytes", sizes),
        ("errors", errors),
        ("time", lambda: times(3 if quick else 15, (1, 4) if quick else (1, 4, 16))),
        ("recovery", lambda: recovery(3 if quick else 11)),
        ("quality", lambda: quality(data, 192 if quick else 2048)),
    ]
    claims: list[Claim] = []
    for index, (name, step) in enumerate(steps):
        if progress is not None:
            progress(index, len(steps), name)
        claims += step()
    return [
        *claims,
        not_run("one-bit matrix instructions of a GPU beat its 4- and 8-bit products at few bits", "ratio above 1"),
    ]


# ---- numbers -------------------------------------------------------------------------------------------------------


def exact_sums() -> list[Claim]:
    random = np.random.default_rng(0)
    wrong, affine_wrong, largest = [], [], 0
    for n, m in itertools.product(WIDTHS, WIDTHS):
        for cols in (1, 63, 65, 321, 4097, 33_000):
            w, x = (random.integers(0, 1 << bits, (rows, cols), np.uint8) for bits, rows in ((n, 9), (m, 3)))
            x[0], w[0] = (1 << m) - 1, (1 << n) - 1
            expected = integers_of(x, m) @ integers_of(w, n).T
            found = plane_products(pack(w, n), pack(x, m), cols)
            largest = max(largest, int(np.abs(found).max()))
            if not np.array_equal(found, expected):
                wrong.append((n, m, cols))
            signed = random.integers(-(1 << (n - 1)), 1 << (n - 1), (9, cols))
            values = integers_of(x, m)
            doubled = plane_products(pack(codes_of_signed(signed, n), n), pack(x, m), cols).astype(np.int64)
            if not np.array_equal((doubled - values.sum(axis=1)[:, None]) // 2, values @ signed.T):
                affine_wrong.append((n, m, cols))
    return [
        Claim(
            claim="packed products equal 64-bit integer products for all 64 pairs of widths, odd inner sizes included",
            measured=f"{len(wrong)} of {64 * 6} differ; the largest sum is {largest:,}, float32 is exact to 16,777,216",
            required="none differs, and sums pass 2^24",
            passed=not wrong and largest > 1 << 24,
        ),
        Claim(
            claim="integers in two's complement convert without loss: after the affine correction sums are identical",
            measured=f"{len(affine_wrong)} of {64 * 6} differ",
            required="none differs",
            passed=not affine_wrong,
        ),
    ]


def sizes() -> list[Claim]:
    off = {}
    for n in WIDTHS:
        packed = codec(f"w{n}a8").encode(np.ones((64, SIZE), np.float32))
        off[n] = packed.buffers["words"].nbytes / (64 * SIZE * 2) / (n / 16) - 1
        off[n] = max(abs(off[n]), packed.nbytes / packed.buffers["words"].nbytes - 1 - 4 / (n * SIZE / 8))
    return [
        Claim(
            claim="n bits take n/16 of float16's bytes and a scale per row, for every n, 3, 5, 6 and 7 included",
            measured=f"at most {max(off.values()):.2%} off over n = 1 to 8",
            required="exactly",
            passed=max(off.values()) < 1e-9,
        )
    ]


def signed_error(x: np.ndarray, bits: int) -> float:
    top = max((1 << (bits - 1)) - 1, 1)
    scale = np.abs(x).max(axis=1, keepdims=True) / top
    return float(np.mean((np.clip(np.round(x / scale), -top - 1, top) * scale - x) ** 2))


def errors() -> list[Claim]:
    x = np.random.default_rng(0).standard_normal((20_000, 64)).astype(np.float32)
    ours, signed = {}, {}
    for bits in (2, 3, 4, 5, 6):
        codes, scales = codes_of(x, bits)
        ours[bits] = float(np.mean((integers_of(codes, bits) * scales[:, None] - x) ** 2))
        signed[bits] = signed_error(x, bits)
    gaps = [signed[bits] / ours[bits] for bits in ours]
    off = max(max(abs(ours[bits] / mine - 1), abs(signed[bits] / other - 1)) for bits, (mine, other) in MSE.items())
    return [
        Claim(
            claim="bipolar bits lose less than two's complement under the same scaling, ever less so with more bits",
            measured="; ".join(f"{bits} bits {ours[bits]:.4f} against {signed[bits]:.4f}" for bits in ours),
            required="lower at 2 to 6 bits, ratio falling; on normal numbers in blocks of 64 within 3 % of "
            + "; ".join(f"{bits} bits {mine:g}, {other:g}" for bits, (mine, other) in MSE.items()),
            passed=all(gap > 1 for gap in gaps) and gaps == sorted(gaps, reverse=True) and off <= 0.03,
        )
    ]


# ---- time ----------------------------------------------------------------------------------------------------------


def torch_products(w: np.ndarray, x: np.ndarray) -> dict[str, Callable[[], object]]:
    """torch's product of 8-bit integers (activations rounded in the call, as ours are) and of float32, if installed."""
    try:
        import torch
    except ImportError:
        return {}
    torch.set_num_threads(kernels.num_threads())
    weights = torch.from_numpy(w)
    rows = (weights * 127 / weights.abs().amax()).round().to(torch.int8)
    tokens = torch.from_numpy(x)

    def int8(weights8: torch.Tensor) -> Callable[[], object]:
        def product() -> object:
            scale = tokens.abs().amax(dim=1, keepdim=True) / 127
            return torch._int_mm((tokens / scale).round().to(torch.int8), weights8)

        return product

    # in both layouts: which one torch is faster with depends on its build
    return {
        "torch int8": int8(rows.t()),
        "torch int8 transposed": int8(rows.t().contiguous()),
        "torch float32": lambda: tokens @ weights.t(),
    }


def times(rounds: int, batches: tuple[int, ...]) -> list[Claim]:
    random = np.random.default_rng(0)
    w = random.standard_normal((SIZE, SIZE)).astype(np.float32)
    packed = {pair: pack_planes(w, pair[0])[0] for pair in PAIRS}
    own = {f"memwall {spec}": kernels.matrix(codec(spec).encode(w)) for spec in ("int8", "int4", "int2")}
    claims, worst = [], 0.0
    for tokens in batches:
        x = random.standard_normal((tokens, SIZE)).astype(np.float32)
        peers = torch_products(w, x)
        works = own_products(packed, x) | {name: integer_product(matrix, x) for name, matrix in own.items()} | peers
        seconds = alternately(works, rounds)
        per_pair = [seconds[f"W{n}A{m}"] / (n * m) for n, m in PAIRS if n * m >= 4]
        worst = max(worst, max(per_pair) / min(per_pair))
        claims.append(beats_peers(tokens, seconds, list(peers)))
        claims += [crossover(tokens, seconds, name) for name in (*own, *peers)]
    linear = Claim(
        claim="time grows about linearly with the product of the widths",
        measured=f"time per bit product from 4 to 64 of them: largest over smallest {worst:.2f}",
        required="at most 2",
        passed=worst <= 2,
    )
    return [linear, *claims]


def own_products(packed: dict[tuple[int, int], np.ndarray], x: np.ndarray) -> dict[str, Callable[[], object]]:
    """Packing of the activations and the product, for every pair."""
    sums = np.empty((len(x), SIZE), np.int32)

    def product(n: int, m: int) -> Callable[[], object]:
        return lambda: plane_products(packed[n, m], pack_planes(x, m)[0], SIZE, sums)

    return {f"W{n}A{m}": product(n, m) for n, m in packed}


def integer_product(matrix: kernels.Matrix, x: np.ndarray) -> Callable[[], object]:
    out = np.empty((len(x), SIZE), np.float32)
    return lambda: kernels.linear(x, [matrix], [out])


def beats_peers(tokens: int, seconds: dict[str, float], peers: list[str]) -> Claim:
    title = f"with {tokens} tokens, pairs up to W2A2 beat torch's 8-bit and float32 products, packing included"
    if not peers:
        return not_run(title, "all below both", "torch")
    slowest = max(seconds[f"W{n}A{m}"] for n, m in PAIRS if n <= 2 and m <= 2)
    return Claim(
        claim=title,
        measured="microseconds: " + ", ".join(f"{name} {each * 1e6:,.0f}" for name, each in seconds.items()),
        required="all below both",
        passed=slowest < min(seconds[name] for name in peers),
    )


def crossover(tokens: int, seconds: dict[str, float], name: str) -> Claim:
    wins = [n * m for n, m in PAIRS if seconds[f"W{n}A{m}"] < seconds[name]]
    losses = [n * m for n, m in PAIRS if seconds[f"W{n}A{m}"] >= seconds[name]]
    return Claim(
        claim=f"with {tokens} tokens: one crossover against {name}, narrow pairs win and wide ones lose",
        measured=f"pairs win up to {max(wins, default=0)} bit products of {PAIRS[-1][0] * PAIRS[-1][1]}, "
        f"lose from {min(losses, default=0)}",
        required="no pair that loses has fewer bit products than one that wins",
        passed=max(wins, default=0) <= min(losses, default=64),
    )


def recovery(rounds: int) -> list[Claim]:
    n, m, tokens = 3, 4, 4
    random = np.random.default_rng(0)
    w, _ = pack_planes(random.standard_normal((SIZE, SIZE)).astype(np.float32), n)
    x, _ = pack_planes(random.standard_normal((tokens, SIZE)).astype(np.float32), m)
    sums, apart = np.empty((tokens, SIZE), np.int32), np.empty((n, m, tokens, SIZE), np.int32)
    weights = (1 << np.add.outer(np.arange(n), np.arange(m))).astype(np.int32)

    def unfused() -> np.ndarray:
        plane_products_apart(w, x, SIZE, apart)
        return np.tensordot(weights, apart, 2)

    same = np.array_equal(unfused(), plane_products(w, x, SIZE, sums))
    seconds = alternately({"fused": lambda: plane_products(w, x, SIZE, sums), "apart": unfused}, rounds)
    return [
        Claim(
            claim="sums recovered in registers are faster than planes written apart, and write n m times fewer bytes",
            measured=f"{seconds['fused'] * 1e6:,.0f} against {seconds['apart'] * 1e6:,.0f} us; "
            f"{sums.nbytes:,} against {apart.nbytes:,} bytes written ({apart.nbytes // sums.nbytes} times)",
            required=f"faster, {n * m} times fewer bytes, the same sums",
            passed=same and seconds["fused"] < seconds["apart"] and apart.nbytes == n * m * sums.nbytes,
        )
    ]


# ---- a model -------------------------------------------------------------------------------------------------------


def quality(data: Path | None, limit: int) -> list[Claim]:
    text = data.read_text(encoding="utf-8") if data is not None else held_out_text()
    model, perplexity, grouped = wide_heads(), {}, {}
    for n, m in itertools.product((1, 2, 3, 4), (2, 4, 8)):
        perplexity[n, m] = evaluate(model, text, weights=f"w{n}a{m}", limit_tokens=limit).perplexity
        grouped[n, m] = evaluate(model, text, weights=f"w{n}a{m}-g64", limit_tokens=limit).perplexity
    by_weights = all(perplexity[n, m] > perplexity[n + 1, m] for n in (1, 2, 3) for m in (2, 4, 8))
    by_activations = all(perplexity[n, m] > perplexity[n, 2 * m] for n in (1, 2, 3, 4) for m in (2, 4))
    shown = ", ".join(f"W{n}A{m} {value:,.1f}" for (n, m), value in perplexity.items())
    return [
        Claim(claim="perplexity of a model falls with every bit of its weights", measured=shown,
              required="strictly, at 2, 4 and 8 bits of activations", passed=by_weights),
        Claim(claim="perplexity of a model falls with the bits of activations", measured=shown,
              required="strictly, at 1 to 4 bits of weights", passed=by_activations),
        Claim(claim="scales for every 64 weights and activations lose less than one per row and token",
              measured=", ".join(f"W{n}A{m} {value:,.1f}" for (n, m), value in grouped.items()),
              required="at every pair of widths", passed=all(grouped[pair] < perplexity[pair] for pair in perplexity)),
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main("apmm-bipolar-int", sys.modules[__name__]))

"""XR-NPE's hardware against its formats, bit for bit: the design clocked by Amaranth, and the gates Yosys makes of it.

A case is a stream of words with the same formats. Both models are fed all pairs of codes of a format in every lane, or
random sums; quire, flags and rounded codes must be what `formats.xr_npe` says, which is itself exact by rational
numbers. No mismatch is allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from memwall.formats.xr_npe import (
    DEFAULT_QUIRE_BITS,
    FORMATS,
    NARROW_QUIRE_BITS,
    WORD_BITS,
    LaneFormat,
    Quire,
    pack_words,
)
from memwall.simulate.hdl import find_yosys, require_amaranth

Progress = Callable[[int, int, str], None]
_SLICE = 1024
_RANDOM_WORDS = 1024
_LARGEST_SUM = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """Words one after another. clear: whether a word begins a sum (each one before it is then the last of its sum)."""

    found: LaneFormat
    out: LaneFormat
    a: np.ndarray
    b: np.ndarray
    clear: np.ndarray

    @property
    def last(self) -> np.ndarray:
        """Whether a word ends a sum."""
        return np.append(self.clear[1:], True)


Result = tuple[int, bool, bool, int]
"""Quire, whether it saturated, whether NaR, code: after a sum."""


def expected(stream: Stream, quire_bits: int) -> list[Result]:
    """What the sums of a stream are by the format engine."""
    quire, results = Quire(bits=quire_bits), []
    for a, b, clear, last in zip(stream.a.tolist(), stream.b.tolist(), stream.clear, stream.last, strict=True):
        if clear:
            quire.clear()
        quire.multiply_add(stream.found, a, b)
        if last:
            code = quire.code(stream.found, stream.out)
            results.append((quire.value, quire.saturated, quire.nar, code))
    return results


def held_sum(found: LaneFormat, quire: int, quire_bits: int) -> int:
    """The number that stands in a quire: all of its bits for Posit(16,1), the low ones for narrower formats."""
    bits = quire_bits if found.bits == WORD_BITS else min(quire_bits, NARROW_QUIRE_BITS)
    value = quire & ((1 << bits) - 1)
    return value - (1 << bits) if value >> (bits - 1) else value


def all_pairs(found: LaneFormat, out: LaneFormat, seed: int = 0) -> Stream:
    """Every pair of codes in every lane (in another order each), a sum per word."""
    codes = np.arange(1 << (2 * found.bits), dtype=np.int64)
    random = np.random.default_rng(seed)
    orders = np.stack([codes, *(random.permutation(codes) for _ in range(found.lanes - 1))], axis=1)
    a, b = (pack_words(found, side.astype(np.uint16))[:, 0] for side in divmod(orders, 1 << found.bits))
    return Stream(found=found, out=out, a=a, b=b, clear=np.ones(len(a), bool))


def random_sums(found: LaneFormat, out: LaneFormat, num_words: int, seed: int = 0) -> Stream:
    """Sums of up to 8 random words; one in 16 has hand-picked hard codes (zero, NaR, the ends of the format)."""
    random = np.random.default_rng(seed)
    codes = random.integers(0, 1 << found.bits, (2, num_words, found.lanes))
    half = 1 << (found.bits - 1)
    hard = np.asarray([0, 1, half - 1, half, half + 1, 2 * half - 1])
    picked = random.random(codes.shape) < 1 / 16
    codes[picked] = random.choice(hard, int(picked.sum()))
    a, b = (pack_words(found, side.astype(np.uint16))[:, 0] for side in codes)
    clear = random.random(num_words) < 2 / _LARGEST_SUM
    clear[::_LARGEST_SUM] = True
    return Stream(found=found, out=out, a=a, b=b, clear=clear)


# -- the design, clock by clock --------------------------------------------------------------------------------------


def clocked(stream: Stream, quire_bits: int, tick: Callable[[int], None] | None = None) -> list[Result]:
    """The sums of a stream by Amaranth's simulator, one word a clock through the pipeline."""
    require_amaranth()
    from amaranth.sim import Simulator

    from memwall.simulate.xr_npe_hdl import LATENCY_CYCLES, MultiplyAdd

    unit, results = MultiplyAdd(quire_bits), []
    sums: list[tuple[int, bool, bool]] = []

    async def bench(context: object) -> None:
        get, put = context.get, context.set  # type: ignore[attr-defined]
        put(unit.mode, stream.found.mode)
        put(unit.out_mode, stream.out.mode)
        words = list(zip(stream.a.tolist(), stream.b.tolist(), stream.clear, stream.last, strict=True))
        for number in range(len(words) + LATENCY_CYCLES):
            a, b, clear, last = words[number] if number < len(words) else (0, 0, False, False)
            put(unit.a, a)
            put(unit.b, b)
            put(unit.valid, number < len(words))
            put(unit.clear, bool(clear))
            put(unit.last, bool(last))
            await context.tick()  # type: ignore[attr-defined]
            if get(unit.out_valid):
                results.append((*sums[0], get(unit.out)))
            sums[:] = [
                (held_sum(stream.found, get(unit.quire), quire_bits), bool(get(unit.saturated)), bool(get(unit.nar)))
            ]
            if tick is not None and number % _SLICE == 0:
                tick(number)

    simulator = Simulator(unit)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()
    return results


# -- the gates -------------------------------------------------------------------------------------------------------


class Gates:
    """The unit's gates; made once, since synthesis takes seconds."""

    def __init__(self, quire_bits: int = DEFAULT_QUIRE_BITS, *, gated: bool = True) -> None:
        require_amaranth()
        from memwall.simulate.netlist import Netlist
        from memwall.simulate.xr_npe_hdl import LATENCY_CYCLES, MultiplyAdd

        self.quire_bits, self._latency = quire_bits, LATENCY_CYCLES
        self.netlist = Netlist.of(MultiplyAdd(quire_bits, gated=gated), "xr_npe")

    def sums(self, stream: Stream) -> list[Result]:
        """The sums of a stream, all at once: each sum is a run of its own, shorter ones are filled with zeros."""
        starts = np.flatnonzero(stream.clear)
        lengths = np.diff(np.append(starts, len(stream.a)))
        run = self.netlist.start(len(starts))
        run.clock({"rst": 0, "mode": stream.found.mode, "out_mode": stream.out.mode, "clear": 1, "valid": 1, "last": 1})
        for step in range(int(lengths.max())):
            there = step < lengths
            at = np.where(there, starts + step, 0)
            a, b = (np.where(there, side[at].astype(np.int64), 0) for side in (stream.a, stream.b))
            run.clock({"a": a, "b": b, "clear": int(step == 0), "valid": 1, "last": 1})
        for _ in range(self._latency - 1):  # the last word is in the quire then, and one clock later in `out`
            run.clock({"valid": 0})
        flags = [run.bits(name)[:, 0].astype(bool).tolist() for name in ("saturated", "nar")]
        quires = [held_sum(stream.found, value, self.quire_bits) for value in run.integers("quire")]
        run.clock({"valid": 0})
        return list(zip(quires, *flags, run.integers("out"), strict=True))

    def changes_per_word(self, found: LaneFormat, num_words: int = 64, num_runs: int = 256, seed: int = 0) -> float:
        """Wires that change while one word of random numbers is multiplied and added."""
        random = np.random.default_rng(seed)
        run = self.netlist.start(num_runs)
        for step in range(num_words + 4):
            codes = random.integers(0, 1 << found.bits, (2, num_runs, found.lanes))
            codes[codes == found.nar] = 1
            a, b = (pack_words(found, side.astype(np.uint16))[:, 0].astype(np.int64) for side in codes)
            control = {"mode": found.mode, "out_mode": found.mode, "valid": 1, "clear": 0, "last": 0}
            run.clock({"a": a, "b": b, **control}, count_changes=step >= 4)
        return run.changes / (num_words * num_runs)


# -- the check -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One stream through one model. first: the first mismatch in words, or empty."""

    model: str
    what: str
    sums: int
    products: int
    mismatches: int
    first: str = ""


def compare(model: str, what: str, stream: Stream, found: Sequence[Result], quire_bits: int) -> Compared:
    """Results of a model against the format engine's."""
    wanted = expected(stream, quire_bits)
    wrong = [at for at, (x, y) in enumerate(zip(found, wanted, strict=False)) if x != y]
    missing = abs(len(found) - len(wanted))
    first = f"sum {wrong[0]}: {found[wrong[0]]}, expected {wanted[wrong[0]]}" if wrong else ""
    return Compared(
        model=model,
        what=what,
        sums=len(wanted),
        products=len(stream.a) * stream.found.lanes,
        mismatches=len(wrong) + missing,
        first=first,
    )


def streams(num_random: int = _RANDOM_WORDS) -> Iterator[tuple[str, Stream]]:
    """All pairs of 4 and 8 bits, rounded to their own format; random sums of each format, rounded to every format."""
    for found in FORMATS:
        if found.bits <= 8:
            yield f"{found.name}: all pairs of codes in every lane", all_pairs(found, found)
    for found in FORMATS:
        for out in FORMATS:
            stream = random_sums(found, out, num_random, seed=out.mode)
            yield f"{found.name}: random sums, rounded to {out.name}", stream


def check(
    *,
    quire_bits: int = DEFAULT_QUIRE_BITS,
    exhaustive: bool = True,
    num_random: int = _RANDOM_WORDS,
    progress: Progress | None = None,
) -> list[Compared]:
    """Both models over `streams`. The gates take part where Yosys is there.

    num_random: words of each random stream. exhaustive: the design too sees all pairs of 8 bits, clock by clock (a
    minute); the gates always do.
    """
    gates = Gates(quire_bits) if find_yosys() is not None else None
    cases = list(streams(num_random))
    results = []
    for number, (what, stream) in enumerate(cases):
        if progress is not None:
            progress(number, len(cases), what)
        if exhaustive or len(stream.a) <= max(num_random, 256):
            results.append(compare("design", what, stream, clocked(stream, quire_bits), quire_bits))
        if gates is not None:
            results.append(compare("gates", what, stream, gates.sums(stream), quire_bits))
    return results

"""XR-NPE's multiply-add unit in hardware, written in Amaranth: one multiplier and one exponent path for four formats.

Source: "XR-NPE" (2025, arXiv 2508.13049): input processing, reconfigurable mantissa multiplier and exponent circuit
(RMMEC), quire, output processing, selective power gating. No hardware source of the authors is public; this is ours.

Idea: a 16-bit word is one Posit(16,1), two Posit(8,0), or four Posit(4,1) or FP4. Significands lie side by side along
the two edges of a 7 x 7 grid of 2 x 2-bit multipliers. The blocks where a lane meets another lane get zeros; products
of lanes then come out of the one adder tree side by side, since lanes at digits d meet at place 2d. Exponents add
lane by lane; products are shifted to units squared and all added to the quire in the same cycle.

Units and shapes: `a` and `b` words [16] with lane 0 in the low bits, `mode` and `out_mode` as `LaneFormat.mode`;
`quire` in units squared; `out` a code of `out_mode` in its low bits.
Differs from the paper: blocks of 2 x 2 bits, the quire's width (a parameter) and four stages are ours; the paper gives
none of them. Gating is operand isolation: blocks and adders that a format does not use see zeros, and `blocks` says
which blocks work; `gated=False` builds the unit without it.
Cost: four cycles from `last` to `out_valid`, one word a cycle; cells by `hdl.cell_counts`.
Holds when: operands of one sum share a mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Any

from amaranth.hdl import Array, C, Cat, Module, Mux, Signal, Value, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from memwall.formats.xr_npe import (
    DEFAULT_QUIRE_BITS,
    FORMATS,
    FP4,
    GRID_BLOCKS,
    GRID_DIGITS,
    NARROW_QUIRE_BITS,
    POSIT8,
    POSIT16,
    LaneFormat,
)

MODE_BITS = 2
CONTROL = ("valid", "clear", "last", "mode", "out_mode")
EDGE_BITS = 2 * GRID_DIGITS
PRODUCT_BITS = 2 * EDGE_BITS
LANE_WIDTHS = (16, 8, 4, 4)
"""Widest code of each lane: 16-bit words use the first, 8-bit ones the first two."""
FRACTION_BITS = 14
"""Of the normalised sum that the encoder looks at; what is below counts as sticky."""
_STRING = 32
LATENCY_CYCLES = 4


def _significand_bits(width: int) -> int:
    return max(found.significand_bits for found in FORMATS if found.bits <= width)


def _scale_bits(width: int) -> int:
    return 6 if width == 16 else 4


class LaneDecoder(wiring.Component):
    """Input processing of one lane: a code at the top of `width` bits -> sign, biased scale, significand.

    A posit with zeros behind it is the same number, so one decoder serves all widths up to its own. The scale counts
    from the format's smallest number; hidden bit on top of the significand. `zero` is what adds nothing, NaR with it.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        super().__init__(
            {
                "code": In(width),
                "mode": In(MODE_BITS),
                "negative": Out(1),
                "zero": Out(1),
                "nar": Out(1),
                "scale": Out(_scale_bits(width)),
                "significand": Out(_significand_bits(width)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        body_bits = self.width - 1
        body, run, rest = Signal(body_bits), Signal(range(body_bits + 1)), Signal(body_bits)
        top = self.code[-1]
        m.d.comb += body.eq(Mux(top, -self.code, self.code))
        regime = body[-1]
        changes = Signal(body_bits)
        m.d.comb += [changes.eq(body ^ regime.replicate(body_bits)), run.eq(body_bits)]
        for place in range(body_bits):  # the last assignment wins: the highest bit that differs ends the run
            with m.If(changes[place]):
                m.d.comb += run.eq(body_bits - 1 - place)
        m.d.comb += rest.eq((body << run) << 1)
        nothing = self.code[:-1] == 0
        m.d.comb += [self.negative.eq(top), self.zero.eq(nothing)]
        m.d.comb += self.nar.eq((self.mode != FP4.mode) & top & nothing)
        with m.Switch(self.mode):
            for found in (each for each in FORMATS if each.bits <= self.width):
                with m.Case(found.mode):
                    m.d.comb += self._minifloat() if found is FP4 else self._posit(found, regime, run, rest)
        return m

    def _posit(self, found: LaneFormat, regime: Value, run: Signal, rest: Signal) -> list[Any]:
        """Regime, exponent and fraction of the string behind the sign."""
        middle = -found.unit >> found.exponent_bits  # the regime's bias
        count = Mux(regime, run + (middle - 1), middle - run)[: len(self.scale)]
        scale = Cat(rest[-1], count) if found.exponent_bits else count
        places = found.significand_bits - 1
        fraction = rest[: len(rest) - found.exponent_bits][-places:] if places else C(0, 0)
        return [self.scale.eq(scale), self.significand.eq(self._on_top(Cat(fraction, C(1, 1))))]

    def _on_top(self, significand: Value) -> Value:
        return Cat(C(0, len(self.significand) - len(significand)), significand)

    def _minifloat(self) -> list[Any]:
        mantissa, exponent = self.code[-4], self.code[-3:-1]
        normal = exponent != 0
        return [
            self.scale.eq(Mux(normal, exponent - 1, 0)),
            self.significand.eq(self._on_top(Cat(mantissa, normal))),
        ]


class MantissaMultiplier(wiring.Component):
    """The grid of 2 x 2-bit multipliers and its adder tree.

    gated: whether blocks at rest see zeros; without, they multiply what stands at their edges and are not listened to.
    """

    def __init__(self, *, gated: bool = True) -> None:
        self.gated = gated
        edges = {"a": In(EDGE_BITS), "b": In(EDGE_BITS), "mode": In(MODE_BITS)}
        super().__init__({**edges, "blocks": Out(GRID_BLOCKS), "product": Out(PRODUCT_BITS)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        parts = []
        for i in range(GRID_DIGITS):
            for j in range(GRID_DIGITS):
                works = Signal(name=f"works_{i}_{j}")
                m.d.comb += works.eq(reduce(lambda x, y: x | y, [self.mode == mode for mode in modes_of_block(i, j)]))
                m.d.comb += self.blocks[GRID_DIGITS * i + j].eq(works)
                left, right = self.a.word_select(i, 2), self.b.word_select(j, 2)
                part = Signal(4, name=f"part_{i}_{j}")
                if self.gated:
                    m.d.comb += part.eq((left & works.replicate(2)) * (right & works.replicate(2)))
                else:
                    m.d.comb += part.eq((left * right) & works.replicate(4))
                parts.append((2 * (i + j), part))
        m.d.comb += self.product.eq(_tree([part << place for place, part in sorted(parts, key=lambda each: each[0])]))
        return m


def modes_of_block(i: int, j: int) -> list[int]:
    """The modes in which block (i, j) works: where digits of the same lane meet."""
    found = []
    for each in FORMATS:
        digits = -(-each.significand_bits // 2)
        same_lane = i // digits == j // digits < each.lanes
        if each.blocks and same_lane:
            found.append(each.mode)
    return found


def _tree(terms: Sequence[Value]) -> Value:
    """The sum of terms by pairs, so that its depth is the logarithm of their number."""
    while len(terms) > 1:
        terms = [reduce(add, terms[at : at + 2]) for at in range(0, len(terms), 2)]
    return terms[0]


class OutputEncoder(wiring.Component):
    """Output processing: the quire, normalised and rounded to the nearest code, ties to the even one."""

    def __init__(self, quire_bits: int) -> None:
        self.quire_bits = quire_bits
        super().__init__(
            {
                "quire": In(signed(quire_bits)),
                "nar": In(1),
                "mode": In(MODE_BITS),
                "out_mode": In(MODE_BITS),
                "code": Out(16),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        bits = self.quire_bits
        magnitude, place, norm = Signal(bits), Signal(range(bits)), Signal(bits)
        above = Signal(range(bits))
        negative = self.quire[-1]
        m.d.comb += magnitude.eq(Mux(negative, -self.quire, self.quire))
        for at in range(bits):
            with m.If(magnitude[at]):
                m.d.comb += place.eq(at)
        m.d.comb += [above.eq(bits - 1 - place), norm.eq(magnitude << above)]
        fraction, sticky = Signal(FRACTION_BITS), Signal()
        padded = Cat(C(0, FRACTION_BITS), norm)  # a short quire has fewer digits than are looked at
        m.d.comb += [fraction.eq(padded[-1 - FRACTION_BITS : -1]), sticky.eq(padded[: -1 - FRACTION_BITS].any())]
        exponent, unit = Signal(signed(10)), Signal(signed(7))
        m.d.comb += unit.eq(Array(found.product_unit for found in FORMATS)[self.mode])
        m.d.comb += exponent.eq(place + unit)
        positive = Signal(15)
        with m.Switch(self.out_mode):
            for found in FORMATS:
                with m.Case(found.mode):
                    encode = _minifloat_code if found is FP4 else _posit_code
                    m.d.comb += positive.eq(encode(m, found, exponent, fraction, sticky))
                    flipped = -positive if found.is_posit else positive | 1 << (found.bits - 1)
                    signed_code = Mux(negative & (positive != 0), flipped, positive)[: found.bits]
                    m.d.comb += self.code.eq(Mux(self.nar, found.nar or 0, Mux(magnitude == 0, 0, signed_code)))
        return m


def _rounded(kept: Value, guard: Value, sticky: Value) -> Value:
    return kept + (guard & (sticky | kept[0]))


def _posit_code(m: Module, found: LaneFormat, exponent: Signal, fraction: Signal, sticky: Signal) -> Value:
    """Magnitude code: the bit string regime, exponent, fraction, cut behind bits - 1 places."""
    regime = Signal(signed(10), name=f"regime_{found.name}")
    m.d.comb += regime.eq(exponent >> found.exponent_bits)
    up = regime >= 0
    if found.exponent_bits:
        string, more = Cat(fraction[1:], exponent[0], ~up, up), fraction[0]
    else:
        string, more = Cat(fraction, ~up, up), C(0, 1)
    shift = Signal(4, name=f"shift_{found.name}")
    m.d.comb += shift.eq(Mux(up, regime, -regime - 1))
    wide, shifted = Signal(_STRING, name=f"wide_{found.name}"), Signal(_STRING, name=f"shifted_{found.name}")
    m.d.comb += wide.eq(string << (_STRING - 16))
    # the regime is a run of what the string begins with
    m.d.comb += shifted.eq(Mux(up, ~(~wide >> shift), wide >> shift))
    cut = _STRING - (found.bits - 1)
    rounded = _rounded(shifted[cut:], shifted[cut - 1], shifted[: cut - 1].any() | more | sticky)
    most = found.bits - 2
    return Mux(regime > most, (1 << (found.bits - 1)) - 1, Mux(regime < -most, 1, rounded))


def _minifloat_code(m: Module, found: LaneFormat, exponent: Signal, fraction: Signal, sticky: Signal) -> Value:
    """Magnitude code of E2M1: normal from 1 on, steps of a half below, saturating at 6."""
    low = fraction[:-2].any() | sticky
    normal = _rounded(Cat(fraction[-1], (exponent + 1)[:2]), fraction[-2], low)
    half = _rounded(C(1, 1), fraction[-1], fraction[-2] | low)
    quarter = fraction.any() | sticky  # from a quarter on: a tie goes down, to zero
    small = Mux(exponent == -1, half, Mux(exponent == -2, quarter, 0))
    return Mux(exponent > 2, 7, Mux(exponent < 0, small, Mux(normal > 7, 7, normal)))


class MultiplyAdd(wiring.Component):
    """The unit: a word of each operand a cycle; `clear` with the first of a sum, `last` with the last.

    Sums of 4 and 8-bit formats stand in the low 64 bits of `quire` (all of a shorter one), in two's complement.
    """

    def __init__(self, quire_bits: int = DEFAULT_QUIRE_BITS, *, gated: bool = True) -> None:
        self.quire_bits, self.gated = quire_bits, gated
        words = {name: In(16) for name in ("a", "b")} | {name: In(MODE_BITS) for name in ("mode", "out_mode")}
        flags = {name: In(1) for name in ("valid", "clear", "last")}
        results = {"quire": Out(quire_bits), "out": Out(16), "blocks": Out(GRID_BLOCKS)}
        super().__init__({**words, **flags, **results, **{n: Out(1) for n in ("saturated", "nar", "out_valid")}})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        control = _registered(m, "decoded", {name: getattr(self, name) for name in CONTROL})
        lanes = [self._decode(m, lane) for lane in range(len(LANE_WIDTHS))]
        control, products = self._multiply(m, control, lanes)
        control = self._accumulate(m, control, products)
        self._encode(m, control)
        return m

    def _decode(self, m: Module, lane: int) -> tuple[dict[str, Signal], dict[str, Signal]]:
        """Input processing of both operands' codes in one lane; registered."""
        sides = []
        for name in ("a", "b"):
            decoder = LaneDecoder(LANE_WIDTHS[lane])
            m.submodules[f"decode_{name}{lane}"] = decoder
            m.d.comb += [decoder.code.eq(_lane_code(getattr(self, name), self.mode, lane)), decoder.mode.eq(self.mode)]
            fields = ("negative", "zero", "nar", "scale", "significand")
            sides.append(_registered(m, f"{name}{lane}", {field: getattr(decoder, field) for field in fields}))
        return sides[0], sides[1]

    def _multiply(
        self, m: Module, control: dict[str, Signal], lanes: Sequence[tuple[dict[str, Signal], dict[str, Signal]]]
    ) -> tuple[dict[str, Signal], list[dict[str, Signal]]]:
        """Significands through the grid, exponents through their adders; registered."""
        m.submodules.multiplier = multiplier = MantissaMultiplier(gated=self.gated)
        mode = control["mode"]
        m.d.comb += [multiplier.mode.eq(mode), self.blocks.eq(multiplier.blocks)]
        for side, edge in enumerate((multiplier.a, multiplier.b)):
            significands = [lane[side]["significand"] for lane in lanes]
            with m.Switch(mode):
                for found in (each for each in FORMATS if each.blocks):
                    width = 2 * -(-found.significand_bits // 2)
                    with m.Case(found.mode):
                        # the hidden bit of a wider lane's significand is the top one in every mode
                        parts = [s[-found.significand_bits :] for s in significands[: found.lanes]]
                        m.d.comb += edge.eq(Cat(Cat(part, C(0, width - len(part))) for part in parts))
        after = _registered(m, "multiplied", {**control, "product": multiplier.product})
        products = []
        for lane, (a, b) in enumerate(lanes):
            used = reduce(lambda x, y: x | y, [mode == found.mode for found in FORMATS if lane < found.lanes])
            values = {
                "negative": a["negative"] ^ b["negative"],
                "counts": used & ~a["zero"] & ~b["zero"],
                "nar": used & (a["nar"] | b["nar"]),
                "shift": a["scale"] + b["scale"],
            }
            products.append(_registered(m, f"product{lane}", values))
        return after, products

    def _accumulate(
        self, m: Module, control: dict[str, Signal], products: Sequence[dict[str, Signal]]
    ) -> dict[str, Signal]:
        """Products in units squared, all added to the quire in one cycle.

        Narrow formats have an adder of their own on the quire's low part. Numbers that change their sign would
        otherwise change every bit of the wide one, which sees zeros while they are at work.
        """
        wide_mode = Signal()
        m.d.comb += wide_mode.eq(control["mode"] == POSIT16.mode)
        magnitudes = [_aligned(m, lane, control, each) for lane, each in enumerate(products)]
        negative, narrow_bits = [each["negative"] for each in products], min(self.quire_bits, NARROW_QUIRE_BITS)
        begun = Mux(control["clear"], 0, self.quire)
        terms = [
            _signed(self._resting(wide_mode, magnitude[: _integer_bits(POSIT8)]), negative[lane])
            for lane, magnitude in enumerate(magnitudes)
        ]
        start = self._resting(wide_mode, begun[:narrow_bits]).as_signed()
        most = Mux(control["mode"] == POSIT8.mode, *(_most(min(self.quire_bits, f.quire_bits)) for f in (POSIT8, FP4)))
        low, low_out = _saturated(m, "narrow", start + _tree(terms), most, narrow_bits)
        start = self._resting(~wide_mode, begun).as_signed()
        term = _signed(self._resting(~wide_mode, magnitudes[0]), negative[0])
        high, high_out = _saturated(m, "wide", start + term, C(_most(self.quire_bits)), self.quire_bits)
        with m.If(control["valid"]):
            m.d.sync += [
                self.quire.eq(Mux(wide_mode, high, low[:narrow_bits])),
                self.saturated.eq(Mux(wide_mode, high_out, low_out) | (self.saturated & ~control["clear"])),
                self.nar.eq(Cat(each["nar"] for each in products).any() | (self.nar & ~control["clear"])),
            ]
        return _registered(m, "summed", control)

    def _resting(self, when: Value, value: Value) -> Value:
        """Zeros while a part is at rest, if such parts are gated."""
        return Mux(when, 0, value) if self.gated else value

    def _encode(self, m: Module, control: dict[str, Signal]) -> None:
        m.submodules.encoder = encoder = OutputEncoder(self.quire_bits)
        ends = Signal()  # between the ends of sums the encoder rests
        m.d.comb += ends.eq(control["valid"] & control["last"])
        narrow = self.quire[: min(self.quire_bits, NARROW_QUIRE_BITS)].as_signed()
        with m.If(ends):
            m.d.comb += encoder.quire.eq(Mux(control["mode"] == POSIT16.mode, self.quire, narrow))
        m.d.comb += encoder.nar.eq(self.nar)
        m.d.comb += [encoder.mode.eq(control["mode"]), encoder.out_mode.eq(control["out_mode"])]
        m.d.sync += self.out_valid.eq(control["valid"] & control["last"])
        with m.If(control["valid"] & control["last"]):
            m.d.sync += self.out.eq(encoder.code)


def _registered(m: Module, stage: str, values: dict[str, Any]) -> dict[str, Signal]:
    """The same names one clock later."""
    held = {name: Signal(len(value), name=f"{name}_{stage}") for name, value in values.items()}
    m.d.sync += [held[name].eq(value) for name, value in values.items()]
    return held


def _lane_code(word: Value, mode: Value, lane: int) -> Value:
    """The code of a lane at the top of the lane's width."""
    width, code = LANE_WIDTHS[lane], word.word_select(lane, 4) << (LANE_WIDTHS[lane] - 4)
    for found in FORMATS:
        if 4 < found.bits <= width:
            code = Mux(mode == found.mode, word.word_select(lane, found.bits) << (width - found.bits), code)
    return code


def _signed(magnitude: Value, negative: Value) -> Value:
    return Mux(negative, -magnitude, magnitude)


def _most(bits: int) -> int:
    return (1 << (bits - 1)) - 1


def _saturated(m: Module, name: str, total: Value, most: Value, bits: int) -> tuple[Signal, Value]:
    """A sum held between -most - 1 and most, and whether it had to be."""
    wide, held = Signal(signed(len(total)), name=f"{name}_sum"), Signal(signed(bits), name=f"{name}_held")
    over, under = Signal(name=f"{name}_over"), Signal(name=f"{name}_under")
    limit = Signal(signed(bits), name=f"{name}_limit")
    m.d.comb += [wide.eq(total), limit.eq(most), over.eq(wide > limit), under.eq(wide < ~limit)]
    m.d.comb += held.eq(Mux(over, limit, Mux(under, ~limit, wide)))
    return held, over | under


def _aligned(m: Module, lane: int, control: dict[str, Signal], product: dict[str, Signal]) -> Value:
    """One lane's product in units squared, without its sign; 0 where the lane is at rest or an operand is zero."""
    held = [found for found in FORMATS if lane < found.lanes]
    significand = Signal(2 * max(found.significand_bits for found in held), name=f"significand{lane}")
    reach = max(_most_shift(found) for found in held)
    shifted = Signal(len(significand) + reach, name=f"shifted{lane}")
    m.d.comb += shifted.eq(significand << product["shift"])
    magnitude = Signal(max(_integer_bits(found) for found in held), name=f"magnitude{lane}")
    with m.Switch(control["mode"]):
        for found in held:
            with m.Case(found.mode):
                bits = 4 * -(-found.significand_bits // 2)
                part = control["product"].word_select(lane, bits) if found.blocks else C(1, 1)
                m.d.comb += [significand.eq(part), magnitude.eq(shifted[_fraction_places(found) :])]
    counted = Signal(len(magnitude), name=f"counted{lane}")
    m.d.comb += counted.eq(Mux(product["counts"], magnitude, 0))
    return counted


def _fraction_places(found: LaneFormat) -> int:
    """Places of a product below the unit squared, always zeros: every number is a multiple of the unit."""
    return 2 * (found.significand_bits - 1) if found.is_posit else 0


def _most_shift(found: LaneFormat) -> int:
    """The largest sum of two biased scales."""
    return 4 * -found.unit if found.is_posit else 4


def _integer_bits(found: LaneFormat) -> int:
    largest = int(found.levels.largest * 2.0**-found.unit)
    return (largest * largest).bit_length()

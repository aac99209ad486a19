"""What a product costs on an array of XR-NPE's units: cycles, bytes over AXI, energy; and what a unit's parts cost.

Source: "XR-NPE" (2025, arXiv 2508.13049): a matrix co-processor fed over AXI, output stationary; 14 pJ, 1.72 GHz and
0.016 mm^2 a unit at 28 nm. How large its array is, how its energy splits over parts and formats, is not published.

Idea: each unit keeps one output in its quire while words of A and B stream by. A tile of outputs takes as many cycles
as its columns have words; meanwhile the next tile's operands come in over AXI, packed, and the last one's outputs
leave. The slower of the two sets the pace. Energy is leakage of what is powered, and switching.

Units and shapes: C[m, n] = A[m, k] B[k, n]; bytes, cycles, joules. `Figure`s say whether they are the paper's or ours.
Differs from the paper: sizes of array, buffer and AXI port are parameters with defaults of ours; so is the energy's
split: `LEAKAGE_SHARE`, and switching in proportion to wires that change in our gates (`xr_npe_check.Gates`).
Cost: bytes = operands as packed + outputs; cycles = max(tiles * words, bytes / port) and what does not overlap.
Holds when: operands of a product share a format, as the unit demands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from memwall.errors import InputError
from memwall.formats.xr_npe import FORMATS, POSIT16, LaneFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A number with its unit and where it is from: `paper` or `ours`."""

    value: float
    unit: str
    origin: str


PAPER = {
    "clock": Figure(value=1.72e9, unit="Hz", origin="paper"),
    "area": Figure(value=0.016, unit="mm^2", origin="paper"),
    "energy": Figure(value=14e-12, unit="J", origin="paper"),
}
"""Of one unit at 28 nm, as the abstract has them. The energy is taken, by us, as that of one Posit(16,1) word with all
blocks at work."""

MOST = 1 << 28
LEAKAGE_SHARE = Figure(value=0.3, unit="of that energy", origin="ours")

PARTS = {"decode": 834, "multiply": 1347, "align and add": 5512, "encode": 2443}
"""Gates of the unit with a quire of 128 bits, without its 333 registers: Yosys 0.70, generic library, November 2026
(measured, ours)."""

CHANGES: dict[bool, dict[str, float]] = {
    True: {"fp4": 997.2, "posit4_1": 872.5, "posit8_0": 1134.1, "posit16_1": 1338.9},
    False: {"fp4": 1350.8, "posit4_1": 1200.7, "posit8_0": 1478.7, "posit16_1": 1476.4},
}
"""Wires that change per word of random codes, by whether parts at rest are gated (measured on the same gates, ours:
`Gates.changes_per_word`)."""


def multiplier_share() -> float:
    """The grid's part of the unit, by gates (ours)."""
    return PARTS["multiply"] / sum(PARTS.values())


def area_of_parts() -> dict[str, Figure]:
    """The paper's area of a unit, spread over parts by our gates."""
    whole = sum(PARTS.values())
    return {
        part: Figure(value=PAPER["area"].value * gates / whole, unit="mm^2", origin="ours")
        for part, gates in PARTS.items()
    }


def energy_per_word(found: LaneFormat, *, gated: bool = True) -> dict[str, float]:
    """Joules of one word through the unit: `leakage` of what is powered and `switching`."""
    whole, grid = PAPER["energy"].value, multiplier_share()
    powered = 1 - grid + grid * (found.utilisation if gated else 1.0)
    switching = CHANGES[gated][found.name] / CHANGES[True][POSIT16.name]
    share = LEAKAGE_SHARE.value
    return {"leakage": whole * share * powered, "switching": whole * (1 - share) * switching}


def energy_per_product(found: LaneFormat, *, gated: bool = True) -> float:
    """Joules of one multiply-add."""
    return sum(energy_per_word(found, gated=gated).values()) / found.lanes


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitArray:
    """rows x columns units. axi_bytes: per cycle, both ways together; buffer_bytes: for operands, half of it each."""

    rows: int = 8
    columns: int = 8
    axi_bytes: int = 16
    buffer_bytes: int = 128 << 10
    clock_hz: float = PAPER["clock"].value
    gated: bool = True

    def __post_init__(self) -> None:
        for name in ("rows", "columns", "axi_bytes", "buffer_bytes"):
            if not 0 < getattr(self, name) <= MOST:
                raise InputError(f"{name.replace('_', ' ')} is {getattr(self, name)}; it must be positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductCost:
    """What one product, or many together, cost. stalls: cycles in which units wait for AXI."""

    products: int
    cycles: int
    compute_cycles: int
    moved_bytes: int
    leakage_j: float
    switching_j: float
    seconds: float

    @property
    def energy_j(self) -> float:
        return self.leakage_j + self.switching_j

    @property
    def bound(self) -> str:
        """What sets the pace: `compute` or `AXI`."""
        return "compute" if 2 * self.compute_cycles >= self.cycles else "AXI"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "energy_j": self.energy_j, "bound": self.bound}


def product_cost(
    m: int, k: int, n: int, found: LaneFormat, array: UnitArray | None = None, *, out_bits: int | None = None
) -> ProductCost:
    """C[m, n] = A[m, k] B[k, n] in one format, tile by tile; out_bits: of an output, those of the format by default."""
    array = array or UnitArray()
    if min(m, k, n) < 1:
        raise InputError(f"a product of {m} x {k} x {n}: sizes must be positive")
    out_bits = found.bits if out_bits is None else out_bits
    words = -(-k // found.lanes)
    pace = _Pace(array.axi_bytes)
    half, panel = array.buffer_bytes // 2, 2 * words
    a_stays, b_stays = array.rows * panel <= half, n * panel <= half
    row_tiles, column_tiles = _tiles(m, array.rows), _tiles(n, array.columns)
    for i, rows in enumerate(row_tiles):
        for j, columns in enumerate(column_tiles):
            loaded = panel * (rows if j == 0 or not a_stays else 0) + panel * (columns if i == 0 or not b_stays else 0)
            pace.tile(loaded, words, -(-rows * columns * out_bits // 8))
    fill = array.rows + array.columns
    cycles = pace.finish() + fill
    seconds = cycles / array.clock_hz
    return _with_energy(m * n * k, m * n * words, cycles, pace, found, array, seconds)


def _with_energy(
    products: int, num_words: int, cycles: int, pace: _Pace, found: LaneFormat, array: UnitArray, seconds: float
) -> ProductCost:
    """Units that wait leak as well."""
    word = energy_per_word(found, gated=array.gated)
    return ProductCost(
        products=products,
        cycles=cycles,
        compute_cycles=pace.compute,
        moved_bytes=pace.moved,
        leakage_j=word["leakage"] * max(num_words, array.rows * array.columns * cycles),
        switching_j=word["switching"] * num_words,
        seconds=seconds,
    )


def total(costs: Sequence[ProductCost]) -> ProductCost:
    """Products one after another."""
    return ProductCost(**{name: sum(getattr(cost, name) for cost in costs) for name in ProductCost.__slots__})


def _tiles(size: int, step: int) -> list[int]:
    return [min(step, size - at) for at in range(0, size, step)]


class _Pace:
    """Tiles through the array: while one computes, the next is loaded and the last one's outputs leave."""

    def __init__(self, axi_bytes: int) -> None:
        self._axi = axi_bytes
        self.moved = self.compute = 0
        # of the tile that computes now, and the outputs of the one before it
        self._cycles = self._computing = self._its_outputs = self._leaving = 0

    def tile(self, loaded: int, compute: int, stored: int) -> None:
        """Load a tile while the one before it computes and the outputs of the one before that leave."""
        self.moved += loaded + stored
        self.compute += compute
        self._cycles += max(self._computing, -(-(loaded + self._leaving) // self._axi))
        self._leaving, self._its_outputs, self._computing = self._its_outputs, stored, compute

    def finish(self) -> int:
        """Cycles in all."""
        last = max(self._computing, -(-self._leaving // self._axi))
        return self._cycles + last + -(-self._its_outputs // self._axi)


def model_cost(
    shapes: Mapping[str, tuple[int, int]],
    formats: Mapping[str, LaneFormat],
    tokens: int,
    array: UnitArray | None = None,
) -> dict[str, ProductCost]:
    """Cost of a pass of `tokens` rows through matrices [rows, columns], by name; outputs leave in 16 bits."""
    return {
        name: product_cost(tokens, columns, rows, formats[name], array, out_bits=16)
        for name, (rows, columns) in shapes.items()
    }


def table() -> list[dict[str, Any]]:
    """One row per format: lanes, blocks, energy with and without gates."""
    return [
        {
            "format": found.name,
            "lanes": found.lanes,
            "blocks": found.blocks,
            "utilisation": found.utilisation,
            "energy_per_product_j": energy_per_product(found),
            "energy_per_product_ungated_j": energy_per_product(found, gated=False),
        }
        for found in FORMATS
    ]

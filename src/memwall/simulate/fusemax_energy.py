"""Energy and area of the accelerators of `fusemax`, from counts of accesses and a table of what each costs.

Energy is what DRAM, the buffer, register files and arithmetic take for each access. Counts follow from the cascade and
from where its tensors lie:

    DRAM        the traffic of the run; every value passes through the buffer on its way
    buffer      what an Einsum reads, once for all elements of the array that share it (a value without p serves a tile
                of rows, one without m a tile of keys) and for all numbers of a head that pass while it stays; and what
                it writes, unless it stays in the arrays (`STAYS`)
    registers   three reads and a write for a multiply-add, two and one for anything else, one and one for a unit's
                exponential
    arithmetic  operations of `einsum_work`; an exponential is six multiply-adds, or one of FLAT's unit

Units: joules; table entries in pJ an access (of 8 bytes of DRAM, 512 of the buffer, one value of registers), 45 nm;
area in square millimetres.

Source: FuseMax, Nayak 2024, arXiv 2406.10491: tables of its published code (Accelergy). Differs from the paper: its
counts come from Timeloop's mapper, these from the rules above, and no power is drawn by waiting. What FuseMax is said
to save (a fifth) does not come from accesses at these prices: evidence/fusemax.py has what is known of why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from memwall.hardware.units import MIB
from memwall.simulate.attention_cascades import cascade
from memwall.simulate.einsum import Einsum, Read
from memwall.simulate.einsum_work import operations, points
from memwall.simulate.fusemax import Accelerator, Design, Run
from memwall.simulate.fusemax_workloads import Workload

PICO = 1e-12
DRAM_PJ, DRAM_BYTES = 249.6, 8
BUFFER_PJ, BUFFER_BYTES = {"read": 484.97, "write": 451.30}, 512
REGISTER_PJ = {
    "deep": {"read": 0.6534, "write": 0.5696},
    "matrix": {"read": 0.2915, "write": 0.2253},
    "vector": {"read": 0.3850, "write": 0.3362},
}
"""Register files of FuseMax's matrix array, of FLAT's, and of the vector array."""
OPERATION_PJ = {"mac": 17.16, "multiply": 17.16, "add": 8.34, "max": 0.028, "divide": 36.25, "exp": 94.65}
"""A product alone goes through a multiply-add unit."""
EXP_MACS = 6

BUFFER_UM2, BUFFER_UM2_BYTES = 94_176_256, 16 * MIB
UNIT_UM2 = {"mac": 1545.0, "max": 49.3, "exp": 8240.0, "divide": 23_741.0}
REGISTER_UM2 = {"deep": 4256.0, "matrix": 1838.0, "vector": 2145.0}

STAYS: dict[str, frozenset[str]] = {
    "unfused": frozenset({"GM", "SD"}),
    "flat": frozenset({"GM", "SD"}),
    "cascade": frozenset({"LM", "SLD", "PRM", "SPD", "SLNV", "SPNV"}),
    "architecture": frozenset({"BQK", "SLN", "LM", "SLD", "PRM", "SPD", "SLNV", "SPNV"}),
    "binding": frozenset({"BQK", "SLN", "LM", "SLD", "PRM", "SPD", "SLNV", "SPNV"}),
}
"""Tensors that go from one Einsum to the next within the arrays, never through the buffer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Energy:
    """Joules."""

    dram: float
    buffer: float
    registers: float
    arithmetic: float

    @property
    def total(self) -> float:
        return self.dram + self.buffer + self.registers + self.arithmetic

    def __add__(self, other: Energy) -> Energy:
        return Energy(
            dram=self.dram + other.dram, buffer=self.buffer + other.buffer,
            registers=self.registers + other.registers, arithmetic=self.arithmetic + other.arithmetic,
        )  # fmt: skip


def attention_energy(run: Run) -> Energy:
    """Of a run."""
    work: Counter[str] = Counter()
    registers = rows = 0.0
    for einsum in cascade(run.design.cascade).einsums:
        if einsum.starts:
            continue
        number = run.shape.problems * points(einsum, run.shape.sizes(run.machine.array))
        counts = {kind: each * number for kind, each in operations(einsum).items()}
        if run.design.exp_cycles == EXP_MACS and "exp" in counts:
            counts["mac"] = counts.get("mac", 0) + EXP_MACS * counts.pop("exp")
        work.update(counts)
        registers += _register_pj(_file(run.design, einsum), counts)
        rows += _buffer_pj(run, einsum)
    return Energy(
        dram=_dram(run.traffic_bytes),
        buffer=PICO * rows + _passing(run.traffic_bytes),
        registers=PICO * registers,
        arithmetic=PICO * sum(OPERATION_PJ[kind] * number for kind, number in work.items()),
    )


def product_energy(workload: Workload, tokens: int, design: Design, machine: Accelerator) -> Energy:
    """Of the products around attention, on the same arrays."""
    whole = workload.batch * tokens
    macs = sum(each.macs(whole) for each in workload.products)
    moved = machine.word_bytes * sum(each.values(whole) for each in workload.products)
    # a tile of R x R results takes R rows' and R columns' values for each number that is summed
    shared = 2 * macs / machine.array
    read = BUFFER_PJ["read"] * machine.word_bytes / BUFFER_BYTES
    return Energy(
        dram=_dram(moved),
        buffer=PICO * shared * read + _passing(moved),
        registers=PICO * _register_pj(_matrix_file(design), {"mac": macs}),
        arithmetic=PICO * OPERATION_PJ["mac"] * macs,
    )


def _dram(moved: float) -> float:
    return PICO * DRAM_PJ * moved / DRAM_BYTES


def _passing(moved: float) -> float:
    """What goes from DRAM to the arrays is written to the buffer, and what goes back is read from it, about as much."""
    return PICO * moved / BUFFER_BYTES * (BUFFER_PJ["read"] + BUFFER_PJ["write"]) / 2


def _matrix_file(design: Design) -> str:
    return "deep" if design.exp_cycles == EXP_MACS else "matrix"


def _file(design: Design, einsum: Einsum) -> str:
    return _matrix_file(design) if einsum.name in design.matrix else "vector"


def _register_pj(file: str, counts: Mapping[str, int]) -> float:
    prices = REGISTER_PJ[file]
    reads = {"mac": 3, "exp": 1}
    return sum(
        number * (reads.get(kind, 2) * prices["read"] + prices["write"]) for kind, number in counts.items()
    )  # fmt: skip


def _buffer_pj(run: Run, einsum: Einsum) -> float:
    stays = STAYS[run.design.name]
    reads = sum(_fetched(run, einsum, read) for read in dict.fromkeys(einsum.reads) if read.tensor not in stays)
    writes = 0 if einsum.name in stays else _fetched(run, einsum, einsum.out)
    share = run.machine.word_bytes / BUFFER_BYTES
    return share * (reads * BUFFER_PJ["read"] + writes * BUFFER_PJ["write"])


def _fetched(run: Run, einsum: Einsum, read: Read) -> float:
    """Values of a tensor that come from the buffer for an Einsum."""
    sizes, array = run.shape.sizes(run.machine.array), run.machine.array
    values = float(run.shape.problems)
    for rank in read.ranks:
        values *= sizes[rank]
    space = set(einsum.space)
    if "p" in space and "p" not in read.ranks:
        values *= sizes["p"] / array
    if space & {"m", "m1"} and not {"m", "m1"} & set(read.ranks) and read is not einsum.out:
        values *= sizes["m1"]
    return values


def areas(design: Design, machine: Accelerator) -> dict[str, float]:
    """Square millimetres: buffer, matrix array, vector array."""
    size = design.buffer_bytes if machine.buffer_bytes is None else machine.buffer_bytes
    deep = _matrix_file(design) == "deep"
    element = UNIT_UM2["mac"] + REGISTER_UM2[_matrix_file(design)] + (UNIT_UM2["max"] if deep else 0.0)
    lane = UNIT_UM2["mac"] + UNIT_UM2["max"] + UNIT_UM2["divide"] + REGISTER_UM2["vector"]
    lane += 0.0 if deep else UNIT_UM2["exp"]
    square = 1e-6
    return {
        "buffer": square * BUFFER_UM2 * size / BUFFER_UM2_BYTES,
        "matrix": square * element * machine.array**2,
        "vector": square * lane * machine.array,
    }


def layer_energy(run: Run, workload: Workload, tokens: int) -> Energy:
    """Attention and the products around it."""
    return attention_energy(run) + product_energy(workload, tokens, run.design, run.machine)

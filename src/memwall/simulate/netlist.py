"""A design as the gates that synthesis made of it, evaluated for many inputs at once, and how often its wires change.

Idea: every wire is a row of bits, one for each of N independent runs, 64 to a word. Gates of one kind and depth are
worked together by one NumPy operation, so a clock of ten thousand gates over 65,536 runs takes a fraction of a second:
exhaustive tests of a unit become cheap, and what is tested are the gates themselves.

Units and shapes: inputs are integers [N] by port; outputs bits [N, width] or integers. Changes are counted over all
wires that gates and registers drive: the base of an estimate of dynamic energy.
Holds when: one clock, gates of Yosys's generic library, registers without reset (they begin at 0).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from memwall.errors import InputError
from memwall.simulate.hdl import rtlil, run_yosys

_A, _B, _S = "A", "B", "S"
_GATES: dict[str, tuple[tuple[str, ...], Callable[..., np.ndarray]]] = {
    "$_NOT_": ((_A,), lambda a: ~a),
    "$_BUF_": ((_A,), lambda a: a),
    "$_AND_": ((_A, _B), lambda a, b: a & b),
    "$_NAND_": ((_A, _B), lambda a, b: ~(a & b)),
    "$_OR_": ((_A, _B), lambda a, b: a | b),
    "$_NOR_": ((_A, _B), lambda a, b: ~(a | b)),
    "$_XOR_": ((_A, _B), lambda a, b: a ^ b),
    "$_XNOR_": ((_A, _B), lambda a, b: ~(a ^ b)),
    "$_ANDNOT_": ((_A, _B), lambda a, b: a & ~b),
    "$_ORNOT_": ((_A, _B), lambda a, b: a | ~b),
    "$_MUX_": ((_A, _B, _S), lambda a, b, s: (a & ~s) | (b & s)),
}
_FLIP_FLOP = "$_DFF_P_"
_ALL_ONES = np.uint64(0xFFFF_FFFF_FFFF_FFFF)


class Netlist:
    """Gates, wires and registers of one design. `num_gates`, `num_registers`: how many."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        """document: what Yosys's `write_json` gives for a design of one flat module."""
        (module,) = document["modules"].values()
        self._wire = {"0": 0, "1": 1, "x": 0}
        self.ports = {name: [self._index(bit) for bit in port["bits"]] for name, port in module["ports"].items()}
        self._inputs = [name for name, port in module["ports"].items() if port["direction"] == "input"]
        gates, flops = [], []
        for cell in module["cells"].values():
            pins = {pin: self._index(bits[0]) for pin, bits in cell["connections"].items()}
            if cell["type"] == _FLIP_FLOP:
                flops.append((pins["D"], pins["Q"]))
            elif cell["type"] in _GATES:
                gates.append((cell["type"], tuple(pins[pin] for pin in _GATES[cell["type"]][0]), pins["Y"]))
            elif cell["type"] != "$scopeinfo":
                raise InputError(f"a netlist may hold Yosys's plain gates and {_FLIP_FLOP}; it has a {cell['type']}")
        self.num_gates, self.num_registers = len(gates), len(flops)
        self._flops = np.asarray(flops, np.int64).reshape(-1, 2)
        self._levels = self._levelled(gates)

    @staticmethod
    def of(design: Any, name: str) -> Netlist:
        """Synthesise an Amaranth component."""
        passes = [
            f"synth -flatten -top {name}",
            f"dfflegalize -cell {_FLIP_FLOP} 0",
            "simplemap",
            "opt_clean -purge",
            "write_json design.json",
        ]
        return Netlist(json.loads(run_yosys(rtlil(design, name), passes, "design.json")))

    def start(self, num_runs: int) -> Run:
        """So many independent runs, registers at 0."""
        return Run(self, num_runs)

    def _index(self, bit: int | str) -> int:
        return self._wire.setdefault(str(bit), len(self._wire) - 1)

    @property
    def num_wires(self) -> int:
        return len(self._wire) - 1  # two names stand for 0

    def _levelled(
        self, gates: list[tuple[str, tuple[int, ...], int]]
    ) -> list[tuple[str, list[np.ndarray], np.ndarray]]:
        """Gates in an order that they can be worked in, those of one kind and depth together."""
        driver = {out: (kind, pins) for kind, pins, out in gates}
        depth: dict[int, int] = {}
        for _, _, first in gates:
            stack = [first]
            while stack:
                out = stack[-1]
                missing = [pin for pin in driver[out][1] if pin in driver and pin not in depth]
                if missing:
                    stack += missing
                    if len(stack) > len(gates) + len(missing) + 1:
                        raise InputError("the design has a loop of gates without a register")
                    continue
                depth[stack.pop()] = 1 + max((depth.get(pin, 0) for pin in driver[out][1]), default=0)
        groups: dict[tuple[int, str], list[tuple[tuple[int, ...], int]]] = {}
        for kind, pins, out in gates:
            groups.setdefault((depth[out], kind), []).append((pins, out))
        found = []
        for (_, kind), members in sorted(groups.items()):
            columns = [np.asarray([pins[i] for pins, _ in members]) for i in range(len(_GATES[kind][0]))]
            found.append((kind, columns, np.asarray([out for _, out in members])))
        return found


class Run:
    """N runs of a netlist, clock by clock. changes: wires that changed so far, over all runs."""

    def __init__(self, netlist: Netlist, num_runs: int) -> None:
        self.netlist = netlist
        self.num_runs = num_runs
        self._words = -(-num_runs // 64)
        self._rows = np.zeros((netlist.num_wires, self._words), np.uint64)
        self._rows[1] = _ALL_ONES
        self.changes = 0

    def clock(self, inputs: Mapping[str, np.ndarray | int], *, count_changes: bool = False) -> None:
        """Set inputs (others keep theirs), let the gates settle; registers then hold what they were given before."""
        before = self._rows.copy() if count_changes else None
        flops = self.netlist._flops
        self._rows[flops[:, 1]] = self._rows[flops[:, 0]]
        for name, values in inputs.items():
            self._set(name, np.broadcast_to(np.asarray(values), (self.num_runs,)))
        for kind, pins, outs in self.netlist._levels:
            self._rows[outs] = _GATES[kind][1](*(self._rows[each] for each in pins))
        if before is not None:
            changed = (before ^ self._rows) & self._valid()
            self.changes += int(np.bitwise_count(changed).sum(dtype=np.int64))

    def bits(self, port: str) -> np.ndarray:
        """A port's bits [N, width] of 0 and 1, lowest first."""
        rows = self._rows[self.netlist.ports[port]]
        wide = np.unpackbits(rows.view(np.uint8), axis=1, bitorder="little")[:, : self.num_runs]
        return np.ascontiguousarray(wide.T)

    def integers(self, port: str, *, signed: bool = False) -> list[int]:
        """A port's values as Python integers."""
        packed = np.packbits(self.bits(port), axis=1, bitorder="little")
        width = len(self.netlist.ports[port])
        values = [int.from_bytes(row.tobytes(), "little") for row in packed]
        return [value - (1 << width) if signed and value >> (width - 1) else value for value in values]

    def _set(self, name: str, values: np.ndarray) -> None:
        if name not in self.netlist._inputs:
            raise InputError(f"{name!r} is no input; inputs are {', '.join(self.netlist._inputs)}")
        for place, wire in enumerate(self.netlist.ports[name]):
            bits = ((values >> place) & 1).astype(np.uint8)
            padded = np.zeros(self._words * 64, np.uint8)
            padded[: self.num_runs] = bits
            self._rows[wire] = np.packbits(padded, bitorder="little").view(np.uint64)

    def _valid(self) -> np.ndarray:
        """Ones where runs are, zeros behind the last."""
        ones = np.zeros(self._words * 64, np.uint8)
        ones[: self.num_runs] = 1
        return np.packbits(ones, bitorder="little").view(np.uint64)

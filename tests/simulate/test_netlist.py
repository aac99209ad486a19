"""Gates evaluated for many inputs at once: a small design against arithmetic, and what a netlist may hold."""

from __future__ import annotations

import numpy as np
import pytest

from memwall.errors import InputError
from memwall.simulate.hdl import find_yosys
from memwall.simulate.netlist import Netlist

amaranth = pytest.importorskip("amaranth.hdl", reason="needs amaranth: pip install 'memwall[hdl]'")


def cell(kind: str, **pins: int | str) -> dict[str, object]:
    return {"type": kind, "connections": {pin: [bit] for pin, bit in pins.items()}}


def document(cells: dict[str, object], **ports: tuple[str, list[int]]) -> dict[str, object]:
    described = {name: {"direction": direction, "bits": bits} for name, (direction, bits) in ports.items()}
    return {"modules": {"top": {"ports": described, "cells": cells}}}


@pytest.mark.skipif(find_yosys() is None, reason="needs yosys: pip install 'memwall[hdl]'")
def test_a_multiply_add_with_registers() -> None:
    from amaranth.lib import wiring
    from amaranth.lib.wiring import In, Out

    class Design(wiring.Component):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__({"a": In(5), "b": In(5), "sum": Out(12)})

        def elaborate(self, platform: object) -> object:
            m = amaranth.Module()
            m.d.sync += self.sum.eq(self.sum + self.a * self.b)
            return m

    netlist = Netlist.of(Design(), "top")
    assert netlist.num_registers == 12
    random = np.random.default_rng(0)
    run, total = netlist.start(100), np.zeros(100, np.int64)
    for _ in range(5):
        a, b = random.integers(0, 32, (2, 100))
        run.clock({"rst": 0, "a": a, "b": b})
        assert run.integers("sum") == (total % 4096).tolist()
        total += a * b
    assert run.bits("sum").shape == (100, 12)


def test_changes_count_every_wire_of_every_run() -> None:
    cells = {"not": cell("$_NOT_", A=2, Y=3), "and": cell("$_AND_", A=2, B="1", Y=4)}
    run = Netlist(document(cells, a=("input", [2]), y=("output", [3]))).start(3)
    run.clock({"a": 0}, count_changes=True)
    assert run.changes == 3  # the inverter's output rises in three runs; what lies behind the third does not count
    run.clock({"a": np.asarray([1, 0, 0])}, count_changes=True)
    assert run.changes == 3 + 3  # input, inverter and the gate behind it, in one run
    assert run.integers("y") == [0, 1, 1]


def test_what_a_netlist_may_hold() -> None:
    with pytest.raises(InputError, match="AOI3"):
        Netlist(document({"g": cell("$_AOI3_", A=2, Y=3)}, a=("input", [2])))
    loop = {"x": cell("$_NOT_", A=3, Y=2), "y": cell("$_NOT_", A=2, Y=3)}
    with pytest.raises(InputError, match="loop"):
        Netlist(document(loop, y=("output", [3])))
    run = Netlist(document({"g": cell("$_NOT_", A=2, Y=3)}, a=("input", [2]))).start(1)
    with pytest.raises(InputError, match="inputs are a"):
        run.clock({"b": 1})

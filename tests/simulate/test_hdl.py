"""Designs to Verilog and cell counts, and what is said where a tool is missing."""

from __future__ import annotations

import re

import pytest

from memwall.errors import InputError, MissingDependency
from memwall.simulate import hdl

needs_yosys = pytest.mark.skipif(hdl.find_yosys() is None, reason="needs yosys: pip install 'memwall[hdl]'")


def test_missing_tools_are_named_with_what_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hdl, "find_spec", lambda name: None)
    monkeypatch.setattr(hdl.shutil, "which", lambda name: None)
    with pytest.raises(MissingDependency, match=r"memwall\[hdl\]"):
        hdl.require_amaranth()
    assert hdl.find_yosys() is None
    with pytest.raises(MissingDependency, match=r"yosys.*memwall\[hdl\]"):
        hdl.run_yosys("", [], "x")


def test_a_program_on_the_path_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hdl.shutil, "which", lambda name: f"/opt/{name}")
    assert hdl.find_yosys() == ["/opt/yosys", "-q", "-s"]


@needs_yosys
def test_what_yosys_says_is_passed_on() -> None:
    with pytest.raises(InputError, match="no_such_pass"):
        hdl.run_yosys("module \\top\nend\n", ["no_such_pass"], "x")


@needs_yosys
def test_verilog_and_cells_of_a_multiplier() -> None:
    pytest.importorskip("amaranth", reason="needs amaranth: pip install 'memwall[hdl]'")
    from memwall.simulate.xr_npe_hdl import LaneDecoder

    text = hdl.verilog(LaneDecoder(4), "decoder")
    assert re.search(r"module decoder\(", text)
    assert "endmodule" in text
    cells = hdl.cell_counts(LaneDecoder(4), "decoder")
    assert cells.registers == 0
    assert 10 < cells.total < 200
    assert cells.to_dict()["total"] == sum(cells.by_type.values())

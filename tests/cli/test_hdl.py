"""`memwall hdl`: the table, a model's cost, Verilog and the check where the tools are there, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from memwall.cli import app
from memwall.formats.xr_npe import FP4, POSIT4
from memwall.simulate import xr_npe_check
from memwall.simulate.hdl import find_yosys


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["hdl", "xr-npe", *arguments])


def test_the_table_needs_no_tools() -> None:
    result = run()
    assert result.exit_code == 0
    assert "posit16_1" in result.stdout
    assert "49 of 49" in result.stdout


def test_a_models_cost() -> None:
    result = run("--model", "demo", "--tokens", "4", "--json")
    found = json.loads(result.stdout)["model"]
    mixed, wide = found["costs"]
    assert found["matrices"] == {"fp4": 46, "posit8_0": 10}
    assert mixed["products"] == wide["products"]
    assert mixed["moved_bytes"] < 0.4 * wide["moved_bytes"]
    assert mixed["energy_j"] < wide["energy_j"] / 2
    assert "bytes over AXI" in run("--model", "demo", "--weights", "posit8", "--array", "4x16").stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--quick",), "--quick is for --check"),
        (("--model", "demo", "--array", "8"), "rows x columns"),
        (("--model", "demo", "--weights", "int4"), "no format of XR-NPE"),
        (("--cells", "--quire-bits", "4"), "16 to 256"),
        (("--verilog", "/nowhere/x.v"), "folder that exists"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_bad_input(arguments: tuple[str, ...], says: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert says in " ".join(result.stderr.split())


def test_unknown_design() -> None:
    result = CliRunner().invoke(app, ["hdl", "xr"])
    assert result.exit_code == 2
    assert "xr-npe" in result.stderr


@pytest.mark.skipif(find_yosys() is None, reason="needs yosys: pip install 'memwall[hdl]'")
def test_verilog_is_written(tmp_path: Path) -> None:
    pytest.importorskip("amaranth", reason="needs amaranth: pip install 'memwall[hdl]'")
    target = tmp_path / "unit.v"
    result = run("--verilog", str(target), "--quire-bits", "32", "--json")
    assert result.exit_code == 0, result.stderr
    text = target.read_text()
    assert "module xr_npe(" in text
    assert json.loads(result.stdout)["verilog"]["lines"] == text.count("\n")


def test_a_mismatch_ends_with_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("amaranth", reason="needs amaranth: pip install 'memwall[hdl]'")
    monkeypatch.setattr(xr_npe_check, "find_yosys", lambda: None)
    monkeypatch.setattr(
        xr_npe_check, "streams", lambda num_random: [("pairs", xr_npe_check.random_sums(FP4, POSIT4, 8))]
    )
    assert run("--check", "--quick").exit_code == 0
    true_sums = xr_npe_check.clocked

    def damaged(*arguments: Any) -> list[Any]:
        first, *others = true_sums(*arguments)
        return [(first[0] + 1, *first[1:]), *others]

    monkeypatch.setattr(xr_npe_check, "clocked", damaged)
    result = run("--check", "--quick")
    assert result.exit_code == 1
    assert "expected" in result.stderr

"""`memwall probe` prints what the room measured."""

from __future__ import annotations

import json
from typing import Any

import pytest

from memwall import hardware
from memwall.plan import kernel_rates
from tests.hardware.conftest import _make_report


class Report:
    """Stands for a measured machine."""

    notes = ("Other work was running.",)

    def rows(self) -> list[hardware.ProbeRow]:
        return [hardware.ProbeRow(group="memory", setting="read, 1 thread", figure="20 GB/s", typical="18 GB/s")]

    def to_json(self) -> dict[str, Any]:
        return {"format": 1}


def test_table_and_json(memwall: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "probe", lambda **settings: Report())
    table = memwall("probe", "--quick")
    assert table.exit_code == 0, table.stderr
    assert "20 GB/s" in table.stdout
    assert "Other work" in table.stderr
    assert json.loads(memwall("probe", "--quick", "--json").stdout) == {"format": 1}


def test_a_thorough_probe_times_kernels_for_plans(memwall: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "probe", lambda **settings: _make_report(rates={}))
    monkeypatch.setattr(kernel_rates, "measure_usual", lambda **settings: {"products/int4-g64/2 threads": 14e9})
    table = memwall("probe")
    assert table.exit_code == 0, table.stderr
    assert "products, int4-g64, 2 threads" in table.stdout
    assert "14.0 GB/s" in table.stdout
    assert json.loads(memwall("probe", "--json").stdout)["rates"] == {"products/int4-g64/2 threads": 14e9}
    assert hardware.load_rates() == {"products/int4-g64/2 threads": 14e9}
    assert "products" not in memwall("probe", "--quick").stdout

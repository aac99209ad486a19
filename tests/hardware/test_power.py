"""Joules: counters that come round, packages counted once, the declared model, and which of the two is taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from memwall.errors import InputError
from memwall.hardware.power import JOULES_PER_BYTE, JOULES_PER_FLOP, Rapl, WorkModel, power_source


def package(root: Path, name: str, energy_uj: int, most: int = 1_000_000) -> Path:
    folder = root / name
    folder.mkdir(exist_ok=True)
    (folder / "energy_uj").write_text(f"{energy_uj}\n")
    (folder / "max_energy_range_uj").write_text(f"{most}\n")
    return folder


def test_counters_are_summed_and_come_round(tmp_path: Path) -> None:
    package(tmp_path, "intel-rapl:0", 900_000)
    package(tmp_path, "intel-rapl:1", 100)
    package(tmp_path, "intel-rapl:0:0", 5)  # a part of the first
    source = Rapl(tmp_path)
    assert source.joules() == 0
    package(tmp_path, "intel-rapl:0", 100_000)  # 200,000 further on, once round
    package(tmp_path, "intel-rapl:1", 300)
    package(tmp_path, "intel-rapl:0:0", 500_000)
    assert source.joules() == pytest.approx(0.2002)
    assert source.joules() == pytest.approx(0.2002)


@pytest.mark.parametrize("content", [None, "many"])
def test_without_counters_the_model_is_taken_and_says_so(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (package(tmp_path, "intel-rapl:0", 1) / "energy_uj").write_text(content)
    work = WorkModel()
    source = power_source(work, tmp_path)
    assert source is work
    assert source.name == "modelled"
    with pytest.raises(InputError, match="energy counters"):
        Rapl(tmp_path)


def test_with_counters_the_model_is_not_taken(tmp_path: Path) -> None:
    package(tmp_path, "intel-rapl:0", 1)
    assert power_source(WorkModel(), tmp_path).name == "rapl"


def test_the_model_counts_declared_work() -> None:
    work = WorkModel()
    work.add(2e9, 1e6)
    work.add(0, 3e6)
    assert work.joules() == pytest.approx(2e9 * JOULES_PER_FLOP + 4e6 * JOULES_PER_BYTE)
    with pytest.raises(InputError, match="joules_per_byte=2"):
        WorkModel(joules_per_byte=2)

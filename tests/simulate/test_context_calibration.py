"""This machine's numbers: they are there, and an analysis can be made of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from memwall.models import DEMO_DIRECTORY, ModelConfig
from memwall.simulate import context_calibration
from memwall.simulate.context_model import ContextModel
from memwall.simulate.long_context_peak_analysis import Analysis, Workload


def test_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context_calibration, "SHAPE", (256, 128))
    monkeypatch.setattr(context_calibration, "FILE_BYTES", 1 << 16)
    peak = context_calibration.calibrate("float32", folder=tmp_path)
    assert not list(tmp_path.iterdir())
    assert (peak.name, peak.devices) == ("here", 1)
    model = ContextModel.of(ModelConfig.from_directory(DEMO_DIRECTORY), "demo", weights="float32")
    one = Analysis(model=model, peak=peak, workload=Workload(context=1000))
    assert one.users >= 1
    assert one.prefill > 0

"""Records for tests of ranks and reports."""

from __future__ import annotations

from typing import Any

from memwall.hardware.meter import Series
from memwall.studies.efficiency_records import Record, metrics_of


def make_record(technique: str, *, losses: list[float] | None, memory: int, step_s: float, **more: Any) -> Record:
    """A run with that mean memory and that latency."""
    series = Series(
        dt_s=0.5, times_s=(0.0, 1.0), memory_bytes=(memory, memory), utilisation=(0.0, 0.5), busy=((0.0,), (1.0,)),
        watts=(0.0, 2.0), power_source="modelled", sampler_share=0.001,
    )  # fmt: skip
    stage = more.get("stage", "inference")
    metrics = metrics_of(
        series, steps_s=[step_s] * 2, stage=stage, count=2, num_parameters=10, tokens=2, base_bytes=10,
        mcr=more.pop("mcr", None),
    )  # fmt: skip
    told: dict[str, Any] = {
        "axis": "attention", "group": "1M", "stage": stage, "model": {}, "num_parameters": 10, "flop_per_token": 2.0,
        "tokens": 2, "hardware": {}, "versions": {}, "seed": 0, "dt_s": 0.5,
        "figures": {"others": 0.0, "arithmetic": "float32"},
        "quality": {} if losses is None else {"losses": losses},
    }  # fmt: skip
    return Record(technique=technique, series=series, metrics=metrics, **(told | more))

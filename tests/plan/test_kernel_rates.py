"""What a probe measures for plans is what plans ask for. Nothing here asserts how fast anything is."""

from __future__ import annotations

import pytest

from memwall.plan import kernel_rates, profile
from memwall.plan.kernel_rates import measure_usual
from memwall.plan.profile import COLUMNS, load_profile


def test_plans_find_what_a_probe_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "WORKING_SETS_BYTES", tuple(range(100_000, 900_000, 100_000)))
    monkeypatch.setattr(profile, "_MATRIX_WEIGHTS", 1 << 16)
    monkeypatch.setattr(profile, "_SECONDS_PER_FIGURE", 0.001)
    monkeypatch.setattr(kernel_rates, "FORMATS", ("int4-g64", "float16"))
    told: list[tuple[int, int, str]] = []
    rates = measure_usual(threads=1, progress=lambda *step: told.append(step))
    assert set(rates) == {"products/int4-g64/1 thread", "products/float16/1 thread"}
    assert all(rate > 0 for rate in rates.values())
    assert [done for done, _, _ in told] == [0, 1, 2]
    kept = load_profile(threads=1, measure=False)
    by_working_set = kept.matvec_bytes_per_s("int4-g64", COLUMNS[-1])
    assert by_working_set is not None
    assert by_working_set[-1] == rates["products/int4-g64/1 thread"]
    assert kept.prefill_macs_per_s("float16")
    assert kept.overhead_seconds()

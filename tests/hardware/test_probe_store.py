from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.hardware import ProbeReport, cache_file, load_cached, load_rates, store_rates
from memwall.hardware.probe_store import save_report

MakeReport = Callable[..., ProbeReport]
DAMAGED = [b"[" * 5000, b"{}", b'{"report": 3, "rates": [1]}', b'{"rates": {"a": "b"}}']


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_a_report_is_found_again_with_the_rates(make_report: MakeReport) -> None:
    assert load_cached() is None
    assert load_rates() == {}
    assert store_rates({"linear/int4": 14e9})
    assert load_cached() is None
    report = make_report(rates={})
    assert save_report(report)
    assert store_rates({"linear/int8": 11e9, "linear/int4": 15e9})
    assert load_cached() == replace(report, rates={"linear/int4": 15e9, "linear/int8": 11e9})
    assert [path.name for path in cache_file().parent.iterdir()] == [cache_file().name]


def test_a_quick_report_does_not_replace_a_thorough_one(make_report: MakeReport) -> None:
    save_report(make_report(quick=True, rates={}))
    save_report(make_report(rates={}))
    save_report(make_report(quick=True, rates={}))
    found = load_cached()
    assert found is not None
    assert not found.quick


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_rates_are_checked(rate: float) -> None:
    with pytest.raises(InputError, match="kernel"):
        store_rates({"kernel": rate})


def test_a_cache_that_cannot_be_written_is_no_error(own_cache: Path, make_report: MakeReport) -> None:
    (own_cache / "memwall").write_text("a file where the directory should be")
    assert not store_rates({"kernel": 1.0})
    assert not save_report(make_report())
    assert load_cached() is None


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=200)
    | st.sampled_from([b"[" * 5000, b"{}", b'{"report": 3, "rates": [1]}', b'{"rates": {"a": "b"}}'])
)
def test_damaged_files_count_as_absent(content: bytes) -> None:
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    assert load_cached() is None
    assert load_rates() == {}

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.memory import Budget

BOUNDED = settings(max_examples=150, deadline=None, derandomize=True)


def test_one_size_is_the_memory_of_the_process() -> None:
    budget = Budget.parse("2GB")
    assert budget.ram == 2_000_000_000
    assert dict(budget.tiers) == {"ram": 2_000_000_000}
    assert dict(budget.rates) == {}


def test_tiers_and_rates() -> None:
    budget = Budget.parse("gpu=11.5GiB, ram=24GiB,disk=80GiB,disk_rate=1GB/s,net_rate=100Mbit/s")
    assert dict(budget.tiers) == {"gpu": 12_348_030_976, "ram": 24 * 2**30, "disk": 80 * 2**30}
    assert dict(budget.rates) == {"disk": 1e9, "net": 12.5e6}
    assert budget.to_json()["rates"] == {"disk": 1e9, "net": 12.5e6}


def test_a_tier_that_is_not_named_has_no_limit() -> None:
    assert Budget.parse("gpu1=8GB,gpu0=8GB").ram is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the budget is empty"),
        ("plenty", "'plenty' is not a size"),
        ("0", "more than zero"),
        ("-2GB", "negative"),
        ("2g", "2GB (powers of 1000) or 2GiB"),
        ("ram=1GB,disk", "'disk' is not name=value"),
        ("ram=", "'ram=' is not name=value"),
        ("ram=0GB", "'ram=0GB'"),
        ("ram=1GB,ram=2GB", "'ram=2GB': ram is given twice"),
        ("disk_rate=1GB/s,disk_rate=2GB/s", "disk_rate is given twice"),
        ("tape=1GB", "unknown tier 'tape'; known are gpu"),
        ("tape_rate=1GB/s", "disk_rate"),
        ("disk_rate=1GB", "size per second"),
        ("gpu=1GB,gpu0=1GB", "both gpu and numbered"),
        ("ram=1GB;disk=2GB", "'ram=1GB;disk=2GB'"),
    ],
)
def test_errors_name_the_piece_and_what_would_work(text: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        Budget.parse(text)
    assert words in str(caught.value)


def test_values_are_checked_however_a_budget_is_made() -> None:
    with pytest.raises(InputError):
        Budget(tiers={"ram": 0})
    with pytest.raises(InputError):
        Budget(tiers={}, rates={"disk": float("nan")})
    with pytest.raises(TypeError):
        Budget(tiers={"ram": 1}).tiers["ram"] = 2  # type: ignore[index]


TIER_NAMES = st.sampled_from(["gpu0", "gpu1", "ram", "cxl", "disk", "net"])


@BOUNDED
@given(
    st.dictionaries(TIER_NAMES, st.integers(1, 2**60), min_size=1),
    st.dictionaries(TIER_NAMES, st.floats(0.001, 1e12, allow_nan=False)),
)
def test_canonical_text_round_trips(tiers: dict[str, int], rates: dict[str, float]) -> None:
    budget = Budget(tiers=tiers, rates={name: round(rate * 8) / 8 or 1.0 for name, rate in rates.items()})
    assert Budget.parse(str(budget)) == budget


@BOUNDED
@given(st.text(alphabet="gpuramdisk_te0123456789=,./GBMi s", max_size=60))
def test_any_text_parses_or_is_refused(text: str) -> None:
    with contextlib.suppress(InputError):
        budget = Budget.parse(text)
        assert budget.tiers or budget.rates

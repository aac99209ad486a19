from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.hardware import units

BOUNDED = settings(max_examples=200, deadline=None, derandomize=True)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("4096", 4096),
        ("0", 0),
        ("200MB", 200_000_000),
        ("1.5GiB", 1_610_612_736),
        ("2 GB", 2_000_000_000),
        ("2gb", 2_000_000_000),
        (" 11.5GiB ", 12_348_030_976),
        (".5 KiB", 512),
        ("1kB", 1000),
        ("1KB", 1000),
        ("0.3B", 0),
        ("1.0000000019GB", 1_000_000_001),
    ],
)
def test_sizes_people_write(text: str, num_bytes: int) -> None:
    assert units.parse_bytes(text) == num_bytes


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1g", "1GB (powers of 1000) or 1GiB"),
        ("64 K", "64kB"),
        ("1Gb", "reads as bits"),
        ("-1GB", "negative"),
        ("", "is not a size"),
        ("GB", "is not a size"),
        ("1e9", "is not a size"),
        ("nan", "is not a size"),
        ("1,000", "is not a size"),
        ("2 bananas", "unknown unit 'bananas'"),
        ("9" * 5000, "is not a size"),
        ("99999PB", "larger than any machine"),
        ("١GB", "is not a size"),
    ],
)
def test_sizes_with_no_clear_reading_are_refused(text: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        units.parse_bytes(text)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [
        ("1GB/s", 1e9),
        ("500 MiB/s", 500 * 2**20),
        ("100Mbit/s", 12.5e6),
        ("10Gbps", 1.25e9),
        ("8bit/s", 1.0),
        ("250B/s", 250.0),
    ],
)
def test_rates_people_write(text: str, bytes_per_s: float) -> None:
    assert units.parse_rate(text) == bytes_per_s


@pytest.mark.parametrize("text", ["1GB", "100", "100/s", "1GB/min", "1Gb/s", "100MBps", "-1GB/s", "", "/s", "1g/s"])
def test_unclear_rates_are_refused(text: str) -> None:
    with pytest.raises(InputError):
        units.parse_rate(text)


@BOUNDED
@given(st.integers(min_value=0, max_value=2**62))
def test_exact_text_gives_the_same_bytes_back(num_bytes: int) -> None:
    assert units.parse_bytes(units.format_bytes(num_bytes, exact=True)) == num_bytes


@BOUNDED
@given(st.integers(min_value=0, max_value=10**17))
def test_short_text_is_within_half_a_percent_and_never_shows_1000(num_bytes: int) -> None:
    text = units.format_bytes(num_bytes)
    assert abs(units.parse_bytes(text) - num_bytes) <= 0.005 * num_bytes + 1
    assert not text.startswith("1000 ")


@BOUNDED
@given(st.text(max_size=40))
def test_any_text_parses_or_is_refused(text: str) -> None:
    for parse in (units.parse_bytes, units.parse_rate):
        with contextlib.suppress(InputError):
            assert parse(text) >= 0


def test_counts_are_whole_and_k_is_1024() -> None:
    assert [units.parse_count(text) for text in ("4096", "32k", " 2 K", "1M", "0")] == [4096, 32768, 2048, 2**20, 0]
    for text in ("", "1.5k", "-4", "32kB", "k", "9" * 400, "four"):
        with pytest.raises(InputError, match="is not a count"):
            units.parse_count(text)


def test_text_of_other_quantities() -> None:
    assert units.format_rate(20.14e9) == "20.1 GB/s"
    assert units.format_flop_rate(1.23e12) == "1.23 TFLOP/s"
    assert units.format_flop_rate(12) == "12 FLOP/s"
    assert units.format_seconds(58e-6) == "58 us"
    assert units.format_seconds(2) == "2 s"
    assert units.format_bytes(-1500) == "-1.50 kB"

"""Bounds between a machine's tiers."""

from __future__ import annotations

import pytest

from memwall.errors import DoesNotFit, InputError
from memwall.hardware import load_machine
from memwall.hardware.machine import Machine
from memwall.simulate.attention_io_complexity import choose, count_words, lower_bound
from memwall.simulate.attention_levels import hierarchy, nested_tiles
from memwall.simulate.attention_shape import Attention

MACHINE = """
title = "Two caches over a memory over a disk"
kind = "server"
[[tier]]
name = "l1"
capacity = "32KiB"
read = "400GB/s"
count = 4
source = "made up"
[[tier]]
name = "l2"
capacity = "1MiB"
read = "100GB/s"
source = "made up"
[[tier]]
name = "ram"
capacity = "1GiB"
read = "10GB/s"
source = "made up"
[[tier]]
name = "disk"
capacity = "1TB"
read = "1GB/s"
source = "made up"
[[compute]]
unit = "cpu"
tier = "ram"
float32 = "1TFLOP/s"
count = 2
source = "made up"
"""


@pytest.fixture
def machine() -> Machine:
    return Machine.from_toml(MACHINE, "made")


def test_each_level_is_a_fast_memory_over_the_next(machine: Machine) -> None:
    shape = Attention(tokens=4096, head_size=128)
    found = hierarchy(shape, machine)
    assert [(one.tier, one.below, one.fast_words) for one in found.levels] == [
        ("l1", "l2", 8192),
        ("l2", "ram", 262144),
    ]
    first, second = found.levels
    assert first.words == count_words(shape, choose(shape, 8192))
    assert first.seconds == pytest.approx(4 * first.words / 100e9)
    assert second.least_seconds == pytest.approx(4 * lower_bound(shape, 262144) / 10e9)
    assert found.compute_seconds == pytest.approx(4 * 4096**2 * 128 / 2e12)
    assert found.least_seconds == max(found.compute_seconds, first.least_seconds, second.least_seconds)
    assert found.seconds == first.seconds
    assert found.limit == "l2 to l1"


def test_a_memory_of_ones_own_goes_on_top(machine: Machine) -> None:
    shape = Attention(tokens=1024, head_size=64)
    found = hierarchy(shape, machine, fast_bytes=1024)
    assert [one.tier for one in found.levels] == ["fast memory", "l1", "l2"]
    assert found.levels[0].bytes_per_s == 4 * 400e9
    with pytest.raises(InputError, match="l1 has 32,768 bytes"):
        hierarchy(shape, machine, fast_bytes=1 << 15)


def test_arrays_live_in_the_first_tier_that_holds_them(machine: Machine) -> None:
    long = Attention(tokens=1 << 22, head_size=128)
    assert [one.below for one in hierarchy(long, machine).levels] == ["l2", "ram", "disk"]
    with pytest.raises(DoesNotFit, match="disk, holds 1"):
        hierarchy(Attention(tokens=1 << 24, head_size=4096, batch=4), machine)
    with pytest.raises(InputError, match="float16"):
        hierarchy(long, machine, "float16")
    with pytest.raises(InputError, match="it has cpu"):
        hierarchy(long, machine, unit="gpu")


def test_presets_tell_their_caches() -> None:
    shape = Attention(tokens=8192, head_size=128, heads=32, kv_heads=8, causal=True)
    found = hierarchy(shape, load_machine("h100-sxm"), "float16")
    assert [(one.tier, one.below, one.count) for one in found.levels] == [("sram", "l2", 132), ("l2", "gpu", 1)]
    assert found.least_seconds <= found.seconds


def test_tiles_for_two_caches() -> None:
    rows, keys = nested_tiles(Attention(tokens=8192, head_size=64), 8192, 262144, step=16)
    assert keys == 32
    assert rows * (2 * 64 + 2 + keys) + 2 * 64 * keys <= 131072 < (rows + 1) * (2 * 64 + 2 + keys) + 2 * 64 * keys
    assert nested_tiles(Attention(tokens=5, head_size=64), 128, 1024, step=16) == (1, 16)

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.hardware import Machine, Tier, load_machine, preset_names
from memwall.hardware.units import parse_flop_rate, parse_seconds

SMALL = """
title = "Test"
kind = "laptop"
[[tier]]
name = "ram"
capacity = "16GiB"
read = "50GB/s"
write = "40GB/s"
latency = "100ns"
source = "data sheet"
[[tier]]
name = "disk"
capacity = "1TB"
read = "3GB/s"
source = "data sheet"
unsure = ["read"]
[[link]]
from = "disk"
to = "ram"
bandwidth = "2GB/s"
source = "bus"
[[compute]]
unit = "cpu"
tier = "ram"
float32 = "1.5TFLOP/s"
int8 = "6TOP/s"
source = "data sheet"
"""


def test_a_description_becomes_typed_figures() -> None:
    machine = Machine.from_toml(SMALL, "small")
    ram, disk = machine.tier("ram"), machine.tier("disk")
    assert (ram.capacity_bytes, ram.read_bytes_per_s, ram.write_bytes_per_s) == (16 * 2**30, 50e9, 40e9)
    assert ram.latency_seconds == 100e-9
    assert disk.write_bytes_per_s == disk.read_bytes_per_s == 3e9
    assert disk.unsure == ("read",)
    assert machine.flop_per_s("cpu", "int8") == 6e12
    assert machine.bytes_per_s("disk", "ram") == 2e9  # the bus is slower than the disk
    assert machine.bytes_per_s("ram", "disk") == 2e9
    assert machine.bytes_per_s("ram", "ram") == 40e9
    assert machine.has_tier("disk")
    assert not machine.has_tier("gpu")


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_whole_and_every_figure_has_a_source(name: str) -> None:
    machine = load_machine(name)
    assert machine.compute
    for item in (*machine.tiers, *machine.links, *machine.compute):
        assert len(item.reference) > 10
    for tier in machine.tiers:
        assert tier.write_bytes_per_s <= tier.read_bytes_per_s
    assert Machine.from_json(json.loads(json.dumps(machine.to_json()))) == machine


def test_presets_cover_the_machines_people_ask_for() -> None:
    assert len(preset_names()) >= 16
    kinds = {load_machine(name).kind for name in preset_names()}
    assert {"laptop", "phone", "desktop", "gpu", "server", "fpga", "microcontroller"} <= kinds


def test_figures_known_by_heart() -> None:
    assert load_machine("a100-80gb").flop_per_s("gpu", "bfloat16") == 312e12
    assert load_machine("h100-sxm").tier("gpu").read_bytes_per_s == 3.35e12
    assert load_machine("dgx-2").tier("gpu").count == 16
    assert load_machine("alveo-u280").tier("hbm").capacity_bytes == 8 * 2**30
    assert load_machine("sn40l-socket").tier("sram").capacity_bytes == 520 * 2**20


def test_a_file_is_a_machine_too(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(SMALL)
    assert load_machine(path).name == "mine"
    with pytest.raises(InputError, match="cannot read"):
        load_machine(tmp_path / "absent.toml")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="cannot read"):
        load_machine(path)
    path.write_bytes(b"#" * (2 << 20))
    with pytest.raises(InputError, match="too large"):
        load_machine(path)


def test_an_unknown_machine_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"nearest are a100-\d0gb and a100-\d0gb"):
        load_machine("a100")
    with pytest.raises(InputError, match="known are"):
        load_machine("zzzzzz")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('read = "50GB/s"', 'reed = "50GB/s"', "did you mean read"),
        ('read = "50GB/s"', 'read = "fast"', "tier ram: read"),
        ('read = "50GB/s"', 'read = "0GB/s"', "more than zero"),
        ('capacity = "16GiB"', "capacity = 16", "capacity is missing or not a text"),
        ('capacity = "16GiB"', 'capacity = "-1GB"', "negative"),
        ('name = "disk"', 'name = "ram"', "given twice"),
        ('name = "disk"', 'name = "Disk 1"', "short word"),
        ('to = "ram"', 'to = "gpu"', "a link names tier 'gpu'"),
        ('tier = "ram"', 'tier = "hbm"', "compute cpu works on tier 'hbm'"),
        ('unsure = ["read"]', 'unsure = ["write"]', "unsure must be a list of fields"),
        ('source = "bus"', 'source = " "', "source is missing"),
        ('float32 = "1.5TFLOP/s"', 'float12 = "1.5TFLOP/s"', "did you mean float"),
        ('float32 = "1.5TFLOP/s"', 'float32 = "1.5T"', "TFLOP/s"),
        ('kind = "laptop"', "", "kind is missing"),
        ('kind = "laptop"', 'kind = "laptop"\ntier = 3', "not valid TOML|must be a list"),
        ('latency = "100ns"', 'latency = "100"', "110ns"),
        ('source = "bus"', 'source = "bus"\nboth_ways = 1', "both_ways must be"),
        ('tier = "ram"', 'tier = "ram"\ncount = "2"', "count must be a whole number"),
        ('title = "Test"', 'title = "Test', "not valid TOML"),
    ],
)
def test_mistakes_are_named(old: str, new: str, words: str) -> None:
    assert old in SMALL
    with pytest.raises(InputError, match=words):
        Machine.from_toml(SMALL.replace(old, new, 1), "small")


def test_asking_for_what_is_not_there_names_what_is() -> None:
    machine = Machine.from_toml(SMALL, "small")
    with pytest.raises(InputError, match="it has ram, disk"):
        machine.tier("gpu")
    with pytest.raises(InputError, match="known are float32, int8"):
        machine.flop_per_s("cpu", "int4")
    with pytest.raises(InputError, match="it has cpu"):
        machine.flop_per_s("gpu", "int8")
    with pytest.raises(InputError, match="no tier"):
        Machine(name="x", title="x", kind="x", tiers=())
    with pytest.raises(InputError, match="more than zero"):
        Tier(name="ram", capacity_bytes=0, read_bytes_per_s=1.0, write_bytes_per_s=1.0, reference="x")  # type: ignore[arg-type]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(SMALL.splitlines()), max_size=25), st.text(max_size=30))
def test_any_text_is_read_or_refused(lines: list[str], junk: str) -> None:
    for text in ("\n".join(lines), "\n".join([*lines, junk])):
        with contextlib.suppress(InputError):
            assert Machine.from_toml(text, "any").tiers
    with pytest.raises(InputError, match="not valid TOML"):
        Machine.from_toml("a = " + "[" * 20_000, "deep")


@pytest.mark.parametrize("data", [{}, {"name": "x"}, {"name": "x", "title": "", "kind": "", "tiers": [{"nam": 1}]}])
def test_json_that_is_no_machine_is_refused(data: dict) -> None:
    with pytest.raises(InputError):
        Machine.from_json(data)


def test_other_quantities_parse_strictly() -> None:
    assert parse_flop_rate("24.5TOP/s") == 24.5e12
    assert parse_flop_rate("100 MFLOP/s") == 1e8
    assert parse_seconds("45us") == 45e-6
    for text in ("24.5TOPS", "1FLOP", "1kW/s", ""):
        with pytest.raises(InputError):
            parse_flop_rate(text)
    for text in ("45", "45 minutes", "-1s"):
        with pytest.raises(InputError):
            parse_seconds(text)

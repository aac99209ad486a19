"""XR-NPE's hardware: each part by hand, the whole unit and its gates against the format engine."""

from __future__ import annotations

import numpy as np
import pytest

from memwall.formats.xr_npe import FORMATS, FP4, GRID_DIGITS, POSIT4, POSIT8, POSIT16, integers
from memwall.simulate.hdl import find_yosys

pytest.importorskip("amaranth", reason="needs amaranth: pip install 'memwall[hdl]'")

from memwall.simulate import xr_npe_check as check
from memwall.simulate import xr_npe_hdl as hdl

SHORT_QUIRE = 48
needs_yosys = pytest.mark.skipif(find_yosys() is None, reason="needs yosys: pip install 'memwall[hdl]'")


def settled(design: object, inputs: dict[str, list[int]], outputs: list[str]) -> dict[str, list[int]]:
    """Outputs of a design without registers for each set of inputs."""
    from amaranth.sim import Simulator

    found: dict[str, list[int]] = {name: [] for name in outputs}

    async def bench(context: object) -> None:
        for values in zip(*inputs.values(), strict=True):
            for name, value in zip(inputs, values, strict=True):
                context.set(getattr(design, name), value)  # type: ignore[attr-defined]
            await context.delay(1e-9)  # type: ignore[attr-defined]
            for name in outputs:
                found[name].append(context.get(getattr(design, name)))  # type: ignore[attr-defined]

    simulator = Simulator(design)
    simulator.add_testbench(bench)
    simulator.run()
    return found


@pytest.mark.parametrize(
    ("lane", "found"),
    [(lane, found) for lane in range(4) for found in FORMATS if lane < found.lanes and found.bits <= 8],
    ids=lambda value: getattr(value, "name", value),
)
def test_every_lane_decodes_every_code(lane: int, found: check.LaneFormat) -> None:
    width = hdl.LANE_WIDTHS[lane]
    codes = np.arange(1 << found.bits)
    inputs = {"code": (codes << (width - found.bits)).tolist(), "mode": [found.mode] * len(codes)}
    got = settled(hdl.LaneDecoder(width), inputs, ["negative", "zero", "nar", "scale", "significand"])
    counts = integers(found, codes)
    places = hdl._significand_bits(width) - found.significand_bits
    for code, count in enumerate(counts.tolist()):
        assert got["nar"][code] == (code == found.nar)
        assert got["zero"][code] == (count == 0)
        if count:
            assert got["negative"][code] == (count < 0)
            shifted = (got["significand"][code] >> places) << got["scale"][code]
            assert shifted >> hdl._fraction_places(found) // 2 == abs(count)


def test_16_bit_codes_decode() -> None:
    codes = np.random.default_rng(0).integers(0, 1 << 16, 400)
    inputs = {"code": codes.tolist(), "mode": [POSIT16.mode] * len(codes)}
    got = settled(hdl.LaneDecoder(16), inputs, ["scale", "significand"])
    decoded = [s << e >> 12 for s, e in zip(got["significand"], got["scale"], strict=True)]
    assert decoded == np.abs(integers(POSIT16, codes)).tolist()


def test_lanes_multiply_side_by_side() -> None:
    """One grid: products of lanes stand beside each other, and as many blocks work as the card's model says."""
    random = np.random.default_rng(0)
    edges = random.integers(0, 1 << hdl.EDGE_BITS, (2, 200)).tolist()
    for found in FORMATS:
        inputs = {"a": edges[0], "b": edges[1], "mode": [found.mode] * 200}
        got = settled(hdl.MantissaMultiplier(), inputs, ["product", "blocks"])
        assert {bin(blocks).count("1") for blocks in got["blocks"]} == {found.blocks}
        bits = 2 * -(-found.significand_bits // 2) if found.blocks else 0
        for a, b, product in zip(*edges, got["product"], strict=True):
            mask = (1 << bits) - 1
            lanes = [((a >> bits * lane) & mask) * ((b >> bits * lane) & mask) for lane in range(found.lanes)]
            assert product == sum(part << 2 * bits * lane for lane, part in enumerate(lanes))


def test_blocks_without_gates_give_the_same_products() -> None:
    edges = np.random.default_rng(1).integers(0, 1 << hdl.EDGE_BITS, (2, 100)).tolist()
    inputs = {"a": edges[0], "b": edges[1], "mode": [POSIT8.mode, FP4.mode] * 50}
    gated, open_ = (settled(hdl.MantissaMultiplier(gated=g), inputs, ["product"]) for g in (True, False))
    assert gated == open_
    assert len(hdl.modes_of_block(0, 0)) == 3
    assert hdl.modes_of_block(0, GRID_DIGITS - 1) == [POSIT16.mode]


@pytest.mark.parametrize("found", [FP4, POSIT4], ids=lambda found: found.name)
def test_all_pairs_of_4_bits_clock_by_clock(found: check.LaneFormat) -> None:
    stream = check.all_pairs(found, POSIT8)
    assert check.compare("design", found.name, stream, check.clocked(stream, 128), 128).mismatches == 0


@pytest.mark.parametrize("found", FORMATS, ids=lambda found: found.name)
def test_random_sums_clock_by_clock(found: check.LaneFormat) -> None:
    for out in FORMATS:
        stream = check.random_sums(found, out, 96, seed=7)
        report = check.compare("design", found.name, stream, check.clocked(stream, 128), 128)
        assert report.mismatches == 0, report.first


def test_a_short_quire_saturates_as_the_engine_says() -> None:
    stream = check.random_sums(POSIT16, POSIT16, 96, seed=3)
    results = check.clocked(stream, SHORT_QUIRE)
    assert check.compare("design", "", stream, results, SHORT_QUIRE).mismatches == 0
    assert any(saturated for _, saturated, _, _ in results)


def test_a_mismatch_is_told() -> None:
    stream = check.random_sums(FP4, FP4, 16)
    right = check.expected(stream, 128)
    wrong = [*right[:-1], (right[-1][0] + 1, *right[-1][1:])]
    report = check.compare("design", "", stream, wrong, 128)
    assert report.mismatches == 1
    assert f"sum {len(right) - 1}" in report.first
    assert check.compare("design", "", stream, right[:-1], 128).mismatches == 1


@needs_yosys
def test_gates_equal_the_engine_for_all_pairs_of_4_and_8_bits() -> None:
    gates = check.Gates(SHORT_QUIRE)
    for found in (FP4, POSIT4, POSIT8):
        stream = check.all_pairs(found, found)
        report = check.compare("gates", found.name, stream, gates.sums(stream), SHORT_QUIRE)
        assert (report.mismatches, report.products) == (0, found.lanes << 2 * found.bits), report.first
    for found in FORMATS:
        stream = check.random_sums(found, POSIT16, 512)
        assert check.compare("gates", found.name, stream, gates.sums(stream), SHORT_QUIRE).mismatches == 0
    changes = {found.name: gates.changes_per_word(found, 8, 64) for found in FORMATS}
    assert changes["posit4_1"] < changes["posit16_1"]

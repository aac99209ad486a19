"""The accelerator: published cycles and bytes to the digit, mean speed-ups, buffers, energy, models of one's own."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.errors import DoesNotFit, InputError
from memwall.hardware.units import GIB, MIB
from memwall.models import model_directory
from memwall.models.config import ModelConfig
from memwall.simulate.attention_cascades import cascade
from memwall.simulate.fusemax import DESIGNS, Accelerator, Design, Run, Shape, flat_tiles, price, query_tiles
from memwall.simulate.fusemax_energy import areas, attention_energy, layer_energy
from memwall.simulate.fusemax_report import least_words, picture, tile_schedule
from memwall.simulate.fusemax_workloads import (
    PUBLISHED,
    PUBLISHED_LENGTHS,
    Workload,
    layer_seconds,
    price_workload,
    product_cycles,
    product_seconds,
)

BERT = PUBLISHED["BERT"]
MACHINE = Accelerator()


def test_published_cycles_and_bytes_of_bert_at_1k() -> None:
    runs = {name: price_workload(name, BERT, 1024) for name in DESIGNS}
    cycles = {name: run.compute_cycles for name, run in runs.items()}
    assert cycles == {
        "unfused": 14_155_776, "flat": 12_582_912, "cascade": 14_413_824, "architecture": 5_627_904,
        "binding": 1_892_352,
    }  # fmt: skip
    assert runs["binding"].traffic_bytes == runs["flat"].traffic_bytes == 402_653_184
    assert product_cycles(BERT, 1024, MACHINE) == 7_077_888
    shares = {name: round(share, 4) for name, share in runs["binding"].shares.items()}
    assert (shares["LM"], shares["SLN"], shares["SLD"]) == (0.0065, 0.0455, 0.0065)
    assert round(runs["binding"].utilisation, 2) == 0.89
    assert runs["flat"].utilisation == 0.125


def test_cycles_of_each_einsum_are_the_formulas() -> None:
    shape = Shape(problems=6, rows=512, keys=1024, key_size=64, value_size=32)
    found = price("binding", shape).einsums
    whole, width = 6 * 512 * 1024, 256
    steps = 6 * 512 * (1024 // width)
    assert found == {
        "BQK": whole * 64 // width**2, "SLNV": whole * 32 // width**2, "LM": whole // width**2,
        "SLD": whole // width**2, "SLN": 7 * whole // width**2, "RM": steps // width, "SPD": steps // width,
        "RD": steps // width, "PRM": 7 * steps // width, "SPNV": steps * 32 // width, "RNV": steps * 32 // width,
        "AV": 6 * 512 * 32 // width,
    }  # fmt: skip
    assert price("cascade", shape).einsums["SLN"] == 2 * whole // width


def test_two_designs_differ_by_overlap_alone() -> None:
    shape = BERT.shape(4096)
    one, two = price("architecture", shape), price("binding", shape)
    assert one.einsums == two.einsums
    assert one.traffic_bytes == two.traffic_bytes
    c = two.einsums
    ends = c["RM"] + max(c["SLN"] + c["SLD"], c["PRM"] + c["SPD"])
    assert two.compute_cycles == (
        max(c["BQK"] + c["LM"], c["RD"] + c["RNV"] + c["AV"]) + ends + max(c["SLNV"], c["SPNV"])
    )
    assert one.compute_cycles == (
        max(c["BQK"] + c["LM"], c["RD"] + c["AV"]) + 256 * c["LM"] + ends + max(c["SLNV"], c["SPNV"] + c["RNV"])
    )


def test_the_interleaved_schedule_keeps_the_cascades_order() -> None:
    """Round t works tile t; the vector array's first phase still belongs to tile t - 1. What is read was written."""
    one, phases = cascade("one-pass"), DESIGNS["binding"].phases
    einsums = {einsum.name: einsum for einsum in one.einsums if not einsum.starts}
    done: set[tuple[str, int]] = {(name, -1) for name in einsums}
    for tile in range(4):
        for number, phase in enumerate(phases):
            late = dict.fromkeys(phase.vector, tile - (number == 0))
            finished = set(done)
            for side in (dict.fromkeys(phase.matrix, tile), late):
                own = set(finished)  # one array after the other; what the other does meanwhile is not there yet
                for name, at in side.items():
                    if name == "AV" and at != 2:
                        continue  # after the last tile of a row
                    for read in einsums[name].reads if at >= 0 else ():
                        before = any(
                            index.rank == "m1" and not index.ahead and not index.last for index in read.indices
                        )
                        carried = read.tensor in one.iterative and before
                        if read.tensor in einsums:
                            assert (read.tensor, at - carried) in own, (name, read.tensor, tile)
                    own.add((name, at))
                done |= own
    assert {name for phase in phases for name in (*phase.matrix, *phase.vector)} == set(einsums)


def test_rows_in_the_buffer_are_a_divisor_and_do_not_depend_on_keys() -> None:
    shape = BERT.shape(65536)
    binding = DESIGNS["binding"]
    assert (16 * MIB - 2 * 2 * 256 * 64) // (2 * 256 * 130) == 251
    assert query_tiles(binding, shape, MACHINE) == 128
    assert price("binding", shape).traffic_bytes == 38_654_705_664
    longer = replace(shape, keys=1 << 24)
    assert query_tiles(binding, longer, MACHINE) == 128
    with pytest.raises(DoesNotFit, match="132,096 bytes would"):
        query_tiles(binding, shape, Accelerator(buffer_bytes=99_999))


def test_flat_spills_once_a_tile_of_scores_does_not_fit() -> None:
    run = price_workload("flat", BERT, 262_144)
    assert run.traffic_bytes == 435_458_144_206_848
    assert run.seconds == pytest.approx(1013.88, abs=0.005)
    assert run.memory_bound
    assert round(run.utilisation, 3) == 0.108
    tiles = [flat_tiles(DESIGNS["flat"], BERT.shape(tokens), MACHINE) for tokens in PUBLISHED_LENGTHS]
    assert tiles == [(4, False), (4, False), (4, False), (1, False), (4, True), (4, True)]


def means() -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in DESIGNS} | {"layer": []}
    for workload in PUBLISHED.values():
        for tokens in PUBLISHED_LENGTHS:
            runs = {name: price_workload(name, workload, tokens) for name in DESIGNS}
            for name, run in runs.items():
                found[name].append(runs["flat"].seconds / run.seconds)
            found["layer"].append(
                layer_seconds(runs["flat"], workload, tokens) / layer_seconds(runs["binding"], workload, tokens)
            )
    return found


def test_published_means() -> None:
    found = means()
    for name, published in (("unfused", 0.668), ("cascade", 0.907), ("architecture", 2.183), ("binding", 6.723)):
        assert fmean(found[name]) == pytest.approx(published, abs=0.0006)
    assert fmean(found["layer"]) == pytest.approx(5.302, abs=0.0006)
    assert min(found["binding"]) == pytest.approx(3.44, abs=0.005)
    assert max(found["binding"]) == pytest.approx(8.57, abs=0.005)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 160), st.integers(1, 160),
    st.sampled_from([16, 64, 256]),
)  # fmt: skip
def test_any_shape_has_a_price(problems: int, rows: int, keys: int, e: int, f: int, array: int) -> None:
    shape = Shape(problems=problems, rows=rows, keys=keys, key_size=e, value_size=f)
    machine = Accelerator(array=array)
    runs = {name: price(name, shape, machine) for name in DESIGNS}
    for run in runs.values():
        assert 0 < run.utilisation <= 1 + 1e-12
        assert 0 < run.vector_utilisation <= 1 + 1e-12
        assert (
            run.seconds >= max(run.compute_cycles / machine.clock_hz, run.traffic_bytes / machine.dram_bytes_per_s) / 3
        )
        assert run.traffic_bytes >= 2 * problems * (rows + keys) * (e + f)
    assert runs["binding"].compute_cycles <= runs["architecture"].compute_cycles
    assert runs["binding"].traffic_bytes == runs["architecture"].traffic_bytes <= runs["unfused"].traffic_bytes
    assert sum(phase["cycles"] + phase["drain"] for phase in tile_schedule(runs["binding"])) * problems * -(
        -rows // array
    ) * -(-keys // array) == pytest.approx(runs["binding"].compute_cycles)


def test_traffic_is_never_below_what_any_schedule_moves() -> None:
    for tokens in PUBLISHED_LENGTHS:
        for name in DESIGNS:
            run = price_workload(name, BERT, tokens)
            ratio = run.traffic_bytes / (2 * least_words(run))
            assert ratio >= 1
            if name == "binding":
                assert ratio < 10


def test_energy_is_counts_times_prices() -> None:
    run = price_workload("binding", BERT, 1024)
    scores, steps = 768 * 1024 * 1024, 768 * 1024 * 4
    found = attention_energy(run)
    macs, divisions = scores * (64 + 6 + 64) + steps * 6, 768 * 1024 * 64
    adds = scores * 2 + steps * (1 + 1 + 64)
    expected = (macs + steps * (1 + 64)) * 17.16 + adds * 8.34 + (scores + steps) * 0.028 + divisions * 36.25
    assert found.arithmetic == pytest.approx(1e-12 * expected)
    assert found.dram == pytest.approx(1e-12 * 249.6 * 402_653_184 / 8)
    flat = attention_energy(price_workload("flat", BERT, 1024))
    per_score = {"mac": 128 * 17.16, "exp": 94.65, "add": 2 * 8.34, "max": 0.028, "divide": 36.25}
    assert flat.arithmetic == pytest.approx(1e-12 * scores * sum(per_score.values()))
    # scores are written and read twice, weights three times, of both kinds; Q and V a tile at a time
    row = (1.0 + 1 + 1) * 451.30 + (2 + 2 + 1 + 3 * 64 / 256) * 484.97
    passing = 402_653_184 / 512 * (484.97 + 451.30) / 2
    av = 768 * 1024 * 64 * 451.30 / 256
    assert flat.buffer == pytest.approx(1e-12 * (scores * row / 256 + passing + av))
    assert found.total == found.dram + found.buffer + found.registers + found.arithmetic


def test_a_layer_takes_more_energy_than_its_attention() -> None:
    for name in DESIGNS:
        run = price_workload(name, BERT, 1024)
        whole, part = layer_energy(run, BERT, 1024), attention_energy(run)
        macs = 7_077_888 * 65536
        assert whole.arithmetic - part.arithmetic == pytest.approx(1e-12 * 17.16 * macs)
        assert whole.dram > part.dram
        assert whole.buffer > part.buffer
        assert whole.registers > part.registers


def test_areas_are_those_of_the_tables() -> None:
    found = areas(DESIGNS["binding"], MACHINE)
    assert found["buffer"] == pytest.approx(94.176256)
    assert found["matrix"] == pytest.approx(65536 * (1545 + 49.3 + 4256) / 1e6)
    flat = areas(DESIGNS["flat"], MACHINE)
    assert flat["buffer"] == pytest.approx(2 * found["buffer"])
    assert flat["vector"] == pytest.approx(256 * (1545 + 49.3 + 8240 + 23741 + 2145) / 1e6)


def test_models_of_memwall_are_workloads() -> None:
    config = ModelConfig.from_directory(model_directory("demo"))
    demo = Workload.of(config, "demo", batch=2)
    shape = demo.shape(512)
    assert (shape.problems, shape.rows, shape.keys, shape.key_size) == (2 * 4, 2 * 512, 512, 32)
    macs = sum(each.macs(1) for each in demo.products)
    assert macs == 256 * (256 + 128 + 128) + 256 * 256 + 3 * 256 * 704
    moe = Workload.of(replace(config, num_experts=8, num_experts_per_token=2), "experts")
    assert sum(each.macs(1) for each in moe.products) == macs + 256 * 8 + 3 * 256 * 704
    assert {each.name: each.copies for each in moe.products}["down"] == 8
    assert next(each for each in moe.products if each.name == "up").values(2) == 4 * (256 + 704) + 4 * 256 * 704
    with pytest.raises(InputError, match="has no attention"):
        Workload.of(replace(config, ssm=object()), "state model")  # type: ignore[arg-type]
    assert product_seconds(demo, 8, MACHINE) > product_cycles(demo, 8, MACHINE) / MACHINE.clock_hz  # DRAM


def test_a_design_of_ones_own_is_a_run_too() -> None:
    plain = DESIGNS["binding"]
    own = Design(
        name="own", what="", cascade="one-pass", phases=plain.phases, buffer_bytes=MIB, exp_cycles=1, streams="once"
    )
    run = Run(design=own, shape=BERT.shape(4096), machine=Accelerator(dram_bytes_per_s=4.0 * GIB))
    assert run.einsums["SLN"] == 2 * run.einsums["LM"]
    assert run.memory_bound
    assert run.traffic_bytes > price("binding", BERT.shape(4096)).traffic_bytes


def test_the_picture_has_a_bar_for_every_einsum() -> None:
    runs = [price_workload(name, BERT, 1024) for name in DESIGNS]
    drawn = picture(runs, "<BERT>")
    assert drawn.count("<title>") == sum(len(run.einsums) for run in runs)
    assert "&lt;BERT&gt;" in drawn


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Accelerator(array=0), "array 0"),
        (lambda: Accelerator(word_bytes=9), "word_bytes 9"),
        (lambda: Accelerator(clock_hz=0.0), "clock_hz 0"),
        (lambda: Accelerator(buffer_bytes=0), "buffer_bytes 0"),
        (lambda: BERT.shape(0), "tokens 0"),
        (lambda: replace(BERT, batch=0), "batch 0"),
        (lambda: Shape(problems=1, rows=1, keys=0, key_size=1, value_size=1), "keys 0"),
        (lambda: price("flash", BERT.shape(8)), "no design 'flash'"),
    ],
)
def test_bad_input_is_named(make: object, says: str) -> None:
    with pytest.raises(InputError, match=says):
        make()  # type: ignore[operator]

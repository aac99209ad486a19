"""FPGA designs: bytes by hand, published times, and what each part of the model must do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from memwall.errors import DoesNotFit, InputError
from memwall.hardware import Machine, load_machine
from memwall.simulate.dsp_packing import Packing
from memwall.simulate.fpga_designs import FLIGHTLLM, Design, ModelShape, Recipe, flightllm, ladder
from memwall.simulate.fpga_llm import compare, run_pass, run_request

U280 = load_machine("alveo-u280")
LLAMA = ModelShape()
ACCLLM = Recipe().design()


def with_memory(bytes_per_s: float, capacity: int) -> Machine:
    """A card whose HBM has another rate."""
    tiers = tuple(
        replace(tier, read_bytes_per_s=bytes_per_s, capacity_bytes=capacity) if tier.name == "hbm" else tier
        for tier in U280.tiers
    )
    return replace(U280, tiers=tiers)


def test_bytes_by_hand() -> None:
    # 2 of 4 weights at 2 bits of code and 2 of place, and per 64 kept ones 18 bits: 2 + 18 / 128
    assert ACCLLM.weight_bits == pytest.approx(2.140625)
    layer = 4 * 4096 * 4096 + 3 * 4096 * 11008
    assert LLAMA.layer_weights == layer
    assert ACCLLM.weight_bytes(LLAMA) == round((32 * layer * 2.140625 + 32000 * 4096 * 8) / 8)
    assert ACCLLM.cache_bytes(LLAMA, 100_000) == 32 * 2 * 4096 * 1028 * 4.5 / 8
    assert FLIGHTLLM.cache_bytes(LLAMA, 2048) == 32 * 2 * 4096 * 2048
    step = run_pass(ACCLLM, LLAMA, U280, past=5000)
    assert step.weight_bytes == ACCLLM.weight_bytes(LLAMA)
    assert step.kv_bytes == pytest.approx(ACCLLM.cache_bytes(LLAMA, 5000), rel=2e-3)  # its own is on chip


def test_pairs_of_a_prompt_are_a_band_and_a_column() -> None:
    small = replace(ACCLLM, sinks=2, window=5)
    for tokens in (1, 4, 7, 8, 30):
        counted = sum(sum(1 for key in range(query + 1) if key < 2 or query - key < 5) for query in range(tokens))
        assert small.pairs(tokens) == counted
    assert replace(FLIGHTLLM, prefill_share=1.0).pairs(10) == 55


@pytest.mark.parametrize(("past", "published_ms"), [(143, 9.28), (1007, 10.59)])
def test_flightllms_published_decode_times(past: int, published_ms: float) -> None:
    """The artifact's own figures for a VHK158 (four cores, 819 GB/s), 4-bit loads."""
    found = run_pass(flightllm(4, weight_bits=4.0), LLAMA, with_memory(819e9, 32 << 30), past=past)
    assert found.seconds * 1e3 == pytest.approx(published_ms, rel=0.1)


@pytest.mark.parametrize(("tokens", "published_ms"), [(128, 289.9), (512, 1181.4)])
def test_flightllms_published_prefill_times(tokens: int, published_ms: float) -> None:
    found = run_pass(flightllm(4, weight_bits=4.0), LLAMA, with_memory(819e9, 32 << 30), tokens=tokens)
    assert found.seconds * 1e3 == pytest.approx(published_ms, rel=0.1)


def test_half_the_buffer_or_one_buffer_is_slower() -> None:
    whole = run_pass(FLIGHTLLM, LLAMA, U280, past=1000).seconds
    assert run_pass(replace(FLIGHTLLM, buffers=1), LLAMA, U280, past=1000).seconds > 1.2 * whole
    small = replace(FLIGHTLLM, buffer_bytes=FLIGHTLLM.buffer_bytes // 64)
    assert run_pass(small, LLAMA, U280, past=1000).seconds > whole


def test_narrower_formats_and_a_window_are_faster_and_level() -> None:
    speeds = {past: run_pass(ACCLLM, LLAMA, U280, past=past).seconds for past in (2000, 8000, 100_000)}
    assert speeds[2000] == speeds[8000] == speeds[100_000]
    full = [run_pass(FLIGHTLLM, LLAMA, U280, past=past).seconds for past in (500, 2000, 8000)]
    assert full == sorted(full)
    for change in ({"weight_bits": 1.5}, {"kv_bits": 2.0}):
        assert run_pass(replace(ACCLLM, **change), LLAMA, U280, past=2000).seconds < speeds[2000]


def test_a_prompt_is_bound_by_products_and_counts_its_activations() -> None:
    found = run_pass(ACCLLM, LLAMA, U280, tokens=512)
    assert found.shares["compute"] > 0.8
    assert found.seconds > run_pass(ACCLLM, LLAMA, U280, tokens=128).seconds
    assert run_pass(replace(ACCLLM, window=64), LLAMA, U280, tokens=2048).seconds < run_pass(
        replace(ACCLLM, window=None), LLAMA, U280, tokens=2048
    ).seconds  # fmt: skip
    spilled = run_pass(replace(ACCLLM, buffer_bytes=1 << 16), LLAMA, U280, tokens=64)
    assert spilled.shares["store"] > 0


def test_packing_and_flushes_reach_the_rates() -> None:
    dear = Recipe(weight_packing=Packing(code_bits=2, lanes=3, spacing=12), flush_cycles=5, shared_places=True).design()
    assert dear.mv_macs == pytest.approx(6144 * 0.8 * 1.5)
    assert dear.flush_share == pytest.approx(0.5)
    assert ACCLLM.mv_macs == pytest.approx(6144 * 0.8)  # rows of other places share no activation
    assert ACCLLM.mm_macs == pytest.approx(6144 * 0.8 * 2 * 341 / 342)
    assert run_pass(dear, LLAMA, U280, tokens=512).seconds > run_pass(ACCLLM, LLAMA, U280, tokens=512).seconds


def test_the_ladder_ends_at_accllm() -> None:
    steps = ladder(Recipe())
    assert steps[0][1] == FLIGHTLLM
    last = steps[-1][1]
    ignored = {"name": "", "watts": 0.0, "flush_share": 0.0, "prefill_share": 1.0}
    assert replace(last, **ignored) == replace(ACCLLM, **ignored)


def test_compare_reports_everything_and_what_does_not_fit() -> None:
    found = compare(LLAMA, U280, Recipe(), prompt_tokens=128, output_tokens=64, contexts=[2048, 200_000])
    assert [one["design"] for one in found["designs"]] == ["FlightLLM", "AccLLM"]
    product = 1.0
    for step in found["steps"]:
        product *= step["times"]
    assert product == pytest.approx(found["speed_up"], rel=1e-6)
    assert found["contexts"][1]["FlightLLM"] is None
    assert found["contexts"][1]["AccLLM"] > 0
    with pytest.raises(DoesNotFit, match="shorten"):
        run_request(FLIGHTLLM, LLAMA, U280, 100_000, 10)
    assert run_request(ACCLLM, LLAMA, U280, 10, 1).decode_tokens_per_s > 0


def test_bad_designs_are_refused() -> None:
    for change, says in (({"weight_bits": 0.0}, "weight bits"), ({"buffers": 0}, "buffers"), ({"window": 0}, "window")):
        with pytest.raises(InputError, match=says):
            replace(ACCLLM, **change)
    assert isinstance(ACCLLM, Design)

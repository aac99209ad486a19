"""The speed model by hand: known rates in, known seconds out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from memwall import kv
from memwall.engine.loading import cache_shape
from memwall.hardware.machine import load_machine
from memwall.models import ModelConfig, model_directory
from memwall.models.precision import resolve
from memwall.plan.base import Choice
from memwall.plan.profile import WORKING_SETS_BYTES, KernelProfile
from memwall.plan.speed import (
    EFFICIENCY,
    arithmetic_elsewhere,
    arithmetic_here,
    batching_elsewhere,
    batching_here,
    predict_elsewhere,
    predict_here,
    step_bytes,
    step_macs,
)

DEMO = ModelConfig.from_directory(model_directory("demo"))
INT4 = resolve(DEMO, "int4")
CHOICE = Choice(weights="int4", kv="float16", context=1024)


def profile(rates: list[float]) -> KernelProfile:
    figures = {
        "matvec int4-g64 x256": rates,
        "prefill int4-g64": 1e11,
        f"attend float16 {DEMO.num_heads}x{DEMO.num_kv_heads}x{DEMO.head_dim}": [1e-5 + 64e-8, 1e-5 + 1024e-8] * 2,
        "overhead": [20e-6, 20e-6, 50e-6, 1e-5],
    }
    return KernelProfile(key="hand", figures=figures, measure=False)


def test_decode_is_bytes_over_rate_plus_overheads() -> None:
    speed = predict_here(DEMO, INT4, CHOICE, 4 << 20, profile([1e10] * len(WORKING_SETS_BYTES)))
    assert speed is not None
    start = sum(step_bytes(DEMO, INT4).values()) / 1e10 + DEMO.num_layers * 20e-6 + 50e-6
    assert 1 / speed.decode_tokens_per_s_at_start == pytest.approx(start)
    # the line through the two measured lengths: 10 ns more per cached token and layer
    assert 1 / speed.decode_tokens_per_s == pytest.approx(start + DEMO.num_layers * 1024e-8)


def test_larger_working_sets_leave_the_cache() -> None:
    rates = [4e10, 4e10, 2e10, 1.5e10, 1.2e10, 1e10, 0.9e10, 0.9e10]
    small = predict_here(DEMO, INT4, CHOICE, 0, profile(rates))
    large = predict_here(DEMO, INT4, CHOICE, 10**9, profile(rates))
    assert small is not None
    assert large is not None
    assert small.decode_tokens_per_s > large.decode_tokens_per_s
    assert small.decode_tokens_per_s_at_start == large.decode_tokens_per_s_at_start


def test_attention_leaves_the_cache_where_products_do() -> None:
    rates = [4e10, 4e10, 2e10, 1e10, 1e10, 1e10, 1e10, 1e10]
    one = profile(rates)
    one.figures[f"attend float16 {DEMO.num_heads}x{DEMO.num_kv_heads}x{DEMO.head_dim}"] = [1e-5, 1e-5, 3e-5, 3e-5]
    weights = sum(step_bytes(DEMO, INT4).values())

    def attention(working_set: int, rate: float) -> float:
        speed = predict_here(DEMO, INT4, CHOICE, int(working_set - weights), one)
        assert speed is not None
        return 1 / speed.decode_tokens_per_s - weights / rate - DEMO.num_layers * 20e-6 - 50e-6 + DEMO.num_layers * 1e-5

    assert attention(8_000_000, 4e10) == pytest.approx(DEMO.num_layers * 1e-5)
    # a third of the way in seconds per byte from the near rate to the far one
    assert attention(12_000_000, 2e10) == pytest.approx(DEMO.num_layers * (1e-5 + 2e-5 / 3))
    assert attention(96_000_000, 1e10) == pytest.approx(DEMO.num_layers * 3e-5)


def test_overheads_grow_from_tiny_to_wide_layers() -> None:
    flat, steep = profile([1e10] * len(WORKING_SETS_BYTES)), profile([1e10] * len(WORKING_SETS_BYTES))
    steep.figures["overhead"] = [20e-6, 60e-6, 50e-6, 1e-5]
    before, after = (predict_here(DEMO, INT4, CHOICE, 0, one) for one in (flat, steep))
    assert before is not None
    assert after is not None
    more = 1 / after.decode_tokens_per_s_at_start - 1 / before.decode_tokens_per_s_at_start
    assert 0 < more < DEMO.num_layers * 40e-6


def test_unknown_figures_give_no_prediction() -> None:
    assert predict_here(DEMO, resolve(DEMO, "int8"), CHOICE, 0, profile([1e10] * len(WORKING_SETS_BYTES))) is None


def test_experts_and_embeddings_count_by_what_a_token_reads() -> None:
    experts = ModelConfig.from_dict(
        {
            "architectures": ["MixtralForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "num_local_experts": 4,
            "num_experts_per_tok": 2, "tie_word_embeddings": False,
        }
    )  # fmt: skip
    specs = resolve(experts, "float32")
    read = sum(step_bytes(experts, specs).values())
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 2 * 3 * 64 * 128
    assert read == pytest.approx(4 * (2 * layer + 512 * 64 + 64))
    assert sum(step_macs(experts, specs).values()) == 2 * layer


def test_elsewhere_is_a_roofline() -> None:
    machine = load_machine("a100-80gb")
    speed = predict_elsewhere(DEMO, INT4, CHOICE, 1 << 20, machine, "gpu")
    weights = sum(step_bytes(DEMO, INT4).values())
    bandwidth = machine.tier("gpu").read_bytes_per_s * EFFICIENCY
    assert speed.decode_tokens_per_s_at_start == pytest.approx(bandwidth / weights)
    assert speed.decode_tokens_per_s == pytest.approx(bandwidth / (weights + (1 << 20)))
    assert speed.prefill_tokens_per_s > speed.decode_tokens_per_s


XQUANT = Choice(weights="int4", kv="xquant(4bit)", context=1024)


def test_a_cache_that_rebuilds_its_keys_pays_for_the_arithmetic() -> None:
    one = profile([1e10] * len(WORKING_SETS_BYTES))
    plain, rebuilt = (predict_here(DEMO, INT4, choice, 1 << 20, one) for choice in (CHOICE, XQUANT))
    assert plain is not None
    assert rebuilt is not None
    macs = kv.step_macs("xquant(4bit)", cache_shape(DEMO), 1024)
    more = 1 / rebuilt.decode_tokens_per_s - 1 / plain.decode_tokens_per_s
    assert more == pytest.approx(macs / 1e11)  # longer than reading: 1e10 bytes a second
    assert rebuilt.decode_tokens_per_s_at_start == pytest.approx(plain.decode_tokens_per_s_at_start)
    slow = profile([1e6] * len(WORKING_SETS_BYTES))
    plain, rebuilt = (predict_here(DEMO, INT4, choice, 1 << 20, slow) for choice in (CHOICE, XQUANT))
    assert plain is not None
    assert rebuilt is not None
    more = 1 / rebuilt.decode_tokens_per_s - 1 / plain.decode_tokens_per_s
    assert more == pytest.approx(kv.read_bytes("xquant(4bit)", cache_shape(DEMO), 1024) / 1e6)


def test_the_plan_says_when_arithmetic_bounds_a_step() -> None:
    fast, slow = (profile([rate] * len(WORKING_SETS_BYTES)) for rate in (1e10, 1e6))
    assert "bound by arithmetic" in arithmetic_here(DEMO, INT4, XQUANT, fast)
    assert arithmetic_here(DEMO, INT4, XQUANT, slow) == ""  # reading is slower still
    assert arithmetic_here(DEMO, INT4, CHOICE, fast) == ""
    assert "FLOP for each byte" in arithmetic_elsewhere(DEMO, XQUANT, load_machine("raspberry-pi-5"), "ram")
    machine = load_machine("desktop-rtx-4090")
    plain, rebuilt = (predict_elsewhere(DEMO, INT4, choice, 1 << 20, machine, "gpu") for choice in (CHOICE, XQUANT))
    assert rebuilt.decode_tokens_per_s < plain.decode_tokens_per_s


def test_batches_share_the_weights_until_arithmetic_takes_longer() -> None:
    """A step of 1 and of 4 sequences takes as long; of 64 as long as the multiply-adds of 64 tokens."""
    one, overhead = profile([1e10] * len(WORKING_SETS_BYTES)), DEMO.num_layers * 20e-6 + 50e-6
    reading, macs = sum(step_bytes(DEMO, INT4).values()) / 1e10, sum(step_macs(DEMO, INT4).values())
    knee = reading / (macs / 1e11)
    assert 4 < knee < 64

    def matrices(batch: int) -> float:
        choice = replace(CHOICE, batch=batch)
        speed = predict_here(DEMO, INT4, choice, 0, one)
        assert speed is not None
        return batch / speed.decode_tokens_per_s_at_start - overhead

    assert matrices(1) == pytest.approx(reading) == pytest.approx(matrices(4))
    assert matrices(64) == pytest.approx(64 * macs / 1e11)
    assert batching_here(DEMO, INT4, CHOICE, one) == ""
    assert f"Up to {knee:.0f} sequences share" in batching_here(DEMO, INT4, replace(CHOICE, batch=4), one)
    assert f"{64 / knee:.1f} times as long" in batching_here(DEMO, INT4, replace(CHOICE, batch=64), one)
    machine = load_machine("raspberry-pi-5")
    assert "bound by arithmetic" in batching_elsewhere(DEMO, INT4, replace(CHOICE, batch=64), machine, "ram")

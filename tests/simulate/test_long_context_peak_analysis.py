"""The formulas of a long context's costs: published sizes, limits, derivatives, windows, experts, bad input."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.hardware import GB, GIB, load_machine
from memwall.models import DEMO_DIRECTORY, ModelConfig
from memwall.simulate.context_model import PUBLISHED_ATTENTION, PUBLISHED_MODEL, PUBLISHED_PEAK, ContextModel, Peak
from memwall.simulate.long_context_peak_analysis import HARDWARE, METRICS, SYMBOLS, Analysis, Effect, Workload


def analysis(context: float, *, model: ContextModel = PUBLISHED_MODEL, peak: Peak = PUBLISHED_PEAK, **work) -> Analysis:
    return Analysis(model=model, peak=peak, workload=Workload(context=context, **work))


def test_sizes_are_exact_and_keep_their_units() -> None:
    assert PUBLISHED_MODEL.token_bytes == 245_760
    assert PUBLISHED_MODEL.kv_bytes(100_000) == 24_576_000_000
    assert PUBLISHED_MODEL.kv_bytes(100_000) / GIB == pytest.approx(22.9, abs=0.05)
    assert PUBLISHED_MODEL.kv_bytes(100_000) / GB == pytest.approx(24.6, abs=0.05)
    assert PUBLISHED_MODEL.weight_bytes == 68 * GB
    without_groups = replace(PUBLISHED_MODEL, kv_heads=56)
    assert without_groups.token_bytes == 7 * PUBLISHED_MODEL.token_bytes


def test_published_times() -> None:
    fitted = replace(PUBLISHED_MODEL, prefill_attention=PUBLISHED_ATTENTION)
    assert analysis(50_000, model=fitted).prefill == pytest.approx(14.1, rel=0.01)
    assert analysis(4_000, model=fitted).prefill == pytest.approx(0.89, rel=0.01)
    own = analysis(50_000)
    assert own.prefill == pytest.approx(17.8, rel=0.01)
    assert replace(own, model=replace(PUBLISHED_MODEL, causal=False)).prefill > 1.3 * own.prefill
    assert own.answer == 250 * (68 * GB + 12_288_000_000) / (2_000 * GB)
    assert own.switch == 2 * 12_288_000_000 / (20 * GB)  # out and in
    assert own.critical_batch == 156
    assert round(own.balance_context) == 276_693


def test_weights_are_read_once_a_step_and_a_large_batch_turns_to_arithmetic() -> None:
    short = analysis(100, users=512)
    arithmetic, reads = short.step_parts(512)
    assert arithmetic > reads
    assert short.step_parts(100)[0] < short.step_parts(100)[1]
    assert short.answer_seconds(100) < 1.1 * short.answer_seconds(1)
    assert 156 < short.turning_batch < 512
    # grouped queries give 7 FLOP a byte of keys and values: at 4K every user brings more to read than to compute
    assert math.isinf(analysis(4_000).turning_batch)


def test_users_come_in_whole_numbers() -> None:
    assert [analysis(tokens).users for tokens in (4_000, 50_000, 100_000)] == [18, 1, 0]
    nobody = analysis(100_000)
    assert (nobody.sessions, nobody.sessions_in_turn, nobody.least_devices) == (0, 0, 2)
    one, two, four = (analysis(50_000, peak=PUBLISHED_PEAK.times(count)).users for count in (1, 2, 4))
    assert two > 2 * one
    assert four > 2 * two  # weights are paid for once


def test_nobody_is_switched_where_all_fit() -> None:
    fits, crowded = analysis(4_000, users=18), analysis(4_000, users=19)
    assert fits.sessions == 18 / (fits.prefill + 5 * fits.answer_seconds(18))
    assert crowded.sessions == 18 / (crowded.prefill + 5 * (crowded.answer_seconds(18) + crowded.switch))
    slow = analysis(4_000, users=18, reading_seconds=1000.0)
    assert slow.sessions == pytest.approx(18 / (fits.session_seconds + 6 * 1000))
    assert fits.sessions_in_turn < fits.sessions


def test_each_cost_has_the_limit_that_the_paper_names() -> None:
    for context in (4_000, 50_000, 1_000_000):
        one = analysis(context, peak=PUBLISHED_PEAK.times(8))
        assert [one.bottleneck(metric) for metric in METRICS[:4]] == list(HARDWARE)
    assert analysis(10, peak=replace(PUBLISHED_PEAK, memory_bytes=GB)).bottleneck("users") is None
    assert analysis(10).bottleneck("prefill") == "bandwidth"  # fewer tokens than the critical batch


def test_derivatives_are_those_of_the_formulas() -> None:
    one = analysis(50_000, users=100)
    n, k, weights, bandwidth = 50_000, 245_760, 68 * GB, 2_000 * GB
    assert one.derivative("answer", "n") == pytest.approx(250 * k / bandwidth, rel=1e-4)
    assert one.derivative("answer", "k") == pytest.approx(250 * n / bandwidth, rel=1e-4)
    assert one.derivative("answer", "W") == pytest.approx(250 / bandwidth, rel=1e-4)
    assert one.derivative("answer", "bandwidth") == pytest.approx(-one.answer / bandwidth, rel=1e-4)
    assert one.derivative("switch", "n") == pytest.approx(2 * k / (20 * GB), rel=1e-4)
    assert one.derivative("users", "memory") == pytest.approx(1 / (n * k), rel=1e-4)
    assert one.derivative("users", "W") == pytest.approx(-1 / (n * k), rel=1e-4)
    slope = (2 * 34 * GB + 4 * 60 * 7168 * n) / (312_000 * GB)
    assert one.derivative("prefill", "n") == pytest.approx(slope, rel=1e-4)
    assert weights == one.weight_bytes


@given(
    context=st.integers(16, 10**7),
    users=st.integers(1, 5000),
    rounds=st.integers(1, 50),
    devices=st.integers(1, 64),
    held=st.floats(0.001, 1),
)
def test_bounds_hold_everywhere(context: int, users: int, rounds: int, devices: int, held: float) -> None:
    one = replace(
        analysis(context, users=users, rounds=rounds, peak=PUBLISHED_PEAK.times(devices)),
        effect=Effect(held=held, read=held, switched=held),
    )
    smooth = replace(one, whole=False)
    assert one.users <= smooth.users < one.users + 1
    assert 0 <= one.sessions_in_turn <= one.sessions
    assert one.weight_bytes + one.users * one.kv_bytes <= one.peak.memory * (1 + 1e-12) or one.users == 0
    longer = replace(one, workload=replace(one.workload, context=2 * context))
    assert longer.users <= one.users
    for metric in ("prefill", "answer", "switch"):
        assert longer.value(metric) >= one.value(metric)
    assert all(math.isfinite(one.elasticity(metric, symbol)) for metric in METRICS for symbol in SYMBOLS)


def test_windows_and_experts() -> None:
    half = replace(PUBLISHED_MODEL, windows=(None, 1000) * 30)
    assert half.kv_bytes(4_000) == 30 * (4_000 + 1_000) * half.layer_token_bytes
    pairs = sum(min(place, 1000) for place in range(1, 4001)) * 30 + 30 * 4000 * 4001 / 2
    assert half.pairs(4_000) == pytest.approx(pairs, rel=0.001)
    mixture = replace(PUBLISHED_MODEL, experts=8, experts_per_token=2, expert_bytes=60 * GB)
    assert mixture.step_read_bytes(1) == 8 * GB + 15 * GB
    assert mixture.step_read_bytes(1) < mixture.step_read_bytes(4) < mixture.step_read_bytes(100) <= 68 * GB


def test_a_model_is_read_from_its_configuration() -> None:
    config = ModelConfig.from_directory(DEMO_DIRECTORY)
    one = ContextModel.of(config, "demo")
    assert one.token_bytes == 2 * config.num_layers * config.num_kv_heads * config.head_dim * 2
    assert one.weight_bytes == 2 * config.num_parameters
    linear = sum(tensor.size for tensor in config.tensors() if tensor.role == "linear")
    assert one.parameters == linear
    assert one.head_parameters == config.vocab_size * config.hidden_size
    assert ContextModel.of(config, "demo", weights="float32").dtype == "float32"


def test_machines_and_exchange() -> None:
    card = Peak.of(load_machine("a100-80gb"), "bfloat16")
    assert (card.memory_bytes, card.flop_per_s) == (80 * GIB, 312_000 * GB)
    assert card.link_bytes_per_s == pytest.approx(32 * GB)
    laptop = Peak.of(load_machine("laptop-ryzen-7840u"), "float32")
    assert 5 * GB < laptop.link_bytes_per_s < 7 * GB  # between the disk's writes and reads
    pair = replace(card.times(2), peer_bytes_per_s=300 * GB)
    more = analysis(50_000, peak=pair).prefill - analysis(50_000, peak=card.times(2)).prefill
    assert more == pytest.approx(2 * 60 * 2 * 50_000 * 7168 / (300 * GB))
    reached = replace(card, shares=(0.5, 1.0, 1.0))
    assert analysis(50_000, peak=reached).prefill == 2 * analysis(50_000, peak=card).prefill


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"memory_bytes": 0}, "memory_bytes is 0"),
        ({"flop_per_s": math.inf}, "finite"),
        ({"shares": (1.0, 1.2, 1.0)}, "shares"),
        ({"peer_bytes_per_s": -1.0}, "between devices"),
    ],
)
def test_bad_devices(changes: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        replace(PUBLISHED_PEAK, **changes)


def test_bad_workloads() -> None:
    with pytest.raises(InputError, match="context is 0"):
        Workload(context=0)
    with pytest.raises(InputError, match="reading_seconds"):
        Workload(context=1, reading_seconds=math.nan)
    with pytest.raises(InputError, match="no second tier"):
        Peak.of(replace(load_machine("raspberry-pi-5"), tiers=load_machine("raspberry-pi-5").tiers[:1]), "float32")

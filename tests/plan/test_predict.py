"""Predicted rows against the ledger of what is really loaded, to the byte."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from memwall import kernels, kv
from memwall.engine import Sampling, Settings, load
from memwall.errors import InputError
from memwall.memory.pages import HUGE_PAGE_BYTES, PAGE_BYTES, round_up
from memwall.models import ModelConfig, model_directory
from memwall.models.decoder import scratch_bytes
from memwall.plan import predict
from memwall.plan.base import Choice
from memwall.plan.predict import ModelSpace, activations, check_policy, check_weights, sampling_bytes
from memwall.plan.search import Goal, grid, mixed, search

DEMO = model_directory("demo")
CONFIG = ModelConfig.from_directory(DEMO)


@pytest.mark.parametrize(
    ("weights", "policy", "context"),
    [
        ("int4", "float16", 96),
        ("mixed-3.70", "float32", 64),
        ("float16", "kivi(2bit)", 400),
        ("int2", "kivi(4bit)", 130),
    ],
)
def test_rows_equal_the_ledger(weights: str, policy: str, context: int) -> None:
    choice = Choice(weights=weights, kv=policy, context=context, segment_tokens=min(context, 128))
    kernels.set_num_threads(1)  # each thread keeps a panel
    predicted = {row.owner: row.nbytes for row in ModelSpace(CONFIG).rows(choice)}
    settings = Settings(
        weights=weights, kv=policy, context_tokens=context, segment_tokens=choice.segment_tokens, threads=1
    )
    session = load(DEMO, settings)
    tokens = np.arange(context) % 100 + 5
    session.prefill(list(tokens))
    held = {row.owner: row.nbytes for row in session.ledger.rows() if row.owner != "runtime"}
    # the prompt's staging is predicted, since the peak holds it, but gone once the prompt is in
    staging = {owner for owner in predicted if owner.endswith("staging")}
    apart = {predict.RUNTIME, predict.HEADROOM, predict.LOADING, *staging}
    assert {owner: size for owner, size in predicted.items() if owner not in apart} == held


def test_rows_add_up_to_the_peak_and_follow_the_device() -> None:
    choice = Choice(weights="int4", kv="float16", context=64, segment_tokens=64, device="gpu")
    space = ModelSpace(CONFIG, device_tier="gpu", runtime_bytes=1000, headroom_bytes=10)
    peak = space.peak_bytes(choice)
    assert sum(peak.values()) == sum(row.nbytes for row in space.rows(choice))
    assert peak["ram"] == 1010 + space.loading_bytes("int4")
    scratch = scratch_bytes(CONFIG, space.specs("int4"), 64)
    assert peak["gpu"] == sum(space.weight_rows("int4").values()) + activations(CONFIG, 64) + scratch + sum(
        kv.predict("float16", space.shape, 64, 64).values()
    )


def test_what_the_caller_holds_is_counted() -> None:
    choice = Choice(weights="int4", kv="float16", context=64)
    plain, more = ModelSpace(CONFIG), ModelSpace(CONFIG, extra_bytes={predict.RUNTIME: 1000, **sampling_bytes(CONFIG)})
    before, after = ({row.owner: row.nbytes for row in space.rows(choice)} for space in (plain, more))
    assert after.pop("sampling") == 16 * CONFIG.vocab_size
    assert after == {**before, predict.RUNTIME: before[predict.RUNTIME] + 1000}
    session = load(DEMO, Settings(weights="int4", context_tokens=64))
    session.prepare(Sampling(temperature=0.5))
    session.prepare(Sampling(temperature=0.5))
    assert session.ledger.owned("sampling") == 16 * CONFIG.vocab_size


def test_scratch_follows_the_threads_planned_for() -> None:
    space = ModelSpace(CONFIG)
    kernels.set_num_threads(1)
    rows = [space.rows(Choice(weights="int4", kv="float16", context=64, threads=n)) for n in (1, 16)]
    one, many = ({row.owner: row.nbytes for row in each}["kernels/scratch"] for each in rows)
    kernels.set_num_threads(16)
    assert many == scratch_bytes(CONFIG, space.specs("int4"), 512) > one
    kernels.set_num_threads(1)


def test_loading_counts_only_above_what_comes_later() -> None:
    space = ModelSpace(CONFIG)
    short = {
        row.owner: row.nbytes for row in space.rows(Choice(weights="int4", kv="float16", context=1, segment_tokens=1))
    }
    long = {row.owner for row in space.rows(Choice(weights="int4", kv="float32", context=1024))}
    # the last matrix in float16 while it is encoded, on whole pages and one more; weights come by whole huge pages
    last = round_up(2 * CONFIG.hidden_size * CONFIG.intermediate_size) + PAGE_BYTES
    assert last <= space.loading_bytes("int4") < last + HUGE_PAGE_BYTES
    assert 0 < short[predict.LOADING] < space.loading_bytes("int4")
    assert predict.LOADING not in long


def test_batch_multiplies_cache_and_activations_but_not_weights() -> None:
    space = ModelSpace(CONFIG, runtime_bytes=0, headroom_bytes=0)
    choice = Choice(weights="int4", kv="float16", context=1024)
    one, four = (space.peak_bytes(replace(choice, batch=n))["ram"] for n in (1, 4))
    scratch = scratch_bytes(CONFIG, space.specs("int4"), choice.segment_tokens, threads=choice.threads)
    weights = sum(space.weight_rows("int4").values()) + scratch
    assert four - weights == 4 * (one - weights)


def test_bits_rise_along_the_grid() -> None:
    space = ModelSpace(CONFIG)
    low, high = grid(space)
    bits = [space.weight_bits(mixed(space, k)) for k in range(low, high + 1, 25)]
    assert bits == sorted(bits)
    sizes = [sum(space.weight_rows(mixed(space, k)).values()) for k in range(low, high + 1, 25)]
    assert sizes == sorted(sizes)
    assert all(abs(space.weight_bits(mixed(space, k)) - k / 100) < 0.2 for k in range(low, 825, 25))


@pytest.mark.parametrize("formats", ["(e2m1,posit8)", "(posit8,nf4,e2m1)", "(int3,nf4,e4m3)"])
def test_other_formats_are_mixed_on_the_same_grid(formats: str) -> None:
    space = ModelSpace(CONFIG)
    integers = space.uniform
    space.mix(formats)
    low, high = grid(space)
    bits = [space.weight_bits(mixed(space, k)) for k in range(low, high + 1, 50)]
    assert bits == sorted(bits)
    used = set(space.specs(mixed(space, (low + high) // 2)).values()) - {"float32"}
    assert used <= {*space.uniform, space.ceiling, "int4-g64"}
    assert any(not spec.startswith("int") for spec in used)
    space.mix(None)
    assert space.uniform == integers
    assert mixed(space, 400) == "mixed-4.00"


def test_stored_bits_leave_the_tail_out() -> None:
    space = ModelSpace(CONFIG)
    assert space.stored_bits("float16") == 16
    assert 2 < space.stored_bits("kivi(2bit)") < 4
    assert space.cache_bits(Choice(weights="int4", kv="kivi(2bit)", context=64, segment_tokens=64)) > 16


def test_a_compressed_folder_has_one_choice() -> None:
    saved = ModelSpace(CONFIG).specs("int3")
    space = ModelSpace(CONFIG, saved=saved)
    assert space.ceiling == "saved"
    assert space.uniform == ("saved",)
    assert grid(space)[1] - grid(space)[0] <= 1
    assert space.weight_bits("saved") == pytest.approx(space.weight_bits("int3"))


def test_unknown_settings_are_named() -> None:
    space = ModelSpace(CONFIG)
    with pytest.raises(InputError, match="int9"):
        check_weights(space, "int9")
    with pytest.raises(InputError, match="zipped"):
        check_policy(space, "zipped")
    check_weights(space, "auto")
    check_policy(space, "auto")


def test_runtime_is_kept_and_has_a_default(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def measured(script: str, *arguments: str) -> int | None:
        calls.append(script)
        return 41_000_000

    monkeypatch.setattr(predict, "_measured", measured)
    assert predict.measured_runtime_bytes(DEMO) == 41_000_000
    assert predict.measured_runtime_bytes(DEMO) == 41_000_000
    assert len(calls) == 1


def test_runtime_default_when_it_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "_measured", lambda script, *arguments: None)
    assert predict.measured_runtime_bytes(DEMO) == predict.DEFAULT_RUNTIME_BYTES


def test_what_lies_elsewhere_is_on_its_own_tier() -> None:
    """A cache on storage: its file and its process take nothing of the host's memory."""
    choice = Choice(weights="int4", kv="instinfer(1)", context=512, segment_tokens=128)
    space = ModelSpace(CONFIG)
    tiers = {row.owner: row.tier for row in space.rows(choice)}
    assert tiers["kv/flash"] == "disk"
    assert tiers["kv/storage process"] == tiers["runtime/storage process"] == "storage"
    assert tiers["kv/link"] == "ram"
    peaks = space.peak_bytes(choice)
    plain = space.peak_bytes(Choice(weights="int4", kv="float16", context=512, segment_tokens=128))
    held = kv.predict("instinfer(1)", space.shape, 512, 128)
    assert peaks["disk"] == held["kv/flash"]
    assert plain["ram"] - peaks["ram"] == kv.predict("float16", space.shape, 512)["kv/full"] - sum(
        held[owner] for owner in ("kv/link", "kv/staging")
    )


def test_heads_that_kivi_does_not_know_get_another_cache() -> None:
    """Whatever the size of its heads, a model can be planned for without naming a cache."""
    odd = ModelConfig.from_dict({**CONFIG.source, "head_dim": 20}, "odd")
    space = ModelSpace(odd, runtime_bytes=0, headroom_bytes=0)
    assert space.policies == predict.OF_ANY_HEAD
    assert ModelSpace(CONFIG, runtime_bytes=0).policies == predict.POLICIES
    least = search(space, Goal(budget={"ram": 1 << 30}, context=64))[0].choice
    assert least.kv == "float16"
    smallest = space.peak_bytes(replace(least, weights=space.uniform[0], kv="int8"))["ram"]
    assert search(space, Goal(budget={"ram": smallest}, context=64))[0].choice.kv == "int8"

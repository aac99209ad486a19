"""Whole plans of the demo model: the promises of the command, with quality and kernels stubbed or bounded."""

from __future__ import annotations

from pathlib import Path

import pytest

from memwall.errors import DoesNotFit, InputError
from memwall.memory import Budget
from memwall.models import model_directory
from memwall.plan import Choice, Goal, Plan, Planner, Quality, make_plan, store
from memwall.plan import choose as choose_module
from memwall.plan.choose import held_out_text

DEMO = model_directory("demo")
RUNTIME = 40_000_000


def planned(budget: int | None, **settings: object) -> Plan:
    options: dict[str, object] = {"measure": False, "runtime_bytes": RUNTIME, "threads": 1, "context": 256}
    return make_plan(DEMO, budget=Budget(tiers={"ram": budget}) if budget else None, **(options | settings))  # type: ignore[arg-type]


def between(share: float, kv: str = "float16", context: int = 256) -> int:
    """A budget that share of the way from the least weights that fit to the weights as they are."""
    space = Planner(DEMO, runtime_bytes=RUNTIME, profile=False).space
    ends = [
        space.peak_bytes(Choice(weights=weights, kv=kv, context=context, segment_tokens=min(512, context)))["ram"]
        for weights in ("int2-g64-asym", space.ceiling)
    ]
    return int(ends[0] + share * (ends[1] - ends[0]))


def test_reads_headers_only_and_stays_under_the_budget() -> None:
    for share in (0.05, 0.2, 0.5, 3):
        budget = between(share)
        plan = planned(budget)
        assert plan.fits
        assert plan.peak_bytes["ram"] <= budget
        assert sum(row.nbytes for row in plan.rows) == plan.peak_bytes["ram"]
        assert Plan.from_json(plan.to_json()) == plan
        assert plan.quality is None
        assert plan.explanation.count(". ") == 1


def test_bits_grow_with_the_budget_and_use_it() -> None:
    plans = [planned(between(share / 20), kv="float16") for share in range(20)]
    bits = [plan.bits_per_weight for plan in plans]
    assert bits == sorted(bits)
    assert bits[-1] > bits[0]
    for plan in plans:
        if plan.choice.weights != "float16":
            assert plan.peak_bytes["ram"] >= 0.95 * plan.budget["ram"]


def test_named_formats_are_mixed_to_fill_the_budget() -> None:
    budget = between(0.4)
    plan = planned(budget, weights="auto(e2m1,posit8)", kv="float16")
    assert plan.choice.weights.startswith("mixed(e2m1,posit8)-")
    assert 0.95 * budget <= plan.peak_bytes["ram"] <= budget
    assert {row.owner for row in plan.rows} >= {"weights/e2m1-g64", "weights/posit8es0-g64"}
    again = planned(None, weights=plan.choice.weights, kv="float16")
    assert again.peak_bytes == plan.peak_bytes
    assert planned(budget, kv="float16").choice.weights.startswith(("mixed-", "int"))
    for wrong, says in (("auto(nf4)", "two formats"), ("auto(nf4,spqr3)", "compress alone"), ("auto(x,y)", "unknown")):
        with pytest.raises(InputError, match=says):
            planned(budget, weights=wrong)


def test_smallest_budget_works_and_one_byte_less_does_not() -> None:
    with pytest.raises(DoesNotFit) as refused:
        planned(RUNTIME + 1)
    smallest = int(str(refused.value).rpartition("--memory ")[2])
    assert planned(smallest).peak_bytes["ram"] <= smallest
    with pytest.raises(DoesNotFit, match=str(smallest)):
        planned(smallest - 1)


def test_exact_settings_answer_whether_or_not_they_fit() -> None:
    fitting = planned(between(2), weights="int4", kv="float16")
    assert fitting.choice.weights == "int4"
    assert fitting.fits
    tight = planned(between(0.1), weights="float16", kv="float32")
    assert not tight.fits
    assert "does not fit" in tight.explanation
    assert planned(None, weights="int3", kv="kivi(2bit)").budget == {}


def test_runners_up_are_others_and_say_why_not() -> None:
    plan = planned(between(0.2))
    assert plan.runners_up
    assert all(option.note for option in plan.runners_up)
    assert all(option.choice != plan.choice for option in plan.runners_up)
    assert any("more" in option.note and "needs" in option.note for option in plan.runners_up)


def test_another_machine_gives_tiers_and_speed() -> None:
    plan = make_plan(DEMO, machine="a100-80gb", measure=False, runtime_bytes=RUNTIME, context=512)
    assert set(plan.peak_bytes) == {"gpu", "ram"}
    assert plan.choice.device == "gpu"
    assert plan.budget["gpu"] == 80 * 2**30
    assert plan.decode_tokens_per_s is not None
    with pytest.raises(InputError, match="a100"):
        make_plan(DEMO, machine="a100-80", measure=False, runtime_bytes=RUNTIME)


def test_measured_quality_decides_is_kept_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[str, str]] = []

    class Stub:
        def __init__(self, *arguments: object, **settings: object) -> None:
            pass

        def score(self, weights: str, kv: str, progress: object = None) -> object:
            measured.append((weights, kv))
            loss = 0.3 if kv == "float16" else 0.2

            class Figures:
                kl_nats, perplexity, top1_agreement, tokens = loss, 20.0, 0.9, 100

            return Figures()

    monkeypatch.setattr("memwall.engine.quality.Evaluator", Stub)
    planner = Planner(DEMO, runtime_bytes=RUNTIME, profile=False)
    goal = Goal(budget={"ram": between(0.2)}, context=256, threads=1)
    monkeypatch.setattr(choose_module, "Figures", None, raising=False)
    plan = planner.plan(goal)
    assert plan.quality is not None
    assert plan.choice.kv != "float16"
    assert "0.2 nats" in plan.explanation
    count = len(measured)
    assert planner.plan(goal, measure=False).quality == plan.quality
    assert len(measured) == count
    assert store.read("quality")


def test_unknown_model_and_settings_are_input_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        make_plan(tmp_path / "absent", runtime_bytes=RUNTIME)
    with pytest.raises(InputError, match="int9"):
        planned(10**8, weights="int9")
    with pytest.raises(InputError, match="zip"):
        planned(10**8, kv="zip")
    with pytest.raises(InputError, match=r"1 to [0-9]+ tokens"):
        planned(10**8, context=1_000_000)
    with pytest.raises(InputError, match="cpu or gpu"):
        planned(10**8, device="tpu")
    with pytest.raises(InputError, match="measure"):
        planned(10**8, max_kl=0.1)


def test_real_measurement_of_one_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose_module, "MEASURED_TOKENS", 96)
    planner = Planner(DEMO, runtime_bytes=RUNTIME, profile=False)
    quality = planner.quality(Choice(weights="int3", kv="kivi(2bit)", context=128, segment_tokens=128))
    assert isinstance(quality, Quality)
    assert 0 < quality.kl_nats < 5
    assert 0 <= quality.top1_agreement <= 1


def test_held_out_text_is_plain_prose_of_a_useful_size() -> None:
    text = held_out_text()
    assert 30_000 < len(text) < 60_000
    assert text.isascii()


def test_a_cache_that_codes_the_prompt_gets_it_in_one_segment() -> None:
    sizes = {"kivi(2bit)": 700, "float16": 512}
    for policy, size in sizes.items():
        assert planned(10**9, kv=policy, context=900, prompt_tokens=700).choice.segment_tokens == size
        assert planned(10**9, weights="int4", kv=policy, context=900, prompt_tokens=700).choice.segment_tokens == size
        assert planned(10**9, kv=policy, context=900, prompt_tokens=5).choice.segment_tokens == 5

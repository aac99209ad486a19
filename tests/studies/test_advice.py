"""What the cache study says to somebody with no time."""

from __future__ import annotations

from typing import Any

from memwall.studies import kv_advice
from memwall.studies.kv_study import Row, Study
from memwall.studies.kv_tasks import QUICK


def row(policy: str, nats: float, right: tuple[float, float, float], held: tuple[int, int, int], **more: Any) -> Row:
    """right: at the prompt's end, later, in conversation; held: bytes of 1,000 in text, recall, talk."""
    told = dict(zip(("text", "recall", "talk"), ({"kv_bytes": n, "float16_bytes": 1000} for n in held)))
    told["text"] |= {"kl_nats": nats}
    told["recall"] |= {"recall": right[0], "later": right[1]}
    told["talk"] |= {"talk": right[2]}
    return Row(method=policy.split("(")[0], policy=policy, budget=0.5, figures=told, **more)


ROWS = [
    row("float16", 0.0, (0.8, 0.8, 0.8), (1000, 1000, 1000)),
    row("kivi(4bit)", 0.01, (0.8, 0.6, 0.7), (480, 450, 460)),
    row("kivi(2bit)", 0.2, (0.5, 0.1, 0.6), (250, 240, 240)),
    row("snapkv(0.25)", 0.3, (0.8, 0.2, 0.8), (600, 250, 960)),
    row("best there is", 0.0, (1.0, 1.0, 1.0), (100, 100, 100), library="a peer"),
    Row(method="think", policy="think(0.9)", budget=0.25, skipped="its least is 0.55 of float16 here"),
]


def study(rows: list[Row]) -> Study:
    return Study(model="demo", fingerprint="f", weights="float32", sizes=QUICK, machine="m", seconds=1.0, rows=rows)


def test_each_goal_gets_the_best_row_that_fits_where_it_is_used() -> None:
    picked = {(pick.budget, pick.goal): pick.policy for pick in kv_advice.picks(study(ROWS))}
    assert picked[0.5, kv_advice.ALL] == picked[0.5, "going on with text"] == "kivi(4bit)"
    assert picked[0.5, "questions in later turns"] == picked[0.5, "a conversation"] == "kivi(4bit)"
    # as many right answers as snapkv, and nearer to the exact model
    assert picked[0.5, "a question at the prompt's end"] == "kivi(4bit)"
    assert picked[0.25, "a question at the prompt's end"] == "snapkv(0.25)"
    assert picked[0.25, "a conversation"] == picked[0.25, kv_advice.ALL] == "kivi(2bit)"


def test_budgets_that_nothing_meets_say_so() -> None:
    tight = [ROWS[0], ROWS[1], Row(method="think", policy="", budget=0.1, skipped="too large")]
    told = kv_advice.sentences(study(tight))
    assert len(told) == 3
    assert "take kivi(4bit)" in told[0]
    assert "In 0.1 of float16's bytes nothing" in told[1]
    assert "Nearest is kivi(4bit)" in told[1]
    assert told[2].startswith("float16 itself: 0.0000 nats")
    assert kv_advice.table(study(tight))[1] == ["0.1", *["-"] * 5]


def test_rows_that_are_not_finished_are_not_offered() -> None:
    half = Row(method="kivi", policy="kivi(3bit)", budget=0.5, figures={"text": ROWS[1].figures["text"]})
    picked = {pick.goal: pick.policy for pick in kv_advice.picks(study([half]))}
    assert picked["going on with text"] == "kivi(3bit)"
    assert picked[kv_advice.ALL] is None
    assert kv_advice.sentences(study([])) == []


def test_the_json_form_holds_the_advice() -> None:
    found = study(ROWS).to_dict()
    assert next(iter(found)) == "version"
    assert {"budget": 0.5, "goal": "anything", "policy": "kivi(4bit)"} in found["advice"]

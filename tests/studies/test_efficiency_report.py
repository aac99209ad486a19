"""Tables of the efficiency study, from records made by hand."""

from __future__ import annotations

from memwall.studies import efficiency_report
from memwall.studies.efficiency_sizes import TINY
from memwall.studies.efficientllm import Study
from tests.studies.efficiency_runs import make_record


def study(*records: object) -> Study:
    return Study(records=records, left_out=("peft: not here",), sizes=TINY, machine="m", seconds=1.0)  # type: ignore[arg-type]


RUNS = (
    make_record("mha", losses=[1.0, 2.0], memory=4_000_000, step_s=0.004),
    make_record("mqa", losses=[1.2, 2.1], memory=1_000_000, step_s=0.001, figures={"others": 0.5}),
    make_record("full", losses=[1.0], memory=9, step_s=1.0, axis="peft", stage="fine-tuning", num_trainable=10),
    make_record("lora", losses=[1.0], memory=9, step_s=1.0, axis="peft", stage="fine-tuning", num_trainable=2),
)


def test_lines_hold_values_and_ranks() -> None:
    found = efficiency_report.groups(study(*RUNS))
    mha, mqa = efficiency_report.lines(found["attention", "1M", "inference"])
    assert mha[:6] == ["mha", "10", "1.5000 (1)", "-", "4.00 MB (2)", "4.00 MB"]
    assert mqa[3] == "+0.1500 ±0.0500"
    assert mqa[7] == "1 ms (1)"
    assert len(mha) == len(efficiency_report.COLUMNS)
    full, lora = efficiency_report.lines(found["peft", "1M", "fine-tuning"])
    assert (full[1], lora[1]) == ("10", "2 of 10")


def test_remarks_say_what_disturbed_what_is_left_out_and_what_cannot_be_told_apart() -> None:
    told = "\n".join(efficiency_report.remarks(study(*RUNS)))
    assert "other processes took up to 50% of the machine" in told
    assert "left out: peft: not here" in told
    assert "modelled" in told
    assert "attention, inference: first in quality mha; amu mqa" in told
    near = make_record("gqa", losses=[1.2, 1.8], memory=1, step_s=1.0)
    assert "losses of gqa are not separable from mha's" in "\n".join(efficiency_report.remarks(study(RUNS[0], near)))


def test_json_is_whole() -> None:
    told = efficiency_report.to_dict(study(*RUNS), {"amu": 1.0})
    assert told["weights"] == {"amu": 1.0}
    assert [row["technique"] for row in told["rows"]] == ["mha", "mqa", "full", "lora"]
    assert len(told["records"]) == 4

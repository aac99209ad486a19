"""XR-NPE's choice of formats by layer: the greedy rule, the notebook's rule, whole runs over a small model."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memwall.compress import METHODS, weight_method
from memwall.compress.allocate import Candidate
from memwall.compress.model import compress_model
from memwall.compress.xr_npe import FORMS, XrNpe, by_share, candidates, greedy, sensitivity
from memwall.errors import InputError
from memwall.formats import codec
from memwall.models.precision import LAYER_ADAPTIVE, bits_of, resolve
from tests.compress.tiny_model import QUICK, make_model


def losses(*pairs: tuple[int, float]) -> list[Candidate]:
    return [Candidate(spec=f"s{nbytes}", nbytes=nbytes, loss=loss) for nbytes, loss in pairs]


def test_the_step_of_largest_gain_per_byte_comes_first() -> None:
    table = [losses((4, 8.0), (8, 0.0)), losses((4, 9.0), (8, 6.0))]
    assert [each.nbytes for each in greedy(table, 12)] == [8, 4]
    assert [each.nbytes for each in greedy(table, 16)] == [8, 8]
    assert [each.nbytes for each in greedy(table, 8)] == [4, 4]
    with pytest.raises(InputError, match="1 bytes more"):
        greedy(table, 7)


def test_of_two_forms_of_the_same_bytes_the_better_one() -> None:
    assert greedy([losses((4, 3.0), (4, 2.0), (8, 2.5))], 100)[0].loss == 2.0


@given(st.lists(st.lists(st.tuples(st.integers(1, 9), st.floats(0, 9)), min_size=1, max_size=3), max_size=4), st.data())
def test_greedy_keeps_the_budget_and_never_loses(table: list[list[tuple[int, float]]], data: st.DataObject) -> None:
    options = [losses(*row) for row in table]
    smallest = [min(row, key=lambda each: (each.nbytes, each.loss)) for row in options]
    budget = sum(each.nbytes for each in smallest) + data.draw(st.integers(0, 20))
    chosen = greedy(options, budget)
    assert sum(each.nbytes for each in chosen) <= budget
    assert sum(each.loss for each in chosen) <= sum(each.loss for each in smallest)
    best = min(
        sum(each.loss for each in pick)
        for pick in itertools.product(*options)
        if sum(each.nbytes for each in pick) <= budget
    )
    assert sum(each.loss for each in chosen) >= best - 1e-9


def test_sensitivity_by_hand() -> None:
    weight = np.zeros((1, 64), np.float32)
    weight[0, :3] = 6.0, 2.4, 0.2  # in e2m1 of scale 1: 6, 2 and 0
    fisher = np.zeros_like(weight)
    fisher[0, :3] = 1.0, 2.0, 3.0
    assert sensitivity(weight, fisher, "e2m1-g64") == pytest.approx(0.5 * (2 * 0.4**2 + 3 * 0.2**2), rel=1e-5)
    found = candidates(weight, fisher, FORMS)
    assert [each.spec for each in found] == list(FORMS)
    assert found[2].loss < found[0].loss
    assert [each.nbytes for each in found] == [codec(spec).nbytes((1, 64)) for spec in FORMS]


def test_the_notebook_widens_a_share() -> None:
    scores = {f"layer{at}": float(at % 7) for at in range(11)}
    chosen = by_share(scores, 0.18)
    assert sorted(name for name, spec in chosen.items() if spec.startswith("posit8")) == ["layer6", "layer5"][::-1]
    assert set(by_share(scores, 0.0).values()) == {"e2m1-g64"}


def test_a_whole_run_without_torch(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", dtype="float16")
    options = {"sensitivity": "measured"}
    report = compress_model(source, tmp_path / "out", method="xr-npe", options=options, tuning=QUICK)
    inner = {spec for name, spec in report.specs.items() if "layers" in name and "proj" in name}
    assert inner <= {codec(spec).spec for spec in FORMS}
    assert report.specs["model.embed_tokens.weight"] == "float16"
    again = compress_model(source, tmp_path / "out2", method="xr-npe", options=options, tuning=QUICK, bits=13)
    assert again.bits_per_weight <= 13
    with pytest.raises(InputError, match="least this model takes"):
        compress_model(source, tmp_path / "out3", method="xr-npe", options=options, tuning=QUICK, bits=5)


@pytest.mark.parametrize("options", [{}, {"sensitivity": "notebook"}, {"qat_steps": "2"}], ids=str)
def test_a_whole_run_with_torch(tmp_path: Path, options: dict[str, str]) -> None:
    pytest.importorskip("torch")
    from memwall.engine.quality import evaluate

    source = make_model(tmp_path / "model", dtype="float16")
    report = compress_model(source, tmp_path / "out", method="xr-npe", options=options, tuning=QUICK)
    forms = [spec for name, spec in report.specs.items() if "layers" in name and "proj" in name]
    wide = sum(spec.startswith("posit8") for spec in forms)
    assert 0 < wide < len(forms)
    if options.get("sensitivity") == "notebook":
        assert wide == round(0.18 * len(forms))
    manifest = json.loads((tmp_path / "out" / "memwall.json").read_text())
    assert manifest["info"]["method"] == "xr-npe"
    text = tmp_path / "text.txt"
    text.write_text("The history of the city begins with a river and a hill above it. " * 20)
    assert evaluate(tmp_path / "out", text, weights="saved", limit_tokens=64).tokens


def test_the_choice_without_measurement() -> None:
    from memwall.models import DEMO_DIRECTORY, ModelConfig

    config = ModelConfig.from_directory(DEMO_DIRECTORY)
    specs = resolve(config, LAYER_ADAPTIVE)
    inner = [spec for name, spec in specs.items() if "proj" in name]
    assert inner.count("posit8es0-g64") == round(0.18 * len(inner))
    assert set(inner) == {"e2m1-g64", "posit8es0-g64"}
    assert specs["model.embed_tokens.weight"] == "float16"
    assert 6.5 < bits_of(config, resolve(config, "xr-npe-6.7")) <= 6.7
    for wrong in ("xr-npe-x", "xr-npe-3", "xr-npe-99"):
        with pytest.raises(InputError, match="bits"):
            resolve(config, wrong)


def test_settings_are_checked() -> None:
    assert METHODS["xr-npe"].endswith("XrNpe")
    assert isinstance(weight_method("xr-npe", {"share": "0.3"}), XrNpe)
    for name, value, says in (
        ("sensitivity", "guess", "fisher, notebook, measured"),
        ("share", "2", "between 0 and 1"),
        ("qat_steps", "-1", "count"),
        ("rate", "0", "rate of learning"),
        ("colour", "red", "no setting"),
    ):
        with pytest.raises(InputError, match=says):
            weight_method("xr-npe", {name: value})

"""Deviation-aware distillation: the loss by hand, scales that learn while bits stay, runs that go on after a stop."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from memwall.compress.db_llm_tuning import loss_of
from memwall.compress.model import compress_model
from memwall.compress.saved import TUNED_NAME
from memwall.errors import InputError
from memwall.formats import Packed, codec
from memwall.models import Checkpoint
from tests.compress.tiny_model import QUICK, contents, make_model
from tests.compress.whole_run import Stop

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
OPTIONS = {"tokens": "1024", "passes": "3", "rate": "0.02"}


def test_tokens_count_by_the_entropy_of_the_float_model() -> None:
    """Two tokens of two choices: one that is unsure (entropy log 2), one that is surer."""
    teacher = torch.log(torch.tensor([[0.5, 0.5], [0.9, 0.1]]))
    student = torch.log(torch.tensor([[0.25, 0.75], [0.6, 0.4]]))
    entropies = [math.log(2), -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))]
    crossed = [-0.5 * (math.log(0.25) + math.log(0.75)), -(0.9 * math.log(0.6) + 0.1 * math.log(0.4))]
    for gamma in (0.0, 1.0, 2.0):
        weights = [entropy**gamma for entropy in entropies]
        wanted = sum(w * c for w, c in zip(weights, crossed, strict=True)) / sum(weights)
        assert float(loss_of(teacher, student, gamma)) == pytest.approx(wanted, rel=1e-5)


def linears(folder: Path) -> dict[str, Packed]:
    with Checkpoint(folder) as checkpoint:
        found = {t.name: checkpoint.packed(t.name) for t in checkpoint.config.tensors() if t.role == "linear"}
        return {
            name: Packed(spec=p.spec, shape=p.shape, buffers={k: np.array(b) for k, b in p.buffers.items()})
            for name, p in found.items()
            if p is not None
        }


def test_scales_learn_and_bits_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_model(tmp_path / "source", num_hidden_layers=1, model_type="llama")
    compress_model(source, tmp_path / "plain", method="db-llm", tuning=QUICK)

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "train" and done == total:
            raise Stop

    with pytest.raises(Stop):
        compress_model(source, tmp_path / "out", method="db-llm", options=OPTIONS, tuning=QUICK, progress=stop)
    seen: list[tuple[int, int]] = []
    compress_model(
        source, tmp_path / "out", method="db-llm", options=OPTIONS, tuning=QUICK,
        progress=lambda stage, done, total: seen.append((done, total)) if stage == "train" else None,
    )  # fmt: skip
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert TUNED_NAME not in contents(tmp_path / "out")
    plain, tuned = linears(tmp_path / "plain"), linears(tmp_path / "out")
    moved = 0.0
    for name, packed in plain.items():
        np.testing.assert_array_equal(packed.buffers["codes"], tuned[name].buffers["codes"])
        old, new = (codec(each.spec).decode(each) for each in (packed, tuned[name]))
        assert (np.sign(old) == np.sign(new)).mean() > 0.99
        moved = max(moved, float(np.abs(new - old).max()))
    assert moved > 1e-3
    with Checkpoint(tmp_path / "out") as checkpoint:
        checkpoint.verify(digests=True)


def test_a_result_that_was_kept_is_only_put_in_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_model(tmp_path / "source", num_hidden_layers=1, model_type="llama")
    from memwall.compress import saved

    def broken(self: saved.WorkDirectory, *_: object) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(saved.WorkDirectory, "finish", broken)
        with pytest.raises(Stop):
            compress_model(source, tmp_path / "out", method="db-llm", options=OPTIONS, tuning=QUICK)
    monkeypatch.setattr("memwall.compress.db_llm_tuning.tune", lambda *_: pytest.fail("trained again"))
    report = compress_model(source, tmp_path / "out", method="db-llm", options=OPTIONS, tuning=QUICK)
    assert report.num_resumed_parts == 3


def test_training_is_refused_under_a_budget_and_bad_settings_are_named(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", num_hidden_layers=1, model_type="llama")
    with pytest.raises(InputError, match="leave out --memory"):
        compress_model(source, tmp_path / "out", method="db-llm", options=OPTIONS, budget_bytes=1 << 40, tuning=QUICK)
    with pytest.raises(InputError, match="gamma is -1"):
        compress_model(source, tmp_path / "out", method="db-llm", options={"gamma": "-1"}, tuning=QUICK)

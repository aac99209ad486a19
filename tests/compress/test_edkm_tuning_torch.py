"""Training of palettes: it pays, it is judged as stored, softness closes, a kept result is only put in again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from memwall.compress import saved
from memwall.compress.model import compress_model
from memwall.compress.saved import TUNED_NAME
from memwall.errors import InputError
from memwall.formats import Packed, codec
from memwall.models import Checkpoint
from tests.compress.tiny_model import QUICK, contents, make_model
from tests.compress.whole_run import Stop

torch = pytest.importorskip("torch")

from memwall.compress.base import MethodConfig, Statistics  # noqa: E402
from memwall.compress.edkm import Edkm  # noqa: E402
from memwall.compress.edkm_tuning_torch import Palettes, Recipe, Report, tuned_palettes  # noqa: E402

OPTIONS = {"steps": "6", "batch": "2", "rate": "0.003"}


def stored(folder: Path) -> dict[str, Packed]:
    with Checkpoint(folder) as checkpoint:
        names = [tensor.name for tensor in checkpoint.config.tensors()]
        found = {}
        for name in names:
            packed = checkpoint.packed(name) or codec("float32").encode(np.array(checkpoint.alone(name), np.float32))
            buffers = {key: np.array(buffer) for key, buffer in packed.buffers.items()}
            found[name] = Packed(spec=packed.spec, shape=packed.shape, buffers=buffers)
        return found


@pytest.mark.parametrize("ordered", [False, True])
def test_what_is_packed_is_what_was_judged(ordered: bool) -> None:
    weight = np.random.default_rng(0).standard_normal((24, 40)).astype(np.float32)
    if ordered:
        known = Statistics(np.diag(np.linspace(1, 4, 40)).astype(np.float32), 40)
        packed = Edkm(steps=0).compress(weight, known, MethodConfig(spec="vptq-v1-k8-g2-ordered"))
        assert not np.array_equal(packed.buffers["order"], np.arange(40))
        fresh = Palettes(packed, codec(packed.spec).decode(packed), Recipe(steps=1))
        np.testing.assert_array_equal(fresh.hard().numpy(), codec(packed.spec).decode(packed))
    else:
        packed = Edkm(steps=0).compress(weight, None, MethodConfig(spec="vptq-v1-k8-g2"))
    matrix = Palettes(packed, weight, Recipe(steps=1))
    for _ in range(3):
        matrix.soft()
    again = matrix.packed()
    np.testing.assert_array_equal(codec(again.spec).decode(again), matrix.hard().numpy())
    places = again.buffers.get("order", np.arange(40)).astype(np.int64)
    assert len(np.unique(matrix.hard().numpy()[:, places[:20]])) <= 8
    soft = matrix.soft().detach()
    matrix.hardness = 1e-4
    gap = [float((each - matrix.hard()).abs().mean()) for each in (soft, matrix.soft().detach())]
    assert gap[1] < 0.1 * gap[0]


@pytest.mark.parametrize("spec", ["vptq-v1-k8-b16", "vptq-v1-k4-g2-b10-ordered"])
def test_palettes_of_blocks(spec: str) -> None:
    """One loss step after the other: what is packed is what is judged, and the weights learn."""
    weight = np.random.default_rng(1).standard_normal((24, 40)).astype(np.float32) * np.linspace(0.2, 2, 24)[:, None]
    packed = Edkm(steps=0, start="line").compress(weight, None, MethodConfig(spec=spec))
    matrix = Palettes(packed, weight, Recipe(steps=1))
    np.testing.assert_array_equal(codec(spec).decode(matrix.packed()), matrix.hard().detach().numpy())
    wanted = torch.from_numpy(weight.astype(np.float32)) * 1.5
    optimizer = torch.optim.Adam([matrix.weight], lr=0.02)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (matrix.soft() - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]  # four values a palette leave much of it for good
    again = matrix.packed()
    np.testing.assert_array_equal(codec(spec).decode(again), matrix.hard().detach().numpy())
    assert again.nbytes == packed.nbytes


def test_training_lowers_what_it_is_judged_by_and_closes_the_gap(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", num_hidden_layers=1)
    compress_model(source, tmp_path / "plain", bits=2, method="edkm", options={"steps": "0"}, tuning=QUICK)
    tokens = np.random.default_rng(0).integers(0, 4096, (8, 64))
    report = Report()
    with Checkpoint(source) as checkpoint:
        recipe = Recipe(steps=24, rate=3e-3, batch=4)
        found = tuned_palettes(checkpoint, tokens, stored(tmp_path / "plain"), recipe, report=report)
    assert found
    (_, soft, hard), (_, soft_end, hard_end) = report.looks[0], report.looks[-1]
    assert min(look[2] for look in report.looks) < 0.95 * hard
    assert abs(hard_end - soft_end) < abs(hard - soft)


def test_a_run_that_was_cut_off_trains_anew_and_ends_as_one_that_was_not(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", num_hidden_layers=1)

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "train" and done == 2:
            raise Stop

    with pytest.raises(Stop):
        compress_model(source, tmp_path / "out", method="edkm", options=OPTIONS, tuning=QUICK, progress=stop)
    seen: list[tuple[int, int]] = []
    compress_model(
        source, tmp_path / "out", method="edkm", options=OPTIONS, tuning=QUICK,
        progress=lambda stage, done, total: seen.append((done, total)) if stage == "train" else None,
    )  # fmt: skip
    assert seen == [(step, 6) for step in range(1, 7)]
    compress_model(source, tmp_path / "straight", method="edkm", options=OPTIONS, tuning=QUICK)
    assert TUNED_NAME not in contents(tmp_path / "out")
    for name, packed in stored(tmp_path / "straight").items():
        other = stored(tmp_path / "out")[name]
        values = [codec(each.spec).decode(each) for each in (packed, other)]
        # threads add up in another order from run to run: a weight or two may take the next entry
        assert np.mean(~np.isclose(*values, rtol=1e-2, atol=1e-4)) < 0.01


def test_a_result_that_was_kept_is_only_put_in_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_model(tmp_path / "source", num_hidden_layers=1)

    def broken(self: saved.WorkDirectory, *_: object) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(saved.WorkDirectory, "finish", broken)
        with pytest.raises(Stop):
            compress_model(source, tmp_path / "out", method="edkm", options=OPTIONS, tuning=QUICK)
    monkeypatch.setattr("memwall.compress.edkm_tuning_torch.tuned_palettes", lambda *_: pytest.fail("trained again"))
    report = compress_model(source, tmp_path / "out", method="edkm", options=OPTIONS, tuning=QUICK)
    assert report.num_resumed_parts == 3


def test_training_is_refused_under_a_budget(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", num_hidden_layers=1)
    with pytest.raises(InputError, match="leave out --memory"):
        compress_model(source, tmp_path / "out", method="edkm", options=OPTIONS, budget_bytes=1 << 40, tuning=QUICK)

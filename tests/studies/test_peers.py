"""Other libraries in the same table: the same model says the same through them, and who is absent says why."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from memwall.errors import InputError
from memwall.models import model_directory
from memwall.plan.choose import held_out_text
from memwall.studies import kv_peers
from memwall.studies.subjects import CacheSubject, StudyModel

DEMO = model_directory("demo")


@pytest.fixture(scope="module")
def model() -> StudyModel:
    return StudyModel(DEMO, "float32")


def test_who_is_absent_is_listed_with_what_to_install(model: StudyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    absent = ("optimum", "kvpress")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name.startswith(absent) else real(name, *rest)
    )
    found = kv_peers.peers(DEMO, [0.5, 0.25], model)
    assert len(found) == 6
    assert all("pip install" in peer.skipped for peer in found)
    assert len(kv_peers.peers(DEMO, [0.5, 0.25], model, quick=True)) == 4
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    assert all("memwall[torch]" in peer.skipped for peer in kv_peers.peers(DEMO, [0.5], model))


def test_peers_that_would_run_other_weights_are_left_out(model: StudyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_peers, "_library", lambda *names: (names[0], ""))
    monkeypatch.setattr(kv_peers, "_kvpress_misfit", lambda: "")
    monkeypatch.setattr(kv_peers, "_stopped_build", lambda: "")
    assert not any(peer.skipped for peer in kv_peers.peers(DEMO, [0.5], model))
    for peer in kv_peers.peers(DEMO, [0.5], model, weights="int4"):
        assert "--weights int4" in peer.skipped


def test_a_folder_that_transformers_cannot_load_is_bad_input_and_names_it(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text((DEMO / "config.json").read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(InputError, match=f"transformers does not load {tmp_path}"):
        kv_peers._loaded(tmp_path)


def test_a_peer_reads_steps_and_branches_as_memwall_does(model: StudyModel) -> None:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peer = kv_peers.PeerSubject(kv_peers._loaded(DEMO), model, transformers.DynamicCache, None)
    mine = CacheSubject(model, "float32")
    tokens = [*model.opening, *model.encode(held_out_text())[:60]]
    turns = [tokens[:40], tokens[40:50]]
    for turn in turns:
        np.testing.assert_allclose(peer.read(turn), mine.read(turn), atol=2e-3)
    asked = model.encode("\nWhat is the secret number of tiger?")
    seen = []
    for _ in range(2):
        with peer.branch():
            seen.append(peer.read(asked).copy())
    np.testing.assert_array_equal(*seen)
    np.testing.assert_allclose(peer.step(tokens[50]), mine.step(tokens[50]), atol=2e-3)
    assert peer.nbytes == model.cache("float16").shape.row_values * 2 * 2 * model.shape.num_layers * 51
    assert peer.say(peer.read(asked), 4) == mine.say(mine.read(asked), 4)
    peer.begin()
    assert peer.nbytes == 0


def test_packed_tensors_count_their_parts() -> None:
    torch = pytest.importorskip("torch")
    assert kv_peers.tensor_bytes(None) == 0
    assert kv_peers.tensor_bytes(torch.zeros(3, 4)) == 24
    assert kv_peers.tensor_bytes((torch.zeros(5, dtype=torch.uint8), {"scale": torch.zeros(2)}, "axis")) == 9


@pytest.mark.skipif(importlib.util.find_spec("kvpress") is None, reason="kvpress is not installed")
def test_a_press_drops_tokens_of_the_prompt_only(model: StudyModel, tmp_path: Path) -> None:
    snap = next(peer for peer in kv_peers.peers(DEMO, [0.5], model) if peer.method == "kvpress-snapkv")
    if snap.skipped:
        pytest.skip(snap.skipped)
    subject = snap.make()
    subject.read(model.encode(held_out_text())[:200])
    half = subject.nbytes
    subject.read(model.encode(held_out_text())[200:220])
    row = 2 * 2 * model.shape.num_layers * model.shape.row_values
    assert half == 100 * row
    assert subject.nbytes == 120 * row


def test_a_build_that_was_stopped_is_told_instead_of_waited_for(
    model: StudyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "library" / "extensions" / "cpp" / "build" / "lock"
    lock.parent.mkdir(parents=True)
    found = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    monkeypatch.setattr(kv_peers, "_library", lambda *names: (names[0], ""))
    monkeypatch.setattr(kv_peers, "_kvpress_misfit", lambda: "")
    assert not kv_peers.peers(DEMO, [0.5], model)[0].skipped
    lock.touch()
    assert f"remove {lock}" in kv_peers.peers(DEMO, [0.5], model)[0].skipped

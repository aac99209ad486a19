"""Streamed neurons give what the whole model gives; windows, budgets and files are kept to."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memwall import kv
from memwall.engine import llm_in_a_flash
from memwall.engine.llm_in_a_flash import NeuronStream, merged, stage_bytes, store_bytes
from memwall.engine.loading import LoadedDecoder, Settings, cache_shape, load_decoder
from memwall.engine.neuron_file import make_flash_model
from memwall.engine.neuron_predictors import Training
from memwall.errors import BudgetExceeded, InputError
from memwall.memory import Arena, Ledger
from memwall.models.config import ModelConfig
from tests.engine.relu_models import MODELS, write_relu_model

PROMPT = np.arange(3, 40)
LATER = np.array([7, 100, 900, 7, 8, 9, 2000, 11])


@pytest.fixture(scope="module", params=sorted(MODELS))
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(whole, streamed)."""
    folder = tmp_path_factory.mktemp(request.param)
    write_relu_model(folder / "whole", request.param)
    make_flash_model(
        folder / "whole", folder / "streamed", max_tokens=2048, training=Training(rank=16, steps=100, missed=0.01)
    )
    return folder / "whole", folder / "streamed"


def edited(folder: Path, out: Path, **changes: object) -> Path:
    """A copy of a streamed model with another layout."""
    out.mkdir()
    for item in folder.iterdir():
        if item.name != "config.json":
            (out / item.name).hardlink_to(item)
    values = json.loads((folder / "config.json").read_text())
    values["streamed_neurons"] |= changes
    (out / "config.json").write_text(json.dumps(values))
    return out


def loaded(folder: Path, **settings: object) -> LoadedDecoder:
    return load_decoder(folder, Settings(weights="float16", segment_tokens=64, context_tokens=128, **settings))


def logits(made: LoadedDecoder, *, one_by_one: bool = True) -> np.ndarray:
    """Of the tokens after a prompt."""
    cache = kv.build("float32", cache_shape(made.config), made.arena, 128)
    try:
        made.decoder.forward(PROMPT, cache)
        if one_by_one:
            return np.stack([made.decoder.forward(LATER[i : i + 1], cache).copy() for i in range(len(LATER))])
        return made.decoder.forward(LATER, cache).copy()
    finally:
        cache.release()


@pytest.fixture
def stream(folders: tuple[Path, Path], tmp_path: Path) -> NeuronStream:
    made = loaded(folders[1], window=3)
    assert isinstance(made.decoder.feed_forward, NeuronStream)
    return made.decoder.feed_forward


def test_all_neurons_predicted_give_the_whole_model(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Thresholds that let all pass: the same numbers, but for the order of sums; and of rows, read in turns."""
    wanted = logits(loaded(folders[0]))
    for rows in (96, 7):
        folder = edited(folders[1], tmp_path / str(rows), thresholds=[-1e6, -1e6], held=[[rows, rows]])
        made = loaded(folder)
        np.testing.assert_allclose(logits(made), wanted, rtol=2e-3, atol=2e-3)
        stats = made.decoder.feed_forward.stats
        assert stats.predicted == 2 * 96 * len(LATER)
        assert (stats.turns > 0) == (rows == 7)
        made.decoder.release()


def test_prompts_are_exact_whatever_is_predicted(folders: tuple[Path, Path], tmp_path: Path) -> None:
    folder = edited(folders[1], tmp_path / "none", thresholds=[1e6, 1e6])
    np.testing.assert_allclose(
        logits(loaded(folder), one_by_one=False), logits(loaded(folders[0]), one_by_one=False), rtol=2e-3, atol=2e-3
    )


def test_predicted_neurons_are_near_the_whole_model(folders: tuple[Path, Path]) -> None:
    wanted, found = logits(loaded(folders[0])), logits(loaded(folders[1], window=2))
    assert np.abs(found - wanted).mean() < 0.1 * np.abs(wanted).mean()


def test_windows_hold_the_last_tokens_and_read_what_they_lack(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Held rows against sets of what was asked for; every row is its neuron's, wherever it was moved to."""
    folder = edited(folders[1], tmp_path / "wide", held=[[96, 96]] * 8)
    made = loaded(folder, window=3)
    stream = made.decoder.feed_forward
    assert isinstance(stream, NeuronStream)
    file = np.fromfile(folder / "neurons.bin", np.uint8).reshape(2, 96, -1)
    draw, sets = np.random.default_rng(0), []
    for now in range(30):
        stream._now = now
        stream.gap_rows = now % 4
        wanted = np.flatnonzero(draw.random(96) < 0.15)
        before, read = stream.stats.loaded, stream.stats.read_bytes
        stream.bring(1, wanted)
        held = set().union(*sets[-3:]) if sets else set()
        sets.append(set(wanted.tolist()))
        store = stream.stores[1]
        keys = store.keys[: store.used]
        assert stream.stats.loaded - before == len(sets[-1] - held)
        assert stream.stats.read_bytes - read >= len(sets[-1] - held) * store.data.shape[1]
        assert set(keys.tolist()) == set().union(*sets[-3:])
        np.testing.assert_array_equal(store.data[: store.used], file[1, keys])
    made.decoder.release()


def test_rows_that_run_out_let_the_oldest_go(folders: tuple[Path, Path], tmp_path: Path) -> None:
    made = loaded(edited(folders[1], tmp_path / "few", held=[[10, 10]] * 8), window=8)
    stream = made.decoder.feed_forward
    assert isinstance(stream, NeuronStream)
    for now, wanted in enumerate(([1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12])):
        stream._now = now
        stream.bring(0, np.array(wanted))
    held = stream.stores[0].keys[: stream.stores[0].used].tolist()
    assert len(held) == 10
    assert {5, 6, 7, 8, 9, 10, 11, 12} <= set(held)
    made.decoder.release()


def test_bytes_are_foreseen_and_come_back(folders: tuple[Path, Path]) -> None:
    made = loaded(folders[1], window=2)
    rows = {row.owner: row.nbytes for row in made.ledger.rows()}
    assert rows[llm_in_a_flash.OWNER] == store_bytes(made.config, 2)
    assert made.config.neurons is not None
    assert rows[llm_in_a_flash.STAGE] == stage_bytes(made.config.neurons, 64)
    made.decoder.release()
    assert not {llm_in_a_flash.OWNER, llm_in_a_flash.STAGE} & {row.owner for row in made.ledger.rows() if row.nbytes}
    arena = Arena(store_bytes(made.config, 2), Ledger())
    with pytest.raises(BudgetExceeded):
        NeuronStream(made.config, made.weights, folders[1], arena, window=2, gap_rows=0)
    assert arena.used_bytes == 0


def test_files_of_another_size_and_bad_windows_are_told(folders: tuple[Path, Path], tmp_path: Path) -> None:
    made = loaded(folders[1])
    short = edited(folders[1], tmp_path / "short")
    data = (short / "neurons.bin").read_bytes()
    (short / "neurons.bin").unlink()
    (short / "neurons.bin").write_bytes(data[:-512])
    for folder, window, said in ((short, 1, "configuration says"), (folders[1], 0, "1 or more")):
        with pytest.raises(InputError, match=said):
            NeuronStream(made.config, made.weights, folder, made.arena, window=window, gap_rows=0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"form": "int3"}, "form must be one of"),
        ({"ranks": [1]}, "ranks must be a list of 2"),
        ({"thresholds": [0, "x"]}, "thresholds must be"),
        ({"held": []}, "held must be"),
        ({"held": [[1, 97]]}, "held must be"),
        ({"hold": 1}, "did you mean held"),
    ],
)
def test_damaged_layouts_are_told(folders: tuple[Path, Path], tmp_path: Path, change: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        ModelConfig.from_directory(edited(folders[1], tmp_path / "damaged", **change))


def test_layouts_belong_to_relu_models(folders: tuple[Path, Path], tmp_path: Path) -> None:
    values = json.loads((folders[1] / "config.json").read_text())
    name = "activation" if "activation" in values else "hidden_act"
    with pytest.raises(InputError, match="goes with a ReLU"):
        ModelConfig.from_dict({**values, name: "gelu" if name == "activation" else "silu"})


def test_adapters_are_refused(folders: tuple[Path, Path]) -> None:
    made = loaded(folders[1])
    with pytest.raises(InputError, match="stream"):
        made.decoder.adapt(object())  # type: ignore[arg-type]


@given(st.sets(st.integers(0, 60), min_size=1), st.integers(0, 5))
def test_runs_cover_the_keys_and_cross_no_larger_gap(found: set[int], gap: int) -> None:
    keys = np.array(sorted(found))
    first, stop = merged(keys, gap)
    assert [key for a, b in zip(first, stop, strict=True) for key in keys[a:b].tolist()] == keys.tolist()
    assert all(np.diff(keys[a:b]).max(initial=1) <= gap + 1 for a, b in zip(first, stop, strict=True))
    assert all(keys[b] - keys[b - 1] > gap + 1 for b in stop[:-1])


def test_several_tokens_at_once_are_predicted_as_one(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Two tokens in one step give what one after the other gives, as far as predictions are the same."""
    made = loaded(edited(folders[1], tmp_path / "all", thresholds=[-1e6, -1e6], held=[[96, 96]]))
    cache = kv.build("float32", cache_shape(made.config), made.arena, 128)
    made.decoder.forward(PROMPT, cache)
    pair = made.decoder.forward(LATER[:2], cache).copy()
    np.testing.assert_allclose(pair, logits(loaded(folders[0]))[1], rtol=2e-3, atol=2e-3)
    assert replace(made.config, neurons=None).num_parameters > made.config.num_parameters

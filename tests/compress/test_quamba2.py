"""Whole runs of Quamba2 over tiny Mamba models: stop, go on, save, run compressed; scales by hand; bad input."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from memwall.compress import MethodConfig, Statistics, weight_method
from memwall.compress.calibration import CalibrationSettings
from memwall.compress.job_plan import Tuning
from memwall.compress.model import compress_model
from memwall.compress.quamba2 import Quamba2
from memwall.compress.ssm_run import Seen
from memwall.compress.static_columns import StaticColumns
from memwall.compress.sweep import Factor, sweep
from memwall.engine import Settings, load
from memwall.errors import InputError
from memwall.formats import codec
from memwall.models import DEMO_DIRECTORY, ModelConfig
from memwall.models.ssm_config import with_quantized
from tests.compress.tiny_model import contents
from tests.compress.tiny_model import make_model as make_llama
from tests.models.ssm_models import MAMBA, MAMBA2, write_model

TINY = Tuning(calibration=CalibrationSettings(max_tokens=256, sequence_tokens=64))
OPTIONS = {"samples": "3"}
TOKENS = np.random.default_rng(1).integers(0, 4096, 40)


def make_model(folder: Path, config: dict[str, object]) -> Path:
    write_model(folder, {**config, "vocab_size": 4096})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_DIRECTORY / name, folder / name)
    return folder


def logits(folder: Path, weights: str) -> np.ndarray:
    run = load(folder, Settings(weights=weights, kv="state", segment_tokens=40, logit_rows=40))
    first = run.decoder.forward(TOKENS[:30], run.cache, all_logits=True).copy()
    steps = [run.decoder.forward(TOKENS[i : i + 1], run.cache, all_logits=True).copy() for i in range(30, 40)]
    return np.concatenate([first, *steps])


def compress(source: Path, out: Path, bits: str, **options: str) -> None:
    compress_model(source, out, bits=bits, method="quamba2", options={**OPTIONS, **options}, tuning=TINY)


@pytest.mark.parametrize(("bits", "most"), [("w8a8", 0.1), ("w4a16", 0.5), ("w4a8", 0.5), ("w4ax", 0.5)])
@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_compressed_models_are_near_the_float_one(tmp_path: Path, family: str, bits: str, most: float) -> None:
    source = make_model(tmp_path / "model", MAMBA if family == "mamba" else MAMBA2)
    compress(source, tmp_path / "out", bits)
    want, got = logits(source, "float32"), logits(tmp_path / "out", "saved")
    # tiny random models pass all noise of their weights on
    assert np.linalg.norm(got - want) < most * np.linalg.norm(want)
    config = ModelConfig.from_directory(tmp_path / "out")
    assert config.ssm is not None
    assert config.ssm.quantized is not None
    forms = set(config.ssm.quantized.layers)
    assert forms == ({"w4a8", "w4a16"} if bits == "w4ax" else {bits})


def test_biases_of_projections_are_added_or_refused(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", {**MAMBA2, "use_bias": True})
    compress(source, tmp_path / "out", "w4a16")
    want, got = logits(source, "float32"), logits(tmp_path / "out", "saved")
    assert np.linalg.norm(got - want) < 0.5 * np.linalg.norm(want)
    for bits in ("w8a8", "w4a8", "w4ax"):
        with pytest.raises(InputError, match=r"use_bias.*use --bits w4a16"):
            compress(source, tmp_path / bits, bits)


def test_activations_and_state_are_bytes(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", MAMBA2)
    compress(source, tmp_path / "out", "w8a8")
    run = load(tmp_path / "out", Settings(weights="saved", kv="state", segment_tokens=40))
    run.decoder.forward(TOKENS, run.cache)
    assert {array.dtype for array in (*run.cache.states, *run.cache.inputs)} == {np.dtype(np.int8)}
    assert np.abs(run.cache.states[0]).max() > 10
    assert {row.owner for row in run.ledger.rows()} >= {"weights/static8", "weights/int8-g64", "state/scan"}
    assert not run.decoder.weights.matrices.keys() & run.decoder.weights.static.keys()
    dense = sum(tensor.size for tensor in run.config.tensors() if tensor.role == "linear")
    held = {row.owner: row.nbytes for row in run.ledger.rows()}
    assert held["weights/static8"] < 1.1 * dense + 4096 * 64 * 1.1  # and the head: no floats beside them


def test_a_run_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "compress" and done > 0.6 * total:
            raise Stop

    source = make_model(tmp_path / "model", MAMBA2)
    settings = {"bits": "w4a8", "method": "quamba2", "options": OPTIONS, "tuning": TINY}
    with pytest.raises(Stop):
        compress_model(source, tmp_path / "out", progress=stop, **settings)
    report = compress_model(source, tmp_path / "out", **settings)
    assert report.num_resumed_parts > 1
    compress_model(source, tmp_path / "straight", **settings)
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_scales_by_hand() -> None:
    config = ModelConfig.from_dict({**MAMBA2, "head_dim": 64, "num_heads": 2})
    assert config.ssm is not None
    method = Quamba2(head_ranges=1, channel_ranges=2)
    quantized = method.quantized(config.ssm, ("w8a8",) * 2, "w8a8")
    ssm = ModelConfig.from_dict(with_quantized({**MAMBA2, "head_dim": 64, "num_heads": 2}, quantized)).ssm
    assert ssm is not None
    channels = np.ones(ssm.conv_size, np.float32)
    channels[64] = 254  # first channel of the second head, which is its group
    channels[128 + 16 :] = 0  # behind B of the first group
    states = np.zeros((128, 16), np.float32)
    states[64, 3] = 127
    peaks = {"mixer.in_proj.weight": 1.0, "mixer.out_proj.weight": 2.0}
    parts = dict.fromkeys(ssm.proj_parts, 127.0)
    seen = Seen(parts=parts, channels=channels, states=states, means=channels[:128], peaks=peaks, clipped=[0.5, 1.5])
    order = method.order(ssm, seen)
    reordered = Seen(
        parts=parts, channels=np.concatenate([channels[order.channels], channels[128:]]), states=states[order.channels],
        means=channels[:128],
        peaks=peaks, clipped=[0.5, 1.5],
    )  # fmt: skip
    scales = {name.removeprefix("mixer.scales."): v for name, v in method.scales(ssm, reordered, order).items()}
    assert order.channel_sizes[1, 0].tolist() == [63, 1]
    np.testing.assert_allclose(scales["x"], [1 / 127, 1e-6, 1 / 127, 2], rtol=1e-6)
    np.testing.assert_allclose(scales["b"], [1 / 127, 1e-6], rtol=1e-6)
    assert scales["state"].shape == (4, 16)
    np.testing.assert_allclose(scales["state"][3, 3], 1)
    np.testing.assert_allclose(scales["proj"], np.ones(5))
    whole = Quamba2(head_ranges=1, channel_ranges=2, x_scales="tensor", bc_scales="tensor")
    other = whole.scales(ssm, reordered, order)
    np.testing.assert_allclose(other["mixer.scales.x"], 2)
    np.testing.assert_allclose(other["mixer.scales.b"], 1 / 127, rtol=1e-6)
    clipped = Quamba2(head_ranges=1, channel_ranges=2, x_scales="percentile").scales(ssm, reordered, order)
    np.testing.assert_allclose(clipped["mixer.scales.x"], 1 / 127, rtol=1e-6)


@pytest.mark.parametrize("spec", ["static8", "static4-g32"])
def test_the_sweep_of_static_columns(spec: str) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((20, 64), np.float32)
    plain = codec(spec).encode(weight)
    same = sweep(weight, Factor.of(np.eye(64, dtype=np.float32)), StaticColumns(codec(spec), weight))
    for name, buffer in plain.buffers.items():  # H = I is rounding to nearest
        np.testing.assert_array_equal(same.buffers[name], buffer)
    x = rng.standard_normal((500, 64), np.float32) @ rng.standard_normal((64, 64), np.float32)
    statistics = Statistics(x.T @ x, 500)
    better = weight_method("quamba2").compress(weight, statistics, MethodConfig(spec=spec))
    errors = [statistics.error(codec(spec).decode(packed) - weight) for packed in (better, plain)]
    assert errors[0] < errors[1]


def test_bad_input_is_named(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", MAMBA2)
    with pytest.raises(InputError, match="w8a8, w4a8, w4a16"):
        compress(source, tmp_path / "out", "w2a8")
    with pytest.raises(InputError, match="--method quamba2"):
        compress_model(source, tmp_path / "out", method="gptq")
    with pytest.raises(InputError, match="use gptq"):
        compress_model(make_llama(tmp_path / "llama"), tmp_path / "out", method="quamba2")
    with pytest.raises(InputError, match="--memory"):
        compress_model(source, tmp_path / "out", method="quamba2", budget_bytes=1 << 30)
    with pytest.raises(InputError, match="x_scales"):
        compress(source, tmp_path / "out", "w8a8", x_scales="other")
    odd = make_model(tmp_path / "odd", {**MAMBA2, "hidden_size": 56, "head_dim": 14})
    with pytest.raises(InputError, match="Hadamard"):
        compress(odd, tmp_path / "out", "w8a8")
    assert not (tmp_path / "out").exists()

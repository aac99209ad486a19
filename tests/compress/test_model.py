"""Whole runs: what is written loads again bit for bit, keeps to its bits, and survives being killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from memwall.compress import calibration, model
from memwall.compress.base import MethodConfig
from memwall.compress.calibration import PromptCache
from memwall.compress.gptq import Gptq
from memwall.compress.model import compress_model
from memwall.errors import BudgetExceeded, DoesNotFit, InputError
from memwall.formats import Packed, codec
from memwall.memory import Arena, Ledger
from memwall.models import Checkpoint, ModelConfig
from memwall.models.decoder import Decoder
from memwall.models.precision import bits_of, is_matrix, resolve
from memwall.models.weights import load_weights
from tests.compress.tiny_model import QUICK, contents, make_model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("source") / "tiny")


def compress(source: Path, out: Path, **options: Any) -> model.CompressReport:
    return compress_model(source, out, **{"bits": 4.0, "tuning": QUICK, **options})


def logits(folder: Path) -> np.ndarray:
    config = ModelConfig.from_directory(folder)
    with Checkpoint(folder, config) as checkpoint:
        arena = Arena(1 << 30, Ledger())
        weights = load_weights(config, checkpoint, resolve(config, "saved", checkpoint), arena)
        decoder = Decoder(config, weights, arena, segment_tokens=8, logit_rows=8)
        return decoder.forward(np.arange(8), PromptCache(config), all_logits=True).copy()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_mean_bits_and_the_folder_written(tmp_path: Path, tied: bool, method: str) -> None:
    folder = make_model(tmp_path / "source", tie_word_embeddings=tied)
    stages: list[tuple[str, int, int]] = []
    report = compress(folder, tmp_path / "out", method=method, progress=lambda *step: stages.append(step))
    config = ModelConfig.from_directory(tmp_path / "out")
    assert bits_of(config, report.specs) == report.bits_per_weight <= 4.0
    assert report.bits_per_weight > 3.9
    assert report.num_calibration_tokens == 512
    assert {name for name, spec in report.specs.items() if spec == "float32"} == {
        tensor.name for tensor in config.tensors() if not is_matrix(tensor)
    }
    assert all(int(report.specs[t.name][3]) >= 4 for t in config.tensors() if t.role in ("embedding", "head"))
    assert [stage for stage, *_ in stages] == sorted((stage for stage, *_ in stages), reverse=True)
    assert all(0 < done <= total for _, done, total in stages)
    assert stages[-1][1] == stages[-1][2]
    files = contents(tmp_path / "out")
    assert {"memwall.json", "config.json", "tokenizer.json", "model-00001-of-00005.safetensors"} < set(files)
    assert not [name for name in files if name.startswith(".") or name in ("progress.json", "lock")]
    assert [path.name for path in tmp_path.iterdir()].count("out.partial") == 0
    with Checkpoint(tmp_path / "out") as checkpoint:
        checkpoint.verify(digests=True)
        assert {t.name: checkpoint.source_dtype(t.name) for t in config.tensors()} == report.specs


def test_what_is_saved_is_what_was_made(source: Path, tmp_path: Path) -> None:
    report = compress(source, tmp_path / "out", bits="int4", method="rtn")
    assert set(report.specs.values()) == {"int4-g64", "float32"}
    with Checkpoint(source) as before, Checkpoint(tmp_path / "out") as after:
        for tensor in before.config.tensors():
            packed = after.packed(tensor.name)
            if packed is None:
                np.testing.assert_array_equal(after.tensor(tensor.name), before.tensor(tensor.name))
            else:
                expected = codec("int4").encode(before.tensor(tensor.name))
                for name, buffer in expected.buffers.items():
                    np.testing.assert_array_equal(packed.buffers[name], buffer)


def test_gptq_loses_less_than_round_to_nearest(source: Path, tmp_path: Path) -> None:
    swept = compress(source, tmp_path / "gptq", bits="int3").errors
    nearest = compress(source, tmp_path / "rtn", bits="int3", method="rtn").errors
    layers = [name for name in swept if ".layers." in name]
    assert sum(swept[name] for name in layers) < 0.8 * sum(nearest[name] for name in layers)


def test_logits_are_the_same_after_loading_again(source: Path, tmp_path: Path) -> None:
    compress(source, tmp_path / "one")
    compress(source, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    np.testing.assert_array_equal(logits(tmp_path / "one"), logits(tmp_path / "two"))


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.compress.tiny_model import QUICK
from memwall.compress.model import compress_model

def progress(stage, done, total):
    if stage == "compress" and done > {share} * total:
        os.kill(os.getpid(), signal.{signal})

compress_model(Path({source!r}), Path({out!r}), bits=4.0, tuning=QUICK, progress=progress)
"""


@pytest.mark.parametrize(("name", "share", "num_parts"), [("SIGKILL", 0.6, 1), ("SIGINT", 0.75, 2)])
def test_killed_and_resumed_gives_the_same_bytes(
    source: Path, tmp_path: Path, name: str, share: float, num_parts: int
) -> None:
    out = tmp_path / "out"
    script = KILLED.format(
        root=str(Path(__file__).parents[2]), share=share, signal=name, source=str(source), out=str(out)
    )
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=120, env=dict(os.environ))
    assert killed.returncode == -getattr(signal, name), killed.stderr.decode()
    assert not out.exists()
    parts = list((tmp_path / "out.partial").glob("model-*.safetensors"))
    assert len(parts) == num_parts
    if name == "SIGINT":
        assert not list((tmp_path / "out.partial").glob(".*"))
    with pytest.raises(InputError, match=r"unfinished run with other settings \(bits: 4.0 then, 5.0 now\)"):
        compress(source, out, bits=5)
    assert compress(source, out).num_resumed_parts == num_parts
    compress(source, tmp_path / "straight")
    assert contents(out) == contents(tmp_path / "straight")
    assert not (tmp_path / "out.partial").exists()


class Stop(Exception):
    pass


def stop_after(share: float) -> Callable[[str, int, int], None]:
    def progress(stage: str, done: int, total: int) -> None:
        if stage == "compress" and done > share * total:
            raise Stop

    return progress


@pytest.mark.parametrize("method", ["rtn", "gptq", "vptq"])
def test_jobs_make_the_same_bytes(source: Path, tmp_path: Path, method: str) -> None:
    bits = {"rtn": "int4", "gptq": 4.0, "vptq": 2.5}[method]
    for jobs in (1, 3):
        compress(source, tmp_path / f"{jobs}", method=method, bits=bits, tuning=replace(QUICK, jobs=jobs))
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_an_error_in_one_of_several_jobs_ends_the_run(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = "model.layers.1.self_attn.k_proj.weight"
    honest = Gptq.compress

    def fails(self: Gptq, weight: np.ndarray, statistics: Any, config: MethodConfig) -> Packed:
        if config.tensor == damaged:
            raise InputError("weights hold NaN")
        return honest(self, weight, statistics, config)

    with monkeypatch.context() as patched:
        patched.setattr(Gptq, "compress", fails)
        with pytest.raises(InputError, match=f"{damaged}: weights hold NaN"):
            compress(source, tmp_path / "out", bits="int4", tuning=replace(QUICK, jobs=2))
    # embedding and first layer are not lost
    again = compress(source, tmp_path / "out", bits="int4", tuning=replace(QUICK, jobs=2))
    assert again.num_resumed_parts == 2
    compress(source, tmp_path / "straight", bits="int4")
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_a_damaged_part_is_made_again(source: Path, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        compress(source, tmp_path / "out", progress=stop_after(0.95))
    parts = sorted((tmp_path / "out.partial").glob("model-*"))
    assert len(parts) == 3
    data = bytearray(parts[1].read_bytes())
    data[-1] ^= 1
    parts[1].write_bytes(data)
    assert compress(source, tmp_path / "out").num_resumed_parts == 1
    compress(source, tmp_path / "straight")
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_force_starts_over_and_replaces(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stop):
        compress(source, out, progress=stop_after(0.5))
    assert compress(source, out, bits="int8", method="rtn", force=True).num_resumed_parts == 0
    with pytest.raises(InputError, match="exists already"):
        compress(source, out, bits="int4", method="rtn")
    compress(source, out, bits="int4", method="rtn", force=True)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    with Checkpoint(out) as checkpoint:
        assert checkpoint.source_dtype("model.embed_tokens.weight") == "int4-g64"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"bits": 2.1}, r"the least this model takes is [34].\d+ bits per weight.*try --bits"),
        ({"bits": 1.0}, "give a mean between"),
        ({"bits": "int9"}, "bits must be 2 to 8"),
        ({"bits": "tiny"}, "unknown"),
        ({"group": 48}, "group"),
        ({"method": "magic"}, "unknown compression method 'magic'; known are rtn, gptq"),
        ({"bits": "float16"}, "integer formats"),
    ],
)
def test_bad_settings(source: Path, tmp_path: Path, options: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        compress(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_bad_places_and_models(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        compress(source, tmp_path / "missing" / "out")
    with pytest.raises(InputError, match="no such folder"):
        compress(tmp_path / "missing", tmp_path / "out")
    compress(source, tmp_path / "out", bits="int4", method="rtn")
    with pytest.raises(InputError, match="already compressed"):
        compress(tmp_path / "out", tmp_path / "again")
    damaged = make_model(tmp_path / "damaged")
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    save_file(tensors, damaged / "model.safetensors")
    with pytest.raises(InputError, match=r"model.layers.1.mlp.up_proj.weight: .*NaN"):
        compress(damaged, tmp_path / "out2", bits="int4", method="rtn")


def test_budget_is_kept(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit, match="calibration on one sequence"):
        compress(source, tmp_path / "out", arena=Arena(1 << 20, Ledger()))
    needed = 12 << 20
    arena = Arena(needed, Ledger())
    report = compress(source, tmp_path / "out", arena=arena)
    assert 0 < report.num_calibration_tokens <= 512
    assert arena.peak_bytes <= needed
    with pytest.raises(BudgetExceeded):
        compress(source, tmp_path / "other", bits="int4", method="rtn", arena=Arena(1000, Ledger()))


def test_calibration_is_not_read_where_it_is_not_needed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "LayerStream", None)
    assert compress(source, tmp_path / "out", bits="int4", method="rtn").num_calibration_tokens == 0


def test_a_format_that_the_method_does_not_make_is_refused_before_text_is_read(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="add --method rtn"):
        compress(source, tmp_path / "out", bits="nf4", method="gptq", calibration_text=tmp_path / "missing.txt")
    assert not (tmp_path / "out").exists()

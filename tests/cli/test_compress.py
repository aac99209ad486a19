"""`memwall compress`, then running what it wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memwall.cli.compress import parse_bits
from memwall.formats import codec
from memwall.models import Checkpoint, ModelConfig
from tests.models.families import make_family

TEXT = "A city lies on a river, and the river comes down from the hills. " * 40


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return make_family("llama", tmp_path)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_bits() -> None:
    assert parse_bits("3.5") == 3.5
    assert parse_bits("int4-g64") == "int4-g64"


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_compress_and_run(memwall: Any, small: Path, text: Path, tmp_path: Path, method: str) -> None:
    out = tmp_path / "out"
    arguments = ("compress", small, out, "--bits", "5", "--method", method, "--calibration", text, "--json")
    result = memwall(*arguments)
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert 3 < document["bits_per_weight"] <= 5
    assert (out / "memwall.json").is_file()
    run = memwall("run", out, "A city", "--max-new-tokens", "3", "--ignore-eos", "--json")
    assert run.exit_code == 0, run.stderr
    assert json.loads(run.stdout)["tokens"] == 3
    again = memwall(*arguments)
    assert again.exit_code == 2
    assert "--force" in again.stderr


@pytest.mark.parametrize(
    ("method", "options", "row"),
    [
        ("spqr", ("--bits", "3", "--set", "outlier-threshold=0.4"), "weights/spqr3"),
        ("awq", ("--set", "clip=no"), "weights/int4-g128-asym"),
        ("smoothquant", (), "weights/int8-g64"),
        ("vptq", ("--bits", "2.5", "--set", "iterations=5", "--set", "refine=2"), "weights/vptq"),
    ],
)
def test_methods_with_settings(
    memwall: Any, small: Path, text: Path, tmp_path: Path, method: str, options: tuple[str, ...], row: str
) -> None:
    out = tmp_path / "out"
    made = memwall("compress", small, out, "--method", method, *options, "--calibration", text, "--json")
    assert made.exit_code == 0, made.stderr
    run = memwall("run", out, "A city", "--max-new-tokens", "3", "--ignore-eos", "--json")
    assert run.exit_code == 0, run.stderr
    assert row in run.stdout
    scored = memwall("eval", out, text, "--weights", "saved", "--json", "--limit", "64")
    assert scored.exit_code == 0, scored.stderr
    assert json.loads(scored.stdout)["bits_per_weight"] == pytest.approx(json.loads(made.stdout)["bits_per_weight"])


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--method", "spqr", "--set", "outlier_threshold"), "write NAME=VALUE"),
        (("--method", "spqr", "--set", "threshold=1"), "it has outlier_threshold, simplified, order"),
        (("--method", "spqr", "--bits", "3.5"), "--bits 3 or 4"),
        (("--method", "gptq", "--bits", "spqr3"), "--method spqr"),
        (("--method", "gptq", "--bits", "vptq2.25"), "--method vptq"),
        (("--method", "vptq", "--bits", "1", "--set", "vector=1", "--set", "codebook=4"), "takes at least 2"),
        (("--method", "vptq", "--set", "codebook=100"), "power of two"),
        (("--method", "awq", "--bits", "nf4"), "int4-g128-asym"),
    ],
)
def test_settings_that_name_nothing(
    memwall: Any, small: Path, tmp_path: Path, options: tuple[str, ...], complaint: str
) -> None:
    result = memwall("compress", small, tmp_path / "out", *options)
    assert result.exit_code == 2
    assert complaint in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bits", ["nf4-dq", "mxfp6", "posit8", "bipolar5"])
def test_level_formats_are_saved_and_read_back_bit_by_bit(memwall: Any, small: Path, tmp_path: Path, bits: str) -> None:
    """What was saved gives the very tokens that compressing while loading gives, and the very bytes of the codec."""
    out = tmp_path / "out"
    assert memwall("compress", small, out, "--bits", bits, "--method", "rtn", "--quiet").exit_code == 0
    asked = ("A city", "--max-new-tokens", "8", "--ignore-eos", "--quiet")
    saved, loaded = memwall("run", out, *asked), memwall("run", small, *asked, "--weights", bits)
    assert saved.exit_code == loaded.exit_code == 0, saved.stderr + loaded.stderr
    assert saved.stdout == loaded.stdout
    config = ModelConfig.from_directory(small)
    name = "model.layers.0.mlp.up_proj.weight"
    with Checkpoint(small, config) as floats, Checkpoint(out, config) as packed:
        expected, found = codec(bits).encode(floats.alone(name)), packed.packed(name)
    assert found is not None
    assert found.spec == expected.spec
    with Checkpoint(out, config) as packed:
        held = packed.packed(name)
        assert held is not None
        for buffer, values in expected.buffers.items():
            np.testing.assert_array_equal(np.asarray(held.buffers[buffer]), values)


@pytest.mark.parametrize(("bits", "method"), [("int4", "rtn"), ("4.25", "gptq"), ("nf4-dq", "rtn")])
def test_the_smallest_budget_that_is_named_is_kept(spawn: Any, tmp_path: Path, bits: str, method: str) -> None:
    asked = ("compress", "demo", tmp_path / "out", "--bits", bits, "--method", method, "--json")
    refused = spawn(*asked, "--memory", "5MB")
    assert refused.returncode == 1
    smallest = re.search(r"try --memory (\d+)", refused.stderr)
    assert smallest, refused.stderr
    assert not (tmp_path / "out").exists()
    result = spawn(*asked, "--memory", smallest[1])
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["peak_resident_bytes"] <= int(smallest[1])


def test_a_damaged_file_is_refused_by_name(memwall: Any, small: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert memwall("compress", small, out, "--method", "rtn", "--calibration", text).exit_code == 0
    victim = sorted(out.glob("*.safetensors"))[0]
    victim.write_bytes(victim.read_bytes()[:-10])
    result = memwall("run", out, "A city", "--max-new-tokens", "2")
    assert result.exit_code == 2
    assert victim.name in result.stderr

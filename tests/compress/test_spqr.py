"""SpQR: what is stored is what was swept, the vote against a slow reference, and whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.compress import weight_method
from memwall.compress.base import MethodConfig, Statistics
from memwall.compress.model import CompressReport, compress_model
from memwall.compress.spqr import Spqr, SpqrColumns, alike_order, leave_one_out
from memwall.errors import InputError
from memwall.formats import codec, spqr
from memwall.formats.spqr import SpqrCodec, unpack
from memwall.memory import Arena, Ledger
from memwall.models import Checkpoint, ModelConfig
from memwall.models.decoder import Decoder
from memwall.models.precision import is_matrix, resolve, weight_bytes
from memwall.models.weights import load_weights
from tests.compress.test_sweep import correlated
from tests.compress.tiny_model import QUICK, contents, make_model

NONE = 1e9


def layer(rows: int, columns: int, seed: int = 0) -> tuple[np.ndarray, Statistics]:
    """Heavy-tailed weights and the statistics of correlated inputs of different sizes."""
    random = np.random.default_rng(seed)
    x = correlated(4 * columns, columns, seed) * np.exp(random.standard_normal(columns)).astype(np.float32)
    return random.standard_t(4, (rows, columns)).astype(np.float32) * 0.05, Statistics(x.T @ x, len(x))


def config(bits: int, damping: float = 1.0) -> MethodConfig:
    return MethodConfig(spec=f"spqr{bits}-ordered", damping=damping)


class Recorded(SpqrColumns):
    """Keeps what the sweep was told that each column decodes to."""

    def quantize(self, column: int, values: np.ndarray) -> np.ndarray:
        found = super().quantize(column, values)
        seen[column] = found
        return found

    def store_exact(self, column: int, kept: np.ndarray, values: np.ndarray, rounded: np.ndarray) -> np.ndarray:
        found = super().store_exact(column, kept, values, rounded)
        seen[column] = found
        return found


seen: dict[int, np.ndarray] = {}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.integers(1, 40),
    st.integers(1, 80),
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from([0.0, 0.1, 0.5, NONE]),
    st.sampled_from(["activation", "identity", "spearman"]),
    st.booleans(),
)
def test_what_is_stored_is_what_was_swept(
    rows: int, columns: int, bits: int, threshold: float, order: str, simplified: bool
) -> None:
    """decode(packed) is the sweep's own W-hat bit for bit, outliers included."""
    weight, statistics = layer(rows, columns)
    seen.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("memwall.compress.spqr.SpqrColumns", Recorded)
        method = Spqr(outlier_threshold=threshold, simplified=simplified, order=order)
        packed = method.compress(weight, statistics, config(bits))
    parts = unpack(packed)
    places = np.arange(columns) if parts.order is None else parts.order
    swept = np.stack([seen[place] for place in range(columns)], axis=1)
    np.testing.assert_array_equal(codec(packed.spec).decode(packed)[:, places], swept)
    if threshold == NONE and weight.size > 1:
        assert parts.outliers is None
    if threshold == 0 and parts.outliers is not None:
        found = codec(packed.spec).decode(packed)
        assert np.abs(found - weight).max() < 2e-3 * max(1, np.abs(weight).max())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 20), st.integers(1, 16), st.sampled_from([2, 3, 4]), st.integers(0, 99), st.booleans())
def test_the_vote_agrees_with_a_slow_reference(rows: int, size: int, bits: int, seed: int, doubles: bool) -> None:
    random = np.random.default_rng(seed)
    values = random.standard_t(3, (rows, size)).astype(np.float32)
    if doubles:
        values = np.round(values)
    weights = random.random(size).astype(np.float32) + 0.1

    def cost(members: np.ndarray, of: np.ndarray) -> float:
        scale, zero = spqr.fit(members, bits)
        rounded = spqr.dequantize(spqr.quantize(members, scale, zero, bits), scale, zero)
        return float((np.square(members - rounded) * of).sum())

    found = leave_one_out(values, weights, bits)
    for row in range(rows):
        whole = cost(values[row], weights)
        for member in range(size):
            left = np.delete(values[row], member)
            expected = whole - (cost(left, np.delete(weights, member)) if len(left) else 0)
            assert found[row, member] == pytest.approx(expected, rel=1e-3, abs=1e-4 * whole + 1e-6)


def test_identity_is_the_codec_s_own_rounding() -> None:
    weight, _ = layer(37, 70)
    for statistics in (None, Statistics.identity(70)):
        method = Spqr(outlier_threshold=NONE, order="identity", simplified=True)
        packed = method.compress(weight, statistics, config(3))
        nearest = codec("spqr3").encode(weight)
        assert packed.spec == nearest.spec
        for name, buffer in nearest.buffers.items():
            np.testing.assert_array_equal(packed.buffers[name], buffer)


def test_each_part_of_the_mechanism_lowers_the_error() -> None:
    weight, statistics = layer(128, 128)

    def error(method: Spqr, bits: int = 3) -> float:
        packed = method.compress(weight, statistics, config(bits, 0.01))
        return statistics.error(codec(packed.spec).decode(packed) - weight)

    full = error(Spqr())
    assert full < error(Spqr(simplified=True)) < error(Spqr(outlier_threshold=NONE))
    assert full < error(Spqr(order="identity"))
    nearest = codec("spqr3").encode(weight)
    assert error(Spqr(outlier_threshold=NONE)) < statistics.error(codec("spqr3").decode(nearest) - weight)
    assert error(Spqr(), 4) < full
    few, many = (
        SpqrCodec.parse(Spqr(outlier_threshold=t).compress(weight, statistics, config(3)).spec).num_outliers
        for t in (1.0, 0.2)
    )
    assert 0 < few < many < weight.size // 4


def test_orders() -> None:
    weight = np.float32([[1, 3, 1.1, -2], [2, 1, 2.1, -9], [3, 2, 3.5, 0.5]])
    np.testing.assert_array_equal(alike_order(weight, 0)[:2], [0, 2])
    assert sorted(alike_order(weight, 1)) == [0, 1, 2, 3]
    _, statistics = layer(4, 64)
    packed = Spqr().compress(np.ones((4, 64), np.float32), statistics, config(3))
    sizes = statistics.hessian.diagonal()[packed.buffers["order"]]
    assert (np.diff(sizes) <= 0).all()


def test_dead_inputs_have_no_say() -> None:
    weight, statistics = layer(32, 64)
    statistics.hessian[5], statistics.hessian[:, 5] = 0, 0
    weight[:, 5] = 1000
    packed = Spqr().compress(weight, statistics, config(4, 0.01))
    found = codec(packed.spec).decode(packed)
    others = np.arange(64) != 5
    assert np.abs(found - weight)[:, others].max() < 0.5
    assert np.abs(found[:, 5]).max() < 0.5


def test_outliers_too_large_and_statistics_that_do_not_fit() -> None:
    weight, statistics = layer(16, 32)
    weight[3, 4] = 3e5
    with pytest.raises(InputError, match="overflows float16"):
        Spqr(outlier_threshold=1e-9).compress(weight, statistics, config(3))
    with pytest.raises(InputError, match="do not fit"):
        Spqr().compress(weight[:, :16], statistics, config(3))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"outlier_threshold": "-1"}, "0 or more"),
        ({"outlier_threshold": "inf"}, "0 or more"),
        ({"outlier_threshold": "much"}, "expected a number"),
        ({"simplified": "perhaps"}, "true or false"),
        ({"order": "random"}, "activation, identity, spearman"),
        ({"threshold": "1"}, "it has outlier_threshold, simplified, order"),
    ],
)
def test_settings_that_are_none(options: dict[str, str], match: str) -> None:
    with pytest.raises(InputError, match=match):
        weight_method("spqr", options)
    with pytest.raises(InputError, match="it has none"):
        weight_method("rtn", options)


# -- whole runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("source") / "tiny")


def compress(source: Path, out: Path, **options: Any) -> CompressReport:
    return compress_model(source, out, **{"method": "spqr", "bits": 3, "tuning": QUICK, **options})


class Stop(Exception):
    pass


def test_saved_resumed_loaded_and_refused_when_altered(source: Path, tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if done > 0.8 * total:
            raise Stop

    with pytest.raises(Stop):
        compress(source, tmp_path / "out", progress=stop)
    with pytest.raises(InputError, match="other settings"):
        compress(source, tmp_path / "out", options={"outlier_threshold": "0.5"})
    assert compress(source, tmp_path / "out").num_resumed_parts > 1
    report = compress(source, tmp_path / "straight")
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")
    model = ModelConfig.from_directory(tmp_path / "out")
    with Checkpoint(tmp_path / "out", model) as checkpoint:
        checkpoint.verify(digests=True)
        specs = resolve(model, "saved", checkpoint)
        assert specs == {t.name: report.specs[t.name] if is_matrix(t) else "float32" for t in model.tensors()}
        linear = [t for t in model.tensors() if t.role == "linear"]
        assert {codec(specs[t.name]).label for t in linear} == {"spqr3"}
        assert specs["model.embed_tokens.weight"] == "float16"
        arena = Arena(1 << 30, Ledger())
        weights = load_weights(model, checkpoint, specs, arena)
        held = weight_bytes(model, specs)
        assert set(held) == {"weights/spqr3", "weights/float16", "weights/float32"}
        stored = sum(checkpoint.stored_bytes(t.name) for t in linear)
        assert held["weights/spqr3"] == pytest.approx(stored, rel=0.02)  # buffers are aligned
        assert sum(weights.matrices[t.name].nbytes for t in linear) == stored
        assert Decoder(model, weights, arena, segment_tokens=4)
        # one of the file's indices altered: its digest gives it away, and were it not looked at, the loader would
        file = max(tmp_path.glob("out/model-0000[2-4]*"), key=lambda path: path.stat().st_size)
        data = bytearray(file.read_bytes())
        data[-40] ^= 255
        file.write_bytes(data)
        with pytest.raises(InputError, match="altered or damaged"):
            checkpoint.verify(digests=True)


def test_within_its_budget(source: Path, tmp_path: Path) -> None:
    arena = Arena(14 << 20, Ledger())
    report = compress(source, tmp_path / "out", arena=arena)
    assert report.num_calibration_tokens > 0
    assert arena.peak_bytes <= 14 << 20


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"bits": 3.5}, "whole bits per code"),
        ({"bits": 1}, "whole bits per code"),
        ({"bits": "int4"}, "spqr makes its own formats"),
        ({"bits": "spqr3", "method": "gptq"}, "memwall compress MODEL OUT --method spqr"),
    ],
)
def test_formats_that_the_method_does_not_make(
    source: Path, tmp_path: Path, options: dict[str, Any], match: str
) -> None:
    with pytest.raises(InputError, match=match):
        compress(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_untied_heads_and_default_bits(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "source", tie_word_embeddings=False, num_hidden_layers=1)
    report = compress(folder, tmp_path / "out", bits=None, options={"order": "identity"})
    assert report.specs["lm_head.weight"] == report.specs["model.embed_tokens.weight"] == "float16"
    assert report.specs["model.layers.0.mlp.up_proj.weight"].startswith("spqr4")
    assert "ordered" not in report.specs["model.layers.0.mlp.up_proj.weight"]

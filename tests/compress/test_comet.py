"""FMPQ: the order of channels, the search for widths by hand and by brute force, and a whole run that loads again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memwall.compress.base import MethodConfig, Statistics
from memwall.compress.comet import Comet, blockwise, over_median, promoted, shares
from memwall.compress.model import CompressReport, compress_model
from memwall.compress.saved import read_part
from memwall.errors import InputError
from memwall.formats import Packed, codec
from memwall.kernels.comet import rounded
from memwall.models import DEMO_DIRECTORY, Checkpoint
from tests.compress.planted import logits_of, plant_outliers
from tests.compress.tiny_model import QUICK, contents, make_model
from tests.models.families import make_family


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    return plant_outliers(make_model(folder / "tiny"), folder / "planted", 60.0)


def compress(source: Path, out: Path, **options: Any) -> CompressReport:
    return compress_model(source, out, **{"method": "comet", "bits": "comet-g32", "tuning": QUICK, **options})


def made_by(folder: Path) -> dict[str, Packed]:
    return {n: p for path in sorted(folder.glob("*.safetensors")) for n, p in read_part(path).items()}


def test_orders() -> None:
    peaks = np.ones(96, np.float32)
    method = Comet()
    assert method.order(peaks, 32) is None
    peaks[[3, 10]] = 50, 90
    assert method.order(peaks, 32) is None  # in one block already
    peaks[70] = 7
    order = method.order(peaks, 32)
    assert order is not None
    assert order[:4].tolist() == [10, 3, 70, 0]
    assert Comet(gather=False).order(peaks, 32) is None
    assert Comet(outlier=8).order(peaks, 32) is None
    np.testing.assert_array_equal(over_median(np.float32([1, 2, 8])), [0.5, 1, 4])
    assert blockwise(np.arange(5), 4).tolist() == [[0, 1, 2, 3], [4, 0, 0, 0]]


def test_the_search_promotes_what_loses_most() -> None:
    random = np.random.default_rng(0)
    x = random.standard_normal((64, 160)).astype(np.float32)
    x[:, 40] *= 80  # block 1 of 32
    x[:, 130] *= 20  # block 4
    weights = random.standard_normal((24, 160)).astype(np.float32)
    assert promoted(x, weights, 32, 0.0, 5).all()
    assert not promoted(x, weights, 32, 1.0, 5).any()
    assert np.flatnonzero(promoted(x, weights, 32, 0.0, 1)).tolist() == [1]
    assert np.flatnonzero(promoted(x, weights, 32, 0.0, 2)).tolist() == [1, 4]
    expected = x @ weights.T
    for tolerance in (0.2, 0.05, 0.01):
        wide = promoted(x, weights, 32, tolerance, 5)
        lost = np.square(rounded(x, 32, wide) @ weights.T - expected).sum() / np.square(expected).sum()
        assert lost <= tolerance * 1.001
        assert wide.sum() < 5


def test_widths_by_outliers() -> None:
    peaks = np.ones(100, np.float32)
    peaks[[5, 70]] = 9, 20
    readers = [codec("comet-g32").encode(np.ones((16, 100), np.float32))]
    x = np.ones((4, 100), np.float32)
    assert Comet(widths="outliers").wide_blocks(x, peaks, readers).tolist() == [True, False, True, False]
    assert Comet(widths="outliers", most=0.25).wide_blocks(x, peaks, readers).tolist() == [False, False, True, False]
    assert Comet(widths="wide").wide_blocks(x, peaks, readers).all()
    assert not Comet(widths="narrow").wide_blocks(x, peaks, readers).any()


def test_gathered_weights_are_the_same_weights() -> None:
    random = np.random.default_rng(1)
    weight = random.standard_normal((32, 96)).astype(np.float32)
    statistics = Statistics.identity(96)
    statistics.peak = np.ones(96, np.float32)
    statistics.peak[[3, 50]] = 40, 30
    for how in ("gptq", "rtn"):
        packed = Comet(weights=how).compress(weight, statistics, MethodConfig(spec="comet-g32"))
        assert packed.spec == "comet-g32-gather"
        order = packed.buffers["order"].astype(int)
        assert order[:2].tolist() == [3, 50]
        plain = codec("int4-g32").decode(codec("int4-g32").encode(weight[:, order]))
        np.testing.assert_allclose(codec(packed.spec).decode(packed)[:, order], plain, atol=1e-6)


def test_a_whole_run(planted: Path, tmp_path: Path) -> None:
    report = compress(planted, tmp_path / "mixed", options={"tolerance": "0.02"})
    found = shares(made_by(tmp_path / "mixed"))
    assert 0 < found.wide_blocks < found.all_blocks
    assert report.specs["model.embed_tokens.weight"] == "float16"
    layer = "model.layers.0.self_attn."
    assert report.specs[layer + "q_proj.weight"] == report.specs[layer + "k_proj.weight"]
    expected = logits_of(planted)
    lost = {"mixed": float(np.square(logits_of(tmp_path / "mixed", exact=False) - expected).mean())}
    for widths in ("narrow", "wide"):
        compress(planted, tmp_path / widths, options={"widths": widths})
        lost[widths] = float(np.square(logits_of(tmp_path / widths, exact=False) - expected).mean())
    assert lost["wide"] <= lost["mixed"] * 1.05
    assert lost["mixed"] < 0.5 * lost["narrow"]
    with Checkpoint(tmp_path / "mixed") as checkpoint:
        checkpoint.verify(digests=True)
    compress(planted, tmp_path / "again", options={"tolerance": "0.02"})
    assert contents(tmp_path / "again") == contents(tmp_path / "mixed")


def test_stopped_and_taken_up_it_is_the_same(planted: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "compress" and done > 0.8 * total:
            raise Stop

    with pytest.raises(Stop):
        compress(planted, tmp_path / "out", progress=stop)
    assert compress(planted, tmp_path / "out").num_resumed_parts > 1
    compress(planted, tmp_path / "straight")
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_sorting_takes_fewer_wide_blocks(planted: Path, tmp_path: Path) -> None:
    counts = {}
    for permute in ("true", "false"):
        compress(planted, tmp_path / permute, options={"tolerance": "0.03", "permute": permute})
        counts[permute] = shares(made_by(tmp_path / permute))
    assert 1.5 * counts["true"].wide_blocks < counts["false"].wide_blocks
    assert counts["true"].gathered_inputs < counts["true"].all_inputs / 2
    assert counts["false"].gathered_inputs == 0


def test_bad_settings(planted: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"weights": "nearest"}, "gptq, rtn"),
        ({"widths": "all"}, "search"),
        ({"outlier": "0.5"}, "above 1"),
        ({"tolerance": "2"}, "between 0 and 1"),
        ({"tolerance": "much"}, "expected a number"),
    ):
        with pytest.raises(InputError, match=message):
            compress(planted, tmp_path / "out", options=options)
    with pytest.raises(InputError, match="comet-g128"):
        compress(planted, tmp_path / "out", bits="int4")
    with pytest.raises(InputError, match="4 bits"):
        compress(planted, tmp_path / "out", bits=3.5)


@pytest.mark.parametrize("family", ["qwen2", "mixtral"])
def test_biases_and_experts(family: str, tmp_path: Path) -> None:
    """Orders go through biases and routers: in float arithmetic only the rounding of weights is left."""
    source = make_family(family, tmp_path, vocab_size=4096)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_DIRECTORY / name, source / name)
    expected = logits_of(source)
    compress(source, tmp_path / "mixed")
    compress(source, tmp_path / "plain", method="gptq", bits="int4-g32")
    lost = [float(np.square(logits_of(tmp_path / name) - expected).mean()) for name in ("mixed", "plain")]
    assert lost[0] < 1.1 * lost[1]

"""BitStack: scales, the order of blocks, whole runs and sizes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memwall.compress import weight_method
from memwall.compress.base import MethodConfig
from memwall.compress.bitstack import LEAST_NORM, BitStack, InputNorms
from memwall.compress.calibration import LayerStream, PromptCache
from memwall.compress.model import CompressReport, compress_model
from memwall.compress.stack_order import fitting, in_order, without_nan
from memwall.compress.transforms import Transformed, sites
from memwall.errors import DoesNotFit, InputError
from memwall.formats import codec
from memwall.formats.safetensors_file import SafetensorsFile
from memwall.memory import Arena, Ledger
from memwall.models import Checkpoint, ModelConfig
from memwall.models.decoder import Decoder
from memwall.models.precision import resolve
from memwall.models.stack_index import StackIndex
from memwall.models.weights import load_weights
from tests.compress.tiny_model import QUICK, contents, make_model

OPTIONS = {"rank": "2", "blocks": "3", "sort_tokens": "128"}
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("source") / "tiny", **TINY)


def compress(source: Path, out: Path, size_bytes: int | None = None, **options: str) -> CompressReport:
    settings = {**OPTIONS, **options}
    return compress_model(source, out, method="bitstack", size_bytes=size_bytes, options=settings, tuning=QUICK)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    compress(source, out)
    return out


def folder_bytes(folder: Path) -> int:
    return sum(len(data) for data in contents(folder).values())


# ---- scales ----------------------------------------------------------------------------------------------------------


def test_norms_are_means_over_sequences() -> None:
    """By hand: two sequences of four tokens, which come in pieces."""
    x = np.random.default_rng(0).standard_normal((8, 5)).astype(np.float32)
    norms = InputNorms({"a"}, 4)
    for rows in (x[:3], x[3:4], x[4:8]):
        norms("a", rows)
        norms("other", rows)
    want = (np.linalg.norm(x[:4], axis=0) + np.linalg.norm(x[4:], axis=0)) / 2 + LEAST_NORM
    found = norms.of("a")
    assert found is not None
    np.testing.assert_allclose(found, want, rtol=1e-5)
    assert InputNorms({"b"}, 4).of("b") is None


def test_scaled_models_compute_the_same(source: Path) -> None:
    """The transform is taken out again by norms and by what comes before: logits stay what they were."""
    config = ModelConfig.from_directory(source)
    with Checkpoint(source, config) as checkpoint:
        tokens = np.arange(32).reshape(2, 16)
        stream = LayerStream(config, checkpoint, tokens, Arena(1 << 30, Ledger()))
        stream.embed()
        transform = BitStack().transform(stream, lambda name: "float32")
        for site in sites(config, 0):
            assert all(transform.changes(name) for name in (*site.readers, *site.producers))
        found = []
        for seen in (checkpoint, Transformed(checkpoint, transform)):
            arena = Arena(1 << 30, Ledger())
            weights = load_weights(config, seen, resolve(config, "float32"), arena)
            decoder = Decoder(config, weights, arena, segment_tokens=16, logit_rows=16)
            found.append(decoder.forward(tokens[0], PromptCache(config), all_logits=True).copy())
        np.testing.assert_allclose(found[1], found[0], rtol=1e-3, atol=1e-3)


def test_scaling_lowers_the_error_of_outputs() -> None:
    random = np.random.default_rng(1)
    scale = np.exp(random.standard_normal(96)).astype(np.float32)
    inputs, weight = random.standard_normal((400, 96)).astype(np.float32) * scale, random.standard_normal((64, 96))
    norms = np.linalg.norm(inputs, axis=0)
    method = weight_method("bitstack", {"rank": "2", "blocks": "2"})
    config = MethodConfig(spec=method.form("bitstack") or "")

    def error(factors: np.ndarray) -> float:
        packed = method.compress(weight * factors, None, config)
        return float(np.linalg.norm(inputs @ (codec(packed.spec).decode(packed) / factors - weight).T))

    assert error(norms) < error(np.ones(96))


# ---- order -----------------------------------------------------------------------------------------------------------


def test_levels_follow_each_other() -> None:
    levels = [{"a": 3.0, "b": 1.0, "c": 2.0}, {"a": 0.1, "b": 0.3, "c": 0.2}]
    assert in_order(levels) == ["b", "c", "a", "a", "c", "b"]


def test_losses_that_are_no_numbers_take_the_next_levels() -> None:
    nan = float("nan")
    fixed = without_nan([{"a": nan, "b": 5.0}, {"a": 1.0, "b": 3.0}])
    assert fixed == [{"a": 1.0 + 3.0, "b": 5.0}, {"a": 1.0, "b": 3.0}]
    assert all(np.isfinite(list(level.values())).all() for level in without_nan([{"a": nan}, {"a": nan}]))


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=6), levels=st.integers(1, 5), room=st.integers(0, 600),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_what_fits_is_a_first_part_of_each_matrix_and_never_too_much(
    sizes: list[int], levels: int, room: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    order = [str(name) for _ in range(levels) for name in random.permutation(len(sizes))]
    by_name = {str(at): size for at, size in enumerate(sizes)}
    taken = fitting(order, by_name, room)
    assert sum(by_name[name] for name in taken) <= room
    at = 0
    while at < len(taken) and taken[at] == order[at]:
        at += 1
    # nothing that fits is left: the first block that is out has no room beside those before it
    if at < len(order):
        assert sum(by_name[name] for name in order[: at + 1]) > room


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_the_folder_holds_the_blocks_in_their_order(whole: Path) -> None:
    config = ModelConfig.from_directory(whole)
    with Checkpoint(whole, config) as checkpoint:
        checkpoint.verify(digests=True)
        index = StackIndex.of(checkpoint)
        assert index is not None
        linears = [tensor.name for tensor in config.tensors() if tensor.role == "linear"]
        assert sorted(index.tensors) == sorted(linears)
        assert index.num_blocks == 2 * len(linears)
        first, second = (set(part) for part in (index.order[: len(linears)], index.order[len(linears) :]))
        assert first == second == set(range(len(linears)))
        counts = dict.fromkeys(linears, 0)
        last = 0
        for at in index.order:
            counts[index.tensors[at]] += 1
            path, start = checkpoint.place_of(index.tensors[at], f"block{counts[index.tensors[at]]}")
            assert path.name == "model-00002-of-00002.safetensors"
            assert start > last
            last = start
    assert not [name for name in contents(whole) if name.startswith(("part-", ".")) or name == "progress.json"]


def test_levels_that_are_not_measured_repeat_the_last(source: Path, tmp_path: Path) -> None:
    stages: list[tuple[str, int, int]] = []
    compress_model(
        source, tmp_path / "out", method="bitstack", options={**OPTIONS, "blocks": "4", "sort_levels": "1"},
        tuning=QUICK, progress=lambda *step: stages.append(step),
    )  # fmt: skip
    with Checkpoint(tmp_path / "out") as checkpoint:
        index = StackIndex.of(checkpoint)
    assert index is not None
    count = len(index.tensors)
    assert index.order[:count] == index.order[count : 2 * count] == index.order[2 * count :]
    assert [step for step in stages if step[0] == "sort"] == [("sort", 1, 1)]


def test_all_blocks_are_near_the_model(source: Path, tmp_path: Path) -> None:
    compress(source, tmp_path / "out", rank="8", blocks="12")
    config = ModelConfig.from_directory(source)
    found = []
    for folder, choice in ((source, "float32"), (tmp_path / "out", "saved")):
        with Checkpoint(folder, config) as checkpoint:
            arena = Arena(1 << 30, Ledger())
            weights = load_weights(config, checkpoint, resolve(config, choice, checkpoint), arena)
            decoder = Decoder(config, weights, arena, segment_tokens=16, logit_rows=16)
            found.append(decoder.forward(np.arange(16), PromptCache(config), all_logits=True).copy())
    assert np.abs(found[1] - found[0]).max() < 0.05 * np.abs(found[0]).max()


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.compress.test_bitstack import OPTIONS, QUICK, compress_model

def progress(stage, done, total):
    if stage == {stage!r} and done >= {share} * total:
        os.kill(os.getpid(), signal.SIGKILL)

compress_model(Path({source!r}), Path({out!r}), method="bitstack", options=OPTIONS, tuning=QUICK, progress=progress)
"""


@pytest.mark.parametrize(("stage", "share"), [("compress", 0.9), ("sort", 0.5)])
def test_a_killed_run_goes_on(source: Path, whole: Path, tmp_path: Path, stage: str, share: float) -> None:
    root = str(Path(__file__).resolve().parents[2])
    script = KILLED.format(root=root, stage=stage, share=share, source=str(source), out=str(tmp_path / "out"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    journal = json.loads((tmp_path / "out.partial" / "progress.json").read_text())
    assert journal["parts"]
    assert bool(journal["notes"].get("levels")) == (stage == "sort")
    report = compress(source, tmp_path / "out")
    assert report.num_resumed_parts == len(journal["parts"])
    assert contents(tmp_path / "out") == contents(whole)


def test_a_size_is_hit_and_never_passed(source: Path, whole: Path, tmp_path: Path) -> None:
    most = folder_bytes(whole)
    with SafetensorsFile(whole / "model-00002-of-00002.safetensors") as stack:
        blocks = [stack.info(name).nbytes for name in stack.names()]
    for share in (0.3, 0.75):
        asked = most - int(share * sum(blocks))
        report = compress(source, tmp_path / str(share), asked)
        assert report.folder_bytes == folder_bytes(tmp_path / str(share))
        assert 0.99 * asked <= report.folder_bytes <= asked
        with Checkpoint(tmp_path / str(share)) as checkpoint:
            index = StackIndex.of(checkpoint)
            assert index is not None
            assert 0 < index.num_blocks < len(blocks)


def test_sizes_that_cannot_be(source: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit, match=r"first blocks of all matrices [a-z ]*take [0-9,]+ bytes.* try --size [0-9]+"):
        compress(source, tmp_path / "small", 300_000)
    with pytest.raises(InputError, match="all blocks of this model take"):
        compress(source, tmp_path / "large", 2 * folder_bytes(whole))
    assert not list(tmp_path.iterdir())


def test_an_unfinished_run_serves_another_size(source: Path, whole: Path, tmp_path: Path) -> None:
    """Blocks and their order are the same whatever the size; only what is kept of them differs."""
    root = str(Path(__file__).resolve().parents[2])
    script = KILLED.format(root=root, stage="sort", share=1.0, source=str(source), out=str(tmp_path / "out"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=False)
    asked = folder_bytes(whole) - 20_000
    report = compress(source, tmp_path / "out", asked)
    assert report.num_resumed_parts == 4
    assert 0.99 * asked <= report.folder_bytes <= asked


@pytest.mark.parametrize("bits", [3.5, "int4"])
def test_bits_are_not_for_stacks(source: Path, tmp_path: Path, bits: float | str) -> None:
    with pytest.raises(InputError, match="--size"):
        compress_model(source, tmp_path / "out", bits=bits, method="bitstack", tuning=QUICK)


@pytest.mark.parametrize(
    "setting",
    [{"rank": "-1"}, {"rank": "65"}, {"blocks": "17"}, {"sort_tokens": "0"}, {"sort_levels": "0"}, {"depth": "3"}],
)
def test_settings_out_of_range(setting: dict[str, str]) -> None:
    with pytest.raises(InputError):
        weight_method("bitstack", setting)


@pytest.mark.parametrize(("width", "rank"), [(64, 1), (256, 2), (1024, 8), (2048, 16), (8192, 16)])
def test_the_rank_follows_the_width_unless_told(source: Path, width: int, rank: int) -> None:
    config = replace(ModelConfig.from_directory(source), hidden_size=width)
    assert weight_method("bitstack").for_model(config).settings()["rank"] == rank
    assert weight_method("bitstack", {"rank": "5"}).for_model(config).settings()["rank"] == 5

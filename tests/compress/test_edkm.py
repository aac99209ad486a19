"""Palettes of a matrix: best clusters of its numbers, bits counted to the byte, whole runs, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from memwall import kernels
from memwall.compress.base import MethodConfig
from memwall.compress.edkm import Edkm
from memwall.compress.model import compress_model
from memwall.errors import InputError
from memwall.formats import Packed, codec
from memwall.memory import Arena, Ledger
from memwall.models import Checkpoint, ModelConfig
from memwall.models.precision import resolve, weight_bytes
from tests.compress.test_spqr import layer
from tests.compress.tiny_model import QUICK, contents, make_model
from tests.compress.whole_run import Stop, agrees_with_floats, check_refused

PLAIN = Edkm(steps=0, start="line", groups=1)


def made(weight: np.ndarray, spec: str, method: Edkm = PLAIN) -> tuple[Packed, np.ndarray]:
    packed = method.compress(weight, None, MethodConfig(spec=spec))
    return packed, codec(spec).decode(packed)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("start", ["line", "spread"])
def test_weights_become_the_nearest_of_few_values(bits: int, start: str) -> None:
    weight, _ = layer(40, 96)
    packed, values = made(weight, f"vptq-v1-k{1 << bits}", Edkm(steps=0, start=start))
    palette = np.unique(values)
    assert len(palette) <= 1 << bits
    nearest = palette[np.abs(weight[..., None] - palette).argmin(axis=-1)]
    assert np.abs(weight - values).sum() == pytest.approx(np.abs(weight - nearest).sum(), rel=1e-6)
    assert packed.nbytes == codec(packed.spec).nbytes(weight.shape)


def test_bytes_are_indices_and_palettes() -> None:
    """3 bits a weight in rows padded to 32 bits, 8 halves a group, and 96 bytes that products read past the ends."""
    for groups in (1, 3):
        form = Edkm(steps=0, start="line", groups=groups).form(3)
        assert form is not None
        words = groups * 40 * -(-(96 // groups) * 3 // 32)
        assert codec(form).nbytes((40, 96)) == 4 * words + 16 * groups + 96


def test_the_swept_start_makes_up_for_errors_in_the_same_bytes() -> None:
    weight, statistics = layer(96, 128)
    form = MethodConfig(spec="vptq-v1-k4-g2-ordered")
    method = Edkm(steps=0, start="swept")
    assert method.calibrates
    assert not PLAIN.calibrates
    swept = method.compress(weight, statistics, form)
    plain, values = made(weight, form.spec)
    assert (swept.spec, swept.nbytes) == (plain.spec, plain.nbytes)
    lost = [statistics.error(each - weight) for each in (codec(swept.spec).decode(swept), values)]
    assert lost[0] < 0.8 * lost[1]


def test_palettes_of_groups_of_columns_lose_less() -> None:
    weight, _ = layer(64, 128)
    weight = weight * np.repeat([0.2, 1.0], 64).astype(np.float32)
    lost = [np.square(made(weight, spec)[1] - weight).sum() for spec in ("vptq-v1-k8", "vptq-v1-k8-g2")]
    assert lost[1] < 0.9 * lost[0]


def test_palettes_of_blocks_of_rows_lose_less() -> None:
    """Rows that differ in size, and a last block that is short."""
    weight, statistics = layer(44, 96)
    weight = weight * np.repeat([0.1, 1.0, 0.4], [16, 16, 12])[:, None].astype(np.float32)
    # as shares of each row: the largest rows are what one palette serves already
    power = np.square(weight).mean(axis=1, keepdims=True)
    lost = [(np.square(made(weight, spec)[1] - weight) / power).sum() for spec in ("vptq-v1-k8", "vptq-v1-k8-b16")]
    assert lost[1] < 0.6 * lost[0]
    packed, values = made(weight, "vptq-v1-k8-g2-b16")
    assert packed.nbytes == 2 * 4 * 44 * -(-48 * 3 // 32) + 6 * 16 + 96
    for rows in (slice(0, 16), slice(16, 32), slice(32, 44)):
        assert len(np.unique(values[rows, :48])) <= 8
    form = MethodConfig(spec="vptq-v1-k4-g2-b16-ordered")
    swept = Edkm(steps=0).compress(weight, statistics, form)
    plain, floats = made(weight, form.spec)
    assert swept.nbytes == plain.nbytes
    ours, theirs = (statistics.error(each - weight) for each in (codec(swept.spec).decode(swept), floats))
    assert ours < 0.8 * theirs


def test_a_matrix_of_few_values_is_exact_and_products_look_it_up() -> None:
    random = np.random.default_rng(0)
    weight = random.choice(np.array([-0.5, 0.0, 0.25], np.float32), (33, 70))
    packed, values = made(weight, "vptq-v1-k8")
    np.testing.assert_array_equal(values, weight)
    matrix = kernels.matrix(packed)
    assert matrix.nbytes == packed.nbytes
    x, out = random.standard_normal((5, 70)).astype(np.float32), np.empty((5, 33), np.float32)
    kernels.linear(x, [matrix], [out], exact=True)
    np.testing.assert_allclose(out, x @ weight.T, rtol=1e-4, atol=1e-4)


def test_forms() -> None:
    assert PLAIN.form(3) == "vptq-v1-k8"
    assert Edkm(steps=0).form(2) == "vptq-v1-k4-g4-ordered"
    assert Edkm(steps=0, order=False).form(2) == "vptq-v1-k4-g4"
    assert Edkm(steps=0, block=16).form(3) == "vptq-v1-k8-g4-b16-ordered"
    PLAIN.check("vptq-v1-k16-g2")
    PLAIN.check("vptq-v1-k16-b4")
    PLAIN.check("vptq-v1-k16-ordered")
    for spec in ("vptq-v2-k8", "vptq-v1-k512", "vptq-v1-k8-norm", "vptq-v1-k8-r4", "int3", "vptq2.25"):
        with pytest.raises(InputError, match="edkm makes palettes"):
            PLAIN.check(spec)
    for bits in (0, 2.5, 9):
        with pytest.raises(InputError, match="--bits 3"):
            PLAIN.form(bits)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"start": "here"}, "swept, line, spread"),
        ({"steps": "-1"}, "steps is -1"),
        ({"tau": "0"}, "tau is above 0"),
        ({"rate": "2"}, "between 0 and 1"),
        ({"rounds": "0"}, "at least 1"),
        ({"groups": "0"}, "at least 1"),
        ({"block": "-1"}, "block is -1"),
    ],
)
def test_settings_that_make_no_sense(options: dict[str, str], match: str) -> None:
    with pytest.raises(InputError, match=match):
        Edkm.configured(options)


def test_training_without_torch_says_what_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="steps=0"):
        Edkm()


def test_numbers_beyond_halves_are_refused() -> None:
    with pytest.raises(InputError):
        made(np.full((4, 8), 1e6, np.float32), "vptq-v1-k8")
    with pytest.raises(InputError):
        made(np.full((4, 8), np.nan, np.float32), "vptq-v1-k8")


def test_whole_runs(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source")
    settings = {"method": "edkm", "options": {"steps": "0"}, "tuning": QUICK}

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "compress" and done > 0.8 * total:
            raise Stop

    with pytest.raises(Stop):
        compress_model(source, tmp_path / "out", progress=stop, **settings)
    report = compress_model(source, tmp_path / "out", **settings)
    assert report.num_resumed_parts > 1
    compress_model(source, tmp_path / "straight", **settings)
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")
    model = ModelConfig.from_directory(tmp_path / "out")
    with Checkpoint(tmp_path / "out", model) as checkpoint:
        checkpoint.verify(digests=True)
        specs = resolve(model, "saved", checkpoint)
        linear = [t for t in model.tensors() if t.role == "linear"]
        assert {specs[t.name] for t in linear} == {"vptq-v1-k8-g4-ordered"}
        assert specs["model.embed_tokens.weight"] == "int8-g64"
        held = weight_bytes(model, specs)
        assert set(held) == {"weights/vptq", "weights/int8-g64", "weights/float32"}
        assert held["weights/vptq"] == pytest.approx(sum(checkpoint.stored_bytes(t.name) for t in linear), rel=0.05)
        agrees_with_floats(model, checkpoint, Arena(1 << 30, Ledger()))
    check_refused(source, tmp_path, "edkm", "int3", "edkm makes palettes")

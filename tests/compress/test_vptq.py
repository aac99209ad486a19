"""VPTQ: what is stored is what was swept, each part of the mechanism lowers the error, and whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.compress import weight_method
from memwall.compress.base import MethodConfig, Statistics
from memwall.compress.codebook_fit import fitted
from memwall.compress.gptq import Gptq
from memwall.compress.model import CompressReport, compress_model
from memwall.compress.sweep import sweep_columns
from memwall.compress.vector_columns import Books, Training, VectorColumns, learned
from memwall.compress.vptq import Vptq, scales
from memwall.errors import InputError
from memwall.formats import codec
from memwall.formats.vector_parts import looked_up
from memwall.formats.vptq import VptqCodec, unpack
from memwall.memory import Arena, Ledger
from memwall.models import Checkpoint, ModelConfig
from memwall.models.decoder import Decoder
from memwall.models.precision import is_matrix, resolve, weight_bytes
from memwall.models.weights import load_weights
from tests.compress.test_spqr import layer
from tests.compress.tiny_model import QUICK, contents, make_model

PLAIN = Vptq(refine=0)


def made(
    method: Vptq, spec: str, weight: np.ndarray, statistics: Statistics | None, damping: float = 0.02
) -> np.ndarray:
    packed = method.compress(weight, statistics, MethodConfig(spec=spec, damping=damping))
    return np.asarray(codec(packed.spec).decode(packed))


class Recorded(VectorColumns):
    """Keeps what the sweep was told that each column decodes to, and what it was given."""

    def quantize(self, column: int, values: np.ndarray) -> np.ndarray:
        found = super().quantize(column, values)
        seen[column] = found.copy()
        given_values[column] = values.copy()
        return found


seen: dict[int, np.ndarray] = {}
given_values: dict[int, np.ndarray] = {}


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    st.integers(1, 40), st.integers(1, 60), st.integers(1, 9), st.sampled_from([0, 8]), st.integers(1, 3),
    st.sampled_from(["none", "range", "deviation"]), st.sampled_from([0.0, 20.0]), st.booleans(),
)  # fmt: skip
def test_what_is_stored_is_what_was_swept(
    rows: int, columns: int, vector: int, residual: int, groups: int, norm: str, outliers: float, order: bool
) -> None:
    """decode(packed) is the sweep's own W-hat bit for bit."""
    weight, statistics = layer(rows, columns)
    method = Vptq(vector=vector, codebook=16, residual=residual, groups=groups, norm=norm, outliers=outliers,
                  outlier_vector=3, outlier_codebook=4, order=order, refine=0)  # fmt: skip
    spec = method.form(8.0)
    assert spec is not None
    form = VptqCodec.parse(spec)
    exact = VptqCodec.parse(spec.replace("vptq8", "vptq"))
    assert form.ordered == order
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("memwall.compress.vptq.VectorColumns", Recorded)
        packed = method.compress(weight, statistics, MethodConfig(spec=exact.spec, damping=0.02))
    places = packed.buffers["order"].astype(np.int64) if order else np.arange(columns)
    swept = np.stack([seen[place] for place in range(columns)], axis=1)
    np.testing.assert_array_equal(codec(packed.spec).decode(packed)[:, places], swept)


def test_one_column_is_the_nearest_centroid() -> None:
    random = np.random.default_rng(0)
    weight = random.standard_normal((24, 1)).astype(np.float32)
    packed = PLAIN.compress(weight, None, MethodConfig(spec="vptq-v4-k4"))
    (_, rest), points = unpack(packed), weight.reshape(6, 4)
    distances = np.square(points[:, None] - rest.main[0].astype(np.float32)).sum(axis=2)
    np.testing.assert_array_equal(rest.codes[:, 0], distances.argmin(axis=1))


def test_indices_are_of_rows_of_one_column() -> None:
    weight, statistics = layer(32, 12)
    _, rest = unpack(PLAIN.compress(weight, statistics, MethodConfig(spec="vptq-v8-k16")))
    assert rest.codes.shape == (4, 12)


def test_columns_make_up_for_those_before_them() -> None:
    """What a column is rounded from is the best it could be for the errors so far, by brute force over 16 columns."""
    weight, statistics = layer(8, 16)
    hessian = statistics.hessian + 0.02 * statistics.hessian.diagonal().mean() * np.eye(16, dtype=np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("memwall.compress.vptq.VectorColumns", Recorded)
        Vptq(refine=0, order=False).compress(weight, statistics, MethodConfig(spec="vptq-v4-k4", damping=0.02))
    for column in (1, 7, 15):
        error = np.stack([seen[c] - weight[:, c] for c in range(column)], axis=1).astype(np.float64)
        # free columns from here on: the best changes of them, of which this column's is the first
        best = -np.linalg.solve(hessian[column:, column:].astype(np.float64), hessian[column:, :column] @ error.T)
        np.testing.assert_allclose(given_values[column] - weight[:, column], best[0], atol=2e-4)


def test_identity_is_the_nearest_centroid_everywhere() -> None:
    weight, _ = layer(40, 30)
    method = Vptq(refine=0, order=False)
    packed = method.compress(weight, Statistics.identity(30), MethodConfig(spec="vptq-v4-k32"))
    form = VptqCodec.parse(packed.spec)
    _, rest = unpack(packed)
    vectors = weight.reshape(10, 4, 30).transpose(0, 2, 1)
    distances = np.square(vectors[:, :, None] - rest.main[0].astype(np.float32)).sum(axis=3)
    np.testing.assert_array_equal(rest.codes, distances.argmin(axis=2))
    np.testing.assert_array_equal(looked_up(form.parts(30)[1], rest, 40), codec(packed.spec).decode(packed))


def test_each_part_of_the_mechanism_lowers_the_error() -> None:
    weight, statistics = layer(256, 128)

    def error(method: Vptq, spec: str, given: Statistics | None = None) -> float:
        decoded = made(method, spec, weight, given or statistics)
        return statistics.error(decoded - weight)

    diagonal = Statistics(np.diag(statistics.hessian.diagonal()), statistics.num_tokens)
    unweighted = error(PLAIN, "vptq-v4-k64", Statistics.identity(128))
    weighted = error(PLAIN, "vptq-v4-k64", diagonal)
    swept = error(PLAIN, "vptq-v4-k64-ordered")
    assert swept < weighted < unweighted
    fit = error(Vptq(rounds=1), "vptq-v4-k64-ordered")
    assert error(Vptq(rounds=3), "vptq-v4-k64-ordered") <= fit < swept
    assert error(PLAIN, "vptq-v4-k64-r64-ordered") < swept / 2
    assert error(PLAIN, "vptq-v4-k64-g4-ordered") < swept
    assert error(PLAIN, "vptq-v4-k64-o30v2k64-ordered") < swept


def test_residuals_are_of_the_compensated_weights() -> None:
    """The second codebook is learned from what the first sweep leaves, not from what the given weights leave."""
    weight, statistics = layer(64, 48)
    factored = statistics.factor(0.02, True)
    ordered = np.ascontiguousarray(weight[:, factored.order])
    form = VptqCodec.parse("vptq-v4-k16-ordered")
    books = [None, Books(main=learned(form.parts(48)[1], ordered, np.ones(48), 4, Training()))]
    columns = Recorded(form, (64, 48), books, order=factored.order, keep_left=True)
    sweep_columns(ordered, factored.arranged(), columns)
    assert columns.left is not None
    for place in (0, 20, 47):
        np.testing.assert_allclose(columns.left[:, place], given_values[place] - seen[place], atol=1e-6)
    assert not np.allclose(columns.left[:, 20], ordered[:, 20] - seen[20], atol=1e-3)


def test_all_groups_get_residuals() -> None:
    weight, statistics = layer(64, 48)
    packed = PLAIN.compress(weight, statistics, MethodConfig(spec="vptq-v4-k16-r16-g3"))
    _, rest = unpack(packed)
    assert rest.residual is not None
    assert rest.residual.shape == (3, 16, 4)
    assert all(np.abs(book).max() > 0 for book in rest.residual)


@pytest.mark.parametrize("spec", ["vptq-v4-k16-ordered", "vptq-v3-k8-r8-g2-o100v2k4-ordered-norm"])
def test_fitted_centroids_are_the_best_for_their_indices(spec: str) -> None:
    weight, statistics = layer(12, 20)
    form = VptqCodec.parse(spec)
    method = Vptq(refine=0, norm="deviation" if form.norm else "none")
    factored = statistics.factor(0.02, True)
    ordered = np.ascontiguousarray(weight[:, factored.order])
    columns = method._swept(form, ordered, statistics.hessian.diagonal()[factored.order].astype(np.float64), factored)
    before = columns.books
    columns.books, _ = fitted(columns, ordered, statistics, factored.order, 0.02, 400)

    def loss(packed: Any) -> float:
        hessian = statistics.hessian + 0.02 * statistics.hessian.diagonal().mean() * np.eye(20, dtype=np.float32)
        difference = codec(packed.spec).decode(packed) - weight
        return float(np.einsum("ij,ij->", difference @ hessian, difference))

    # moving any centroid of the fit a little either way gains nothing to speak of
    fit = loss(columns.finish())
    books = [book for each in columns.books if each is not None for book in (each.main, each.residual)]
    for book in (each for each in books if each is not None):
        for index in np.ndindex(book[:, :3, :2].shape):
            was = book[index]
            for change in (1.02, 0.98):
                book[index] = was * np.float16(change)
                assert loss(columns.finish()) > 0.999 * fit
            book[index] = was
    columns.books = before
    assert fit < loss(columns.finish())


def test_scales() -> None:
    values = np.float32([[1, 5, 0], [3, 5, 0], [2, 5, 0]])
    np.testing.assert_array_equal(scales(values, "range"), np.float16([[2, 1, 1], [1, 5, 0]]))
    np.testing.assert_allclose(scales(values, "deviation"), [[0.8165, 1, 1], [2, 5, 0]], atol=1e-3)


def test_dead_inputs_have_no_say() -> None:
    weight, statistics = layer(32, 64)
    statistics.hessian[5], statistics.hessian[:, 5] = 0, 0
    weight[:, 5] = 1000
    for method in (PLAIN, Vptq(refine=5), Vptq(norm="range")):
        spec = "vptq-v4-k64-ordered" + ("-norm" if method.norm != "none" else "")
        found = made(method, spec, weight, statistics)
        assert np.abs(found).max() < 2


def test_better_than_gptq_at_two_bits() -> None:
    """At fewer bits, codebooks counted."""
    weight, statistics = layer(512, 256)
    ours = Vptq().compress(weight, statistics, MethodConfig(spec="vptq2.2-ordered", damping=0.02))
    config = MethodConfig(spec="int2-g128-asym", activation_order=True)
    other = Gptq().compress(weight, statistics, config)
    assert ours.bits_per_value <= 2.2 < other.bits_per_value
    errors = [statistics.error(codec(each.spec).decode(each) - weight) for each in (ours, other)]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"vector": "17"}, "1 to 16"),
        ({"codebook": "100"}, "power of two"),
        ({"norm": "always"}, "none, range, deviation"),
        ({"init": "zeros"}, "sampled, spread"),
        ({"outliers": "60"}, "percentage of the columns"),
        ({"refine": "-1"}, "at least 0"),
        ({"rounds": "0"}, "at least 1"),
        ({"tune_rate": "2"}, "between 0 and 1"),
        ({"length": "8"}, "it has vector, codebook, residual"),
    ],
)
def test_settings_that_are_none(options: dict[str, str], match: str) -> None:
    with pytest.raises(InputError, match=match):
        weight_method("vptq", options)


def test_tuning_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="tune needs torch"):
        weight_method("vptq", {"tune": "10"})


def test_statistics_that_do_not_fit() -> None:
    weight, statistics = layer(16, 32)
    with pytest.raises(InputError, match="do not fit"):
        PLAIN.compress(weight[:, :16], statistics, MethodConfig(spec="vptq-v4-k16"))


# -- whole runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("source") / "tiny")


def compress(source: Path, out: Path, **options: Any) -> CompressReport:
    settings = {"iterations": "5", "refine": "2", **options.pop("options", {})}
    given = {"method": "vptq", "bits": 2.5, "tuning": QUICK, "options": settings, **options}
    return compress_model(source, out, **given)


class Stop(Exception):
    pass


def test_saved_resumed_loaded(source: Path, tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if done > 0.8 * total:
            raise Stop

    with pytest.raises(Stop):
        compress(source, tmp_path / "out", progress=stop)
    with pytest.raises(InputError, match="other settings"):
        compress(source, tmp_path / "out", options={"groups": "2"})
    assert compress(source, tmp_path / "out").num_resumed_parts > 1
    report = compress(source, tmp_path / "straight")
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")
    model = ModelConfig.from_directory(tmp_path / "out")
    with Checkpoint(tmp_path / "out", model) as checkpoint:
        checkpoint.verify(digests=True)
        specs = resolve(model, "saved", checkpoint)
        assert specs == {t.name: report.specs[t.name] if is_matrix(t) else "float32" for t in model.tensors()}
        linear = [t for t in model.tensors() if t.role == "linear"]
        for tensor in linear:
            assert 8 * codec(specs[tensor.name]).nbytes(tensor.shape) <= 2.5 * tensor.size
        assert specs["model.embed_tokens.weight"] == "float16"
        arena = Arena(1 << 30, Ledger())
        weights = load_weights(model, checkpoint, specs, arena)
        held = weight_bytes(model, specs)
        assert set(held) == {"weights/vptq", "weights/float16", "weights/float32"}
        stored = sum(checkpoint.stored_bytes(t.name) for t in linear)
        assert held["weights/vptq"] == pytest.approx(stored, rel=0.05)  # buffers are aligned
        assert sum(weights.matrices[t.name].nbytes for t in linear) == stored
        assert Decoder(model, weights, arena, segment_tokens=4)


def test_torch_keeps_no_budget(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    for setting in ("tune", "tune_model"):
        with pytest.raises(InputError, match="which no budget holds"):
            compress(source, tmp_path / "out", options={setting: "5"}, budget_bytes=1 << 30)
    assert not (tmp_path / "out").exists()


def test_within_its_budget(source: Path, tmp_path: Path) -> None:
    arena = Arena(14 << 20, Ledger())
    assert compress(source, tmp_path / "out", arena=arena).num_calibration_tokens > 0
    assert arena.peak_bytes <= 14 << 20


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"bits": 0.2}, "0.5 to 8 bits"),
        ({"bits": 1.0, "options": {"vector": "2", "codebook": "16"}}, "takes at least 2"),
        ({"bits": "int4"}, "vptq makes its own formats"),
        ({"bits": "vptq2.25", "method": "gptq", "options": {}}, "memwall compress MODEL OUT --method vptq"),
    ],
)
def test_forms_that_cannot_be_made(source: Path, tmp_path: Path, options: dict[str, Any], match: str) -> None:
    run = compress_model if options.get("method") == "gptq" else compress
    with pytest.raises(InputError, match=match):
        run(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()

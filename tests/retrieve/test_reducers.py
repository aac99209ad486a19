"""Maps to fewer dimensions, against scikit-learn's and against what they must keep."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.decomposition import PCA, KernelPCA

from memwall.errors import InputError
from memwall.retrieve.reducers import REDUCERS, Autoencoder, KernelPca, Pca, Projection, sample


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    draw = np.random.default_rng(0)
    return (draw.standard_normal((300, 24)) * np.linspace(3, 0.1, 24) @ draw.standard_normal((24, 24)) + 1).astype(
        np.float32
    )


def up_to_signs(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference once columns point the same way."""
    return float(np.abs(a - b * np.sign((a * b).sum(axis=0))).max())


def test_pca_is_scikit_learns(x: np.ndarray) -> None:
    theirs = PCA(10, svd_solver="full").fit(x)
    ours = Pca.fit(x, 10)
    assert up_to_signs(ours.apply(x), theirs.transform(x)) < 1e-3
    np.testing.assert_allclose(ours.weights.T @ ours.weights, np.eye(10), atol=1e-5)
    assert ours.nbytes == 4 * (24 * 10 + 24)


def test_linear_kernel_pca_is_pca(x: np.ndarray) -> None:
    ours = KernelPca.fit(x, 10).apply(x)
    assert up_to_signs(ours, Pca.fit(x, 10).apply(x)) < 1e-3
    assert up_to_signs(ours, KernelPCA(10, kernel="linear").fit_transform(x.astype(np.float64))) < 1e-3
    with pytest.raises(InputError, match="more than 24 vectors"):
        KernelPca.fit(x[:24], 24)


def test_all_components_only_turn(x: np.ndarray) -> None:
    y = Pca.fit(x, 24).apply(x)
    centred = x - x.mean(axis=0)
    np.testing.assert_allclose(y @ y.T, centred @ centred.T, atol=0.05)


def test_projections_keep_products_in_expectation(x: np.ndarray) -> None:
    a, b = x[0] / np.linalg.norm(x[0]), x[1] / np.linalg.norm(x[1])
    found = [
        float(np.prod([one.apply(v[None])[0] for v in (a, b)], axis=0).sum())
        for one in (Projection.fit(x, 12, seed) for seed in range(400))
    ]
    assert abs(np.mean(found) - a @ b) < 4 * np.std(found) / 20


def test_the_encoder_is_applied_as_torch_applies_it(x: np.ndarray) -> None:
    torch = pytest.importorskip("torch")
    before = torch.random.get_rng_state()
    ours = Autoencoder.fit(x, 6)
    assert torch.equal(before, torch.random.get_rng_state())
    assert [weights.shape for weights, _ in ours.layers] == [(24, 512), (512, 256), (256, 6)]
    held = torch.from_numpy(x)
    for number, (weights, bias) in enumerate(ours.layers):
        held = held @ torch.from_numpy(weights) + torch.from_numpy(bias)
        held = torch.relu(held) if number < 2 else held
    np.testing.assert_allclose(ours.apply(x), held.numpy(), atol=1e-4)
    np.testing.assert_array_equal(ours.apply(x), Autoencoder.fit(x, 6).apply(x))  # one seed, one encoder


def test_the_encoder_learns(x: np.ndarray) -> None:
    """What it gives tells vectors apart as the vectors do: it was trained to give them back."""
    y = Autoencoder.fit(x, 6).apply(x)
    near = np.linalg.lstsq(np.c_[y, np.ones(len(y))], x, rcond=None)[0]
    left = x - np.c_[y, np.ones(len(y))] @ near
    assert left.var() < 0.5 * x.var()


@pytest.mark.parametrize("kind", [name for name, one in REDUCERS.items() if one.stored])
def test_tables_say_all_of_it(kind: str, x: np.ndarray) -> None:
    ours = REDUCERS[kind].fit(x, 7)
    tables = ours.tables()
    assert {name: table.shape for name, table in tables.items()} == type(ours).shapes(24, 7)
    assert all(table.dtype == np.float32 for table in tables.values())
    np.testing.assert_array_equal(type(ours).of_tables(tables).apply(x), ours.apply(x))
    assert ours.apply(x[:0]).shape == (0, 7)


def test_umap_cannot_be_stored() -> None:
    for refused in (
        lambda: REDUCERS["umap"].shapes(4, 2),
        lambda: REDUCERS["umap"].of_tables({}),
        lambda: REDUCERS["umap"](None).tables(),
    ):  # type: ignore[call-arg]
        with pytest.raises(InputError, match="cannot be stored"):
            refused()


def test_samples_are_rows_in_order() -> None:
    rows = np.arange(100)[:, None]
    assert sample(rows, 200) is rows
    found = sample(rows, 10)[:, 0]
    assert len(found) == 10
    assert (np.diff(found) > 0).all()

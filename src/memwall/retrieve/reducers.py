"""Fewer dimensions: maps from d to m numbers that are learned once, from one set of vectors, and applied to all others.

    pca             the m directions of largest variance: z = (x - mean) W
    kernel-pca      the same by way of the products between the fitted vectors (4,000 of them at most), as kernels need;
                    with the linear kernel, the default of the paper's code, it is PCA up to signs
    projection      W of independent normal numbers of variance 1/m, nothing learned
    autoencoder     the encoder of d -> 512 -> 256 -> m with ReLU between, trained with its mirror image to give x back
                    (squared error, Adam, rate 1e-3, 10 epochs, batches of 64); only the encoder is kept
    umap            neighbourhoods (15 neighbours, distance 0.1, cosine); its map is the fitted object itself, so it can
                    be compared but not stored in a file

What is learned are float32 tables, which a file holds beside the vectors. Cost: d * m * 4 bytes for the linear ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from memwall.errors import InputError, MissingDependency

MOST_FITTED = 250_000
MOST_KERNEL = 4_000
SEED = 42
HIDDEN = (512, 256)
_CHUNK = 8192

Arrays = Mapping[str, np.ndarray]


class Reducer(ABC):
    """A fitted map from d to m dimensions."""

    kind: ClassVar[str]
    stored: ClassVar[bool] = True
    """Whether its tables say all of it."""

    @classmethod
    @abstractmethod
    def fit(cls, x: np.ndarray, m: int, seed: int = SEED) -> Reducer:
        """Learned from x, float32 [n, d]."""

    @abstractmethod
    def apply(self, x: np.ndarray) -> np.ndarray:
        """float32 [n, d] -> float32 [n, m]."""

    @abstractmethod
    def tables(self) -> dict[str, np.ndarray]:
        """What a file holds of it, float32."""

    @classmethod
    @abstractmethod
    def shapes(cls, d: int, m: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tables."""

    @classmethod
    @abstractmethod
    def of_tables(cls, tables: Arrays) -> Reducer:
        """Inverse of `tables`."""

    @property
    def nbytes(self) -> int:
        return sum(table.nbytes for table in self.tables().values())


class Linear(Reducer):
    """z = (x - mean) @ weights. mean [d], weights [d, m]."""

    def __init__(self, mean: np.ndarray, weights: np.ndarray) -> None:
        self.mean = np.ascontiguousarray(mean, np.float32)
        self.weights = np.ascontiguousarray(weights, np.float32)

    def apply(self, x: np.ndarray) -> np.ndarray:
        found: np.ndarray = (x - self.mean) @ self.weights
        return found

    def tables(self) -> dict[str, np.ndarray]:
        return {"mean": self.mean, "weights": self.weights}

    @classmethod
    def shapes(cls, d: int, m: int) -> dict[str, tuple[int, ...]]:
        return {"mean": (d,), "weights": (d, m)}

    @classmethod
    def of_tables(cls, tables: Arrays) -> Linear:
        return cls(tables["mean"], tables["weights"])


class Pca(Linear):
    """Eigenvectors of the covariance: the right singular vectors of the centred vectors, without the n x d work."""

    kind = "pca"

    @classmethod
    def fit(cls, x: np.ndarray, m: int, seed: int = SEED) -> Pca:
        mean = x.mean(axis=0, dtype=np.float64)
        covariance = np.zeros((x.shape[1], x.shape[1]))
        for start in range(0, len(x), _CHUNK):
            centred = x[start : start + _CHUNK] - mean.astype(np.float32)
            covariance += centred.T @ centred
        vectors = np.linalg.eigh(covariance)[1][:, ::-1][:, :m]
        return cls(mean, _signed(vectors))


class KernelPca(Linear):
    """Linear kernel: combinations of the fitted vectors, from the eigenvectors of their centred products."""

    kind = "kernel-pca"

    @classmethod
    def fit(cls, x: np.ndarray, m: int, seed: int = SEED) -> KernelPca:
        x = sample(x, MOST_KERNEL, seed)
        if m > len(x) - 1:
            raise InputError(f"kernel-pca:{m} needs more than {m} vectors to learn from, got {len(x)}")
        mean = x.mean(axis=0, dtype=np.float64)
        centred = x - mean
        values, vectors = np.linalg.eigh(centred @ centred.T)
        values, vectors = values[::-1][:m], vectors[:, ::-1][:, :m]
        return cls(mean, _signed(centred.T @ (vectors / np.sqrt(np.maximum(values, np.finfo(float).tiny)))))


class Projection(Linear):
    """Gaussian random projection; inner products are kept in expectation."""

    kind = "projection"

    @classmethod
    def fit(cls, x: np.ndarray, m: int, seed: int = SEED) -> Projection:
        d = x.shape[1]
        return cls(np.zeros(d), np.random.default_rng(seed).standard_normal((d, m)) / np.sqrt(m))


class Autoencoder(Reducer):
    """The encoder alone. layers: weights [inputs, outputs] and biases [outputs]."""

    kind = "autoencoder"

    def __init__(self, layers: list[tuple[np.ndarray, np.ndarray]]) -> None:
        self.layers = [tuple(np.ascontiguousarray(one, np.float32) for one in layer) for layer in layers]

    @classmethod
    def fit(cls, x: np.ndarray, m: int, seed: int = SEED) -> Autoencoder:
        try:
            from memwall.retrieve.autoencoder_torch import train
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise MissingDependency("torch", "torch") from None
        return cls(train(x, (x.shape[1], *HIDDEN, m), seed))

    def apply(self, x: np.ndarray) -> np.ndarray:
        for number, (weights, bias) in enumerate(self.layers):
            x = x @ weights + bias
            if number < len(self.layers) - 1:
                x = np.maximum(x, 0)
        return x

    def tables(self) -> dict[str, np.ndarray]:
        return {
            f"{name}{number}": table
            for number, layer in enumerate(self.layers)
            for name, table in zip(("weights", "bias"), layer, strict=True)
        }

    @classmethod
    def shapes(cls, d: int, m: int) -> dict[str, tuple[int, ...]]:
        sizes = (d, *HIDDEN, m)
        found: dict[str, tuple[int, ...]] = {}
        for number in range(len(sizes) - 1):
            found[f"weights{number}"] = (sizes[number], sizes[number + 1])
            found[f"bias{number}"] = (sizes[number + 1],)
        return found

    @classmethod
    def of_tables(cls, tables: Arrays) -> Autoencoder:
        return cls([(tables[f"weights{number}"], tables[f"bias{number}"]) for number in range(len(HIDDEN) + 1)])


class Umap(Reducer):
    """umap-learn's own object."""

    kind = "umap"
    stored = False

    def __init__(self, fitted: Any) -> None:
        self.fitted = fitted

    @classmethod
    def fit(cls, x: np.ndarray, m: int, seed: int = SEED) -> Umap:
        try:
            import umap
        except ModuleNotFoundError as error:
            raise MissingDependency(f"umap-learn ({error.name})", "umap") from None
        settings = {"n_neighbors": 15, "min_dist": 0.1, "metric": "cosine"}
        return cls(umap.UMAP(n_components=m, random_state=seed, n_jobs=1, **settings).fit(x))

    def apply(self, x: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(self.fitted.transform(x), np.float32)

    def tables(self) -> dict[str, np.ndarray]:
        raise InputError("umap's map is the fitted object itself and cannot be stored; take pca, or projection")

    @classmethod
    def shapes(cls, d: int, m: int) -> dict[str, tuple[int, ...]]:
        raise InputError("umap's map is the fitted object itself and cannot be stored; take pca, or projection")

    @classmethod
    def of_tables(cls, tables: Arrays) -> Umap:
        raise InputError("umap's map is the fitted object itself and cannot be stored; take pca, or projection")


REDUCERS: dict[str, type[Reducer]] = {one.kind: one for one in (Pca, KernelPca, Projection, Autoencoder, Umap)}


def sample(x: np.ndarray, most: int, seed: int = SEED) -> np.ndarray:
    """x, or `most` of its rows by lot, in their order."""
    if len(x) <= most:
        return x
    return x[np.sort(np.random.default_rng(seed).choice(len(x), most, replace=False))]


def _signed(vectors: np.ndarray) -> np.ndarray:
    """Columns turned so that their largest number is positive: one answer whatever the library."""
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=0)[None], axis=0)[0]
    return vectors * np.where(largest < 0, -1.0, 1.0)

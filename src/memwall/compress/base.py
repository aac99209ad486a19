"""The seam of weight compression: what is known of a layer's inputs, and methods that make its matrix a `Packed`.

Matrices are [rows, cols] = [outputs, inputs]; a layer computes y = x W^T. The error that matters is not that of the
weights but that of the outputs over the inputs the layer sees: sum over tokens of |x (W - W')^T|^2 = trace((W - W') H
(W - W')^T) with H = X^T X. So H is all that a method has to know about the data.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from memwall.compress.sweep import Factor
from memwall.errors import InputError
from memwall.formats import Packed, codec


@dataclass(slots=True)
class Statistics:
    """What calibration learned about the inputs of a linear layer.

    hessian: X^T X summed over the tokens seen, [cols, cols] float32, symmetric.
    num_tokens: how many rows X had.
    """

    hessian: np.ndarray
    num_tokens: int = 0
    _factor: tuple[tuple[float, bool], Factor] | None = None

    @staticmethod
    def identity(num_columns: int) -> Statistics:
        """All inputs alike and independent: under it every method's compensation is nothing."""
        return Statistics(np.eye(num_columns, dtype=np.float32), 1)

    def add(self, x: np.ndarray) -> None:
        """Take in inputs x [tokens, cols] float32."""
        self.hessian += x.T @ x
        self.num_tokens += len(x)
        self._factor = None

    def factor(self, damping: float, activation_order: bool) -> Factor:
        """H's factor for the sweep; made once for all matrices that read these inputs."""
        key = (damping, activation_order)
        if self._factor is None or self._factor[0] != key:
            self._factor = (key, Factor.of(self.hessian, damping, activation_order))
        return self._factor[1]

    def error(self, difference: np.ndarray) -> float:
        """Squared error of the outputs when the weights change by `difference` [rows, cols]."""
        return float(np.einsum("ij,ij->", difference @ self.hessian, difference, dtype=np.float64))


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodConfig:
    """What a method is asked for.

    spec: codec of the result.
    damping: share of H's mean diagonal that is added to its diagonal (0.01 in the GPTQ paper).
    activation_order: work the columns with the largest inputs first (their groups' scales are then fixed beforehand).
    """

    spec: str
    damping: float = 0.01
    activation_order: bool = False

    def __post_init__(self) -> None:
        codec(self.spec)
        if not 0 < self.damping <= 1e6:
            raise InputError(f"damping is {self.damping:g}; it must be positive, such as 0.01")


class WeightMethod(ABC):
    """A way to compress one matrix. Instances hold no state between matrices."""

    name: ClassVar[str]
    needs_statistics: ClassVar[bool]
    """Whether calibration has to run before the method can."""

    def check(self, spec: str) -> None:
        """InputError where the method does not make this format; asked before any text is read."""
        codec(spec)

    @abstractmethod
    def compress(self, weight: np.ndarray, statistics: Statistics | None, config: MethodConfig) -> Packed:
        """weight [rows, cols] of any float type -> Packed in the form `config.spec`."""

    @abstractmethod
    def work_bytes(self, num_rows: int, num_columns: int) -> int:
        """Most bytes that `compress` holds beside the weight, the statistics and the result."""

"""Mixed-integer linear programs for the pipeline search, solved by HiGHS through SciPy, which is an optional extra."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from memwall.errors import DoesNotFit, MissingDependency


def need_scipy() -> Any:
    """`scipy.optimize` and `scipy.sparse`; an error that says how to install them."""
    try:
        import scipy.optimize
        import scipy.sparse
    except ImportError:
        raise MissingDependency("scipy", "search") from None
    return scipy


class Program:
    """Minimise a sum of variables under linear constraints; variables are numbers that `add` gives."""

    def __init__(self) -> None:
        self._cost: list[float] = []
        self._lower: list[float] = []
        self._upper: list[float] = []
        self._whole: list[int] = []
        self._rows: list[int] = []
        self._columns: list[int] = []
        self._values: list[float] = []
        self._least: list[float] = []

    def add(self, *, lower: float = 0.0, upper: float = float("inf"), whole: bool = False, cost: float = 0.0) -> int:
        """A variable within bounds."""
        self._cost.append(cost)
        self._lower.append(lower)
        self._upper.append(upper)
        self._whole.append(int(whole))
        return len(self._cost) - 1

    def binary(self) -> int:
        """A variable that is 0 or 1."""
        return self.add(upper=1.0, whole=True)

    def at_least(self, terms: Mapping[int, float], least: float) -> None:
        """The sum of factor times variable is at least so much."""
        row = len(self._least)
        for column, value in terms.items():
            if value:
                self._rows.append(row)
                self._columns.append(column)
                self._values.append(value)
        self._least.append(least)

    def equal(self, terms: Mapping[int, float], value: float) -> None:
        """The sum is so much."""
        self.at_least(terms, value)
        self.at_least({column: -factor for column, factor in terms.items()}, -value)

    def solve(self, *, seconds: float, gap: float = 1e-3) -> np.ndarray:
        """Values of all variables, the best found within `seconds`. DoesNotFit where none was found."""
        scipy = need_scipy()
        shape = (len(self._least), len(self._cost))
        matrix = scipy.sparse.csr_array((self._values, (self._rows, self._columns)), shape=shape)
        found = scipy.optimize.milp(
            np.array(self._cost),
            constraints=scipy.optimize.LinearConstraint(matrix, lb=np.array(self._least)),
            integrality=np.array(self._whole),
            bounds=scipy.optimize.Bounds(np.array(self._lower), np.array(self._upper)),
            options={"time_limit": seconds, "mip_rel_gap": gap},
        )
        if found.x is None:
            raise DoesNotFit(f"no pipeline was found within {seconds:.0f} s ({found.message}); allow it more time")
        return np.asarray(found.x)


def sum_of(*terms: tuple[int, float] | Mapping[int, float]) -> dict[int, float]:
    """Terms joined, factors of one variable added up."""
    total: dict[int, float] = {}
    for term in terms:
        for column, value in term.items() if isinstance(term, Mapping) else (term,):
            total[column] = total.get(column, 0.0) + value
    return total

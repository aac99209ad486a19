"""Every kernel test runs on each instruction set that this processor has, on one thread and on two."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from memwall import kernels


@pytest.fixture(params=["portable", "avx2", "avx512", "amx"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    try:
        kernels.force_isa(request.param)
    except ValueError:
        pytest.skip(f"this processor lacks {request.param}")
    yield request.param
    kernels.force_isa(kernels.best_isa())


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = kernels.num_threads()
    kernels.set_num_threads(request.param)
    yield request.param
    kernels.set_num_threads(before)

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from memwall import kernels
from memwall.formats import codec


def test_best_is_in_use_and_the_portable_one_always_works() -> None:
    assert kernels.isa() == kernels.best_isa()
    kernels.force_isa("portable")
    assert kernels.isa() == "portable"
    kernels.force_isa(kernels.best_isa())


def test_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match="sse9"):
        kernels.force_isa("sse9")


def big_product() -> float:
    matrix = kernels.matrix(codec("int4-g64").encode(np.ones((2048, 1024), np.float32)))
    out = np.empty((1, 2048), np.float32)
    kernels.linear(np.ones((1, 1024), np.float32), [matrix], [out])
    return float(out.sum())


def test_number_of_threads_can_change_while_running() -> None:
    before = kernels.num_threads()
    for count in (1, 3, 2, 1, before):
        kernels.set_num_threads(count)
        assert kernels.num_threads() == count
        assert big_product() == pytest.approx(2048 * 1024, rel=1e-3)


def test_calls_from_several_python_threads() -> None:
    results: list[float] = []
    workers = [threading.Thread(target=lambda: results.extend(big_product() for _ in range(5))) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert results == pytest.approx([2048 * 1024] * 15, rel=1e-3)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_child_of_a_fork_gets_its_own_threads() -> None:
    big_product()
    child = os.fork()
    if child == 0:
        os._exit(0 if abs(big_product() / (2048 * 1024) - 1) < 1e-3 else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_neither_threads_nor_what_was_fetched_ahead_change_a_bit() -> None:
    rng = np.random.default_rng(0)
    sizes = ((300, 1024), (2048, 1024), (1040, 2048))

    def products() -> list[np.ndarray]:
        """Matrices that come, follow each other twice, and go: what was noted of them may be of memory that is gone."""
        held = [kernels.matrix(codec("int4-g64").encode(weights)) for weights in all_weights]
        outs = [np.empty((1, rows), np.float32) for rows, _ in sizes]
        for _ in range(2):
            kernels.linear(x[:, :1024].copy(), held[:2], outs[:2])
            kernels.linear(x, held[2:], outs[2:])
        return outs

    all_weights = [rng.standard_normal(size).astype(np.float32) for size in sizes]
    x = rng.standard_normal((1, 2048)).astype(np.float32)
    before = kernels.num_threads()
    try:
        kernels.set_num_threads(1)
        wanted = products()
        for count in (2, 3, 9, 2):
            kernels.set_num_threads(count)
            for got, want in zip(products(), wanted):
                np.testing.assert_array_equal(got, want)
    finally:
        kernels.set_num_threads(before)


def test_no_two_bound_classes_have_one_name() -> None:
    # nanobind knows types by name: classes called alike in two files are one to it, and it only warns
    command = [sys.executable, "-W", "error", "-c", "import memwall._native"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

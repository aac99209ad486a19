"""Kernel rates: measured once, kept, and never taken from a damaged file. Nothing here asserts how fast anything is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from memwall import kernels, kv
from memwall.formats import codec
from memwall.plan import profile, store
from memwall.plan.profile import (
    ATTEND_LAYERS,
    ATTEND_TOKENS,
    WORKING_SETS_BYTES,
    KernelProfile,
    load_profile,
    random_packed,
)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "WORKING_SETS_BYTES", tuple(range(100_000, 900_000, 100_000)))
    monkeypatch.setattr(profile, "_MATRIX_WEIGHTS", 1 << 16)
    monkeypatch.setattr(profile, "BETWEEN_BYTES", 20_000)
    monkeypatch.setattr(profile, "_SECONDS_PER_FIGURE", 0.001)


def test_figures_are_measured_kept_and_read_again() -> None:
    first = load_profile(threads=1)
    rates = first.matvec_bytes_per_s("int3-g64-asym", 256)
    attend = first.attend_seconds("float16", (4, 2, 32))
    overhead = first.overhead_seconds()
    assert rates is not None
    assert attend is not None
    assert overhead is not None
    assert len(rates) == len(WORKING_SETS_BYTES)
    assert len(attend) == len(ATTEND_TOKENS) * len(ATTEND_LAYERS)
    assert all(one > 0 for one in [*rates, *attend, *overhead, first.prefill_macs_per_s("float16") or 0])
    first.save()
    second = load_profile(threads=1, measure=False)
    assert second.matvec_bytes_per_s("int3-g64-asym", 256) == rates
    assert second.overhead_seconds() == overhead
    assert second.matvec_bytes_per_s("int4-g64", 256) is None


def test_processes_beside_a_cache_serve_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they do in a run; a process for each layer took minutes to start."""
    built: list[int] = []
    build = kv.build

    def counting(policy: str, shape: kv.CacheShape, *rest: Any) -> kv.KVCache:
        built.append(shape.num_layers)
        return build(policy, shape, *rest)

    monkeypatch.setattr(profile.kv, "build", counting)
    with profile._cache_steps("instinfer(1)", 4, 2, 32, 64, 3) as steps:
        for _ in range(2):
            for step in steps:
                step()
    assert built == [3]
    with profile._cache_steps("float16", 4, 2, 32, 64, 3) as steps:
        assert len(steps) == 3
    assert built == [3, 1, 1, 1]


def test_damaged_figures_are_dropped() -> None:
    key = load_profile(threads=1, measure=False).key
    store.update("kernels", {key: {"overhead": "soon", "matvec int4-g64": [1.0, -2.0], "prefill int4-g64": 5.0}})
    kept = load_profile(threads=1, measure=False)
    assert kept.figures == {"prefill int4-g64": 5.0}


def test_a_profile_measures_each_figure_once() -> None:
    calls: list[int] = []
    figures = KernelProfile(key="test")
    for _ in range(3):
        assert figures.get("x", lambda: calls.append(1) or 7.0) == 7.0
    assert len(calls) == 1


@pytest.mark.parametrize(
    "spec",
    [
        "int4-g64",
        "int2-g64-asym",
        "float16",
        "bfloat16",
        "nf4-g64",
        "nf4-g64-dq",
        "mxfp4",
        "e2m1-g64",
        "binary2-g64",
        "spqr3-ordered",
        "vptq-v8-k256-r64-ordered",
    ],
)
def test_random_matrices_are_whole_and_usable(spec: str) -> None:
    pool = np.zeros(codec(spec).nbytes((32, 64)) + 256, np.uint8)
    packed = random_packed(spec, (32, 64), pool, np.random.default_rng(0))
    out = np.empty((1, 32), np.float32)
    kernels.linear(np.ones((1, 64), np.float32), [kernels.matrix(packed)], [out], exact=True)
    expected = codec(spec).decode(packed).sum(axis=1)
    np.testing.assert_allclose(out[0], expected, rtol=1e-3, atol=1e-3)

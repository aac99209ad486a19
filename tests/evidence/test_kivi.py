"""The parts of KIVI's evidence that its verdicts hang on: the study's rounding and the caches that wrap others."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from memwall import kv
from memwall.cli.evidence import load_experiment
from memwall.errors import InputError
from memwall.kernels import attention_reference
from memwall.memory import Arena, Ledger
from memwall.systems import find_system

SHAPE = kv.CacheShape(num_layers=1, num_heads=2, num_kv_heads=1, head_dim=32)


@pytest.fixture(scope="module")
def kivi() -> ModuleType:
    return load_experiment(find_system("kivi"))


def decode(cache: kv.KVCache, length: int = 90) -> np.ndarray:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((length, heads, 32)).astype(np.float16).astype(np.float32) for heads in (2, 1, 1))
    outs = []
    for begin, end in [(0, 40)] + [(i, i + 1) for i in range(40, length)]:
        positions = np.arange(begin, end)
        cache.append(0, k[begin:end], v[begin:end], positions)
        outs.append(cache.attend(0, q[begin:end], positions, np.empty_like(q[begin:end])))
        cache.settle(0)
    return np.concatenate(outs)


@pytest.mark.parametrize("along_tokens", [True, False])
def test_rounding_is_the_reference_s(kivi: ModuleType, along_tokens: bool) -> None:
    x = np.random.default_rng(1).standard_normal((64, 2, 32)).astype(np.float32)
    want = attention_reference.kivi_round_trip(torch.from_numpy(x), 2, 32, along_tokens=along_tokens)
    np.testing.assert_allclose(kivi.round_groups(x, 2, along_tokens=along_tokens), want.numpy(), atol=1e-6)


@pytest.mark.parametrize("residual", [0, 32])
def test_the_study_s_cache_on_kivi_s_axes_is_kivi(kivi: ModuleType, residual: int) -> None:
    study = decode(kivi.AxesCache(SHAPE, 2, residual, True, False))
    real = decode(kv.build(f"kivi(bits=2,group=32,residual={residual})", SHAPE, Arena(1 << 24, Ledger()), 128))
    np.testing.assert_allclose(study, real, atol=1e-4)
    other = decode(kivi.AxesCache(SHAPE, 2, residual, False, False))
    assert np.abs(other - real).max() > 0.01


def test_planted_outliers_leave_an_exact_cache_as_it_is(kivi: ModuleType) -> None:
    plain = decode(kv.build("float32", SHAPE, Arena(1 << 24, Ledger()), 128))
    planted = decode(kivi.OutlierCache(kv.build("float32", SHAPE, Arena(1 << 24, Ledger()), 128), 32.0))
    np.testing.assert_allclose(planted, plain, atol=1e-5)


def test_a_text_that_is_too_short_is_refused(kivi: ModuleType, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(InputError, match="needs"):
        kivi.run(True, short)

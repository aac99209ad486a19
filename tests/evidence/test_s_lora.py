"""What S-LoRA's verdicts hang on: the exact logits, the counted pages, the padded products that it is compared with."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from memwall.cli.evidence import load_experiment
from memwall.engine.s_lora import SLora
from memwall.systems import find_system


@pytest.fixture(scope="module")
def s_lora() -> ModuleType:
    return load_experiment(find_system("s-lora"))


def test_exactness_holds(s_lora: ModuleType, tmp_path: Path) -> None:
    claims = list(s_lora.exact_claims(tmp_path))
    assert len(claims) == 3
    assert all(claim.passed for claim in claims), claims


def test_nothing_leaks_and_one_pool_beats_two(s_lora: ModuleType) -> None:
    assert s_lora.leak_claim(3000).passed
    assert s_lora.adversarial_claim(4).passed
    unified, _ = s_lora.running_at_once(SLora(), 300, 0)
    fixed, _ = s_lora.running_at_once(s_lora.FixedPools(adapter_pages=60, read_ahead=0), 240, 0, 60)
    assert unified > fixed


def test_popularity_follows_the_power_law(s_lora: ModuleType) -> None:
    even, skewed = ([which for which, _, _ in s_lora.drawn(2000, 100, alpha)] for alpha in (1.0, 0.1))
    assert abs(np.mean(even) - 49.5) < 3
    assert np.mean(np.array(skewed) == 0) > 0.5


def test_padded_products_are_the_same_numbers(s_lora: ModuleType, tmp_path: Path) -> None:
    sizes = s_lora.Sizes(layers=2, hidden=128, intermediate=256)
    config = s_lora.write_base(tmp_path / "base", sizes)
    files = [s_lora.write_adapter(tmp_path / f"f{rank}", config, rank, rank) for rank in (8, 32)]
    rates = s_lora.Rates(tmp_path / "base", files)
    texts = [("a0", [5, 6, 7, 8]), (None, [9, 10]), ("a1", [11])]
    native = s_lora.forwarded(rates.held, texts)
    executor = rates.held.engine.executor
    decoder, lora = executor.decoder, executor.lora
    padded = s_lora.PaddedProducts(rates)
    decoder._decode_step, decoder._lora, executor.lora = lambda num_rows=1: None, padded, padded
    found = s_lora.forwarded(rates.held, texts)
    for one, other in zip(native, found):
        assert np.abs(one - other).max() < 2e-2
        assert np.abs(one).max() > 0.1
    executor.lora = lora
    rates.held.release()

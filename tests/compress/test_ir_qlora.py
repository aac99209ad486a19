"""IR-QLoRA: the connection against its definition, merged exactly; codes that tell more than NF4's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.compress.ir_qlora import averaging, calibrate, entropies, parts
from memwall.compress.tuning import tune_method
from memwall.errors import InputError
from memwall.formats import codec


def test_connection_is_the_published_one_and_merges_exactly() -> None:
    """A-out += b1 * means of r consecutive groups of x; B-out += b2 * each of the r values repeated out / r times."""
    method = tune_method("ir-qlora", {"rank": "4", "alpha": "8", "dropout": "0"})
    base = torch.nn.Linear(32, 24, bias=False)
    layer = method.linear(base, (32, 24), torch.zeros)
    random = torch.Generator().manual_seed(0)
    layer.start(random)
    for parameter in (layer.lora_B, layer.beta_in, layer.beta_out):
        torch.nn.init.normal_(parameter, generator=random)
    x = torch.randn(3, 32, generator=random)
    low = x @ layer.lora_A.T + layer.beta_in * x.view(3, 4, 8).mean(2)
    expected = base(x) + 2.0 * (low @ layer.lora_B.T + layer.beta_out * low.repeat_interleave(6, dim=1))
    torch.testing.assert_close(layer(x), expected)
    a, b = layer.merged()
    torch.testing.assert_close(base(x) + 2.0 * (x @ a.T) @ b.T, expected)
    layer(x).square().sum().backward()
    assert layer.beta_in.grad is not None
    assert layer.beta_in.grad.abs() > 0


def test_starts_as_qlora_does() -> None:
    base = torch.nn.Linear(16, 16, bias=False)
    layer = tune_method("ir-qlora", {"rank": "4"}).linear(base, (16, 16), torch.zeros).eval()
    layer.start(torch.Generator().manual_seed(0))
    x = torch.ones(2, 16)
    torch.testing.assert_close(layer(x), base(x))
    with pytest.raises(InputError, match="rank=64"):
        tune_method("ir-qlora").linear(base, (16, 16), torch.zeros)


@given(rank=st.integers(1, 9), width=st.integers(9, 70))
def test_parts_are_consecutive_and_as_equal_as_can_be(rank: int, width: int) -> None:
    found = parts(rank, width)
    assert (found.sum(axis=0) == 1).all()
    sizes = found.sum(axis=1)
    assert sizes.max() - sizes.min() <= 1
    assert (np.diff(found.argmax(axis=0)) >= 0).all()
    np.testing.assert_allclose(averaging(rank, width).sum(axis=1), 1, rtol=1e-6)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), lean=st.floats(-0.5, 0.5))
def test_calibrated_codes_tell_more(seed: int, lean: float) -> None:
    weight = np.random.default_rng(seed).standard_normal((8, 256)).astype(np.float32) + np.float32(lean)
    plain, shifted = calibrate(weight, 1), calibrate(weight, 41)
    assert shifted.entropy > plain.entropy
    error = np.abs(shifted.decode() - weight).max()
    assert error <= 0.16 * np.abs(weight - np.median(weight)).max() + 0.05  # half the widest gap between levels, shifts


def test_without_a_shift_codes_are_those_of_nf4() -> None:
    weight = np.random.default_rng(0).standard_normal((4, 128)).astype(np.float32)
    plain = calibrate(weight, 1)
    np.testing.assert_allclose(plain.decode(), codec("nf4").decode(codec("nf4").encode(weight)), rtol=1e-6)


def test_entropy_by_hand() -> None:
    codes = np.array([[0] * 32 + [5] * 32, list(range(16)) * 4], np.uint8)
    np.testing.assert_allclose(entropies(codes), [1, 4])

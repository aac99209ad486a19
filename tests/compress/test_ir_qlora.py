"""IR-QLoRA: the connection against its definition, merged exactly; the calibrated base."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memwall import kernels
from memwall.compress import weight_method
from memwall.compress.ir_qlora import averaging, parts
from memwall.compress.model import compress_model
from memwall.compress.tune import tune_model
from memwall.compress.tuning import tune_method
from memwall.errors import InputError
from memwall.memory import Arena, Ledger
from memwall.models import Checkpoint
from memwall.models.config import ModelConfig
from memwall.models.precision import resolve
from memwall.models.weights import load_weights
from tests.compress.tiny_model import make_model


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


def test_the_base_is_calibrated_and_so_is_what_compress_makes(tmp_path: Path) -> None:
    """`memwall compress --method ir-qlora`, saved and read again, is the base that the method trains on, bit for
    bit.
    """
    model, out = make_model(tmp_path / "model"), tmp_path / "packed"
    report = compress_model(model, out, method="ir-qlora")
    assert tune_method("ir-qlora").base == "irnf4"
    assert report.bits_per_weight == pytest.approx(4.26, abs=0.05)
    config = ModelConfig.from_directory(model)
    held = []
    for folder, choice in ((model, "irnf4"), (out, "saved")):
        with Checkpoint(folder, ModelConfig.from_directory(folder)) as checkpoint:
            specs = resolve(config, choice, checkpoint)
            weights = load_weights(config, checkpoint, specs, Arena(1 << 40, Ledger()))
        rows = {}
        for name, matrix in weights.matrices.items():
            rows[name] = np.empty((matrix.rows, matrix.cols), np.float32)
            kernels.gather_rows(matrix, np.arange(matrix.rows), rows[name])
        held.append(rows)
    assert held[0].keys() == held[1].keys()
    for name, values in held[0].items():
        np.testing.assert_array_equal(values, held[1][name], err_msg=name)


def test_it_makes_one_width() -> None:
    method = weight_method("ir-qlora")
    assert method.form("irnf4") == method.form(4.0) == "irnf4"
    with pytest.raises(InputError, match="makes irnf4"):
        method.form(3.0)
    with pytest.raises(InputError, match="not int4"):
        method.check("int4")


def test_tuned_on_the_calibrated_base(tmp_path: Path) -> None:
    model, text = make_model(tmp_path / "model"), tmp_path / "text.txt"
    text.write_text("A city lies on a river, and the river comes down from the hills. " * 40)
    options = {"rank": "4", "context": "64", "batch": "4", "steps": "4", "learning_rate": "0.01"}
    report = tune_model(model, text, tmp_path / "out", method="ir-qlora", options=options)
    losses = [each["held_out"] for each in report.history]
    assert losses[-1] < losses[0]
    assert report.base == "irnf4"
    assert report.base_bits == pytest.approx(4.27, abs=0.03)

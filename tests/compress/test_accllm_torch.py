"""Training under a mask: rounding equals the stored form's, gradients reach what is kept, zeros stay zeros."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.compress.accllm import AccLlm, rounded_ranges
from memwall.compress.accllm_torch import Masked, rounded, tuned_model
from memwall.compress.base import Subject
from memwall.formats import codec
from memwall.formats.sparse import SparseCodec, largest_pairs
from memwall.memory import Arena, Ledger
from memwall.models.checkpoint import Checkpoint
from memwall.models.torch_decoder import TorchDecoder
from tests.compress.tiny_model import make_model

SPECS = ("sparse2-g128-asym", "sparse2-g64", "sparse3-g64-asym", "sparse4-g256")


def form_of(spec: str) -> SparseCodec:
    form = codec(spec)
    assert isinstance(form, SparseCodec)
    return form


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SPECS), st.integers(1, 20), st.integers(4, 300), st.floats(1e-4, 1e3), st.integers(0, 1 << 30))
def test_rounding_is_that_of_the_stored_form(spec: str, rows: int, columns: int, size: float, seed: int) -> None:
    weight = (size * np.random.default_rng(seed).standard_normal((rows, columns))).astype(np.float32)
    weight *= largest_pairs(np.abs(weight))
    form = form_of(spec)
    stored = form.decode(rounded_ranges(weight, largest_pairs(np.abs(weight)), form))
    found = rounded(torch.from_numpy(weight), form).numpy()
    # of two ranges that are as good the sums' order may choose: the errors are the same then
    assert np.square(found - weight).sum() == pytest.approx(np.square(stored - weight).sum(), rel=1e-4)
    assert (found == stored).mean() > 0.9


def test_a_group_of_zeros_stays_zero() -> None:
    assert not rounded(torch.zeros(3, 130), form_of("sparse2-g128-asym")).any()


def test_gradients_pass_the_rounding_to_kept_weights_only() -> None:
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mask = torch.from_numpy(largest_pairs(weight.detach().abs().numpy())).float()
    module = Masked(mask, form_of("sparse2-g128-asym"))
    for rounding in (False, True):
        module.rounding = rounding
        weight.grad = None
        module(weight).sum().backward()
        assert weight.grad is not None
        assert torch.equal(weight.grad, mask)


@pytest.mark.parametrize("aware", [0, 3])
def test_training_brings_the_model_nearer_and_keeps_zeros(tmp_path: Path, aware: int) -> None:
    source = make_model(tmp_path / "source")
    with Checkpoint(source) as checkpoint:
        names = [tensor.name for tensor in checkpoint.config.tensors() if tensor.role == "linear"]
        specs = dict.fromkeys(names, "sparse2-g128-asym")
        tokens = np.random.default_rng(0).integers(0, checkpoint.config.vocab_size, (4, 32))
        seen: list[tuple[int, int]] = []
        subject = Subject(
            checkpoint=checkpoint, tokens=tokens, arena=Arena(1 << 40, Ledger()), progress=lambda *at: seen.append(at)
        )
        pruned = AccLlm().pruned_weights(subject, specs)
        seen.clear()
        made = [
            tuned_model(subject, pruned, specs, steps=12, aware_steps=aware, rate=1e-3)
            for _ in range(2 if aware else 1)
        ]
        assert seen[11 + aware] == (12 + aware, 12 + aware)
        teacher = TorchDecoder.from_checkpoint(checkpoint)(torch.from_numpy(tokens)).log_softmax(-1)

        def divergence(weights: dict[str, np.ndarray]) -> float:
            student = TorchDecoder.from_checkpoint(checkpoint)
            with torch.no_grad():
                for name, weight in weights.items():
                    student.get_parameter(name).copy_(torch.from_numpy(weight))
                found = student(torch.from_numpy(tokens)).log_softmax(-1)
            return float((teacher.exp() * (teacher - found)).sum(-1).mean())

        tuned = {
            tensor.name: made[0].alone(tensor.name) for tensor in checkpoint.config.tensors() if tensor.name in specs
        }
        for name, weight in pruned.items():
            assert not tuned[name][weight == 0].any()
            np.testing.assert_array_equal(tuned[name], made[-1].alone(name))  # deterministic
        others = {t.name: made[0].alone(t.name) for t in checkpoint.config.tensors() if t.name not in specs}
        if not aware:
            assert divergence({**others, **tuned}) < divergence(pruned)

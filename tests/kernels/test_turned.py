"""Products with turned tiles against the decoded matrix, on sizes that divide by nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from memwall import kernels
from memwall.formats import Packed, codec
from memwall.formats.quip import QuipCodec
from memwall.kernels import reference
from tests.kernels.test_linear import activations, product

SHAPES = [(1, 1), (16, 128), (37, 100), (50, 17), (129, 544), (40, 300)]
SPECS = ["quip2", "quip3", "quip4-hadamard", "quip8"]


def turned(rows: int, cols: int, spec: str, seed: int = 0) -> Packed:
    random = np.random.default_rng(seed)
    form = codec(spec)
    assert isinstance(form, QuipCodec)
    codes = random.integers(0, 1 << form.bits, (rows, cols), np.uint8)
    return form.pack(codes, np.exp(random.standard_normal(cols)).astype(np.float16), 0.3, seed)


def decoded(packed: Packed) -> torch.Tensor:
    return torch.from_numpy(codec(packed.spec).decode(packed))


def close(got: torch.Tensor, want: torch.Tensor, x: torch.Tensor, packed: Packed) -> None:
    """Within rounding of what turns could sum up to: as if every number met every other."""
    columns = torch.from_numpy(packed.buffers["columns"].astype(np.float32))
    size = (x * columns).norm(dim=1, keepdim=True) * decoded(packed).div(columns).norm(dim=1)
    assert ((got - want).abs() <= 3e-5 * size + 1e-6).all()


@pytest.mark.parametrize("spec", SPECS)
def test_exact_products(spec: str, isa: str) -> None:
    for seed, (rows, cols) in enumerate(SHAPES):
        packed = turned(rows, cols, spec, seed)
        matrix, weight = kernels.matrix(packed), decoded(packed)
        for tokens in (1, 2, 9, 33):
            x = torch.from_numpy(activations(tokens, cols))
            close(product(x.numpy(), matrix, exact=True), reference.linear(x, weight), x, packed)


@pytest.mark.parametrize("spec", SPECS)
def test_rounded_products_round_the_turned_activations(spec: str, isa: str) -> None:
    for seed, (rows, cols) in enumerate(SHAPES):
        packed = turned(rows, cols, spec, seed)
        form = codec(spec)
        assert isinstance(form, QuipCodec)
        by_rows, by_cols = form.turns(packed.shape, seed)
        inner = torch.from_numpy(0.3 * form.levels.decode(form.unpack(packed)).astype(np.float32))
        for tokens in (1, 2, 9):
            x = activations(tokens, cols)
            met = by_cols.turn(x * packed.buffers["columns"].astype(np.float32)).astype(np.float32)
            rounded = reference.round_activations(torch.from_numpy(met), 128)
            want = by_rows.turn_back(reference.linear(rounded, inner).numpy())
            got = product(x, kernels.matrix(packed)).numpy()
            # a number next to the middle of two steps may fall to either side
            step = np.abs(met).max() / 127 * 0.3 * float(np.abs(form.levels.levels).max()) * np.sqrt(rows)
            assert np.abs(got - want).max() <= 1.1 * step * 2 + 1e-4
            assert np.median(np.abs(got - want)) <= 1e-4 * max(np.abs(want).max(), 1e-3)


def test_biases_accumulation_and_company(threads: int) -> None:
    x = torch.from_numpy(activations(5, 160))
    dense = np.random.default_rng(0).standard_normal((33, 160), np.float32)
    specs = ["quip2", "spqr3-ordered", "quip4", "int4-g64", "quip2", "float32", "billm", "quip3-hadamard", "int4-g128"]
    parts = [turned(40 + i, 160, s, i) if s[0] == "q" else codec(s).encode(dense) for i, s in enumerate(specs)]
    outs = [np.ones((5, part.shape[0]), np.float32) for part in parts]
    biases = [np.full(part.shape[0], 2, np.float32) if i % 2 else None for i, part in enumerate(parts)]
    kernels.linear(x.numpy(), [kernels.matrix(p) for p in parts], outs, exact=True, accumulate=True, biases=biases)
    for index, (part, out) in enumerate(zip(parts, outs, strict=True)):
        want = reference.linear(x, decoded(part)) + (3 if index % 2 else 1)
        assert (torch.from_numpy(out) - want).abs().max() < 1e-4 * want.abs().max()
    plain = [np.empty((5, part.shape[0]), np.float32) for part in parts]
    kernels.linear(x.numpy(), [kernels.matrix(p) for p in parts], plain)
    alone = [product(x.numpy(), kernels.matrix(part)).numpy() for part in parts]
    for one, other in zip(plain, alone, strict=True):
        np.testing.assert_array_equal(one, other)


def test_bytes_held_are_those_of_the_form_scratch_is_predicted_and_rows_are_refused() -> None:
    packed = turned(700, 700, "quip2")
    matrix = kernels.matrix(packed)
    assert matrix.nbytes == packed.nbytes == codec("quip2").nbytes((700, 700))
    assert kernels.roundings("quip2") == (3,)
    assert kernels.roundings("quip2", exact=True) == (4,)
    before = kernels.predict_scratch_bytes(64, 700, group=3, threads=1)
    assert before - kernels.predict_scratch_bytes(64, 700, group=4, threads=1) == 64 * (768 + 8 * 6)
    out = np.empty((64, 700), np.float32)
    kernels.linear(activations(64, 700), [matrix], [out])
    assert kernels.scratch_bytes() >= kernels.predict_scratch_bytes(64, 700, group=3)
    with pytest.raises(ValueError, match="without all others"):
        kernels.gather_rows(matrix, np.arange(3), np.empty((3, 700), np.float32))


def test_turns_that_point_outside_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = turned(20, 40, "quip2")
    form = codec("quip2")
    assert isinstance(form, QuipCodec)
    real = form.turns((20, 40), 0)
    real[1].order[3] = 40
    try:
        with pytest.raises(ValueError, match="points outside"):
            kernels.matrix(packed)
    finally:
        from memwall.formats import quip

        quip.factors.cache_clear()

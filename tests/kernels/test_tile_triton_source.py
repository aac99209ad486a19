"""Emitted Triton, run by its interpreter on the CPU (and on a GPU where there is one), on the packed weights of all."""

from __future__ import annotations

import ast

import numpy as np
import pytest

from memwall.errors import InputError
from memwall.kernels import tilus
from memwall.kernels.tile_triton_source import Launch, emit
from memwall.kernels.tile_types import PUBLISHED, tile_type


@pytest.mark.parametrize("dtype", PUBLISHED)
def test_every_type_gives_valid_python(dtype: str) -> None:
    for make in (tilus.direct_program, tilus.matvec_program):
        tree = ast.parse(emit(make(dtype, 4, 128, 256)))
        assert [node.name for node in tree.body if isinstance(node, ast.FunctionDef)] == ["kernel"]


def test_shared_memory_is_refused() -> None:
    with pytest.raises(InputError, match="manages shared memory itself"):
        emit(tilus.matmul_program("i4", 16, 128, 256))
    with pytest.raises(InputError, match="powers of two"):
        emit(tilus.matvec_program("i4", 3, 128, 256))


@pytest.mark.parametrize("dtype", ["i4", "u3", "i7", "f6e3m2", "f8e4m3", "f8e5m2", "u1"])
@pytest.mark.parametrize("program", ["direct", "matvec"])
def test_matches_the_decoded_product(dtype: str, program: str) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    random, form = np.random.default_rng(0), tile_type(dtype)
    tokens, rows, columns = (5 if program == "direct" else 4), 256, 128
    codes = random.choice(np.flatnonzero(np.isfinite(form.values)).astype(np.uint8), (rows, columns))
    scales = (random.uniform(0.5, 1.5, (2, columns)) / form.largest / 8).astype(np.float16)
    weights = tilus.prepare(codes, scales, dtype)
    kind = np.float16 if program == "direct" else np.float32
    x = random.normal(size=(tokens, rows)).astype(kind)
    make = tilus.direct_program if program == "direct" else tilus.matvec_program
    launch = Launch(make(dtype, tokens, columns, rows))
    out = torch.zeros(tokens, columns, dtype=torch.from_numpy(x).dtype, device=device)
    arrays = {"x": x, "packed": weights.packed, "scales": weights.scales}
    launch({name: torch.from_numpy(array).to(device) for name, array in arrays.items()} | {"out": out})
    want = x.astype(np.float32) @ weights.decode()
    tolerance = 4e-3 if program == "direct" else 1e-5
    np.testing.assert_allclose(out.cpu().numpy().astype(np.float32), want, atol=tolerance * np.abs(want).max())

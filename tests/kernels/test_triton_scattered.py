"""GPU attention at scattered positions, run by Triton's interpreter where there is no GPU, against the CPU kernel."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
HAS_GPU = torch.cuda.is_available()
pytest.importorskip("triton")

from memwall import kernels  # noqa: E402
from memwall.kernels.triton_scattered import attend_scattered  # noqa: E402

DEVICE = "cuda" if HAS_GPU else "cpu"


@pytest.mark.parametrize(
    ("count", "length", "heads", "kv_heads", "dim", "window"),
    [(1, 70, 4, 2, 32, None), (45, 200, 6, 2, 32, None), (64, 130, 8, 8, 16, 20), (9, 65, 8, 1, 64, None)],
)
def test_matches_the_cpu_kernel(
    count: int, length: int, heads: int, kv_heads: int, dim: int, window: int | None
) -> None:
    rng = np.random.default_rng(count)
    q = rng.standard_normal((count, heads, dim), np.float32)
    k, v = (rng.standard_normal((length, kv_heads, dim), np.float32) for _ in range(2))
    positions = np.sort(rng.choice(length, count, replace=False)).astype(np.int64)
    want = kernels.attend_scattered(q, k, v, positions, scale=0.25, window=window, out=np.empty_like(q))
    on_device = [torch.from_numpy(x).to(DEVICE) for x in (q, k, v, positions)]
    got = attend_scattered(*on_device, scale=0.25, window=window)
    np.testing.assert_allclose(got.cpu().numpy(), want, atol=2e-4)
    half = attend_scattered(on_device[0], *(x.half() for x in on_device[1:3]), on_device[3], scale=0.25, window=window)
    np.testing.assert_allclose(half.cpu().numpy(), want, atol=2e-2)


def test_disagreeing_shapes_are_refused() -> None:
    rows = torch.zeros(4, 2, 32)
    with pytest.raises(ValueError, match="positions"):
        attend_scattered(rows, rows, rows, torch.zeros(3, dtype=torch.int64), scale=1.0)
    with pytest.raises(ValueError, match="power of two"):
        attend_scattered(torch.zeros(4, 2, 24), torch.zeros(4, 2, 24), rows, torch.arange(4), scale=1.0)

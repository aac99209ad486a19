"""The GPU attention over coded caches, run by Triton's interpreter where there is no GPU, against the CPU kernel."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
HAS_GPU = torch.cuda.is_available()
pytest.importorskip("triton")

from memwall import kernels  # noqa: E402
from memwall.kernels import attention  # noqa: E402
from memwall.kernels.triton_attention import attend_kivi  # noqa: E402

DEVICE = "cuda" if HAS_GPU else "cpu"


@pytest.mark.parametrize(
    ("bits", "group", "dim", "heads", "kv_heads", "length", "residual"),
    [
        (2, 32, 64, 4, 2, 197, 64),
        (3, 32, 64, 4, 1, 150, 32),
        (4, 16, 32, 2, 2, 70, 32),
        (8, 64, 64, 8, 2, 200, 64),
        (2, 32, 64, 2, 1, 20, 32),
    ],
)
def test_matches_the_cpu_kernel(
    bits: int, group: int, dim: int, heads: int, kv_heads: int, length: int, residual: int
) -> None:
    rng = np.random.default_rng(bits * 100 + length)
    k, v = (rng.normal(size=(length, kv_heads, dim)).astype(np.float16) for _ in range(2))
    q = rng.normal(size=(1, heads, dim)).astype(np.float32)
    coded_keys, coded_values = length - length % residual, max(length - residual, 0)
    key_bytes, value_bytes = attention.kivi_block_bytes(bits, group, dim)
    key_blocks = np.zeros(max(coded_keys // group, 1) * kv_heads * key_bytes, np.uint8)
    value_blocks = np.zeros(max(-(-coded_values // 32), 1) * kv_heads * value_bytes, np.uint8)
    if coded_keys:
        attention.kivi_encode_keys(k[:coded_keys], key_blocks, bits=bits, group=group)
    if coded_values:
        attention.kivi_encode_values(v[:coded_values], 0, value_blocks, bits=bits, group=group)
    counts = {"coded_keys": coded_keys, "coded_values": coded_values, "bits": bits, "group": group, "scale": dim**-0.5}
    rest_k, rest_v = np.ascontiguousarray(k[coded_keys:]), np.ascontiguousarray(v[coded_values:])
    want = kernels.attend_kivi(
        q, key_blocks, value_blocks, rest_k, rest_v, first_position=length - 1, out=np.empty_like(q), **counts
    )
    on_device = [torch.from_numpy(x).to(DEVICE) for x in (q[0], key_blocks, value_blocks, rest_k, rest_v)]
    got = attend_kivi(*on_device, **counts)
    np.testing.assert_allclose(got.cpu().numpy(), want[0], atol=2e-4)


def test_disagreeing_lengths_are_refused() -> None:
    rows = torch.zeros(4, 1, 32, dtype=torch.float16)
    blocks = torch.zeros(1024, dtype=torch.uint8)
    with pytest.raises(ValueError, match="disagree"):
        attend_kivi(
            torch.zeros(1, 32), blocks, blocks, rows, rows, coded_keys=32, coded_values=0, bits=2, group=32, scale=1.0
        )

"""The GPU product against the NumPy kernel, by Triton's interpreter on the CPU (and on a GPU where there is one)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
HAS_GPU = torch.cuda.is_available()
pytest.importorskip("triton")

from memwall.errors import InputError  # noqa: E402
from memwall.formats import codec  # noqa: E402
from memwall.kernels import marlin, triton_marlin  # noqa: E402
from memwall.kernels.marlin_model import multiply as modelled  # noqa: E402
from memwall.kernels.triton_marlin import MarlinLinear, fits, multiply  # noqa: E402
from tests.kernels.gpu_compile import compiled  # noqa: E402
from tests.kernels.test_marlin_model import case  # noqa: E402

DEVICE = "cuda" if HAS_GPU else "cpu"


@pytest.mark.parametrize("rows", [1, 16, 33, 64, 70])
@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("processors", [1, 3])
def test_agrees_with_the_model(rows: int, grouped: bool, processors: int) -> None:
    x, weight = case(256, 512, 2 if grouped else 1, rows, seed=rows)
    words, scales = torch.from_numpy(weight.words).to(DEVICE), torch.from_numpy(weight.scales).to(DEVICE)
    found = multiply(torch.from_numpy(x).to(DEVICE), words, scales, weight.group, processors).cpu().numpy()
    want = modelled(x, weight, processors).astype(np.float32)
    exact = x.astype(np.float64) @ marlin.decode(weight).astype(np.float64)
    assert np.abs(found - exact).mean() < 1e-3 * np.abs(exact).mean()
    assert np.abs(found - want).mean() < 1e-3 * np.abs(want).mean()


def test_more_processors_than_slices() -> None:
    """Each slice is shared by three programs."""
    x, weight = case(384, 256, 3, 5, seed=1)
    words, scales = torch.from_numpy(weight.words).to(DEVICE), torch.from_numpy(weight.scales).to(DEVICE)
    found = multiply(torch.from_numpy(x).to(DEVICE), words, scales, weight.group, 6).cpu().numpy()
    exact = x.astype(np.float64) @ marlin.decode(weight).astype(np.float64)
    assert np.abs(found - exact).mean() < 1e-3 * np.abs(exact).mean()


def test_layer_holds_only_packed_bytes() -> None:
    random = np.random.default_rng(0)
    packed = codec("int4-g128").encode(random.standard_normal((256, 128), np.float32))
    bias = torch.arange(256.0)
    layer = MarlinLinear(packed, bias, device=DEVICE)
    assert layer.words.nbytes + layer.scales.nbytes == packed.nbytes
    assert not list(layer.parameters())
    x = torch.from_numpy(random.standard_normal((2, 3, 128)).astype(np.float16)).to(DEVICE)
    want = x.float().cpu() @ torch.from_numpy(codec(packed.spec).decode(packed)).T + bias
    torch.testing.assert_close(layer(x).float().cpu(), want, rtol=5e-3, atol=5e-2)


def test_what_it_does_not_take() -> None:
    assert fits((256, 128))
    assert not fits((128, 128))
    with pytest.raises(InputError, match="takes PackedLinear"):
        MarlinLinear(codec("int4-g128").encode(np.ones((128, 128), np.float32)), device=DEVICE)
    with pytest.raises(InputError, match="groups of 128"):
        MarlinLinear(codec("int4-g64").encode(np.ones((256, 256), np.float32)), device=DEVICE)
    layer = MarlinLinear(codec("int4-g128").encode(np.ones((256, 128), np.float32)), device=DEVICE)
    with pytest.raises(InputError, match="float16"):
        layer(torch.ones(1, 128, device=DEVICE))


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU: launches real programs side by side")
def test_large_layer_on_a_gpu() -> None:
    x, weight = case(4096, 4096, 32, 16, seed=0)
    words, scales = torch.from_numpy(weight.words).cuda(), torch.from_numpy(weight.scales).cuda()
    found = multiply(torch.from_numpy(x).cuda(), words, scales, weight.group).float().cpu().numpy()
    want = x.astype(np.float32) @ marlin.decode(weight)
    assert np.abs(found - want).mean() < 1e-3 * np.abs(want).mean()


def test_compiles_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    """To machine code of compute capability 8.0: tensor cores, asynchronous copies, no conversion of integers."""
    types = {"x": "*fp16", "words": "*i32", "scales": "*fp16", "out": "*fp16", "room": "*fp32"}
    found = compiled(
        tmp_path, triton_marlin.__name__, ["_stripe", "_reduce"], types,
        [{"ROWS": 16, "K_TILE": 128, "N_TILE": 128, "GROUPED": grouped} for grouped in (True, False)],
        ["mma.sync", "cp.async", "cvt.rn.f16.s"],
        {"num_warps": triton_marlin.WARPS, "num_stages": triton_marlin.STAGES},
    )  # fmt: skip
    assert len(found) == 4
    assert all(size > 0 for size, *_ in found)
    assert all(products > 0 and copies > 0 and not casts for _, products, copies, casts in found[::2])

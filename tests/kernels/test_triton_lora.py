"""GPU products with adapters in pages, run by Triton's interpreter where there is no GPU, against NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
HAS_GPU = torch.cuda.is_available()
pytest.importorskip("triton")

from memwall.errors import InputError  # noqa: E402
from memwall.kernels import triton_lora  # noqa: E402
from memwall.kernels.lora import LoraRoom  # noqa: E402
from memwall.kernels.triton_lora import FIELDS, TILE, WIDE, LoraLaunch, PlacedLora  # noqa: E402
from tests.kernels.gpu_compile import compiled  # noqa: E402
from tests.kernels.test_lora import Made, pool_of  # noqa: E402

DEVICE = "cuda" if HAS_GPU else "cpu"
WIDTHS = {"q_proj": (100, 96), "k_proj": (100, 40), "v_proj": (100, 40), "down_proj": (130, 100)}


def placed(one: Made, form: str) -> PlacedLora:
    return PlacedLora(form=form, scale=one.scale, shapes=one.shapes, pages=one.pages)


@pytest.mark.parametrize("form", ["float32", "float16"])
@pytest.mark.parametrize("layer", [0, 1])
def test_mixed_ranks_in_scattered_pages(form: str, layer: int, tmp_path: Path) -> None:
    draw = np.random.default_rng(4)
    room = LoraRoom(num_layers=2, unit_bytes=80, units_per_block=32)
    pool, pages = pool_of(room, 400), list(draw.permutation(400))
    ranks = [{"q_proj": 8, "k_proj": 8, "v_proj": 8}, {"q_proj": 3, "v_proj": 33}, {"k_proj": 20, "down_proj": 16}]
    made = [
        Made(room, pool, pages, form, {n: (r, *WIDTHS[n]) for n, r in one.items()}, draw, tmp_path) for one in ranks
    ]
    segments = [(0, 1, made[1]), (1, 21, made[0]), (23, 2, made[2]), (25, 1, made[0])]  # row 22 belongs to none
    launch = LoraLaunch(room, [(first, count, placed(one, form)) for first, count, one in segments], DEVICE)
    on_device = torch.from_numpy(pool).to(DEVICE)
    for targets in (("q_proj", "k_proj", "v_proj"), ("down_proj",)):
        inputs = WIDTHS[targets[0]][0]
        x = draw.standard_normal((26, inputs)).astype(np.float32)
        outs = {n: draw.standard_normal((26, WIDTHS[n][1])).astype(np.float32) for n in targets}
        found = {n: torch.from_numpy(out.copy()).to(DEVICE) for n, out in outs.items()}
        launch.add(layer, on_device, torch.from_numpy(x).to(DEVICE), targets, list(found.values()))
        for name in targets:
            want = outs[name].astype(np.float64)
            for first, count, one in segments:
                want[first : first + count] += one.added(layer, name, x[first : first + count])
            tolerance = 1e-4 if form == "float32" else 2e-2
            np.testing.assert_allclose(found[name].cpu().numpy(), want, atol=tolerance, rtol=tolerance)
            np.testing.assert_array_equal(found[name].cpu().numpy()[22], outs[name][22])


def test_nobody_and_forms_that_differ(tmp_path: Path) -> None:
    room = LoraRoom(num_layers=1, unit_bytes=64, units_per_block=16)
    out = torch.ones(2, 40, device=DEVICE)
    LoraLaunch(room, [], DEVICE).add(0, torch.zeros(1, 1024), torch.ones(2, 100), ["k_proj"], [out])
    assert (out == 1).all()
    shapes = {"k_proj": (4, 100, 40)}
    mixed = [PlacedLora(form=form, scale=1.0, shapes=shapes, pages=[0]) for form in ("float16", "float32")]
    with pytest.raises(InputError, match="float16 and float32; they must have one form"):
        LoraLaunch(room, [(0, 1, mixed[0]), (1, 1, mixed[1])], DEVICE)


def test_compiles_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    """To machine code of compute capability 8.0, whose tensor cores do the products."""
    types = {
        "x": "*fp16", "pool": "*fp16", "pages": "*i32", "tasks": "*i64", "scratch": "*fp32", "scales": "*fp32",
        "out": "*fp16",
    }  # fmt: skip
    constants = {"FIELDS": FIELDS, "PAGE": 65_536, "UNIT": 128, "UNITS": 16, "TILE": TILE, "WIDE": WIDE}
    found = compiled(tmp_path, triton_lora.__name__, ["_shrink", "_expand"], types, [constants], ["mma.sync"])
    assert len(found) == 2
    assert all(size > 0 for size, _ in found)
    assert found[0][1] > 0

"""GGUF's block types against the `gguf` package."""

from __future__ import annotations

import numpy as np
import pytest

from memwall.formats import codec
from memwall.formats.gguf_blocks import BLOCKS, Block, packed

gguf = pytest.importorskip("gguf", reason="needs the gguf package")
HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
CODED = [kind for kind, block in BLOCKS.items() if block.values > 1]


def random_blocks(block: Block, rows: int, blocks: int) -> np.ndarray:
    """All bits at random, but scales that are finite."""
    draw = np.random.default_rng(blocks)
    raw = draw.integers(0, 256, (rows, blocks, block.nbytes), dtype=np.uint8)
    for at in HALVES.get(block.name, (0,)):
        halves = draw.normal(0, 0.02, (rows, blocks, 1)).astype("<f2")
        raw[..., at : at + 2] = halves.view(np.uint8)
    return raw


@pytest.mark.parametrize("kind", CODED, ids=[BLOCKS[kind].name for kind in CODED])
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (37, 3), (16, 8)])
def test_blocks_are_what_the_gguf_package_says(kind: int, rows: int, blocks: int) -> None:
    from gguf.quants import dequantize

    block = BLOCKS[kind]
    raw = random_blocks(block, rows, blocks)
    wanted = dequantize(raw.reshape(rows, -1), gguf.GGMLQuantizationType(kind)).reshape(rows, -1)
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)] == (block.values, block.nbytes)
    scale = np.abs(wanted).reshape(rows, -1, 32).max(-1, keepdims=True)
    bound = {True: 0.0, False: 2**-10 if block.codes is not None else 2**-7 + 2**-11}[block.exact]
    form = packed(block, raw)
    assert form.spec == block.spec
    for found in (block.decode(raw), codec(form.spec).decode(form)):
        assert (np.abs(found - wanted).reshape(rows, -1, 32) <= bound * scale + 1e-12).all()


@pytest.mark.parametrize(("kind", "dtype"), [(0, "<f4"), (1, "<f2")])
def test_floats_are_as_they_lie(kind: int, dtype: str) -> None:
    values = np.arange(12, dtype=dtype).reshape(3, 4) / 7
    raw = values[..., None].view(np.uint8)
    np.testing.assert_array_equal(BLOCKS[kind].decode(raw), values)

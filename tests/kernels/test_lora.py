"""Low-rank additions from scattered pages against NumPy: mixed ranks, number formats, prompts and single rows."""

from __future__ import annotations

import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall import kernels
from memwall.kernels.lora import TARGETS, LoraBatch, LoraRoom, PagedLora

DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


class Made:
    """An adapter with its factors, in pages of a pool that is full of not-a-numbers elsewhere."""

    def __init__(
        self,
        room: LoraRoom,
        pool: np.ndarray,
        pages: list[int],
        form: str,
        shapes: dict[str, tuple[int, int, int]],
        draw: np.random.Generator,
        folder: Path,
        stored: str | None = None,
    ) -> None:
        stored = stored or form
        self.scale, self.shapes = 0.75, shapes
        self.paged = PagedLora(room, form, self.scale, shapes)
        self.pages = [pages.pop() for _ in range(self.paged.num_pages)]
        self.paged.place(self.pages)
        offsets = np.full((room.num_layers, len(TARGETS), 2), -1, np.int64)
        self.factors, data = {}, b""
        for layer in range(room.num_layers):
            for name, (rank, inputs, outputs) in shapes.items():
                for part, shape in enumerate(((rank, inputs), (outputs, rank))):
                    values = (draw.standard_normal(shape) / 4).astype(DTYPES[stored])
                    offsets[layer, TARGETS.index(name), part] = len(data)
                    data += values.tobytes()
                    self.factors[layer, name, part] = values.astype(DTYPES[form]).astype(np.float32)
        path = folder / f"{len(os.listdir(folder))}.bin"
        path.write_bytes(data)
        with open(path, "rb") as file:
            assert self.paged.fetch(pool, file.fileno(), stored, offsets) == len(data)

    def added(self, layer: int, name: str, x: np.ndarray) -> np.ndarray:
        if name not in self.shapes:
            return np.zeros((len(x), 1), np.float32)
        a, b = (self.factors[layer, name, part].astype(np.float64) for part in (0, 1))
        return self.scale * (x.astype(np.float64) @ a.T) @ b.T


def pool_of(room: LoraRoom, count: int) -> np.ndarray:
    return np.full((count, room.page_bytes), 0xFF, np.uint8)


@pytest.mark.parametrize("form", list(DTYPES))
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_mixed_ranks_in_scattered_pages(form: str, isa: str, tmp_path: Path) -> None:
    before = kernels.isa()
    try:
        kernels.force_isa(isa)
    except ValueError:
        pytest.skip(f"this processor lacks {isa}")
    try:
        draw = np.random.default_rng(4)
        room = LoraRoom(num_layers=2, unit_bytes=80, units_per_block=32)  # 40 numbers of 16 bits: no whole vectors
        shapes = {"q_proj": (0, 100, 96), "k_proj": (0, 100, 40), "v_proj": (0, 100, 40)}
        pool, pages = pool_of(room, 300), list(draw.permutation(300))
        ranks = [8, 16, 3, 64]
        adapters = [
            Made(room, pool, pages, form, {n: (rank, i, o) for n, (_, i, o) in shapes.items()}, draw, tmp_path)
            for rank in ranks
        ]
        batch = LoraBatch(room, np.empty((64, 3 * 64), np.float32))
        rows = [(0, 1, 0), (1, 3, 1), (6, 1, 2), (7, 9, 3), (16, 2, 0)]  # rows 4, 5 and the last are of the base alone
        batch.assign(pool, [(first, count, adapters[which].paged) for first, count, which in rows])
        x = draw.standard_normal((19, 100)).astype(np.float32)
        for layer in range(2):
            outs = [np.ones((19, o), np.float32) for _, _, o in shapes.values()]
            done = batch.multiplies
            batch.add(layer, 0, x, [0, 1, 2], outs)
            own = sum(count * ranks[which] * (i + o) for _, count, which in rows for _, i, o in shapes.values())
            assert batch.multiplies - done == own
            for name, out in zip(shapes, outs):
                wanted = np.ones(out.shape)
                for first, count, which in rows:
                    wanted[first : first + count] += adapters[which].added(layer, name, x[first : first + count])
                assert np.abs(out - wanted).max() < 1e-4
                assert (out[[4, 5, 18]] == 1).all()
    finally:
        kernels.force_isa(before)


@settings(max_examples=30, deadline=None)
@given(
    unit=st.integers(1, 20).map(lambda n: 4 * n), block=st.sampled_from([1, 4, 32]), rank=st.integers(1, 9),
    inputs=st.integers(1, 70), outputs=st.integers(1, 70), tokens=st.integers(1, 9), seed=st.integers(0, 99),
    form=st.sampled_from(list(DTYPES)),
)  # fmt: skip
def test_any_shape(
    unit: int, block: int, rank: int, inputs: int, outputs: int, tokens: int, seed: int, form: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    draw = np.random.default_rng(seed)
    room = LoraRoom(num_layers=1, unit_bytes=unit, units_per_block=block)
    need = PagedLora(room, form, 1.0, {"down_proj": (rank, inputs, outputs)}).num_pages
    pool, pages = pool_of(room, 2 * need), list(draw.permutation(2 * need))
    one = Made(room, pool, pages, form, {"down_proj": (rank, inputs, outputs)}, draw, tmp_path_factory.mktemp("lora"))
    x, out = draw.standard_normal((tokens, inputs)).astype(np.float32), np.zeros((tokens, outputs), np.float32)
    batch = LoraBatch(room, np.empty((tokens, 3 * rank), np.float32))
    batch.assign(pool, [(0, tokens, one.paged)])
    batch.add(0, 0, x, [6], [out])
    assert np.abs(out - one.added(0, "down_proj", x)).max() < 1e-4
    free = np.delete(pool, one.pages, axis=0)
    assert (free == 0xFF).all()  # nothing is written beside its own pages


def test_a_row_has_the_same_bits_whatever_stands_beside_it(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    room = LoraRoom(num_layers=1, unit_bytes=128, units_per_block=32)
    pool, pages = pool_of(room, 50), list(draw.permutation(50))
    one, other = (Made(room, pool, pages, "float16", {"q_proj": (rank, 130, 70)}, draw, tmp_path) for rank in (16, 5))
    batch = LoraBatch(room, np.empty((16, 64), np.float32))
    x = draw.standard_normal((9, 130)).astype(np.float32)
    together = np.zeros((9, 70), np.float32)
    batch.assign(pool, [(0, 7, one.paged), (7, 2, other.paged)])
    batch.add(0, 0, x, [0], [together])
    for row in range(9):
        alone = np.zeros((1, 70), np.float32)
        batch.assign(pool, [(0, 1, (one if row < 7 else other).paged)])
        batch.add(0, 0, x[row : row + 1].copy(), [0], [alone])
        assert np.array_equal(alone[0], together[row])


def test_float32_files_may_become_float16(tmp_path: Path) -> None:
    draw = np.random.default_rng(2)
    room = LoraRoom(num_layers=1, unit_bytes=64, units_per_block=32)
    pool, pages = pool_of(room, 20), list(draw.permutation(20))
    one = Made(room, pool, pages, "float16", {"o_proj": (4, 48, 33)}, draw, tmp_path, stored="float32")
    x, out = draw.standard_normal((3, 48)).astype(np.float32), np.zeros((3, 33), np.float32)
    batch = LoraBatch(room, np.empty((3, 12), np.float32))
    batch.assign(pool, [(0, 3, one.paged)])
    batch.add(0, 0, x, [3], [out])
    assert np.abs(out - one.added(0, "o_proj", x)).max() < 1e-4


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    draw = np.random.default_rng(2)
    room = LoraRoom(num_layers=1, unit_bytes=64, units_per_block=32)
    pool, pages = pool_of(room, 20), list(range(20))
    one = Made(room, pool, pages, "float16", {"q_proj": (8, 32, 32)}, draw, tmp_path)
    batch = LoraBatch(room, np.empty((4, 12), np.float32))
    with pytest.raises(ValueError, match="rank is larger"):
        batch.assign(pool, [(0, 1, one.paged)])
    one.paged.place([99])
    batch = LoraBatch(room, np.empty((4, 64), np.float32))
    with pytest.raises(ValueError, match="outside the pool"):
        batch.assign(pool, [(0, 1, one.paged)])
    one.paged.place([])
    with pytest.raises(ValueError, match="fewer pages"):
        batch.assign(pool, [(0, 1, one.paged)])
    one.paged.place(one.pages)
    with pytest.raises(OSError, match="Bad file descriptor"):
        one.paged.fetch(pool, -1, "float16", np.zeros((1, 7, 2), np.int64))


@settings(max_examples=30, deadline=None)
@given(
    unit=st.integers(1, 20).map(lambda n: 4 * n), rank=st.integers(1, 9), outputs=st.integers(1, 300),
    tokens=st.integers(1, 9), seed=st.integers(0, 99),
)  # fmt: skip
def test_outputs_are_lengthened_once_all_is_added(
    unit: int, rank: int, outputs: int, tokens: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """y + d y + c of y with what the adapter adds; rows of the other adapter, and of none, stay as they are."""
    draw = np.random.default_rng(seed)
    room, folder = LoraRoom(num_layers=2, unit_bytes=unit, units_per_block=4), tmp_path_factory.mktemp("lora")
    shapes = {"q_proj": (rank, 24, outputs)}
    need = PagedLora(room, "float16", 1.0, shapes).num_pages
    pool, pages = pool_of(room, 2 * need), list(draw.permutation(2 * need))
    one, other = (Made(room, pool, pages, "float16", shapes, draw, folder) for _ in range(2))
    rows = draw.standard_normal((2, 2, outputs)).astype(np.float32)
    one.paged.lengthen("q_proj", rows)
    assert one.paged.row_bytes == rows.nbytes
    batch = LoraBatch(room, np.empty((2 * tokens + 1, 3 * rank), np.float32))
    batch.assign(pool, [(0, tokens, other.paged)])
    assert not batch.lengthens
    batch.assign(pool, [(0, tokens, one.paged), (tokens, tokens, other.paged)])
    assert batch.lengthens
    x = draw.standard_normal((2 * tokens + 1, 24)).astype(np.float32)
    start = draw.standard_normal((len(x), outputs)).astype(np.float32)
    for layer in range(2):
        out = start.copy()
        batch.add(layer, 0, x, [0], [out])
        wanted = start.astype(np.float64)
        wanted[:tokens] += one.added(layer, "q_proj", x[:tokens])
        wanted[:tokens] += rows[layer, 0] * wanted[:tokens] + rows[layer, 1]
        wanted[tokens:-1] += other.added(layer, "q_proj", x[tokens:-1])
        assert np.abs(out - wanted).max() < 1e-4
    with pytest.raises(ValueError, match="rows must be"):
        one.paged.lengthen("q_proj", rows[:, :1])

"""Building programs: scalars, listings, and what is refused at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from memwall.errors import InputError
from memwall.kernels.tile_layout import local, spatial
from memwall.kernels.tile_program import Expr, TileProgram, evaluate, instructions, listing, written


def fresh(warps: int = 1) -> TileProgram:
    return TileProgram("p", grid=(2, 3), warps=warps)


def test_scalars() -> None:
    p = fresh()
    scalar = (p.block(0) * 16 + 3) // 2 % 5
    assert evaluate(scalar, {"block0": 3}) == (3 * 16 + 3) // 2 % 5
    assert written(scalar) == "((((block0 * 16) + 3) / 2) % 5)"
    assert written(p.block(1) - 1 < 4, "//") == "((block1 - 1) < 4)"
    assert evaluate(Expr("<", (2, 3)), {}) == evaluate((2 * p.block(0)).equals(4), {"block0": 2}) == 1


def test_a_listing_shows_every_instruction() -> None:
    p = fresh()
    x = p.global_view("x", "f32", (4, 32))
    with p.loop(4) as i, p.when(i < 2):
        tile = p.load_global(x, (i, 0), (1, 32))
        p.store_global(x, p.unary("neg", tile), (i, 0))
    text = listing(p)
    assert "for i0 in range(4):" in text
    assert "if (i0 < 2):" in text
    assert "r0 = load_global(x, offsets=[i0, 0]" in text
    assert [step.op for step in instructions(p.body)] == ["load_global", "elementwise", "store_global"]


def tile(p: TileProgram, dtype: str = "f32", shape: tuple[int, ...] = (4, 8)) -> Any:
    return p.register_tensor(dtype, shape)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: TileProgram("q", grid=(), warps=1), "grid"),
        (lambda p: TileProgram("q", grid=(1,), warps=33), "1 to 32 warps"),
        (lambda p: (p.global_view("x", "f32", (4,)), p.global_view("x", "f32", (4,))), "two parameters"),
        (lambda p: p.shared_tensor("u4", (4, 8)), "whole bytes"),
        (lambda p: p.load_global(p.global_view("x", "f32", (4, 8)), (0,), (4, 8)), "at"),
        (lambda p: p.load_shared(p.global_view("x", "f32", (4, 8)), (0, 0), (4, 8)), "load_shared of"),
        (lambda p: p.store_global(p.global_view("x", "f16", (4, 8)), tile(p), (0, 0)), "cast first"),
        (
            lambda p: p.copy_async(p.shared_tensor("u8", (4,)), p.global_view("x", "f16", (4,)), (0,), (0,), (4,)),
            "type",
        ),
        (lambda p: p.binary("pow", tile(p), tile(p)), "add, sub"),
        (lambda p: p.add(tile(p), tile(p, "f16")), "cast"),
        (lambda p: p.add(tile(p), tile(p, shape=(4, 7))), "do not match"),
        (lambda p: p.unary("tan", tile(p)), "neg, exp"),
        (lambda p: p.where(tile(p, shape=(4, 1)), tile(p), tile(p)), "shape"),
        (lambda p: p.assign(tile(p), tile(p, "f16")), "cannot take"),
        (lambda p: p.reduce("mean", tile(p), (0,)), "sum, max"),
        (lambda p: p.reduce("sum", tile(p), (2,)), "no such dimension"),
        (lambda p: p.dot(tile(p, "f16", (16, 16)), tile(p, "f16", (8, 8)), tile(p, "f32", (16, 8))), "[m, k]"),
        (lambda p: p.dot(tile(p, "f32", (16, 16)), tile(p, "f32", (16, 8)), tile(p, "f32", (16, 8))), "f16"),
        (lambda p: p.cast(p.global_view("x", "f32", (4,)), "f16"), "load first"),
        (lambda p: p.register_tensor("f32", (4, 8), layout=spatial(8, 4)), "cannot have a layout"),
        (lambda p: p.annotate(tile(p), local(2, 2)), "cannot have a layout"),
    ],
)
def test_refused(make: Callable[[TileProgram], Any], says: str) -> None:
    with pytest.raises(InputError, match=says.replace("[", r"\[").replace("]", r"\]")):
        make(fresh())

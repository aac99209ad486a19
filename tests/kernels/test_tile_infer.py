"""Layout inference: each rule, defaults, and programs that cannot run; shared memory planned by lifetime."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from memwall.errors import InputError
from memwall.kernels.tile_infer import default_layout, infer, plan_shared, register_bytes, slot_map
from memwall.kernels.tile_layout import MMA_A, MMA_B, MMA_C, column_spatial, local, replicated, spatial
from memwall.kernels.tile_program import TileProgram


def program(warps: int = 1) -> TileProgram:
    return TileProgram("p", grid=(1,), warps=warps)


def test_elementwise_follows_its_full_operand_and_repeats_the_other() -> None:
    p = program()
    x, scale = p.register_tensor("f32", (8, 8), layout=spatial(8, 4).compose(local(1, 2))), None
    scale = p.register_tensor("f32", (1, 8))
    y = p.cast(p.mul(x, scale), "f16")
    infer(p)
    assert y.held.same_as(x.held)
    assert scale.held.same_as(x.held.reduce((0,)))
    assert slot_map(scale, y) == [0, 1]


def test_reduce_and_reshape() -> None:
    p = program()
    x = p.register_tensor("f32", (16, 8), layout=MMA_C)
    total = p.reduce("sum", x, (1,))
    again = p.reshape(x, (2, 8, 8))
    infer(p)
    assert total.held.same_as(MMA_C.reduce((1,)))
    assert again.held.same_as(MMA_C.reshape((2, 8, 8)))


@pytest.mark.parametrize("given", [True, False])
def test_operands_of_a_product_follow_its_sums(given: bool) -> None:
    p = program(warps=4)
    warps = spatial(2, 2).compose(local(1, 2))
    acc = p.register_tensor("f32", (32, 32), layout=warps.compose(MMA_C) if given else None)
    a, b = p.register_tensor("f16", (32, 32)), p.register_tensor("f16", (32, 32))
    p.dot(a, b, acc)
    infer(p)
    assert a.held.divide(MMA_A).num_threads == b.held.divide(MMA_B).num_threads == 4
    if given:
        assert a.held.same_as(spatial(2, 2).reduce((1,)).compose(local(1, 2)).compose(MMA_A))
        # k before n, as weights are stored; both rows of warps hold the same columns
        assert b.held.num_slots == 16
        assert b.held.replicas == 2


def test_defaults_are_coalesced() -> None:
    p = program(warps=2)
    x = p.register_tensor("f16", (16, 64))
    layout = default_layout(x, 64)
    assert layout.same_as(local(2, 1).compose(spatial(8, 8)).compose(local(1, 8)))
    small = p.register_tensor("f32", (1, 4))
    assert default_layout(small, 64).same_as(replicated(64, 2).compose(local(1, 4)))
    infer(p)
    assert register_bytes(x) == 32


def bad_view(p: TileProgram) -> None:
    raw = p.register_tensor("u8", (64,), layout=spatial(32).compose(local(2)))
    p.view(raw, "u4", spatial(8, 4).compose(local(1, 2)))


def odd_bits(p: TileProgram) -> None:
    raw = p.register_tensor("u8", (32,), layout=spatial(32))
    p.view(raw, "u3", spatial(8, 4).compose(local(1, 3)))


def missing_elements(p: TileProgram) -> None:
    p.add(
        p.register_tensor("f32", (8, 4), layout=spatial(8, 4)),
        p.register_tensor("f32", (8, 4), layout=column_spatial(8, 4)),
    )


def no_fragments(p: TileProgram) -> None:
    acc = p.register_tensor("f32", (16, 8), layout=MMA_C)
    p.dot(p.register_tensor("f16", (16, 16), layout=spatial(16, 2).compose(local(1, 8))),
          p.register_tensor("f16", (16, 8)), acc)  # fmt: skip


def freed(p: TileProgram) -> None:
    shared = p.shared_tensor("f32", (32,))
    p.free_shared(shared)
    p.load_shared(shared, (0,), (32,))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (bad_view, "takes"),
        (odd_bits, "no whole bytes"),
        (missing_elements, "layouts differ"),
        (no_fragments, "fragments"),
        (freed, "has been freed"),
        (lambda p: p.register_tensor("f32", (4, 4), layout=local(4, 4)), "held by 1 threads of 32"),
        (lambda p: p.dot(p.register_tensor("f16", (8, 16)), p.register_tensor("f16", (16, 8)),
                         p.register_tensor("f32", (8, 8))), "16 x 8"),
    ],
)  # fmt: skip
def test_programs_that_cannot_run(make: Callable[[TileProgram], object], says: str) -> None:
    p = program()
    make(p)
    with pytest.raises(InputError, match=says):
        infer(p)


def test_a_layout_that_nothing_determines_is_named() -> None:
    p = program()
    raw = p.register_tensor("u8", (64,), layout=spatial(32).compose(local(2)))
    tile = p.view(raw, "u4", spatial(8, 4).compose(local(1, 4)))
    tile.layout = None
    with pytest.raises(InputError, match="no rule finds a layout for r1"):
        infer(p)


def test_shared_memory_is_used_again() -> None:
    p = program()
    first, second = p.shared_tensor("f16", (64, 64)), p.shared_tensor("u8", (1000,))
    p.free_shared(first)
    third, fourth = p.shared_tensor("f32", (32, 32)), p.shared_tensor("f32", (32, 32))
    with p.loop(2):
        p.free_shared(second)
        fifth = p.shared_tensor("u8", (128,))
    places, peak = plan_shared(p)
    assert places[id(first)] == places[id(third)] == 0
    assert places[id(fourth)] == 4096
    assert places[id(fifth)] == 8192 + 1024  # the loop may still use `second` in its next round
    assert peak == 8192 + 1024 + 128
    with pytest.raises(InputError, match=r"9,344 bytes.*8,192"):
        plan_shared(p, 8192)

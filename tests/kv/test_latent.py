"""Latent rows against plain lists of rows, and attention over rebuilt blocks against attention over whole arrays."""

from __future__ import annotations

import numpy as np
import pytest

from memwall.kernels import attend_float
from memwall.kernels import latent as kernel
from memwall.kv.latent import BLOCK_TOKENS, BlockAttention, Rebuild, rebuild_with
from memwall.kv.latent_rows import LatentForm, LatentStack
from memwall.memory import Arena, Ledger
from tests.kv.latent_models import loaded, project

WIDTH = 24


class SlowRows:
    """Rows in order; whole groups are rounded, in place, when they settle."""

    def __init__(self, form: LatentForm) -> None:
        self.form, self.rows, self.coded = form, np.zeros((0, form.width), np.float32), 0

    def push(self, rows: np.ndarray) -> None:
        if self.form.cycle > 1:
            rows = rows.astype(np.float16).astype(np.float32)
        self.rows = np.concatenate([self.rows, rows])

    def settle(self) -> None:
        end = len(self.rows) - len(self.rows) % self.form.cycle
        if end > self.coded and self.form.coded:
            part = self.rows[self.coded : end]
            records = np.zeros(self.form.nbytes(len(part)), np.uint8)
            self.form.encode(part, 0, records)
            self.form.decode(records, 0, part)
        self.coded = end


def forms() -> list[LatentForm]:
    return [
        LatentForm(width=WIDTH, bits=4, group=16),
        LatentForm(width=WIDTH, bits=2, group=16, along_tokens=True),
        LatentForm(width=WIDTH, bits=3, group=7, along_tokens=True, zero_inside=True),
        LatentForm(width=WIDTH, bits=32),
    ]


def stack_of(form: LatentForm, ledger: Ledger | None = None) -> LatentStack:
    return LatentStack(Arena(1 << 24, ledger or Ledger()), [form, form], 400)


def take(stack: LatentStack, rows: np.ndarray) -> None:
    stack.reserve(stack.layers[0].count + len(rows))
    for layer in stack.layers:
        for begin in range(0, len(rows), 50):
            layer.push(rows[begin : begin + 50])


def held(stack: LatentStack, layer: int = 1) -> np.ndarray:
    rows = stack.layers[layer]
    return rows.read(0, rows.count, np.empty((rows.count, WIDTH), np.float32)).copy()


@pytest.mark.parametrize("form", forms(), ids=str)
def test_rows_are_those_of_a_list(form: LatentForm) -> None:
    rng = np.random.default_rng(0)
    for counts in [(1,) * 40, (15, 1, 1), (16, 16), (33, 1, 100, 14, 1), (200,), (3, 60, 1)]:
        ledger = Ledger()
        stack, slow = stack_of(form, ledger), SlowRows(form)
        for count in counts:
            rows = rng.standard_normal((count, WIDTH)).astype(np.float32)
            before = slow.rows.copy()
            take(stack, rows)
            slow.push(rows)
            # until the layer settles, what was there before is as it was
            read = stack.layers[1].read(0, len(before), np.empty_like(before))
            np.testing.assert_allclose(read, before, atol=1e-6)
            for layer in stack.layers:
                layer.settle()
            slow.settle()
            np.testing.assert_allclose(held(stack), slow.rows, atol=1e-6)
            sizes = LatentStack.predict([form, form], len(slow.rows))
            assert {row.owner: row.nbytes for row in ledger.rows()} == {o: n for o, n in sizes.items() if n}
            assert stack.nbytes == ledger.total()
        stack.release()
        assert ledger.total() == 0


@pytest.mark.parametrize("form", forms(), ids=str)
def test_truncating_before_settling_undoes_the_push(form: LatentForm) -> None:
    rng = np.random.default_rng(1)
    first, second, third = (rng.standard_normal((n, WIDTH)).astype(np.float32) for n in (39, 90, 30))
    stack, alone = stack_of(form), stack_of(form)
    for each in (stack, alone):
        take(each, first)
        for layer in each.layers:
            layer.settle()
    take(stack, second)
    stack.truncate(39)
    np.testing.assert_array_equal(held(stack), held(alone))
    for each in (stack, alone):
        take(each, third)
        for layer in each.layers:
            layer.settle()
    np.testing.assert_array_equal(held(stack), held(alone))


@pytest.mark.parametrize("form", forms(), ids=str)
@pytest.mark.parametrize("length", [0, 1, 15, 16, 21, 60, 64])
def test_truncating_keeps_the_front_as_it_was_decoded(form: LatentForm, length: int) -> None:
    stack = stack_of(form)
    take(stack, np.random.default_rng(2).standard_normal((64, WIDTH)).astype(np.float32))
    for layer in stack.layers:
        layer.settle()
    before = held(stack)
    stack.truncate(length)
    assert stack.layers[0].count == length
    np.testing.assert_allclose(held(stack), before[:length], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["llama-bias", "qwen3", "llama-tied", "qwen2-window"])
@pytest.mark.parametrize("queries", [1, 20, 60])
def test_rebuilt_blocks_attend_as_whole_keys_do(family: str, queries: int) -> None:
    """Also where value weights are summed over latent rows first, and where they are not."""
    tiny = loaded(family)
    shape, config, weights, layer = tiny.shape, tiny.config, tiny.model.weights, tiny.shape.num_layers - 1
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, config.hidden_size)).astype(np.float32)
    prefix = f"model.layers.{layer}.self_attn."
    rebuild = rebuild_with(tiny.model, layer, *(weights.matrices[f"{prefix}{n}_proj.weight"] for n in "kv"))
    assert isinstance(rebuild, Rebuild)
    exact = tiny.cache("float32")
    keys, values = project(tiny, layer, x)
    exact.append(layer, keys, values, np.arange(300))
    exact._lengths = [300] * shape.num_layers
    q = rng.standard_normal((queries, shape.num_heads, shape.head_dim)).astype(np.float32)
    positions = np.arange(300 - queries, 300)
    want = exact.attend(layer, q, positions, np.empty_like(q), np.empty((*q.shape[:2], 2), np.float32))
    attention = BlockAttention(tiny.model, shape, Arena(1 << 24, Ledger()), config.hidden_size)
    held_tokens = 300 - queries
    out, stats = np.empty_like(q), np.empty((*q.shape[:2], 2), np.float32)
    attend_float(
        q, keys[held_tokens:], values[held_tokens:], scale=shape.logit_scale, first_position=held_tokens,
        key_start=held_tokens, window=shape.window(layer), out=out, stats=stats,
    )  # fmt: skip
    attention.add(layer, rebuild, lambda a, b: (x[a:b], x[a:b]), held_tokens, q, held_tokens, out, stats)
    np.testing.assert_allclose(out, want, atol=2e-4)


def test_a_block_is_no_longer_than_the_kernel_takes() -> None:
    assert BLOCK_TOKENS <= kernel.MOST_TOKENS

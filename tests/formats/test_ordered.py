"""Integers whose columns stand in an order of their own: the same numbers, two bytes a column, and what cannot be."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.formats import codec
from memwall.formats.integer import IntegerCodec
from memwall.formats.ordered import OrderedCodec, check, weights_of


def sample(rows: int, cols: int) -> np.ndarray:
    return np.random.default_rng(rows + cols).standard_normal((rows, cols), np.float32)


def test_encoding_alone_keeps_columns_where_they_are() -> None:
    values = sample(37, 300)
    packed, plain = codec("ordered-int4-g128").encode(values), codec("int4-g128").encode(values)
    np.testing.assert_array_equal(codec(packed.spec).decode(packed), codec("int4-g128").decode(plain))
    assert packed.nbytes == plain.nbytes + 2 * 300


@settings(max_examples=20, deadline=None)
@given(
    cols=st.integers(1, 200),
    bits=st.integers(2, 8),
    group=st.sampled_from((32, 64, 128)),
    symmetric=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_an_order_of_columns_is_undone(cols: int, bits: int, group: int, symmetric: bool, seed: int) -> None:
    values, inner = sample(5, cols), IntegerCodec(bits=bits, group=group, symmetric=symmetric)
    order = np.random.default_rng(seed).permutation(cols)
    form, held = OrderedCodec(inner=inner), inner.encode(values[:, order])
    packed = form.around(held, order)
    check(packed)
    assert codec(packed.spec) == form
    assert weights_of(packed).nbytes == held.nbytes == packed.nbytes - 2 * cols == form.nbytes((5, cols)) - 2 * cols
    np.testing.assert_array_equal(form.decode(packed)[:, order], inner.decode(held))


def test_more_columns_than_two_bytes_can_name() -> None:
    form = codec("ordered-int2-g128")
    assert form.buffers((1, 1 << 16))["order"][1] == np.uint16
    assert form.buffers((1, (1 << 16) + 1))["order"][1] == np.uint32


def test_what_it_is_called() -> None:
    form = codec("ordered-int4")
    assert (form.spec, form.method) == ("ordered-int4-g64", "gptq")
    for bad in ("ordered", "ordered-", "ordered-nf4", "ordered-int4-g64-rows", "ordered-int9", "orderedint4"):
        with pytest.raises(InputError):
            codec(bad)


def test_orders_that_cannot_be() -> None:
    form = codec("ordered-int4-g64")
    assert isinstance(form, OrderedCodec)
    packed = form.encode(sample(4, 80))
    for order in (np.zeros(80, np.uint16), np.arange(1, 81, dtype=np.uint16)):
        with pytest.raises(InputError, match="name each once"):
            check(replace(packed, buffers={**packed.buffers, "order": order}))
    with pytest.raises(InputError, match="does not fit"):
        form.around(form.inner.encode(sample(4, 80)), np.arange(79))
    with pytest.raises(InputError, match="does not fit"):
        form.around(codec("int4-g32").encode(sample(4, 80)), np.arange(80))

"""COMET's stored form: int4's weights, widths of blocks, an order of columns, and what cannot be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.formats import Packed, codec
from memwall.formats.comet import CometCodec, check, weights_of, with_wide


def sample(rows: int, cols: int) -> np.ndarray:
    return np.random.default_rng(rows + cols).standard_normal((rows, cols), np.float32)


def test_weights_are_those_of_int4() -> None:
    values = sample(37, 300)
    packed, plain = codec("comet-g128-x1").encode(values), codec("int4-g128").encode(values)
    np.testing.assert_array_equal(packed.buffers["codes"], plain.buffers["codes"])
    np.testing.assert_array_equal(codec(packed.spec).decode(packed), codec("int4-g128").decode(plain))
    assert packed.buffers["wide"].tolist() == [1, 0, 0]
    assert packed.nbytes == plain.nbytes + 3


def test_lowest_code_is_minus_eight() -> None:
    """The scale carries the sign of the extreme, which always takes code 0: -8."""
    values = np.zeros((1, 64), np.float32)
    values[0, 3], values[0, 4] = 16.0, -14.0
    packed = codec("comet-g64").encode(values)
    codes, scales, _ = CometCodec(group=64).inner.unpack(packed)
    assert codes[0, 3] == 0
    assert scales[0, 0] == -2
    assert codec("comet-g64").decode(packed)[0, 3:5].tolist() == [16.0, -14.0]


@settings(max_examples=20, deadline=None)
@given(cols=st.integers(1, 200), group=st.sampled_from((32, 64, 128)), seed=st.integers(0, 1000))
def test_an_order_of_columns_is_undone(cols: int, group: int, seed: int) -> None:
    values = sample(5, cols)
    order = np.random.default_rng(seed).permutation(cols)
    form = CometCodec(group=group, gather=True)
    packed = form.around(form.inner.encode(values[:, order]), np.zeros(form.blocks(cols)), order)
    expected = np.empty_like(values)
    expected[:, order] = form.inner.decode(form.inner.encode(values[:, order]))
    np.testing.assert_array_equal(form.decode(packed), expected)
    wide = np.arange(form.blocks(cols)) % 2
    mixed = with_wide(packed, wide)
    check(mixed)
    assert CometCodec.parse(mixed.spec).wide == wide.sum()
    assert weights_of(mixed).nbytes == form.inner.nbytes((5, cols))


def test_what_it_is_called() -> None:
    form = codec("comet-g64-x12-gather")
    assert (form.label, form.timed, form.method) == ("comet-g64", "comet-g64", "comet")
    for bad in ("comet-g48", "comet-x", "comet-g64-gather-x1", "comet4"):
        with pytest.raises(InputError):
            codec(bad)


def test_buffers_that_cannot_be() -> None:
    packed = codec("comet-g32-x1-gather").encode(sample(3, 70))
    for name, buffer in (
        ("wide", np.uint8([2, 0, 0])),
        ("wide", np.uint8([1, 1, 0])),
        ("order", np.zeros(70, np.uint16)),
    ):
        with pytest.raises(InputError, match="comet-g32-x1-gather"):
            check(Packed(spec=packed.spec, shape=packed.shape, buffers={**packed.buffers, name: buffer}))
    with pytest.raises(InputError, match="65536"):
        codec("comet").buffers((16, 65537))

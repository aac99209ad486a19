"""The range coder against a slow one in whole numbers, and round trips over all shapes and alphabets."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.kernels import range_coder
from memwall.kernels.range_coder import TOTAL


def slow_encode(symbols: list[int], tables: list[list[int]]) -> bytes:
    """The interval as exact numbers: all bytes so far in one integer. tables: cumulative counts for each symbol."""
    low, digits, width = 0, 4, 2**32 - 1
    for symbol, starts in zip(symbols, tables):
        ends = [*starts[1:], TOTAL]
        unit = width >> 16
        low += unit * starts[symbol]
        width = unit * (ends[symbol] - starts[symbol])
        while width < 2**24:
            low, width, digits = low << 8, width << 8, digits + 1
    low = -(-low // 2**24) * 2**24
    return low.to_bytes(digits, "big").rstrip(b"\0")


def slow_decode(data: bytes, tables: list[list[int]]) -> list[int]:
    data += bytes(2 * len(tables) + 8)
    code, place, width, symbols = int.from_bytes(data[:4], "big"), 4, 2**32 - 1, []
    for starts in tables:
        unit = width >> 16
        symbol = max(s for s, start in enumerate(starts) if start <= min(code // unit, TOTAL - 1))
        code -= unit * starts[symbol]
        width = unit * ([*starts[1:], TOTAL][symbol] - starts[symbol])
        while width < 2**24:
            code, width, place = code << 8 | data[place], width << 8, place + 1
        symbols.append(symbol)
    return symbols


def random_case(seed: int, planes: int, tokens: int, channels: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Symbols and tables; rare symbols have a single count, and are used."""
    rng = np.random.default_rng(seed)
    weights = rng.random((planes, channels, size)) ** rng.integers(1, 40)
    return rng.integers(0, size, (planes, tokens, channels)).astype(np.uint8), range_coder.cumulative(weights)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    planes=st.integers(1, 3),
    tokens=st.integers(0, 70),
    channels=st.integers(1, 35),
    size=st.sampled_from([1, 2, 3, 31, 64, 65, 255, 256]),
    cut=st.sampled_from([1, 7, 32, 256]),
    anchors=st.sampled_from([None, 1, 2, 17, 255]),
    group=st.integers(1, 12),
)
def test_round_trip(
    seed: int, planes: int, tokens: int, channels: int, size: int, cut: int, anchors: int | None, group: int
) -> None:
    symbols, starts = random_case(seed, planes, tokens, channels, size)
    others = None
    if anchors is not None:
        drawn, others = random_case(seed + 1, planes, tokens, channels, anchors)
        first = np.arange(tokens) % cut % group == 0
        symbols[:, first] = drawn[:, first]
    form = {"cut": cut, "anchors": others, "group": group if anchors is not None else 0}
    data, sizes = range_coder.encode(symbols, starts, **form)
    assert len(sizes) == range_coder.num_streams(symbols.shape, cut)
    assert sizes.sum() == len(data)
    np.testing.assert_array_equal(range_coder.decode(data, sizes, starts, np.empty_like(symbols), **form), symbols)
    # each stream is the slow coder's, byte for byte
    ends, cuts = np.cumsum(sizes), -(-tokens // cut)
    for stream in np.random.default_rng(seed).integers(0, len(sizes), min(3, len(sizes))):
        plane, piece, channel = stream // channels // cuts, stream // channels % cuts, stream % channels
        part = symbols[plane, piece * cut : (piece + 1) * cut, channel].tolist()
        tables = [
            (others if others is not None and i % group == 0 else starts)[plane, channel].tolist()
            for i in range(len(part))
        ]
        own = data[ends[stream] - sizes[stream] : ends[stream]].tobytes()
        assert own == slow_encode(part, tables)
        assert slow_decode(own, tables) == part


def test_streams_cost_what_entropy_says_and_a_byte() -> None:
    rng = np.random.default_rng(0)
    weights = np.exp(-0.5 * ((np.arange(64) - 31) / 1.3) ** 2) + 1e-9
    shares = weights / weights.sum()
    symbols = rng.choice(64, (2, 1024, 64), p=shares).astype(np.uint8)
    starts = np.broadcast_to(range_coder.cumulative(weights), (2, 64, 64)).copy()
    data, sizes = range_coder.encode(symbols, starts, cut=256)
    ideal = -np.log2(shares[symbols]).sum() / 8
    assert 0 < len(data) - ideal < 1.2 * len(sizes)


def test_a_single_symbol_costs_nothing() -> None:
    symbols = np.zeros((1, 1000, 5), np.uint8)
    data, sizes = range_coder.encode(symbols, range_coder.cumulative(np.ones((1, 5, 1))), cut=256)
    assert len(data) == sizes.sum() == 0


def test_cumulative_counts_keep_every_symbol() -> None:
    starts = range_coder.cumulative(np.array([[0.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 5.0]]))
    ends = np.concatenate([starts[:, 1:].astype(int), np.full((3, 1), TOTAL)], axis=1)
    assert ((ends - starts) >= 1).all()
    assert starts[1].tolist() == [0, 16384, 32768, 49152]
    assert (ends - starts)[0].tolist() == [1, TOTAL - 3, 1, 1]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.binary(max_size=300), seed=st.integers(0, 99), size=st.sampled_from([1, 2, 64, 256]))
def test_any_bytes_decode_inside_the_alphabet(data: bytes, seed: int, size: int) -> None:
    _, starts = random_case(seed, 1, 0, 3, size)
    third = len(data) // 3
    sizes = np.array([third, third, len(data) - 2 * third], np.uint32)
    out = range_coder.decode(np.frombuffer(data, np.uint8), sizes, starts, np.empty((1, 40, 3), np.uint8), cut=64)
    assert out.max(initial=0) < size


def test_threads_do_not_matter(threads: int) -> None:
    symbols, starts = random_case(3, 4, 600, 40, 64)
    data, sizes = range_coder.encode(symbols, starts, cut=256)
    assert data[:8].tolist() == range_coder.encode(symbols[:1], starts[:1], cut=256)[0][:8].tolist()
    np.testing.assert_array_equal(range_coder.decode(data, sizes, starts, np.empty_like(symbols), cut=256), symbols)


def test_what_cannot_be_is_named() -> None:
    symbols, starts = random_case(0, 1, 10, 2, 4)
    flat = starts.copy()
    flat[0, 1, 2] = flat[0, 1, 1]
    data, sizes = range_coder.encode(symbols, starts, cut=256)
    out = np.empty_like(symbols)
    for says, call in (
        ("grow from 0", lambda: range_coder.encode(symbols, flat, cut=256)),
        ("outside its alphabet", lambda: range_coder.encode(symbols + 4, starts, cut=256)),
        ("add up", lambda: range_coder.decode(data[1:], sizes, starts, out, cut=256)),
        ("planes, channels", lambda: range_coder.encode(symbols, starts[:, :1], cut=256)),
        ("1 to 4096", lambda: range_coder.encode(symbols, starts, cut=5000)),
        ("group", lambda: range_coder.encode(symbols, starts, cut=256, group=10)),
        ("sizes", lambda: range_coder.decode(data, sizes[1:], starts, out, cut=256)),
    ):
        with pytest.raises(ValueError, match=says):
            call()

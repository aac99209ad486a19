"""Codes of latent rows and attention over one block, against slow references, at sizes that divide nothing evenly."""

from __future__ import annotations

import numpy as np
import pytest

from memwall.kernels import latent


def slow_round_trip(x: np.ndarray, bits: int, zero_inside: bool) -> np.ndarray:
    """One group after the definition: the finest grid that covers it and whose zero point fits a byte."""
    levels = 2**bits - 1
    least = 0 if zero_inside else -((255 - levels) // 2)
    most = levels if zero_inside else least + 255
    low, high, levels = x.min(), x.max(), np.float32(levels)
    needed = (low / np.float32(-least) if least else high / levels) if low > 0 else -low / np.float32(most)
    scale = np.float32(np.float16(max((high - low) / levels, needed)))
    if scale == 0:
        return np.zeros_like(x)
    zero = np.clip(np.rint(-low / scale), least, most)
    return ((np.clip(np.rint(x * (np.float32(1) / scale)) + zero, 0, levels) - zero) * scale).astype(np.float32)


def rows_of(num_tokens: int, width: int) -> np.ndarray:
    """Normal numbers; one channel far from zero, one below it, one all zero."""
    x = np.random.default_rng(0).standard_normal((num_tokens, width)).astype(np.float32)
    x[:, 0] += 9
    x[:, 1] = -5 - 0.1 * x[:, 1]
    x[:, 2] = 0
    return x


def round_trip(x: np.ndarray, first: int = 0, **form: int) -> np.ndarray:
    each = {name: form[name] for name in ("bits", "group", "along_tokens")}
    tokens = form["group"] if form["along_tokens"] else 1
    records = np.zeros(len(x) // tokens * latent.record_bytes(x.shape[1], **each), np.uint8)
    latent.encode_rows(x, records, **form)
    return latent.decode_rows(records, first, np.empty_like(x[first:]), **form)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zero_inside", [False, True])
@pytest.mark.parametrize(("width", "group"), [(3, 8), (21, 6), (128, 128), (300, 128), (520, 64)])
def test_groups_along_channels(bits: int, zero_inside: bool, width: int, group: int, isa: str, threads: int) -> None:
    x = rows_of(37, width)
    got = round_trip(x, 5, bits=bits, group=group, along_tokens=False, zero_inside=zero_inside)
    want = np.concatenate(
        [
            [slow_round_trip(row[g : g + group], bits, zero_inside) for row in x]
            for g in range(0, width, group)
        ],
        axis=1,
    )[5:]  # fmt: skip
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zero_inside", [False, True])
@pytest.mark.parametrize(("width", "group"), [(3, 8), (70, 32), (300, 128)])
def test_groups_along_tokens(bits: int, zero_inside: bool, width: int, group: int, isa: str, threads: int) -> None:
    x = rows_of(3 * group, width)
    got = round_trip(x, group - 3, bits=bits, group=group, along_tokens=True, zero_inside=zero_inside)
    want = np.concatenate(
        [np.stack([slow_round_trip(c, bits, zero_inside) for c in block.T], 1) for block in x.reshape(3, group, width)]
    )[group - 3 :]
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_group_far_from_zero_keeps_a_fine_grid_unless_zero_must_be_inside() -> None:
    x = 9 + np.random.default_rng(1).random((128, 1), np.float32)
    form = {"bits": 2, "group": 128, "along_tokens": True}
    fine, coarse = (np.abs(round_trip(x, **form, zero_inside=inside) - x).max() for inside in (False, True))
    assert fine < 0.18  # half of a third of the range
    assert coarse > 0.6  # half of a third of [0, 10], less where 10 itself is a code


def test_bytes() -> None:
    assert latent.record_bytes(256, 4, 128, along_tokens=False) == 128 + 2 * 3
    assert latent.record_bytes(20, 3, 32, along_tokens=True) == 32 * 9 + 20 * 3


@pytest.mark.parametrize(
    ("queries", "heads", "kv_heads", "dim", "value_heads", "width"),
    [(1, 8, 8, 16, 1, 128), (3, 6, 2, 20, 2, 20), (5, 4, 2, 32, 2, 32), (2, 3, 1, 8, 1, 70)],
)
@pytest.mark.parametrize("window", [None, 50])
def test_attention_in_blocks(
    queries: int, heads: int, kv_heads: int, dim: int, value_heads: int, width: int, window: int | None, isa: str,
    threads: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng(0)
    length, first = 290, 290
    q = rng.standard_normal((queries, heads, dim)).astype(np.float32)
    k = rng.standard_normal((length, kv_heads, dim)).astype(np.float32)
    v = rng.standard_normal((length, value_heads, width)).astype(np.float32)
    out, stats = np.full((queries, heads, width), np.nan, np.float32), np.zeros((queries, heads, 2), np.float32)
    for begin in range(0, length, 128):
        part = slice(begin, min(begin + 128, length))
        first_key = -(1 << 40) if window is None else first - window + 1 - begin
        latent.attend_block(q, k[part], v[part], out, stats, scale=0.3, first_key=first_key)
    out /= stats[..., 1:]
    rep = heads // kv_heads
    logits = 0.3 * np.einsum("thd,shd->ths", q, k.repeat(rep, 1))
    if window is not None:
        seen = np.arange(length) > first + np.arange(queries)[:, None] - window
        logits = np.where(seen[:, None], logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    want = np.einsum("ths,shw->thw", weights, v.repeat(heads // value_heads, 1)) / weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(out, want, atol=2e-5)
    np.testing.assert_allclose(stats[..., 0], logits.max(-1), atol=1e-4)

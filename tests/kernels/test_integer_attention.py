"""Queries and shares of 8 bits against KIVI's codes: sums of integers, against NumPy's on the same codes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from memwall.kernels import attention, attention_reference

VALUE_BLOCK = attention.VALUE_BLOCK_TOKENS


def coded(
    k: np.ndarray, v: np.ndarray, bits: int, group: int, key_group: int
) -> tuple[dict[str, np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Blocks of all rows; codes, scales, minima: of keys [blocks, tokens or 1, Hkv, Dk], values [n, Hkv, groups, G]."""
    heads, dim = v.shape[1:]
    key_bytes = attention.kivi_key_block_bytes(bits, key_group, k.shape[2])
    value_bytes = attention.kivi_block_bytes(bits, group, dim)[1]
    blocks = {
        "key_blocks": np.full(len(k) // key_group * heads * key_bytes, 255, np.uint8),
        "value_blocks": np.full(-(-len(v) // VALUE_BLOCK) * heads * value_bytes, 255, np.uint8),
    }
    attention.kivi_encode_keys(k, blocks["key_blocks"], bits=bits, group=key_group)
    attention.kivi_encode_values(v, 0, blocks["value_blocks"], bits=bits, group=group)
    grouped = torch.from_numpy(k).view(-1, key_group, *k.shape[1:]), torch.from_numpy(v).view(*v.shape[:2], -1, group)
    parts = [attention_reference.kivi_quantize(x, bits, axis) for x, axis in zip(grouped, (1, 3))]
    keys, values = ([x.double().numpy() for x in part] for part in parts)
    return blocks, keys, values


def rounded(x: np.ndarray, axis: int, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Integers and their step along an axis."""
    step = np.abs(x).max(axis, keepdims=True) / top
    return np.rint(x / np.where(step > 0, step, 1)).astype(np.int64), step


def logits_of(q: np.ndarray, keys: list[np.ndarray]) -> np.ndarray:
    """q [T, H, D], scaled, against coded keys -> [T, H, S]."""
    codes, scales, minima = keys
    heads = np.arange(q.shape[1]) // (q.shape[1] // codes.shape[2])
    factors, step = rounded(q[:, None] * scales[None, :, 0, heads], 3, 127)  # [T, blocks, H, D]
    sums = np.einsum("tbhd,bshd->thbs", factors, codes[:, :, heads].astype(np.int64))
    offset = np.einsum("thd,bhd->thb", q, minima[:, 0, heads])
    return (sums * step[..., 0].transpose(0, 2, 1)[..., None] + offset[..., None]).reshape(*q.shape[:2], -1)


def mixed(shares: np.ndarray, values: list[np.ndarray]) -> np.ndarray:
    """Shares [T, H, S] of coded values -> [T, H, D]."""
    codes, scales, minima = values
    heads = np.arange(shares.shape[1]) // (shares.shape[1] // codes.shape[1])
    out = np.einsum("ths,shg->thg", shares, minima[..., 0][:, heads])[..., None] * np.ones(codes.shape[3])
    for begin in range(0, len(codes), VALUE_BLOCK):
        part = slice(begin, begin + VALUE_BLOCK)
        factors, step = rounded(shares[:, :, part, None] * scales[..., 0][part][:, heads].swapaxes(0, 1), 2, 255)
        out += np.einsum("thsg,shgc->thgc", factors, codes[part][:, heads].astype(np.int64)) * step[:, :, 0, :, None]
    return out.reshape(*shares.shape[:2], -1)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(
    ("heads", "key_dim", "dim", "group", "key_group"),
    [(2, 32, 32, 32, 32), (6, 48, 48, 16, 16), (14, 64, 64, 32, 64), (8, 128, 128, 128, 128), (10, 13, 32, 16, 32)],
)
def test_integer_products_are_those_of_numpy(
    isa: str, threads: int, bits: int, heads: int, key_dim: int, dim: int, group: int, key_group: int
) -> None:
    rng = np.random.default_rng(bits)
    coded_keys, coded_values, kv_heads = 256, 203, 2
    k = rng.standard_normal((300, kv_heads, key_dim)).astype(np.float16).astype(np.float32)
    v = rng.standard_normal((300, kv_heads, dim)).astype(np.float16).astype(np.float32)
    k[:, 0, 3] *= 20  # an outlier, and channels that never change
    k[:, :, 4], v[7] = 2, 0.5
    blocks, keys, values = coded(k[:coded_keys], v[:coded_values], bits, group, key_group)
    of = np.arange(heads) // (heads // kv_heads)
    for num_queries, first, window in [(1, 299, None), (5, 295, None), (40, 240, None), (3, 150, 70)]:
        q = rng.standard_normal((num_queries, heads, key_dim), np.float32)
        settings = {"scale": key_dim**-0.5, "first_position": first, "window": window}
        out, stats = np.empty((num_queries, heads, dim), np.float32), np.empty((num_queries, heads, 2), np.float32)
        attention.attend_kivi(
            q, blocks["key_blocks"], blocks["value_blocks"], k[coded_keys:], v[coded_values:],
            coded_keys=coded_keys, coded_values=coded_values, bits=bits, group=group, key_group=key_group,
            integers=True, **settings, out=out, stats=stats,
        )  # fmt: skip
        scaled = q.astype(np.float64) * settings["scale"]
        exact = np.einsum("thd,shd->ths", scaled, k[coded_keys:, of])
        logits = np.concatenate([logits_of(scaled, keys), exact], axis=2)
        own, other = first + np.arange(num_queries)[:, None], np.arange(300)
        seen = (other <= own) & (True if window is None else other > own - window)
        logits = np.where(seen[:, None], logits, -np.inf)
        peak = logits.max(2, keepdims=True)
        shares = np.exp(logits - peak)
        total = shares.sum(2, keepdims=True)
        want = mixed(shares[..., :coded_values], values)
        want = (want + np.einsum("ths,shd->thd", shares[..., coded_values:], v[coded_values:, of])) / total
        # a factor between two integers may go to the other one where floats are added in another order
        np.testing.assert_allclose(out, want, atol=3e-3)
        assert np.abs(out - want).mean() < 2e-5
        np.testing.assert_allclose(stats[..., 0], peak[..., 0], rtol=1e-4, atol=5e-3)


def test_rounding_is_small_and_there() -> None:
    rng = np.random.default_rng(0)
    q, (k, v) = rng.standard_normal((2, 8, 64), np.float32), rng.standard_normal((2, 512, 2, 64), np.float32)
    blocks, _, _ = coded(k, v, 4, 32, 32)
    none = np.empty((0, 2, 64), np.float32)
    outs = [np.empty_like(q) for _ in range(2)]
    for integers, out in zip((False, True), outs):
        attention.attend_kivi(
            q, blocks["key_blocks"], blocks["value_blocks"], none, none, coded_keys=512, coded_values=512,
            bits=4, group=32, integers=integers, scale=0.125, first_position=510, out=out,
        )  # fmt: skip
    error = np.linalg.norm(outs[1] - outs[0]) / np.linalg.norm(outs[0])
    assert 1e-4 < error < 2e-2


@pytest.mark.parametrize("bits", [3, 8])
def test_other_widths_are_refused(bits: int) -> None:
    q, none = np.zeros((1, 2, 32), np.float32), np.zeros((0, 2, 32), np.float32)
    with pytest.raises(ValueError, match="2 or 4 bits"):
        attention.attend_kivi(
            q, np.zeros(0, np.uint8), np.zeros(0, np.uint8), none, none, coded_keys=0, coded_values=0,
            bits=bits, group=32, integers=True, scale=1.0, first_position=0, out=q.copy(),
        )  # fmt: skip

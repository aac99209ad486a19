"""KV4: keys by page and channel, values by page and token, through KIVI's blocks; bytes, edges and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from memwall import kv
from memwall.errors import InputError
from memwall.kernels import attention_reference
from memwall.kv.kv4 import Kv4Cache
from memwall.memory import Arena, Ledger

HEADS, KV_HEADS = 4, 2


def cache_of(policy: str, head_dim: int, capacity: int = 400) -> Kv4Cache:
    shape = kv.CacheShape(num_layers=2, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=head_dim)
    cache = kv.build(policy, shape, Arena(1 << 25, Ledger()), capacity)
    assert isinstance(cache, Kv4Cache)
    return cache


def numbers(rng: np.random.Generator, tokens: int, head_dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    q = rng.standard_normal((tokens, HEADS, head_dim))
    k, v = rng.standard_normal((2, tokens, KV_HEADS, head_dim))
    k[:, 0, 5] *= 30
    return tuple(x.astype(np.float16).astype(np.float32) for x in (q, k, v))  # type: ignore[return-value]


def step(cache: kv.KVCache, q: np.ndarray, k: np.ndarray, v: np.ndarray, first: int) -> np.ndarray:
    out = np.empty_like(q)
    for layer in range(2):
        cache.append(layer, k, v, np.arange(first, first + len(k)))
        cache.attend(layer, q, np.arange(first, first + len(k)), out)
        cache.settle(layer)
    return out


@pytest.mark.parametrize(("head_dim", "group"), [(32, 32), (64, 64), (128, 128), (192, 64)])
@pytest.mark.parametrize("page", [64, 32])
def test_against_pages_and_tokens_rounded_apart(head_dim: int, group: int, page: int) -> None:
    rng = np.random.default_rng(head_dim + page)
    prompt, steps = 150, 60
    q, k, v = numbers(rng, prompt + steps, head_dim)
    cache = cache_of(f"kv4(page={page})", head_dim)
    assert cache.settings.group == group
    coded_k, coded_v = np.array(k), np.array(v)
    for begin, end in [(0, prompt)] + [(i, i + 1) for i in range(prompt, prompt + steps)]:
        out = step(cache, q[begin:end], k[begin:end], v[begin:end], begin)
        keys, values = np.array(k[:end]), np.array(v[:end])
        whole = begin // page * page  # what was settled before this step
        keys[:whole], values[:whole] = coded_k[:whole], coded_v[:whole]
        expected, _ = attention_reference.attend(
            *(torch.from_numpy(x) for x in (q[begin:end], keys, values)), scale=head_dim**-0.5, first_position=begin
        )
        np.testing.assert_allclose(out, expected.numpy(), rtol=2e-3, atol=2e-3)
        done = end // page * page
        keys, values = torch.from_numpy(k[:done]), torch.from_numpy(v[:done])
        coded_k[:done] = attention_reference.kivi_round_trip(keys, 4, page, along_tokens=True).numpy()
        coded_v[:done] = attention_reference.kivi_round_trip(values, 4, group, along_tokens=False).numpy()
    found_k, found_v = cache.rows(1, 0, end)
    np.testing.assert_allclose(found_k[:done], coded_k[:done], atol=1e-3, rtol=1e-3)
    np.testing.assert_allclose(found_v, coded_v, atol=1e-3, rtol=1e-3)


def test_bytes_a_token() -> None:
    """4 bits and the scales: (4 + 32 / 64) of keys and (4 + 32 / 128) of values, against 16 and 16."""
    shape = kv.CacheShape(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=128)
    read = [kv.read_bytes("kv4", shape, tokens) for tokens in (640, 1280)]
    assert (read[1] - read[0]) / 640 == 2 * 2 * 128 * (4.5 + 4.25) / 8
    plain = kv.read_bytes("float16", shape, 640)
    assert read[0] / plain == pytest.approx(8.75 / 32)
    held = kv.predict("kv4", shape, 6400, 0, 6400)
    assert sum(held.values()) < 0.29 * 2 * 2 * 2 * 128 * 2 * 6400


def test_forgetting_inside_a_page() -> None:
    cache = cache_of("kv4", 32)
    q, k, v = numbers(np.random.default_rng(0), 200, 32)
    step(cache, q, k, v, 0)
    before = cache.rows(0, 0, 100)
    cache.truncate(100)
    assert cache.length == 100
    after = cache.rows(0, 0, 100)
    for one, other in zip(before, after, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3, rtol=1e-3)  # half precision of the exact part
    step(cache, q[100:], k[100:], v[100:], 100)
    assert cache.length == 200
    twin = cache.fork()
    np.testing.assert_array_equal(twin.rows(0, 0, 200)[0], cache.rows(0, 0, 200)[0])


def test_names_and_refusals() -> None:
    assert cache_of("kv4", 64).policy == "kv4(page=64)"
    assert cache_of("kv4(page=32,exact=bfloat16)", 64).policy == "kv4(page=32,exact=bfloat16)"
    assert kv.build(
        "kivi(4bit,key_group=64,group=32,residual=0)", cache_of("kv4", 32).shape, Arena(1 << 25, Ledger()), 9
    )
    with pytest.raises(InputError, match="page has 16, 32, 64, 128"):
        cache_of("kv4(page=48)", 64)
    with pytest.raises(InputError, match="bits"):
        cache_of("kv4(bits=2)", 64)
    with pytest.raises(InputError, match="key_group"):
        kv.build("kivi(key_group=24)", cache_of("kv4", 32).shape, Arena(1 << 25, Ledger()), 9)
    with pytest.raises(InputError, match="head dimension"):
        cache_of("kv4", 40)

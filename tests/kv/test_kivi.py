"""KIVI against a slow reference that keeps lists of tokens, at every length and step; its bytes, edges and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall import kv
from memwall.errors import BudgetExceeded, InputError
from memwall.kernels import attention_reference
from memwall.kv.kivi import KiviCache
from memwall.memory import Arena, Ledger

HEADS, KV_HEADS, DIM = 4, 2, 32
SHAPE = kv.CacheShape(num_layers=2, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM)


def numbers(rng: np.random.Generator, num_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q, k, v exact in half precision, one key channel huge, one constant."""
    q = rng.standard_normal((num_tokens, HEADS, DIM))
    k, v = rng.standard_normal((2, num_tokens, KV_HEADS, DIM))
    k[:, 0, 5] *= 30
    k[:, :, 7] = 0.25
    return tuple(x.astype(np.float16).astype(np.float32) for x in (q, k, v))


def cache_of(policy: str, capacity: int = 600, ledger: Ledger | None = None) -> KiviCache:
    cache = kv.build(policy, SHAPE, Arena(1 << 25, ledger or Ledger()), capacity)
    assert isinstance(cache, KiviCache)
    return cache


def step(cache: kv.KVCache, q: np.ndarray, k: np.ndarray, v: np.ndarray, first: int) -> np.ndarray:
    positions = np.arange(first, first + len(k))
    out = np.empty_like(q)
    for layer in range(SHAPE.num_layers):
        cache.append(layer, k, v, positions)
        cache.attend(layer, q, positions, out)
        cache.settle(layer)
    return out


class SlowKivi:
    """What the paper says, token by token: lists of coded groups and of exact tokens."""

    def __init__(self, bits: int, group: int, residual: int) -> None:
        self.bits, self.group, self.residual = bits, group, residual
        self.coded_k = self.coded_v = self.k = self.v = torch.zeros(0, KV_HEADS, DIM)

    def step(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        self.k, self.v = torch.cat([self.k, torch.from_numpy(k)]), torch.cat([self.v, torch.from_numpy(v)])
        keys, values = torch.cat([self.coded_k, self.k]), torch.cat([self.coded_v, self.v])
        first = len(keys) - len(q)
        out, _ = attention_reference.attend(torch.from_numpy(q), keys, values, scale=DIM**-0.5, first_position=first)
        cycle = max(self.residual, self.group)
        n = len(self.k) - len(self.k) % cycle
        if n:
            coded = attention_reference.kivi_round_trip(self.k[:n], self.bits, self.group, along_tokens=True)
            self.coded_k, self.k = torch.cat([self.coded_k, coded]), self.k[n:]
        n = max(len(self.v) - self.residual, 0)
        if n:
            coded = attention_reference.kivi_round_trip(self.v[:n], self.bits, self.group, along_tokens=False)
            self.coded_v, self.v = torch.cat([self.coded_v, coded]), self.v[n:]
        return out.numpy()


@pytest.mark.parametrize("residual", [0, 32])
def test_every_prompt_length_and_every_step(residual: int) -> None:
    cycle = max(residual, 16)
    for prompt in range(1, 4 * cycle + 1):
        q, k, v = numbers(np.random.default_rng(prompt), prompt + cycle + 2)
        cache, slow = cache_of(f"kivi(bits=2,group=16,residual={residual})"), SlowKivi(2, 16, residual)
        for begin, end in [(0, prompt)] + [(i, i + 1) for i in range(prompt, prompt + cycle + 2)]:
            part = slice(begin, end)
            out = step(cache, q[part], k[part], v[part], begin)
            state = cache._layers[1]
            assert state.coded_keys + state.keys.count == state.coded_values + state.values.count == end
            assert state.keys.count == end % cycle
            assert state.values.count == min(end, residual)
            if prompt % cycle in (0, 1, cycle - 1):
                np.testing.assert_allclose(out, slow.step(q[part], k[part], v[part]), atol=1e-4)
                assert (state.coded_keys, state.keys.count) == (len(slow.coded_k), len(slow.k))
                assert (state.coded_values, state.values.count) == (len(slow.coded_v), len(slow.v))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    group=st.sampled_from([16, 32]),
    multiple=st.integers(0, 3),
    cuts=st.lists(st.integers(1, 70), min_size=1, max_size=5),
)
def test_prompts_in_pieces(bits: int, group: int, multiple: int, cuts: list[int]) -> None:
    residual = multiple * group
    q, k, v = numbers(np.random.default_rng(0), sum(cuts))
    cache, slow = cache_of(f"kivi(bits={bits},group={group},residual={residual})"), SlowKivi(bits, group, residual)
    begin = 0
    for cut in cuts:
        part = slice(begin, begin + cut)
        out = step(cache, q[part], k[part], v[part], begin)
        np.testing.assert_allclose(out, slow.step(q[part], k[part], v[part]), atol=1e-4)
        begin += cut


@pytest.mark.parametrize("bits", [2, 4])
def test_queries_of_eight_bits_attend_nearly_as_floats(bits: int) -> None:
    q, k, v = numbers(np.random.default_rng(0), 400)
    caches = [cache_of(f"kivi({bits}bit,residual=32{queries})") for queries in ("", ",queries=int8")]
    assert [cache.policy.endswith("queries=int8)") for cache in caches] == [False, True]
    for begin, end in [(0, 300), (300, 340), *((i, i + 1) for i in range(340, 400))]:
        exact, rounded = (step(cache, q[begin:end], k[begin:end], v[begin:end], begin) for cache in caches)
        error = np.linalg.norm(rounded - exact, axis=(1, 2)) / np.linalg.norm(exact, axis=(1, 2))
        assert (error == 0).all() if end <= 300 else 1e-5 < error.mean() < 0.2  # a prompt attends exactly
    np.testing.assert_array_equal(*(cache._layers[1].key_blocks.bytes for cache in caches))


def codes(cache: KiviCache) -> tuple[torch.Tensor, torch.Tensor]:
    state, s = cache._layers[0], cache.settings
    keys, values = (
        torch.from_numpy(blocks.bytes[: size(SHAPE, count)].copy())
        for blocks, size, count in (
            (state.key_blocks, s.key_bytes, state.coded_keys),
            (state.value_blocks, s.value_bytes, state.coded_values),
        )
    )
    unpack = attention_reference.kivi_unpack
    return (
        unpack(keys, s.bits, s.group, KV_HEADS, DIM, keys=True),
        unpack(values, s.bits, s.group, KV_HEADS, DIM, keys=False)[: state.coded_values],
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_never_change_and_a_huge_channel_spoils_no_other(bits: int) -> None:
    q, k, v = numbers(np.random.default_rng(2), 100)
    tame = k.copy()
    tame[:, 0, 5] /= 64
    caches = [cache_of(f"kivi(bits={bits},group=16,residual=32)") for _ in range(2)]
    before: tuple[torch.Tensor, torch.Tensor] | None = None
    for begin, end in [(0, 40)] + [(i, i + 1) for i in range(40, 100)]:
        for cache, keys in zip(caches, (k, tame)):
            step(cache, q[begin:end], keys[begin:end], v[begin:end], begin)
        now = codes(caches[0])
        if before is not None:
            for old, new in zip(before, now):
                assert torch.equal(old, new[: len(old)])
        before = now
    huge, other = codes(caches[0])[0], codes(caches[1])[0]
    rest = [d for d in range(DIM) if d != 5]
    assert len(huge) == 96
    assert torch.equal(huge[:, :, rest], other[:, :, rest])
    assert torch.all(huge[:, :, 7] == 0)  # the constant channel
    want = attention_reference.kivi_quantize(torch.from_numpy(k[:96]).view(6, 16, KV_HEADS, DIM), bits, 1)[0]
    assert torch.equal(huge, want.view(96, KV_HEADS, DIM).long())


def test_prompt_attention_equals_the_float_cache_bit_for_bit() -> None:
    q, k, v = numbers(np.random.default_rng(3), 150)
    exact = kv.build("float16", SHAPE, Arena(1 << 24, Ledger()), 200)
    np.testing.assert_array_equal(step(cache_of("kivi"), q, k, v, 0), step(exact, q, k, v, 0))


def test_a_window_hides_coded_tokens() -> None:
    shape = kv.CacheShape(num_layers=1, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, windows=(21,))
    q, k, v = numbers(np.random.default_rng(4), 90)
    cache = kv.build("kivi(bits=8,group=16,residual=16)", shape, Arena(1 << 24, Ledger()), 90)
    for begin, end in [(0, 70), (70, 71), (71, 80), (80, 81)]:
        part, positions = slice(begin, end), np.arange(begin, end)
        cache.append(0, k[part], v[part], positions)
        out = cache.attend(0, q[part], positions, np.empty_like(q[part]))
        cache.settle(0)
        want, _ = attention_reference.attend(
            *(torch.from_numpy(x) for x in (q[part], k[:end], v[:end])),
            scale=DIM**-0.5,
            first_position=begin,
            window=21,
        )
        np.testing.assert_allclose(out, want.numpy(), atol=0.05)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("residual", [0, 32])
def test_bytes_are_what_was_predicted(bits: int, residual: int) -> None:
    policy = f"kivi(bits={bits},group=32,residual={residual})"
    ledger = Ledger()
    cache = cache_of(policy, 600, ledger)
    q, k, v = numbers(np.random.default_rng(5), 600)
    first = 0
    for count in [1, 40, 1, 1, 300, 1, 99]:
        part = slice(first, first + count)
        step(cache, q[part], k[part], v[part], first)
        first += count
        predicted = kv.predict(policy, SHAPE, first, 0, 600)
        assert {row.owner: row.nbytes for row in ledger.rows()} == {key: n for key, n in predicted.items() if n}
        assert cache.nbytes == sum(predicted.values())
    cache.release()
    assert ledger.total() == 0


def test_staging_is_predicted_and_goes() -> None:
    ledger = Ledger()
    cache = cache_of("kivi(4bit)", 600, ledger)
    q, k, v = numbers(np.random.default_rng(6), 500)
    positions = np.arange(500)
    for layer in range(2):
        cache.append(layer, k, v, positions)
        peak = {row.owner: row.nbytes for row in ledger.rows()}
        cache.attend(layer, q, positions, np.empty_like(q))
        cache.settle(layer)
    assert peak == kv.predict("kivi(4bit)", SHAPE, 500, 500, 600)
    assert "kv/staging" not in {row.owner for row in ledger.rows()}


@pytest.mark.parametrize("bits", [2, 4])
def test_size_is_the_formula(bits: int) -> None:
    shape = kv.CacheShape(num_layers=16, num_heads=32, num_kv_heads=8, head_dim=64)
    sizes = kv.predict(f"kivi(bits={bits})", shape, 8192)
    numbers_held = 2 * 16 * 8 * 64
    formula = numbers_held * (8192 * (bits + 32 / 32) + 128 * 16) / 8
    assert abs(sum(sizes.values()) / formula - 1) < 0.03


def test_truncate_keeps_the_front() -> None:
    q, k, v = numbers(np.random.default_rng(7), 200)
    for length in (0, 1, 15, 16, 17, 63, 64, 100, 130, 150):
        cache = cache_of("kivi(bits=8,group=16,residual=32)")
        step(cache, q[:150], k[:150], v[:150], 0)
        cache.truncate(length)
        state = cache._layers[0]
        assert cache.length == state.coded_keys + state.keys.count == state.coded_values + state.values.count == length
        for i in range(length, length + 40):
            out = step(cache, q[i : i + 1], k[i : i + 1], v[i : i + 1], i)
        want, _ = attention_reference.attend(
            *(torch.from_numpy(x) for x in (q[i : i + 1], k[: i + 1], v[: i + 1])), scale=DIM**-0.5, first_position=i
        )
        np.testing.assert_allclose(out, want.numpy(), atol=0.05)


def test_an_arena_that_is_full_leaves_the_cache_as_it_was() -> None:
    q, k, v = numbers(np.random.default_rng(8), 200)
    cache = kv.build("kivi(bits=2,group=16,residual=16)", SHAPE, Arena(50_000, Ledger()), 400)
    with pytest.raises(BudgetExceeded, match="kv/"):
        cache.append(0, np.repeat(k, 2, 0), np.repeat(v, 2, 0), np.arange(400))
    assert cache.length == 0
    assert cache.nbytes <= 50_000
    step(cache, q[:40], k[:40], v[:40], 0)
    assert cache.length == 40


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ("kivi(5bit)", "must be one of 2, 3, 4, 8"),
        ("kivi(group=64)", "must be one of 16, 32"),
        ("kivi(residual=100)", "try 128"),
        ("kivi(budget=3)", "unknown setting"),
        ("kivi(exact=int8)", "float32, float16 or bfloat16"),
        ("kivi(queries=int4)", "must be one of float32, int8"),
        ("kivi(3bit,queries=int8)", "2 or 4 bits, not 3"),
        ("kivi(bits=two)", "not a whole number"),
        ("kivi(2bit,bits=3)", "given twice"),
        ("kivi(", "must look like"),
        ("kivy", "known: float32"),
    ],
)
def test_bad_policies_are_named(policy: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        cache_of(policy)


def test_odd_head_dimensions() -> None:
    def build(head_dim: int) -> kv.KVCache:
        shape = kv.CacheShape(num_layers=1, num_heads=2, num_kv_heads=1, head_dim=head_dim)
        return kv.build("kivi", shape, Arena(1 << 24, Ledger()), 10)

    assert build(80).policy == "kivi(bits=2,group=16,residual=128)"
    with pytest.raises(InputError, match="use float16"):
        build(20)

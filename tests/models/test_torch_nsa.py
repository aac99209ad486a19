"""Sparse attention: what each branch reads, against a slow reference of one token; what the cache holds."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from memwall.errors import InputError  # noqa: E402
from memwall.models.torch_blocks import rotary, rotated  # noqa: E402
from memwall.models.torch_nsa import Sparse, SparseAttention  # noqa: E402

SPEC = Sparse(heads=4, kv_heads=2, head_dim=8, block=4, stride=2, selected=4, chosen=4, window=5)
WIDTH, TOKENS = 16, 37


def reference(mixer: SparseAttention, x: torch.Tensor, t: int) -> torch.Tensor:
    """The output of token t of x [T, W], by loops over heads and blocks."""
    spec = mixer.spec
    size, group = spec.head_dim, spec.heads // spec.kv_heads
    tables = rotary(torch.arange(len(x)), size)
    rows = mixer.kv_proj(x).view(len(x), 3, 2, spec.kv_heads, size)
    queries = mixer.q_proj(x[t]).view(spec.heads, size)
    gates = mixer.gate(x[t]).sigmoid().view(3, spec.heads)
    outs = []
    for g in range(spec.kv_heads):
        raw_k, raw_v = rows[:, 0, 0, g], rows[:, 0, 1, g]
        starts = [s for s in range(0, len(x), spec.stride) if s + spec.block <= t + 1]
        made_k = [mixer.key_map(raw_k[s : s + spec.block]) for s in starts]
        made_v = [mixer.value_map(raw_v[s : s + spec.block]) for s in starts]
        importance = dict.fromkeys(range(t // spec.selected + 1), 0.0)
        firsts = []
        for head in range(g * group, (g + 1) * group):
            if not starts:
                firsts.append(torch.zeros(size))
                continue
            share = (torch.stack(made_k) @ queries[head] / math.sqrt(size)).softmax(0)
            firsts.append(share @ torch.stack(made_v))
            for start, weight in zip(starts, share.tolist(), strict=True):
                for chunk in range(start, start + spec.block, spec.stride):
                    importance[chunk // spec.selected] += weight
        own = t // spec.selected
        for forced in {0, own, max(own - 1, 0)}:
            importance[forced] = math.inf
        best = sorted(importance, key=lambda block: -importance[block])[: spec.chosen]
        read = [s for block in best for s in range(block * spec.selected, (block + 1) * spec.selected) if s <= t]
        near = list(range(max(t - spec.window + 1, 0), t + 1))
        turned_q = rotated(queries, tuple(part[t] for part in tables))
        for number, head in enumerate(range(g * group, (g + 1) * group)):
            out = gates[0, head] * firsts[number]
            for branch, places in ((1, read), (2, near)):
                keys = torch.stack([rotated(rows[s, branch, 0, g], tuple(part[s] for part in tables)) for s in places])
                share = (keys @ turned_q[head] / math.sqrt(size)).softmax(0)
                out = out + gates[branch, head] * (share @ rows[places, branch, 1, g])
            outs.append(out)
    return mixer.o_proj(torch.cat(outs))


@pytest.fixture(scope="module")
def mixer() -> SparseAttention:
    torch.manual_seed(0)
    return SPEC.build(WIDTH)


@pytest.mark.parametrize("t", [0, 3, 4, 12, 20, 30, 36])
def test_three_branches_against_a_slow_reference(mixer: SparseAttention, t: int) -> None:
    x = 2 * torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(t))
    with torch.no_grad():
        assert torch.allclose(mixer(x)[0, t], reference(mixer, x[0], t), atol=1e-5)


def test_what_is_not_chosen_is_not_read(mixer: SparseAttention) -> None:
    """Of the selected branch's rows, most tokens' can change without any effect on the last one."""
    x = torch.randn(1, TOKENS, WIDTH)
    cache = mixer.cache(1, TOKENS)
    with torch.no_grad():
        mixer.prefill(x[:, :-1], cache)
        kept, moved = cache.selected.clone(), 0
        for token in range(TOKENS - 1):
            cache.length = TOKENS - 1
            cache.selected.copy_(kept)
            before = mixer.step(x[:, -1:], cache)
            cache.length = TOKENS - 1
            cache.selected.copy_(kept)
            cache.selected[..., token, :] += 3
            moved += not torch.allclose(mixer.step(x[:, -1:], cache), before, atol=1e-6)
    assert SPEC.selected < moved <= 2 * SPEC.chosen * SPEC.selected  # each of two groups chooses its own


def test_the_cache_keeps_rings_and_compressed_rows(mixer: SparseAttention) -> None:
    cache = mixer.cache(2, 30)
    with torch.no_grad():
        mixer.prefill(torch.randn(2, 29, WIDTH), cache)
    assert cache.ring.shape == (2, 2, 2, 5, 8)
    assert cache.waiting.shape == (2, 2, 2, 4, 8)
    assert cache.selected.shape == (2, 2, 2, 32, 8)
    assert cache.compressed.shape == (2, 2, 2, 14, 8)
    rows = 29 + 13 + 5 + 4
    assert cache.nbytes == 2 * 4 * SPEC.cached_values(29) == 2 * 4 * 2 * 2 * 8 * rows
    assert cache.read_bytes() == 2 * 4 * 2 * 2 * 8 * (13 + 16 + 5)
    filled = mixer.cache(2, 30)
    filled.fill(29)
    assert filled.nbytes == cache.nbytes
    with pytest.raises(InputError, match="holds 30 tokens; 31"):
        filled.fill(2)


@pytest.mark.parametrize(
    "wrong", [{"kv_heads": 3}, {"stride": 3}, {"selected": 5}, {"chosen": 3}, {"window": 0}, {"head_dim": 3}]
)
def test_what_cannot_be_built_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(InputError):
        Sparse(**{"heads": 4, "kv_heads": 2, "head_dim": 8, **wrong})

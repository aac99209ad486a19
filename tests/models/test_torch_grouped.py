"""Grouped attention: the cache's shapes and bytes, one head for all against copies of it, T5's buckets by hand."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from memwall.errors import InputError  # noqa: E402
from memwall.models.torch_grouped import Grouped, buckets  # noqa: E402


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_the_cache_holds_the_key_value_heads_only(kv_heads: int) -> None:
    spec = Grouped(heads=8, kv_heads=kv_heads, head_dim=4)
    mixer = spec.build(16)
    cache = mixer.cache(3, 20)
    with torch.no_grad():
        mixer.prefill(torch.randn(3, 11, 16), cache)
    assert {name: tuple(rows.shape) for name, rows in cache.held.items()} == {
        "keys": (3, kv_heads, 20, 4),
        "values": (3, kv_heads, 20, 4),
    }
    assert cache.nbytes == cache.read_bytes() == 3 * 4 * spec.cached_values(11) == 3 * 4 * 2 * kv_heads * 4 * 11
    with pytest.raises(InputError, match="holds 20 tokens; 21"):
        cache.fill(10)


def test_multi_query_is_multi_head_with_equal_heads() -> None:
    one, all_ = (Grouped(heads=4, kv_heads=heads, head_dim=4).build(16) for heads in (1, 4))
    with torch.no_grad():
        for name in ("k_proj", "v_proj"):
            getattr(all_, name).weight.copy_(getattr(one, name).weight.repeat(4, 1))
        for name in ("q_proj", "o_proj"):
            getattr(all_, name).weight.copy_(getattr(one, name).weight)
        x = torch.randn(2, 9, 16)
        assert torch.allclose(one(x), all_(x), atol=1e-5)


def test_relative_positions_are_told_by_distance_alone() -> None:
    found = buckets(torch.tensor([0, 1, 15, 16, 17, 64, 127, 128, 5000, -3]))
    assert found.tolist()[:3] == [0, 1, 15]
    assert found.tolist()[3:5] == [16, 16]
    assert found.tolist()[6:] == [31, 31, 31, 0]
    assert 24 <= int(found[5]) <= 27  # half way from 16 to 128 on a logarithmic scale is 45


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 3, 8), (4, 0, 8), (4, 2, 7)])
def test_heads_that_do_not_fit_are_refused(heads: int, kv_heads: int, size: int) -> None:
    with pytest.raises(InputError, match="heads"):
        Grouped(heads=heads, kv_heads=kv_heads, head_dim=size)

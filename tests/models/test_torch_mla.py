"""Latent attention: the cache holds the latent row and the turned key and nothing else; steps never rebuild keys."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from memwall.errors import InputError  # noqa: E402
from memwall.models.torch_mla import Latent  # noqa: E402

SPEC = Latent(heads=8, head_dim=16, rank=12, turned_dim=4)


def test_the_cache_holds_latents_and_turned_keys_only() -> None:
    mixer = SPEC.build(32)
    cache = mixer.cache(2, 30)
    with torch.no_grad():
        mixer.prefill(torch.randn(2, 9, 32), cache)
        mixer.step(torch.randn(2, 1, 32), cache)
    assert {name: tuple(rows.shape) for name, rows in cache.held.items()} == {"rows": (2, 30, 12 + 4)}
    assert cache.nbytes == 2 * 4 * SPEC.cached_values(10) == 2 * 4 * 16 * 10
    tensors = [value for value in vars(cache).values() if isinstance(value, torch.Tensor)]
    assert not tensors  # no keys or values beside them


def test_heads_share_one_turned_key() -> None:
    """A change of W_uk moves the plain part alone; the turned key is the projection's last rows, turned."""
    mixer = SPEC.build(32)
    x = torch.randn(1, 5, 32)
    with torch.no_grad():
        first, second = mixer.cache(1, 5), mixer.cache(1, 5)
        mixer.prefill(x, first)
        mixer.key_up.mul_(2)
        mixer.prefill(x, second)
    assert torch.equal(first.held["rows"], second.held["rows"])
    turned, raw = first.held["rows"][..., SPEC.rank :], mixer.down_proj(x)[..., SPEC.rank :]
    assert torch.allclose(turned[:, 0], raw[:, 0])  # position 0 is not turned
    assert not torch.allclose(turned[:, 1], raw[:, 1])
    assert torch.allclose(turned.norm(dim=-1), raw.norm(dim=-1), atol=1e-5)


def test_latents_are_normed() -> None:
    mixer = SPEC.build(32)
    cache = mixer.cache(1, 5)
    with torch.no_grad():
        mixer.prefill(5 * torch.randn(1, 5, 32), cache)
    assert torch.allclose(cache.held["rows"][..., : SPEC.rank].pow(2).mean(-1), torch.ones(1, 5), atol=1e-3)


@pytest.mark.parametrize(("rank", "turned"), [(0, 4), (8, 3), (8, 0)])
def test_what_cannot_be_built_is_refused(rank: int, turned: int) -> None:
    with pytest.raises(InputError, match="turned part"):
        Latent(heads=2, head_dim=8, rank=rank, turned_dim=turned)

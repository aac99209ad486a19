"""RWKV's block: the sums by hand, large keys, chunks of any length, a state of fixed size."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from memwall.errors import InputError  # noqa: E402
from memwall.models.torch_rwkv import CHUNK_TOKENS, Rwkv, RwkvMixer  # noqa: E402


def by_hand(mixer: RwkvMixer, x: torch.Tensor) -> torch.Tensor:
    """Eq. 11 to 16 of the paper, token by token, in double precision."""
    before = torch.cat([torch.zeros(1, x.shape[1]), x[:-1]])
    r, k, v = (each.double() for each in mixer._parts(x, before))
    decay, bonus = mixer.log_decay.double().exp(), mixer.bonus.double()
    outs = []
    for t in range(len(x)):
        own = (bonus + k[t]).exp()
        above, below = own * v[t], own.clone()
        for i in range(t):
            weight = (-(t - 1 - i) * decay + k[i]).exp()
            above, below = above + weight * v[i], below + weight
        outs.append(r[t].sigmoid() * above / below)
    result: torch.Tensor = mixer.o_proj(torch.stack(outs).float())
    return result


@pytest.mark.parametrize("tokens", [1, CHUNK_TOKENS, 2 * CHUNK_TOKENS + 5])
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_outputs_by_hand(tokens: int, size: float) -> None:
    torch.manual_seed(tokens)
    mixer, x = Rwkv(size=8).build(6), torch.randn(tokens, 6)
    with torch.no_grad():
        mixer.k_proj.weight.mul_(size)  # keys of some tens would overflow without a scale
        found = mixer(x[None])[0]
        assert torch.isfinite(found).all()
        assert torch.allclose(found, by_hand(mixer, x), atol=1e-4)


def test_the_state_does_not_grow() -> None:
    mixer = Rwkv(size=8).build(6)
    cache = mixer.cache(2, 100)
    with torch.no_grad():
        mixer.prefill(torch.randn(2, 40, 6), cache)
        mixer.step(torch.randn(2, 1, 6), cache)
    assert cache.length == 41
    assert cache.nbytes == cache.read_bytes() == 2 * 4 * (3 * 8 + 6)
    cache.fill(5)
    with torch.no_grad():
        assert torch.isfinite(mixer.step(torch.randn(2, 1, 6), cache)).all()
    with pytest.raises(InputError, match="0 channels"):
        Rwkv(size=0)

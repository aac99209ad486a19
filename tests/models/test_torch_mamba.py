"""Mamba's block: a recurrence by hand, a state of fixed size, and what is refused."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from memwall.errors import InputError  # noqa: E402
from memwall.models.torch_mamba import TAPS, Mamba  # noqa: E402

SPEC = Mamba(heads=2, head_dim=4, state=3)


def test_the_recurrence_by_hand() -> None:
    torch.manual_seed(0)
    mixer, x = SPEC.build(6), torch.randn(1, 9, 6)
    with torch.no_grad():
        z, u, b, c, dt, _ = mixer._parts(x, torch.zeros(1, TAPS - 1, SPEC.conv_size))
        state, outs = torch.zeros(2, 4, 3), []
        for t in range(9):
            for head in range(2):
                kept = torch.exp(-dt[0, t, head] * mixer.log_decay[head].exp())
                state[head] = kept * state[head] + dt[0, t, head] * torch.outer(u[0, t, head], b[0, t])
            outs.append(torch.stack([state[head] @ c[0, t] + mixer.skip[head] * u[0, t, head] for head in range(2)]))
        wanted = mixer._out(torch.stack(outs)[None], z)
        cache = mixer.cache(1, 9)
        assert torch.allclose(mixer.prefill(x, cache), wanted, atol=1e-5)
        assert torch.allclose(cache.state[0], state, atol=1e-5)


def test_the_state_does_not_grow() -> None:
    mixer = SPEC.build(6)
    cache = mixer.cache(2, 100)
    size = cache.nbytes
    with torch.no_grad():
        mixer.prefill(torch.randn(2, 50, 6), cache)
        for _ in range(3):
            mixer.step(torch.randn(2, 1, 6), cache)
    assert cache.length == 53
    assert cache.nbytes == cache.read_bytes() == size == 2 * 4 * SPEC.cached_values(53)
    cache.fill(10)
    assert (cache.length, cache.nbytes) == (63, size)


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(InputError, match="0 states"):
        Mamba(heads=1, head_dim=1, state=0)

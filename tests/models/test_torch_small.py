"""Small models: decoding token by token is the full pass, for every block; equal parameters; counted operations."""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from memwall.errors import InputError  # noqa: E402
from memwall.models.torch_blocks import FeedSpec, MixerSpec  # noqa: E402
from memwall.models.torch_grouped import Grouped  # noqa: E402
from memwall.models.torch_mamba import Mamba  # noqa: E402
from memwall.models.torch_mla import Latent  # noqa: E402
from memwall.models.torch_moe import Dense, Experts  # noqa: E402
from memwall.models.torch_nsa import Sparse  # noqa: E402
from memwall.models.torch_rwkv import Rwkv  # noqa: E402
from memwall.models.torch_small import SmallConfig, SmallLm, matched_feed, sinusoids  # noqa: E402

MIXERS: dict[str, MixerSpec] = {
    "mha": Grouped(heads=4, kv_heads=4, head_dim=8),
    "gqa": Grouped(heads=4, kv_heads=2, head_dim=8),
    "mqa": Grouped(heads=4, kv_heads=1, head_dim=8),
    "mla": Latent(heads=4, head_dim=8, rank=12, turned_dim=4),
    "mamba": Mamba(heads=4, head_dim=8, state=8),
    "rwkv": Rwkv(size=32),
    "nsa": Sparse(heads=4, kv_heads=2, head_dim=8, block=4, stride=2, selected=4, chosen=4, window=6),
}
FEEDS: dict[str, FeedSpec] = {"dense": Dense(size=24), "experts": Experts(count=4, top=2, size=12)}


def model(mixer: MixerSpec, feed: FeedSpec = FEEDS["dense"], **more: object) -> SmallLm:
    config = SmallConfig(mixer=mixer, feed=feed, width=32, num_layers=2, vocab_size=50, most_tokens=64)
    return SmallLm(replace(config, **more), seed=1).eval()  # type: ignore[arg-type]


def tokens(count: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(0, 50, (batch, count), generator=torch.Generator().manual_seed(0))


VARIANTS = [
    *((name, "dense", "rotary") for name in MIXERS),
    *((name, "experts", "rotary") for name in ("mha", "nsa")),
    *(("mha", "dense", positions) for positions in ("sinusoidal", "learned", "relative", "none")),
]


def variant(mixer: str, feed: str, positions: str) -> SmallLm:
    spec = MIXERS[mixer]
    if positions != "rotary":
        spec = replace(spec, turned=False, relative=positions == "relative")  # type: ignore[call-arg]
    return model(spec, FEEDS[feed], positions=positions)


@pytest.mark.parametrize("prompt", [1, 3, 4, 17, 39])
@pytest.mark.parametrize(("mixer", "feed", "positions"), VARIANTS)
def test_decoding_by_steps_is_the_full_pass(mixer: str, feed: str, positions: str, prompt: int) -> None:
    lm, text = variant(mixer, feed, positions), tokens(40)
    with torch.no_grad():
        whole = lm(text)
        caches = lm.caches(2, 40)
        logits = [lm.prefill(text[:, :prompt], caches)]
        logits += [lm.step(text[:, at : at + 1], caches) for at in range(prompt, 40)]
    assert torch.allclose(torch.cat(logits, 1), whole, atol=2e-4)
    assert all(cache.length == 40 for cache in caches)


@pytest.mark.parametrize(("mixer", "feed", "positions"), VARIANTS)
def test_the_past_does_not_see_the_future(mixer: str, feed: str, positions: str) -> None:
    lm, text = variant(mixer, feed, positions), tokens(40)
    other = text.clone()
    other[:, 25:] = (other[:, 25:] + 7) % 50
    with torch.no_grad():
        first, second = lm(text), lm(other)
    assert torch.allclose(first[:, :25], second[:, :25], atol=1e-5)
    assert not torch.allclose(first[:, 25:], second[:, 25:], atol=1e-3)


@pytest.mark.parametrize("name", MIXERS)
def test_every_parameter_learns(name: str) -> None:
    lm = model(MIXERS[name]).train()
    lm.loss(tokens(41)).backward()
    without = [key for key, parameter in lm.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert not without


@pytest.mark.parametrize("name", ["mha", "gqa", "mqa", "mla", "nsa"])
@pytest.mark.parametrize("feed", FEEDS)
def test_operations_are_those_that_torch_counts(name: str, feed: str) -> None:
    lm, text = model(MIXERS[name], FEEDS[feed]), tokens(40, batch=1)
    caches = lm.caches(1, 41)
    with torch.no_grad():
        lm.prefill(text[:, :39], caches)
    with FlopCounterMode(display=False) as counter:  # with gradients: attention is torch's, which it counts
        lm.step(text[:, 39:], caches)
    if name == "nsa":  # a block is compressed in this step, which `flop` spreads over its stride
        assert counter.get_total_flops() == pytest.approx(lm.flop(40), rel=0.15)
    else:
        assert counter.get_total_flops() == lm.flop(40)


def test_experts_that_are_not_chosen_are_not_active() -> None:
    dense, experts = model(MIXERS["mha"], Dense(size=24)), model(MIXERS["mha"], Experts(count=4, top=2, size=12))
    router = 2 * 32 * 4
    assert dense.num_active == dense.num_parameters == experts.num_active - router
    assert experts.num_parameters - experts.num_active == 2 * 2 * 3 * 12 * 32


@pytest.mark.parametrize("name", MIXERS)
def test_feeds_are_sized_for_equal_parameters(name: str) -> None:
    config = SmallConfig(mixer=MIXERS[name], feed=Dense(size=1), width=32, num_layers=2, vocab_size=50)
    sized = replace(config, feed=Dense(size=matched_feed(config, 40_000)))
    assert SmallLm(sized).num_parameters == pytest.approx(40_000, abs=3 * 32 * 2)
    with pytest.raises(InputError, match="too few"):
        matched_feed(config, 1000)


def test_seeds_decide_and_the_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    first, same, other = (SmallLm(model(MIXERS["mla"]).config, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), same.parameters()))
    assert not torch.equal(first.embed.weight, other.embed.weight)


def test_sinusoids_by_hand() -> None:
    table = sinusoids(torch.tensor([0, 2]), 4)
    assert torch.allclose(table[0], torch.tensor([0.0, 1.0, 0.0, 1.0]))
    assert table[1, 0] == pytest.approx(float(torch.tensor(2.0).sin()))
    assert table[1, 3] == pytest.approx(float(torch.tensor(0.02).cos()))


def test_learned_positions_end() -> None:
    lm = variant("mha", "dense", "learned")
    with pytest.raises(InputError, match="learned positions end at 64"):
        lm(tokens(65))
    with pytest.raises(InputError, match="must be one of rotary"):
        model(MIXERS["mha"], positions="circular")

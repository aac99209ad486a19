"""XQuant: exact at 16 bits in every family of models, closed deltas, bytes as its formula says, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from memwall import kv
from memwall.errors import BudgetExceeded, InputError
from memwall.kv.latent import decoded, projection_names
from memwall.kv.xquant import XQuantCache, XQuantSettings
from memwall.memory import Arena, Ledger
from tests.kv.latent_models import Loaded, loaded

FAMILIES = ("llama", "llama-tied", "llama-bias", "llama-yarn", "mistral", "qwen2-window", "qwen3")
POLICIES = ("xquant(16bit)", "xquant(16bit,cl=1,base=1)", "xquant(16bit,keep=inputs)")
STEPS = (150, 1, 1, 40, 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", POLICIES)
def test_sixteen_bits_give_the_model_s_logits(family: str, policy: str) -> None:
    """Whatever the family adds (bias, key norm, windows, rotary scaling), through prompts, single steps and a turn."""
    tiny = loaded(family)
    tokens = tiny.tokens(sum(STEPS))
    want = tiny.decode(tiny.cache("float32"), tokens, *STEPS)
    got = tiny.decode(tiny.cache(policy), tokens, *STEPS)
    np.testing.assert_array_equal(got[:150], want[:150])  # the prompt attends exactly
    assert np.square(got - want).mean() < (0.005 * want.std()) ** 2


@pytest.mark.parametrize("policy", ["xquant(8bit)", "xquant(8bit,cl=1,base=1)"])
def test_packed_weights_serve_as_they_are_held(policy: str) -> None:
    tiny = loaded("llama", "int8-g32")
    tokens = tiny.tokens(190)
    want = tiny.decode(tiny.cache("float32"), tokens, 150, *(1,) * 40)
    got = tiny.decode(tiny.cache(policy), tokens, 150, *(1,) * 40)
    assert np.square(got - want).mean() < (0.1 * want.std()) ** 2


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
@pytest.mark.parametrize("policy", ["xquant(bits={})", "xquant(bits={},cl=1,base=1)"])
def test_more_bits_lose_less(family: str, policy: str) -> None:
    tiny = loaded(family)
    tokens = tiny.tokens(220)
    want = tiny.decode(tiny.cache("float32"), tokens, 150, *(1,) * 70)
    errors = [
        float(np.square(tiny.decode(tiny.cache(policy.format(b)), tokens, 150, *(1,) * 70) - want).mean())
        for b in (2, 4, 8, 16)
    ]
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 4 * errors[3]


def inputs(tiny: Loaded, length: int) -> np.ndarray:
    """[layers, length, d]: slowly drifting inputs, as a residual stream gives them."""
    rng = np.random.default_rng(0)
    steps = rng.standard_normal((tiny.shape.num_layers, length, tiny.config.hidden_size)).astype(np.float32)
    steps[1:] *= 0.1
    return np.cumsum(steps, axis=0)


def feed(cache: XQuantCache, x: np.ndarray, begin: int, end: int) -> None:
    rows = np.zeros((end - begin, cache.shape.num_kv_heads, cache.shape.head_dim), np.float32)
    q = np.zeros((end - begin, cache.shape.num_heads, cache.shape.head_dim), np.float32)
    for layer in range(cache.shape.num_layers):
        cache.take_inputs(layer, x[layer, begin:end], np.arange(begin, end))
        cache.append(layer, rows, rows, np.arange(begin, end))
        cache.attend(layer, q, np.arange(begin, end), np.empty_like(q))
        cache.settle(layer)


def sums(cache: XQuantCache, layer: int, length: int) -> np.ndarray:
    cache._sum_up(layer, length)
    assert cache._sums is not None
    return cache._sums.read(0, length, np.empty((length, cache._sums.form.width), np.float32)).copy()


def test_deltas_are_taken_from_what_will_be_read() -> None:
    """Closed loop: X'_i = X'_{i-1} + Q(X_i - X'_{i-1}), against a plain computation of just that."""
    tiny = loaded("llama-tied", num_hidden_layers=8)
    x = inputs(tiny, 200)
    cache = tiny.cache("xquant(2bit,cl=1,base=2)")
    for begin, end in [(0, 130), (130, 131), (131, 180), (180, 181), (181, 200)]:
        feed(cache, x, begin, end)
    total, errors = None, []
    for layer, form in enumerate(XQuantSettings.from_policy(kv.parse(cache.policy), tiny.shape).stacks(tiny.shape)[0]):
        delta = x[layer] if total is None else x[layer] - total
        records = np.zeros(form.nbytes(200), np.uint8)
        form.encode(np.ascontiguousarray(delta), 0, records)
        out = np.empty_like(delta)
        form.decode(records, 0, out)
        if layer >= 1:
            total = (out if total is None else out + total).astype(np.float16).astype(np.float32)
        if layer >= 2:
            assert total is not None
            np.testing.assert_allclose(sums(cache, layer, 200), total, atol=2e-3)
            errors.append(float(np.square(total - x[layer]).mean()))
    assert max(errors[1:]) < 1.5 * errors[1]  # flat, not growing with depth


def test_latent_deltas_correct_what_the_layer_sees() -> None:
    """GQA: the part of the error inside span(U_KV) is no larger in the last layer than in the first one of deltas."""
    tiny = loaded("llama", num_hidden_layers=8)
    x = inputs(tiny, 200)
    cache = tiny.cache("xquant(4bit,cl=1,base=2)")
    assert cache.settings.latents
    feed(cache, x, 0, 200)
    shape, errors = tiny.shape, []
    for layer in range(2, 8):
        weights = [
            decoded(tiny.model.weights.matrices[name], shape.row_values, tiny.config.hidden_size)
            for name in projection_names(layer)
        ]
        seen = np.linalg.svd(np.concatenate(weights).T, full_matrices=False)[0]
        errors.append(float(np.square((sums(cache, layer, 200) - x[layer]) @ seen).mean()))
    assert max(errors) < 4 * errors[0]


@pytest.mark.parametrize(
    ("policy", "numbers", "bits"),
    [("xquant(bits={})", 16 * 2048, 4), ("xquant(bits={})", 16 * 2048, 2), ("xquant(bits={},cl=1)", 16 * 2048, 3)],
)
def test_size_is_the_formula(policy: str, numbers: int, bits: int) -> None:
    """MHA of a 1B shape at 8,192 tokens; with `cl`, three layers at 4 bits and the shared sums besides."""
    shape = kv.CacheShape(num_layers=16, num_heads=32, num_kv_heads=32, head_dim=64, hidden_size=2048)
    sizes = kv.predict(policy.format(bits), shape, 8192)
    each = lambda b: b + (16 + b) / 128  # noqa: E731
    cl = "cl" in policy
    want = 8192 * 2048 * ((16 - 3) * each(bits) + 3 * each(4) if cl else 16 * each(bits)) / 8
    if cl:
        want += 2 * 8192 * 2048
    assert abs(sizes["kv/latents"] + sizes["kv/sums"] - want) < 0.03 * want
    assert sizes["kv/rebuild"] < 0.1 * want


def test_gqa_never_holds_more_than_coded_keys_and_values() -> None:
    shape = kv.CacheShape(num_layers=4, num_heads=32, num_kv_heads=8, head_dim=64, hidden_size=2048)
    ours = kv.predict("xquant(4bit)", shape, 8192)
    theirs = kv.predict("kivi(bits=4,group=64,residual=128)", shape, 8192)
    assert ours["kv/latents"] + ours["kv/recent"] < sum(theirs.values())
    assert kv.predict("xquant(4bit,keep=inputs)", shape, 8192)["kv/latents"] > 1.9 * ours["kv/latents"]


def test_keys_of_one_block_exist_at_most() -> None:
    ledger = Ledger()
    tiny = loaded("llama-tied")
    arena_peak = 0
    cache = tiny.cache("xquant(4bit)", 400, ledger)
    tokens = tiny.tokens(400)
    tiny.decode(cache, tokens, 380, *(1,) * 20)
    arena_peak = cache.arena.peak_bytes
    assert arena_peak == ledger.total() == sum(kv.predict("xquant(4bit)", tiny.shape, 400, 0, 400).values())


@pytest.mark.parametrize("policy", ["xquant(2bit)", "xquant(4bit,cl=1,base=1)", "xquant(4bit,keep=inputs)"])
@pytest.mark.parametrize("length", [1, 100, 128, 150])
def test_truncate_keeps_the_front(policy: str, length: int) -> None:
    tiny = loaded("llama")
    tokens = tiny.tokens(200)
    cache = tiny.cache(policy.replace("2bit", "8bit").replace("4bit", "8bit"))
    tiny.decode(cache, tokens, 180, 1, 1)
    cache.truncate(length)
    assert cache.length == length
    rest = tokens[length:]
    got = tiny.decode(cache, rest, *(1,) * 20)
    exact = tiny.cache("float32")
    tiny.decode(exact, tokens, length)
    want = tiny.decode(exact, rest, *(1,) * 20)
    assert np.abs(got - want).max() < 0.3 * want.std()


def test_a_full_arena_leaves_the_cache_as_it_was() -> None:
    tiny = loaded("llama")
    for policy in ("xquant(2bit)", "xquant(2bit,cl=1,base=1)"):
        ledger = Ledger()
        cache = tiny.cache(policy, 400, ledger)
        tokens = tiny.tokens(400)
        tiny.decode(cache, tokens, 140)
        held = ledger.total()
        cache.arena.set_cap(held)
        with pytest.raises(BudgetExceeded, match="kv/"):
            tiny.decode(cache, tokens[140:], 250)
        assert (cache.length, ledger.total()) == (140, held)
        with pytest.raises(BudgetExceeded):
            cache.fork()
        assert ledger.total() == held
        cache.arena.set_cap(1 << 40)
        alone = tiny.cache(policy)
        tiny.decode(alone, tokens, 140)
        np.testing.assert_array_equal(tiny.decode(cache, tokens[140:], 30, 1), tiny.decode(alone, tokens[140:], 30, 1))
    with pytest.raises(BudgetExceeded):
        tiny.cache("xquant(2bit)", 400, None, 20_000)


def test_rebuilding_is_counted() -> None:
    shape = kv.CacheShape(num_layers=2, num_heads=32, num_kv_heads=32, head_dim=128, hidden_size=4096)
    macs, read = kv.step_macs("xquant(4bit)", shape, 8192), kv.read_bytes("xquant(4bit)", shape, 8192)
    assert macs == 2 * (8192 * 4096 * 4096 + 32 * 4096 * (8192 + 4096))
    assert 2 * macs / read > 15_000  # FLOP a byte: far beyond any machine
    assert kv.step_macs("kivi", shape, 8192) == 0


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ("xquant(5bit)", "2, 3, 4, 8, 16"),
        ("xquant(cl=2)", "cl=2"),
        ("xquant(cl=1,base=3)", "1 to 2"),
        ("xquant(keep=all)", "inputs, latents or auto"),
        ("xquant(group=4)", "8 to 1024"),
        ("xquant(residual=3)", "unknown setting"),
    ],
)
def test_settings_that_make_no_sense(policy: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        loaded("llama").cache(policy)


def test_it_needs_a_model_and_its_width() -> None:
    shape = kv.CacheShape(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32)
    with pytest.raises(InputError, match="loaded model"):
        kv.build("xquant", shape, Arena(1 << 24, Ledger()), 10)
    with pytest.raises(InputError, match="hidden_size"):
        kv.predict("xquant", shape, 10)

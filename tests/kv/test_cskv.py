"""CSKV: full density gives the model back, windows at their edges against a dense reference, factors and their fit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from memwall import kv
from memwall.compress.calibration import LayerStream
from memwall.errors import InputError
from memwall.kernels import attention_reference, rope
from memwall.kv import cskv_fit, fitted
from memwall.kv.cskv import ClippedForm, CskvCache, CskvSettings
from memwall.kv.latent_rows import LatentForm
from memwall.memory import Arena, Ledger
from memwall.models import Checkpoint
from tests.kv.latent_models import Loaded, loaded, project

STEPS = (150, 1, 1, 40, 1)


def settings_of(policy: str) -> CskvSettings:
    return CskvSettings.from_policy(kv.parse(policy))


def fit(tiny: Loaded, policy: str, inputs: np.ndarray | None = None) -> None:
    """Factors from the weights alone (or from given inputs of every layer), kept where the cache looks for them."""
    settings, config = settings_of(policy), tiny.config
    arrays: dict[str, np.ndarray] = {}
    with Checkpoint(tiny.model.directory, config) as checkpoint:
        for layer in range(config.num_layers):
            x = np.ones((1, 64, config.hidden_size), np.float16) if inputs is None else inputs
            data = cskv_fit.LayerData(config, checkpoint, layer, x)
            found = cskv_fit.fit_layer(data, settings, tiny.shape, None)
            arrays |= {f"{layer}.{name}": array for name, array in found.items()}
    fitted.save(tiny.model.fingerprint, CskvCache.fit_key(kv.parse(policy)), arrays)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "llama-bias", "mistral", "qwen2-window", "qwen3"])
@pytest.mark.parametrize("more", ["", ",sliding=1", ",window=0"])
def test_full_density_gives_the_model_s_logits(family: str, more: str) -> None:
    tiny, policy = loaded(family), f"cskv(1.0,init=svd,train=0{more})"
    fit(tiny, policy)
    tokens = tiny.tokens(sum(STEPS))
    want = tiny.decode(tiny.cache("float32"), tokens, *STEPS)
    got = tiny.decode(tiny.cache(policy), tokens, *STEPS)
    np.testing.assert_array_equal(got[:150], want[:150])  # the prompt attends exactly
    assert np.square(got - want).mean() < (0.006 * want.std()) ** 2


def test_no_rank_is_above_the_width_of_the_inputs() -> None:
    """Heads that are wider together than a layer's input: from there on every density keeps everything."""
    tiny, policy = loaded("llama", head_dim=64), "cskv(0.9,init=svd,train=0)"
    width = tiny.config.hidden_size
    assert settings_of(policy).ranks(tiny.shape) == (width, width)
    assert tiny.shape.row_values > width
    fit(tiny, policy)
    tokens = tiny.tokens(sum(STEPS))
    want = tiny.decode(tiny.cache("float32"), tokens, *STEPS)
    got = tiny.decode(tiny.cache(policy), tokens, *STEPS)
    assert np.square(got - want).mean() < (0.006 * want.std()) ** 2


class SlowCskv:
    """One layer as the paper has it, dense: features of all tokens, whole groups rounded, the newest rows as given."""

    def __init__(self, tiny: Loaded, settings: CskvSettings, factors: dict[str, np.ndarray]) -> None:
        self.tiny, self.settings, self.factors = tiny, settings, factors
        self.x = np.zeros((0, tiny.config.hidden_size), np.float32)
        self.whole_from = 0

    def step(self, x: np.ndarray, q: np.ndarray) -> np.ndarray:
        shape, settings, first = self.tiny.shape, self.settings, len(self.x)
        self.x = np.concatenate([self.x, x])
        keys, values = project(self.tiny, 0, self.x)
        keys[: self.whole_from], values[: self.whole_from] = self._rebuilt(first, self.whole_from)
        heads = [torch.from_numpy(np.ascontiguousarray(part)) for part in (q, keys, values)]
        out, _ = attention_reference.attend(*heads, scale=shape.head_dim**-0.5, first_position=first)
        length, window = len(self.x), settings.window
        self.whole_from = (
            max(length - window, 0) if settings.sliding else length - length % window if window else length
        )
        return out.numpy()

    def _rebuilt(self, settled: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        shape, parts = self.tiny.shape, []
        for name, form in zip("kv", self.settings.forms(shape)):
            features = self.x[:settled] @ self.factors[f"{name}.in"].astype(np.float32).T
            whole = settled - settled % form.cycle
            if form.coded and whole:
                records = np.zeros(form.nbytes(whole), np.uint8)
                rows = features[:whole].astype(np.float16).astype(np.float32) if form.cycle > 1 else features[:whole]
                form.encode(np.ascontiguousarray(rows), 0, records)
                features = np.concatenate([self._decoded(form, records, whole), features[whole:]])
            flat = np.ascontiguousarray(features[:count] @ self.factors[f"{name}.out"].astype(np.float32).T)
            parts.append(flat.reshape(count, shape.num_kv_heads, shape.head_dim))
        return rope(parts[0], *self.tiny.model.rotary.at(np.arange(count))), parts[1]

    @staticmethod
    def _decoded(form: LatentForm, records: np.ndarray, count: int) -> np.ndarray:
        out = np.empty((count, form.width), np.float32)
        form.decode(records, 0, out)
        return out


@pytest.mark.parametrize("sliding", [0, 1])
@pytest.mark.parametrize("bits", [16, 4])
def test_every_step_around_a_full_window_is_the_dense_reference_s(bits: int, sliding: int) -> None:
    """T = l - 1, l, l + 1 and twice that, for prompts and for steps, in one layer, so that no error piles up."""
    tiny = loaded("llama", num_hidden_layers=1)
    policy = f"cskv(0.5,bits={bits},window=32,sliding={sliding},init=svd,train=0)"
    fit(tiny, policy)
    factors = {
        name[2:]: m
        for name, m in fitted.load(tiny.model, kv.parse(policy), CskvCache.fit_key(kv.parse(policy))).items()
    }
    for prompt in (1, 31, 32, 33, 64, 65):
        rng = np.random.default_rng(prompt)
        cache, slow = tiny.cache(policy), SlowCskv(tiny, settings_of(policy), factors)
        for begin, end in [(0, prompt)] + [(i, i + 1) for i in range(prompt, prompt + 35)]:
            x = rng.standard_normal((end - begin, tiny.config.hidden_size)).astype(np.float32)
            q = rng.standard_normal((end - begin, tiny.shape.num_heads, tiny.shape.head_dim)).astype(np.float32)
            positions = np.arange(begin, end)
            k, v = project(tiny, 0, x, begin)
            cache.take_inputs(0, x, positions)
            cache.append(0, k, v, positions)
            got = cache.attend(0, q, positions, np.empty_like(q))
            cache.settle(0)
            # a code may fall to the other side of a tie: features differ in their last bit
            np.testing.assert_allclose(got, slow.step(x, q), atol=0.01 if bits == 4 else 3e-3)
            assert cache._whole[0].count == (min(end, 32) if sliding else end % 32)


def test_shrunk_keys_before_rotation_are_not_those_after() -> None:
    """The factors come before rotary: rebuilding rotated features would lose what density 1 keeps."""
    tiny = loaded("llama", num_hidden_layers=1)
    policy = "cskv(0.25,init=svd,train=0,window=0)"
    fit(tiny, policy)
    ledger = Ledger()
    cache = tiny.cache(policy, 400, ledger)
    tiny.decode(cache, tiny.tokens(300), 300)
    sizes = kv.predict(policy, tiny.shape, 300, 0, 400)
    assert {row.owner: row.nbytes for row in ledger.rows()} == {owner: n for owner, n in sizes.items() if n}
    ranks = settings_of(policy).ranks(tiny.shape)
    assert cache._keys.layers[0].form.width == ranks[0] == 2 * 4
    assert sizes["kv/latents"] == 2 * (-(-300 * 8 * 2 // 4096) * 4096)


def test_bytes_are_the_formula() -> None:
    """A fifth of the channels in 4 bits is a twentieth of float16 and the scales; the window besides."""
    shape = kv.CacheShape(num_layers=8, num_heads=32, num_kv_heads=32, head_dim=128, hidden_size=4096)
    sizes = kv.predict("cskv(0.2,4bit)", shape, 8192)
    r = 32 * 25
    scales = r * 24 / 32 / 8 + 32 * 3  # a channel's over 32 tokens; one for each head's 25 numbers of a value
    coded = 8 * 8192 * (2 * r * 4 / 8 + scales)
    assert abs(sizes["kv/latents"] / coded - 1) < 0.03
    full = 2 * 8 * 8192 * 4096 * 2
    assert sizes["kv/latents"] < 0.065 * full
    window = 2 * 8 * 32 * 4096 * 2
    assert abs(sizes["kv/recent"] - window - 2 * 9 * 32 * r) < 3 * 4096


def layer_of(inputs: np.ndarray, family: str = "llama-bias") -> tuple[Loaded, Any]:
    tiny = loaded(family)
    with Checkpoint(tiny.model.directory, tiny.config) as checkpoint:
        return tiny, cskv_fit.LayerData(tiny.config, checkpoint, 1, inputs)


def some_inputs() -> np.ndarray:
    """Inputs with strong and weak channels, so that it matters which are kept."""
    rng = np.random.default_rng(0)
    spread = np.exp(rng.standard_normal(96) * 1.2)
    return (rng.standard_normal((6, 64, 96)) * spread).astype(np.float16)


def loss_of(data: Any, settings: CskvSettings, tiny: Loaded, pairs: list[Any]) -> float:
    factors = [torch.from_numpy(m) for pair in pairs for m in pair]
    with torch.no_grad():
        return float(cskv_fit.Target(data).loss(data.inputs, factors, settings.forms(tiny.shape)))


def starts(data: Any, settings: CskvSettings, tiny: Loaded, init: str) -> list[Any]:
    return [cskv_fit.start(data, which, rank, init) for which, rank in enumerate(settings.ranks(tiny.shape))]


def test_training_lowers_the_loss_and_cannot_beat_principal_directions() -> None:
    tiny, data = layer_of(some_inputs())
    settings = settings_of("cskv(0.3)")
    svd, asvd, pca = (
        loss_of(data, settings, tiny, starts(data, settings, tiny, init)) for init in ("svd", "asvd", "pca")
    )
    trained = loss_of(
        data, settings, tiny, cskv_fit.train(data, starts(data, settings, tiny, "asvd"), settings.forms(tiny.shape), 1)
    )
    assert pca <= trained < pca + 0.2 * (asvd - pca)
    assert asvd < 0.7 * svd


def test_training_with_codes_beats_coding_afterwards() -> None:
    tiny, data = layer_of(some_inputs())
    floats, codes = settings_of("cskv(0.3)"), settings_of("cskv(0.3,2bit)")
    begin = starts(data, floats, tiny, "asvd")
    afterwards = cskv_fit.train(data, begin, floats.forms(tiny.shape), 1)
    with_codes = cskv_fit.train(data, begin, codes.forms(tiny.shape), 1)
    assert loss_of(data, codes, tiny, with_codes) < 0.97 * loss_of(data, codes, tiny, afterwards)


@pytest.mark.parametrize("along_tokens", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("kind", [LatentForm, ClippedForm])
def test_training_rounds_as_the_cache_does(kind: type[LatentForm], bits: int, along_tokens: bool) -> None:
    form = kind(width=20, bits=bits, group=16, along_tokens=along_tokens, zero_inside=True)
    x = np.random.default_rng(0).standard_normal((1, 64, 20)).astype(np.float32)
    x[..., :3] += (9, -9, 2)
    x[:, 20:30] += 8
    x[:, 30:40] -= 8
    features = torch.from_numpy(x).requires_grad_()
    got = cskv_fit.rounded(features, form)
    records, want = np.zeros(form.nbytes(64), np.uint8), np.empty((64, 20), np.float32)
    form.encode(x[0], 0, records)
    form.decode(records, 0, want)
    np.testing.assert_allclose(got.detach().numpy()[0], want, atol=1e-4)
    got.sum().backward()
    assert features.grad is not None
    assert set(features.grad.unique().tolist()) <= {0.0, 1.0}


def test_clipped_codes_are_the_paper_s() -> None:
    """A group far from zero: its step is a 15th of its range, and what lies beyond that range's width is cut off."""
    form = ClippedForm(width=1, bits=4, group=32, along_tokens=True, zero_inside=True)
    x = np.linspace(9, 12, 32, dtype=np.float32)[:, None] * np.repeat([[1.0, -1.0, 0.2]], 32, axis=0).astype(np.float32)
    for column, want in zip(x.T, (3.0, -3.0, 0.6)):
        rows, records = np.ascontiguousarray(column[:, None]), np.zeros(form.nbytes(32), np.uint8)
        form.encode(rows, 0, records)
        form.decode(records, 0, out := np.empty((32, 1), np.float32))
        np.testing.assert_allclose(out, want, rtol=2e-3)


def test_a_joint_rank_loses_less_than_one_per_head() -> None:
    tiny, data = layer_of(some_inputs())
    weight, heads = data.weights[0], tiny.shape.num_kv_heads
    joint = cskv_fit.start(data, 0, 2 * heads, "svd")
    each = [SimpleNamespace(weights=(part,), inputs=data.inputs) for part in np.split(weight, heads, axis=1)]
    apart = np.concatenate([a @ b for a, b in (cskv_fit.start(one, 0, 2, "svd") for one in each)], axis=1)  # type: ignore[arg-type]
    assert np.square(joint[0] @ joint[1] - weight).sum() < np.square(apart - weight).sum()


def test_a_layer_s_loss_hangs_on_its_own_factors_only() -> None:
    """The inputs that layers are trained on are the model's own, whatever other layers' factors are."""
    tiny = loaded("llama")
    tokens = np.stack([tiny.tokens(70, seed) for seed in range(2)])
    with Checkpoint(tiny.model.directory, tiny.config) as checkpoint:
        stream = LayerStream(tiny.config, checkpoint, tokens, Arena(1 << 40, Ledger()))
        stream.embed()
        seen = [cskv_fit.layer_inputs(stream, layer) for layer in range(tiny.config.num_layers)]

    inner = tiny.cache("float32")
    taken: dict[int, np.ndarray] = {}
    inner.takes_inputs = True
    inner.take_inputs = lambda layer, x, positions: taken.__setitem__(layer, x.copy())
    tiny.decode(inner, tokens[0], 70)
    for layer, x in taken.items():
        np.testing.assert_allclose(seen[layer][0].astype(np.float32), x, rtol=2e-3, atol=2e-3)


def test_fitting_through_the_front_door(tmp_path: Path) -> None:
    """`memwall fit` on the bundled text makes what the cache asks for; without it the cache says so."""
    tiny = loaded("llama-tied")
    policy = "cskv(0.5,window=16,init=pca,train=0)"
    with pytest.raises(InputError, match="memwall fit"):
        tiny.cache("cskv(0.5,init=asvd,train=0)")
    words = "Some words about walls and memory, again and again. " * 60
    (path,) = fitted.fit(policy, tiny.model.directory, text=words, threads=1)
    assert path.is_file()
    cache = tiny.cache(policy)
    assert settings_of(cache.policy) == settings_of(policy)
    tokens = tiny.tokens(100)
    want = tiny.decode(tiny.cache("float32"), tokens, 80, *(1,) * 20)
    got = tiny.decode(cache, tokens, 80, *(1,) * 20)
    assert 0 < np.square(got - want).mean() < want.var()


def test_truncate_and_go_on() -> None:
    tiny, policy = loaded("llama"), "cskv(1.0,8bit,init=svd,train=0)"
    fit(tiny, policy)
    tokens = tiny.tokens(220)
    for length in (1, 31, 32, 40, 96, 150):
        cache = tiny.cache(policy)
        tiny.decode(cache, tokens, 170, 1, 1)
        cache.truncate(length)
        assert cache.length == length
        got = tiny.decode(cache, tokens[length:], *(1,) * 40)
        exact = tiny.cache("float32")
        tiny.decode(exact, tokens, length)
        want = tiny.decode(exact, tokens[length:], *(1,) * 40)
        assert np.square(got - want).mean() < (0.2 * want.std()) ** 2


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ("cskv(0)", "above 0"),
        ("cskv(k=1.5)", "k=1.5"),
        ("cskv(5bit)", "5 bits"),
        ("cskv(init=random)", "asvd, svd, pca"),
        ("cskv(sliding=2)", "0 or 1"),
        ("cskv(window=9999)", "4096"),
    ],
)
def test_settings_that_make_no_sense(policy: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        kv.predict(policy, loaded("llama").shape, 10)

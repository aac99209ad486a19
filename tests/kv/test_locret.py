"""Locret: the heads by hand, final and causal scores, packed positions, a bounded peak, and training on a frozen
model.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from memwall import kv
from memwall.engine import Settings, load
from memwall.errors import InputError
from memwall.kernels import rope
from memwall.kv import fitted
from memwall.kv.locret import HEADS, LocretCache, LocretSettings, RetainingHeads, head_inputs, heads_width
from memwall.kv.policy import parse
from memwall.kv.retaining import TrainSettings, largest_logits, make_rows, train, train_heads
from memwall.memory import Arena, Ledger
from memwall.models import model_directory
from memwall.models.checkpoint import Checkpoint
from memwall.models.config import RopeConfig
from memwall.models.rope import RotaryTable
from memwall.models.tokenizer import Tokenizer
from memwall.plan import make_plan

DEMO = model_directory("demo")
SHAPE = kv.CacheShape(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8)
YARN = RopeConfig(type="yarn", theta=10_000.0, factor=4.0, original_max_position=64, attention_factor=1.14)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def random_heads(shape: kv.CacheShape, width: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    arrays = {}
    for layer in range(shape.num_layers):
        for name, rows, columns in (("w1", width, head_inputs(shape)), ("w2", shape.num_kv_heads, width)):
            arrays[f"{layer}.{name}"] = (rng.standard_normal((rows, columns)) / columns**0.5).astype(np.float16)
    return arrays


@pytest.fixture
def demo(own_cache: None) -> kv.CacheShape:
    """The demo model with heads that were never trained."""
    shape = kv.CacheShape(num_layers=8, num_heads=8, num_kv_heads=4, head_dim=32)
    with Checkpoint(DEMO) as checkpoint:
        fingerprint = checkpoint.fingerprint()
    fitted.save(fingerprint, LocretCache.fit_key(parse("locret")), random_heads(shape, heads_width(shape)))
    return shape


def session(policy: str, context: int, segment: int = 1024) -> Any:
    return load(
        DEMO, Settings(weights="float16", kv=policy, context_tokens=context, segment_tokens=segment, exact=True)
    )


def prompt(num_tokens: int) -> list[int]:
    ids = Tokenizer.from_directory(DEMO).encode((Path(__file__)).read_text(), add_bos=False)
    return [0, *(ids * (num_tokens // len(ids) + 1))[: num_tokens - 1]]


@pytest.mark.parametrize("rope_config", [RopeConfig(type="default", theta=10_000.0), YARN], ids=["plain", "yarn"])
def test_scores_are_those_of_the_heads_before_rotation(rope_config: RopeConfig) -> None:
    table, ledger = RotaryTable(rope_config, 8), Ledger()
    arrays = random_heads(SHAPE, 5)
    heads = RetainingHeads(SHAPE, table, 5, Arena(1 << 20, ledger), lambda: arrays)
    assert {row.owner: row.nbytes for row in ledger.rows()} == {HEADS: RetainingHeads.nbytes_of(SHAPE, 5)}
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((131, n, 8)).astype(np.float32) for n in (4, 2, 2))
    turns = np.arange(700, 831)
    turned_q, turned_k = q.copy(), k.copy()
    for x in (turned_q, turned_k):
        rope(x, *table.at(turns))
    for layer in range(2):
        first, second = (torch.from_numpy(arrays[f"{layer}.w{i}"]).float() for i in (1, 2))
        x = torch.from_numpy(np.concatenate([y.reshape(131, -1) for y in (q, k, v)], axis=1))
        want = torch.nn.functional.silu(x @ first.T) @ second.T
        np.testing.assert_allclose(heads.see(layer, turned_q, turned_k, v, turns), want.numpy(), atol=2e-5)
    heads.release()
    assert ledger.total() == 0


def test_a_budget_of_all_tokens_equals_the_full_cache(demo: kv.CacheShape) -> None:
    tokens = prompt(500)
    one, full = session("locret(tokens=500,chunk=128,local=30,stable=40)", 600), session("float16", 600)
    for new in (tokens, [5], [7]):
        np.testing.assert_allclose(one.prefill(new), full.prefill(new), atol=0.02)


def test_scores_do_not_depend_on_later_tokens(demo: kv.CacheShape) -> None:
    tokens, found = prompt(400), []
    for count in (400, 260):
        cache = session("locret(tokens=500,chunk=128,local=4,stable=0)", 500)
        cache.prefill(tokens[:count])
        past = cache.cache._layers[7].past
        found.append(np.stack([part[:128] for part in np.split(past.scores(past.num_rows), past.offsets[1:-1])]))
    np.testing.assert_array_equal(*found)
    assert np.ptp(found[0], axis=1).min() > 0


def test_the_peak_does_not_depend_on_the_prompt(demo: kv.CacheShape) -> None:
    """Up to four times the positions that the model knows; bytes never go over what was predicted."""
    policy, peaks = "locret(tokens=150,chunk=128,local=20,stable=30)", []
    for count in (600, 2000, 4000):
        made = session(policy, 4100)
        before = made.arena.used_bytes - made.cache.nbytes
        logits = made.prefill(prompt(count))
        assert np.isfinite(logits).all()
        assert made.cache.next_position == 170
        assert made.cache.length == count
        peaks.append(made.arena.peak_bytes - before)
    predicted = kv.predict(policy, demo, 4000, 1024, 4100)
    assert peaks[0] == peaks[1] == peaks[2] <= sum(predicted.values())


def test_heads_keep_different_tokens(demo: kv.CacheShape) -> None:
    made = session("locret(tokens=40,chunk=128,local=4,stable=0)", 500)
    made.prefill(prompt(400))
    for layer in made.cache._layers:
        rows = layer.past.rows(layer.past.num_rows)[1].reshape(4, 40, 32)
        scores = layer.past.scores(160).reshape(4, 40)
        assert len({tuple(np.sort(each)[-5:]) for each in scores}) == 4
        assert len({rows[head].tobytes() for head in range(4)}) == 4


def test_plans_beyond_the_model_s_positions(demo: kv.CacheShape) -> None:
    plan = make_plan(DEMO, kv="locret(tokens=256)", context=5000, measure=False, profile=False)
    assert plan.choice.context == 5000
    assert {row.owner for row in plan.rows} >= {"kv/kept", "kv/tail", "kv/scores", "kv/heads"}
    with pytest.raises(InputError, match="out of range"):
        make_plan(DEMO, kv="float16", context=5000, measure=False, profile=False)
    with pytest.raises(InputError, match="more positions than the 1024"):
        session("locret(tokens=800,chunk=512)", 5000)


def test_settings() -> None:
    shape = kv.CacheShape(num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128)
    s = LocretSettings.from_policy(parse("locret(tokens=16384,chunk=1024)"), shape, 131072)
    assert (s.stable, s.local, s.width) == (2500, 100, 1024)  # the paper's, for this shape
    # the paper's formula of the heads' parameters: 6.3M a layer
    assert RetainingHeads.weight_bytes(shape, 1024) == 2 * 32 * 1024 * ((32 + 16) * 128 + 8)
    assert LocretSettings.from_policy(parse("locret"), SHAPE, 4000).tokens == 1000
    assert LocretSettings.from_policy(parse("locret(0.1,stable=7)+bfloat16"), SHAPE, 4000).stable == 7
    for policy, says in (
        ("locret(0.5,tokens=9)", "not both"),
        ("locret(1.5)", "at most 1"),
        ("locret(tokens=8,stable=8)", "leave none"),
        ("locret(tokens=8,chunk=16,local=16)", "below the chunk"),
        ("locret(page=3)", "unknown setting"),
        ("locret(width=0)", "at least 1"),
    ):
        with pytest.raises(InputError, match=says):
            LocretSettings.from_policy(parse(policy), SHAPE, 100)
    with pytest.raises(InputError, match="rows only"):
        kv.resolve("locret+kivi")
    windowed = kv.CacheShape(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, windows=(None, 64))
    with pytest.raises(InputError, match="sliding"):
        LocretSettings.from_policy(parse("locret"), windowed, 100)


def test_heads_must_be_fitted_first() -> None:
    with pytest.raises(InputError, match="memwall fit"):
        session("locret(tokens=100)", 500)


def test_the_label_is_the_largest_logit_of_the_group() -> None:
    """By hand: two keys, one head pair, two asking queries; before the softmax, the better of all four products."""
    keys = np.array([[[1.0, 0.0]], [[0.0, -2.0]]], np.float32)
    asking = np.array([[[3.0, 1.0], [-1.0, 0.0]], [[0.5, -4.0], [0.0, 0.0]]], np.float32)
    np.testing.assert_allclose(largest_logits(asking, keys, 0.5), [[1.5], [4.0]])


def test_rows_ask_for_every_fact() -> None:
    tokenizer = Tokenizer.from_directory(DEMO)
    settings = TrainSettings(rows=12, row_tokens=300)
    rows = make_rows(tokenizer, (Path(__file__)).read_text(), settings, 300)
    kinds = set()
    for tokens, asks, count in zip(rows.tokens, rows.asks, rows.prompts):
        assert tokens[0] == 0
        assert not asks[: count - 1].any()
        assert asks[count - 1]
        text = tokenizer.decode(tokens.tolist())
        if text.count("What is the secret number") == 4:
            kinds.add("recall")
            answered = tokenizer.decode(tokens[1:][asks[:-1]].tolist())
            assert all(text.count(number) >= 2 for number in answered.replace(".", "").split())
        else:
            kinds.add("continued")
    assert kinds == {"recall", "continued"}
    with pytest.raises(InputError, match="at least"):
        make_rows(tokenizer, "too short", settings, 300)


def test_training_learns_and_leaves_the_model_alone() -> None:
    before = {path.name: path.read_bytes() for path in DEMO.iterdir() if path.is_file()}
    settings = TrainSettings(width=8, rows=3, row_tokens=192, epochs=2)
    text = Path(fitted.__file__).read_text() + Path(__file__).read_text()
    stages = []
    arrays = train(DEMO, settings, text, 1, lambda *stage: stages.append(stage))
    assert {path.name: path.read_bytes() for path in DEMO.iterdir() if path.is_file()} == before
    assert stages[-1][1:] == (8, 8)
    assert [arrays[f"7.w{i}"].shape for i in (1, 2)] == [(8, 512), (4, 8)]
    again = train(DEMO, settings, text, 1, None)
    assert all(np.array_equal(arrays[name], again[name]) for name in arrays)


def test_heads_learn_what_can_be_learned() -> None:
    """Labels that are a function of the inputs: most of their variance is explained after a few passes."""
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((30, 64, 12)).astype(np.float16)
    labels = np.stack([inputs[..., 0], np.abs(inputs[..., 1])], axis=2).astype(np.float32)
    settings = TrainSettings(epochs=20, smoothness=0.0, learning_rate=1e-2)
    first, second = (w.astype(np.float32) for w in train_heads(inputs, labels, np.full(30, 50), 32, settings))
    x = inputs.reshape(-1, 12).astype(np.float32) @ first.T
    scores = (x / (1 + np.exp(-x))) @ second.T
    assert np.mean((scores - labels.reshape(-1, 2)) ** 2) < 0.1 * labels.reshape(-1, 2).var(axis=0).sum()


def test_forks_share_the_heads() -> None:
    ledger = Ledger()
    model: Any = SimpleNamespace(
        fingerprint="m",
        directory=Path("m"),
        config=SimpleNamespace(max_position=4096),
        rotary=RotaryTable(RopeConfig(type="default", theta=10_000.0), 8),
    )
    fitted.save("m", LocretCache.fit_key(parse("locret")), random_heads(SHAPE, heads_width(SHAPE)))
    cache = kv.build("locret(tokens=16,chunk=8)", SHAPE, Arena(1 << 20, ledger), 100, model)
    other = cache.fork()
    assert ledger.total() == cache.nbytes == RetainingHeads.nbytes_of(SHAPE, heads_width(SHAPE))
    cache.release()
    assert ledger.total() == other.nbytes
    other.release()
    assert ledger.total() == 0

"""Orders of key channels, and what they do to a cache with outliers; the cache's contract is in test_contract.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall import kv
from memwall.errors import InputError
from memwall.kernels import bfp
from memwall.kv.bfp_outlier_reorder import BfpCache, BfpSettings, pair_order, placed_order, row_norms
from memwall.kv.policy import parse
from memwall.memory import Arena, Ledger
from tests.kv.latent_models import loaded

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "hidden_size": 128}


@given(st.integers(0, 2**32 - 1), st.sampled_from([32, 64, 128]), st.sampled_from([16, 32]), st.sampled_from(bfp.BITS))
@settings(max_examples=40, deadline=None)
def test_orders_hold_every_channel_once_and_pairs_together(seed: int, dim: int, block: int, bits: int) -> None:
    rng = np.random.default_rng(seed)
    keys, queries = (np.exp(rng.normal(size=(3, dim)) * 2) for _ in range(2))
    for order in (pair_order(keys), placed_order(keys, queries, bits, block)):
        assert (np.sort(order, axis=1) == np.arange(dim)).all()
        assert (order[:, 1::2] - order[:, ::2] == dim // 2).all()


def test_sorting_puts_pairs_of_one_size_in_one_block() -> None:
    sizes = np.ones((1, 64))
    sizes[0, [5, 37, 20]] = 9, 1, 10  # pairs (5, 37) and (20, 52)
    assert pair_order(sizes)[0, :4].tolist() == [20, 52, 5, 37]


def expected_error(order: np.ndarray, keys: np.ndarray, queries: np.ndarray, block: int) -> float:
    """Error of logits when rows of these sizes are coded in 4 bits in that order."""
    rng = np.random.default_rng(0)
    k = (rng.normal(size=(512, 1, 64)) * keys).astype(np.float32)
    form, blocks = bfp.BfpForm(block=block), np.zeros(32 * bfp.BfpForm(block=block).key_bytes(64), np.uint8)
    bfp.encode_keys(k, 0, blocks, form, order)
    lost = bfp.decode_keys(blocks, 0, np.empty_like(k), form, order) - k
    return float((np.square(lost).mean(axis=0) * queries**2).sum())


def test_placing_beats_sorting_where_blocks_are_few_and_outliers_rare() -> None:
    plain, errors = np.arange(64, dtype=np.int16)[None], np.zeros(3)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        keys, queries = np.exp(rng.normal(size=(1, 64)) * 0.7), np.ones((1, 64))
        keys[0, [3, 35]] *= 16
        queries[0, [3, 35]] /= 16
        orders = placed_order(keys, queries, 4, 32), pair_order(keys), plain
        errors += [expected_error(order, keys, queries, 32) for order in orders]
    assert errors[0] < 0.7 * errors[1:].min()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_norms_are_those_of_the_checkpoints_rows(family: str) -> None:
    model = loaded(family, **SIZES).model
    for which in ("k", "q"):
        found = row_norms(model.directory, model.config, 1, which)
        assert found.shape == (2, 64)
        with_norms = family == "qwen3"
        assert (found[0] == found[1]).all() == with_norms


def test_settings_of_a_policy() -> None:
    assert BfpSettings.from_policy(parse("bfp(6bit,values=8)"), 64) == BfpSettings(bits=6, values=8)
    for text, dim, says in (
        ("bfp(5bit)", 64, "must be one of 3, 4, 6, 8"),
        ("bfp(values=2)", 64, "values=2"),
        ("bfp(block=64)", 32, "does not work for a head dimension of 32"),
        ("bfp", 80, "that 32 divides"),
        ("bfp(order=best)", 64, "order=best; must be one of placed"),
        ("bfp(axis=heads)", 64, "channels, tokens"),
        ("bfp(exact=int8)", 64, "float16, float32"),
        ("bfp(cycle=4)", 64, "unknown setting"),
    ):
        with pytest.raises(InputError, match=says):
            BfpSettings.from_policy(parse(text), dim)


def test_an_order_needs_a_model_and_a_calibrated_one_a_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = loaded("llama", **SIZES)
    arena = Arena(1 << 24, Ledger())
    with pytest.raises(InputError, match="loaded model's own weights"):
        kv.build("bfp", found.shape, arena, 64)
    with pytest.raises(InputError, match="memwall fit"):
        kv.build("bfp(order=calibrated)", found.shape, arena, 64, found.model)
    assert arena.used_bytes == 0
    assert BfpCache.must_fit(parse("bfp(order=calibrated)"))
    assert not BfpCache.must_fit(parse("bfp"))


def test_clocks_without_a_model_time_it_without_an_order() -> None:
    assert kv.needs_model("bfp")
    assert not kv.needs_model("bfp(order=plain)")
    assert kv.timed("snapkv(0.5)+bfp(6bit)") == "snapkv(0.5)+bfp(bits=6,order=plain)"
    assert kv.timed("kivi(2bit)") == "kivi(bits=2)"
    assert kv.timed("xquant") == "float16"

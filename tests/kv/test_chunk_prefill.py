"""Prefill of prompts made of chunks: equal to an ordinary one where it should be, cheaper where it says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from memwall import kv
from memwall.errors import BudgetExceeded, InputError
from memwall.kv.cache_craft import CraftSettings, chunk_id
from memwall.kv.cachegen_profile import turn
from memwall.kv.chunk_prefill import STAGE
from memwall.kv.chunk_prompt import ChunkPrompt, arrange, cut_spans, predict_stage_bytes
from tests.kv.chunk_cases import Reader, made_up_chunk
from tests.models.families import FAMILIES, make_family, some_tokens

CHUNKS = [made_up_chunk(seed, 40 + seed) for seed in range(4)]
QUESTION = made_up_chunk(99, 9)
OPENING = [0, *made_up_chunk(50, 19)]


def prompt(order: str = "0123", opening: list[int] | None = None) -> ChunkPrompt:
    return ChunkPrompt([0] if opening is None else opening, [CHUNKS[int(index)] for index in order], QUESTION)


@pytest.mark.parametrize("opening", [[], [0], OPENING], ids=["none", "bos", "text"])
@pytest.mark.parametrize("segment", [512, 64, 31])
def test_chunks_computed_in_full_are_an_ordinary_prefill(tmp_path: Path, opening: list[int], segment: int) -> None:
    reader = Reader(tmp_path, segment_tokens=segment)
    whole = prompt(opening=opening)
    want = reader.full(whole)
    rows = [reader.cache.rows(layer, 0, len(whole.tokens)) for layer in (0, 7)]
    outcome = reader.read(whole)
    assert outcome.share == 1
    np.testing.assert_allclose(outcome.logits, want, atol=2e-3)
    assert reader.cache.length == len(whole.tokens)
    for layer, (keys, values) in zip((0, 7), rows):
        mine = reader.cache.rows(layer, 0, len(whole.tokens))
        np.testing.assert_allclose(mine[0], keys, atol=1e-3)
        np.testing.assert_allclose(mine[1], values, atol=1e-3)


@pytest.mark.parametrize("policy", ["float16", "kivi(8bit)"])
def test_any_cache_of_rows_takes_them(tmp_path: Path, policy: str) -> None:
    reader = Reader(tmp_path, policy=policy)
    want = reader.full(prompt())
    for _ in range(2):  # computed, then kept
        outcome = reader.read(prompt())
        assert np.abs(outcome.logits - want).max() < 0.2
    assert [part.kept for part in outcome.parts] == [False, True, True, True, True]


def test_the_same_context_again_computes_nothing_of_the_chunks(tmp_path: Path) -> None:
    reader = Reader(tmp_path)
    want = reader.read(prompt(opening=OPENING), alpha=5.0).logits.copy()
    again = reader.read(prompt(opening=OPENING), alpha=5.0)
    assert again.rows_run == len(QUESTION) * reader.config.num_layers
    assert all(part.kept and part.reuse.overhead == 0 for part in again.parts)
    np.testing.assert_allclose(again.logits, want, atol=0.05)  # rows went through float16
    # the decision was made before anything ran, and what ran scales with it
    other = reader.read(prompt("3012", OPENING), alpha=0.6)
    repaired = sum(len(part.reuse.repair) for part in other.parts if part.kept)
    assert 0 < repaired < sum(map(len, CHUNKS))
    assert other.rows_run == (repaired + len(QUESTION)) * reader.config.num_layers


def test_a_chunk_alone_is_right_at_any_place(tmp_path: Path) -> None:
    """Keys are kept unturned: at another place they are what turning by that place makes of them."""
    reader = Reader(tmp_path)
    reader.read(prompt("1"))
    reader.read(ChunkPrompt([0], [made_up_chunk(7, 77), CHUNKS[1]], QUESTION), alpha=0.0)
    begin, size = 1 + 77, len(CHUNKS[1])
    moved = reader.cache.rows(3, begin, begin + size)
    reader.full(prompt("1"))
    there = reader.cache.rows(3, 1, 1 + size)
    np.testing.assert_allclose(moved[1], there[1], rtol=2e-3, atol=2e-3)
    for rows, first in ((moved[0], begin), (there[0], 1)):
        turn(reader.config, rows.reshape(size, -1), np.arange(first, first + size), back=True)
    np.testing.assert_allclose(moved[0], there[0], atol=2e-2)


def test_repairing_everything_is_exact(tmp_path: Path) -> None:
    reader = Reader(tmp_path)
    reader.read(prompt("3210"))
    want = reader.full(prompt("0123"))
    near = np.abs(reader.read(prompt("0123"), alpha=0.0).logits - want).max()
    assert near > 0.02
    # every token of every kept chunk, though the store would repair fewer
    everything = reader.read(prompt("0123"), alpha=0.9, choose=lambda context, count: np.arange(context.num_tokens))
    assert any(part.kept for part in everything.parts)
    untouched = [part for part in everything.parts if part.kept and part.reuse.overhead == 0 and part.predecessors]
    assert not [part for part in untouched if len(part.reuse.repair) < len(part.tokens)]
    np.testing.assert_allclose(everything.logits, want, atol=2e-3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("segment", [256, 24])
def test_every_family_of_models(family: str, segment: int, tmp_path: Path) -> None:
    """Computed and repaired in full, both are an ordinary prefill: windows, scaled rotations, norms, experts."""
    reader = Reader(tmp_path / "store", model=make_family(family, tmp_path), segment_tokens=segment)
    chunks = [some_tokens(20 + seed, seed=seed) for seed in range(3)]
    whole, turned = (ChunkPrompt([0], [chunks[i] for i in order], some_tokens(7)) for order in ((0, 1, 2), (2, 1, 0)))
    np.testing.assert_allclose(reader.read(whole).logits, reader.full(whole), atol=2e-3)
    want = reader.full(turned)
    plain = reader.read(turned, alpha=0.0).logits.copy()
    mended = reader.read(turned, alpha=0.0, choose=lambda context, count: np.arange(context.num_tokens))
    assert all(part.kept for part in mended.parts[1:])
    np.testing.assert_allclose(mended.logits, want, atol=2e-3)
    if family != "mistral":  # its windows are shorter than a chunk: the question sees nothing of what changed
        assert np.abs(plain - want).max() > 0.02
    again = reader.read(whole, alpha=1.0)
    assert again.rows_run == (1 + 7) * reader.config.num_layers
    np.testing.assert_allclose(again.logits, reader.full(whole), atol=0.05)


def test_statistics_are_sums_of_attention(tmp_path: Path) -> None:
    """Against a matrix of attention, made here from the rows of an ordinary prefill."""
    reader = Reader(tmp_path)
    outcome = reader.read(prompt("01"))
    kept = reader.store.variants(chunk_id(CHUNKS[1]))
    (context,) = kept.values()
    first, second = (slice(part.begin, part.end) for part in outcome.parts[1:])
    assert context.predecessors == (chunk_id([0]), chunk_id(CHUNKS[0]))
    assert context.lengths == (0, len(CHUNKS[0]))
    weights = attention(reader, prompt("01"))  # [L, n, n], mean over heads
    assert context.inter[0] == 0
    np.testing.assert_allclose(context.inter[1], weights[:, second, first].sum(axis=(1, 2)).mean(), rtol=2e-3)
    own = weights[:, second, second]
    own = (own.sum(axis=(1, 2)) - np.trace(own, axis1=1, axis2=2)).mean()
    np.testing.assert_allclose(context.intra, own, rtol=2e-3)
    np.testing.assert_allclose(context.token_inter, weights[:, second, first].sum(axis=(0, 2)), rtol=5e-3, atol=1e-3)


def attention(reader: Reader, whole: ChunkPrompt) -> np.ndarray:
    """Attention of every token to every other, from queries taken out of an ordinary prefill."""
    queries: list[np.ndarray] = []
    inner = reader.cache

    class Watcher(type(inner)):  # type: ignore[misc]
        def attend(self, layer: int, q: np.ndarray, *more: object) -> np.ndarray:
            queries.append(q.copy())
            return super().attend(layer, q, *more)

    reader.cache.truncate(0)
    reader.cache.__class__ = Watcher
    reader.decoder.forward(np.array(whole.tokens), reader.cache)
    layers = []
    for layer in range(reader.config.num_layers):
        keys = np.repeat(reader.cache.rows(layer, 0, reader.cache.length)[0], 2, axis=1)
        logits = np.einsum("thd,shd->hts", queries[layer], keys) * reader.cache.shape.logit_scale
        logits = np.where(np.tril(np.ones(logits.shape[1:], bool)), logits, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        layers.append((weights / weights.sum(-1, keepdims=True)).mean(axis=0))
    return np.stack(layers)


def test_early_stop_leaves_out_chunks_that_the_question_does_not_look_at(tmp_path: Path) -> None:
    whole = prompt("3012")
    shares = []
    for stop in (0, 1):
        reader = Reader(tmp_path, settings=CraftSettings(stop=stop, margin=1.0))
        if not len(reader.store):
            reader.read(prompt("0123"))
        outcome = reader.read(whole, alpha=0.5)
        shares.append(outcome.rows_run)
        assert (outcome.focused is None) == (stop == 0)
        assert reader.cache.length == len(whole.tokens)
        reader.store.close()
    assert shares[1] < shares[0]


def test_a_duplicate_in_one_prompt(tmp_path: Path) -> None:
    reader = Reader(tmp_path)
    want = reader.full(prompt("101"))
    outcome = reader.read(prompt("101"))
    np.testing.assert_allclose(outcome.logits, want, atol=2e-3)
    assert len(reader.store.variants(chunk_id(CHUNKS[1]))) == 2
    again = reader.read(prompt("101"), alpha=3.0)
    assert again.rows_run == (len(QUESTION) + 1) * reader.config.num_layers
    np.testing.assert_allclose(again.logits, want, atol=0.05)


def test_kept_chunks_name_the_predecessors_they_were_computed_behind(tmp_path: Path) -> None:
    reader = Reader(tmp_path)
    reader.read(prompt("01"))
    outcome = reader.read(prompt("2301"), alpha=9.0)  # so large an alpha computes what lost any context anew
    names = [chunk_id(CHUNKS[index]) for index in (2, 3, 0, 1)]
    assert [part.name for part in outcome.parts[1:]] == names
    contexts = {context.predecessors for context in reader.store.variants(names[3]).values()}
    assert contexts == {(chunk_id([0]), names[2]), (chunk_id([0]), *names[:3])}


def test_spans_hold_what_the_decoder_takes() -> None:
    class Store:
        def variants(self, name: str) -> dict:
            return {}

    parts = arrange(Store(), prompt(), 1.0, 16)  # type: ignore[arg-type]
    total = len(prompt().tokens)
    spans = cut_spans(parts, total, 16)
    assert [span.begin for span in spans[1:]] == [span.end for span in spans[:-1]]
    assert np.concatenate([span.chosen for span in spans]).tolist() == list(range(total))
    assert max(len(span.chosen) for span in spans) == 16


@pytest.mark.parametrize("depth", [1, 3, 8, 99])
def test_preloading_changes_nothing_but_time(tmp_path: Path, depth: int) -> None:
    reader = Reader(tmp_path, segment_tokens=64)
    want = reader.read(prompt(opening=OPENING)).logits.copy()
    outcome = reader.read(prompt(opening=OPENING), depth=depth)
    assert outcome.preload == min(depth, 8)
    np.testing.assert_allclose(outcome.logits, want, atol=0.05)
    assert outcome.loaded_bytes == 2 * 2 * 8 * 128 * (sum(map(len, CHUNKS)) + len(OPENING))


def test_a_refused_prompt_leaves_everything_as_it_was(tmp_path: Path) -> None:
    reader = Reader(tmp_path, most_bytes=1 << 40)
    used = reader.arena.used_bytes
    reader.arena.set_cap(used + 400_000)  # for the stage, not for the cache
    with pytest.raises(BudgetExceeded):
        reader.read(prompt())
    assert reader.cache.length == 0
    assert not list(tmp_path.glob("*.chunk")) + list(tmp_path.glob(".*partial"))
    assert not [row for row in reader.arena.ledger.rows() if row.owner == STAGE]
    reader.arena.set_cap(1 << 40)
    reader.read(prompt())
    assert len(reader.store) == 4


def test_what_it_holds_is_what_it_says(tmp_path: Path) -> None:
    reader = Reader(tmp_path)
    before = reader.arena.used_bytes
    reader.read(prompt())
    held = reader.cache.nbytes
    assert reader.arena.peak_bytes - before - held <= predict_stage_bytes(reader.cache.shape, prompt())


def test_prompts_are_checked() -> None:
    with pytest.raises(InputError, match="question"):
        ChunkPrompt([0], [[1]], [])
    with pytest.raises(InputError, match="chunk"):
        ChunkPrompt([0], [[]], [1])
    deep, flat = (kv.CacheShape(num_layers=count, num_heads=1, num_kv_heads=1, head_dim=4) for count in (9, 1))
    assert predict_stage_bytes(deep, prompt()) == predict_stage_bytes(flat, prompt())  # one layer at a time

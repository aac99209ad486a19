"""EpiCache: clusters, patched prompts, scores by hand, episodes that come back as they were, and budgets by layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from memwall import kv
from memwall.cli import app
from memwall.engine import Settings, load
from memwall.errors import InputError
from memwall.kv import fitted
from memwall.kv.attention_scores import most_attention
from memwall.kv.epicache import EPISODES, EpiCache, EpiSettings
from memwall.kv.episodes import (
    INSTRUCTION,
    HashedWords,
    MeanEmbedding,
    Turn,
    Utterance,
    find_episodes,
    k_means,
    read_history,
    squared_distances,
    unit,
    windows_of,
)
from memwall.kv.policy import parse
from memwall.kv.sensitivity import MaskedCache, windows_likeness
from memwall.models import model_directory
from memwall.models.checkpoint import Checkpoint
from memwall.models.config import EMBEDDING, ModelConfig
from memwall.models.tokenizer import Tokenizer

DEMO = model_directory("demo")
TOKENIZER = Tokenizer.from_directory(DEMO)
TALK = [
    *(Utterance(f"The falcon flew over the forest {n} times.", "Ann") for n in ("two", "three", "four", "five")),
    *(Utterance(f"We painted the {n} wall in yellow and blue.", "Bob") for n in ("first", "second", "third", "last")),
    *(Utterance(f"The falcon and the {n} hunt in the forest.", "Ann") for n in ("owl", "heron", "lynx", "otter")),
    Utterance("The secret number of falcon is 4711."),
    Utterance("Paint the wall in yellow.", "Bob"),
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def session(policy: str, context: int = 600) -> Any:
    return load(DEMO, Settings(weights="float16", kv=policy, context_tokens=context, segment_tokens=128, exact=True))


def remembering(policy: str, context: int = 600) -> tuple[Any, EpiCache]:
    made = session(policy, context)
    assert isinstance(made.cache, EpiCache)
    made.cache.remember(made.decoder, TOKENIZER, TALK, opening=[0])
    return made, made.cache


def topics(texts: Any) -> np.ndarray:
    """An encoder that knows two words."""
    return unit(np.array([[text.count("forest") + 0.01, text.count("wall")] for text in texts], np.float32))


def test_k_means_finds_what_was_scattered() -> None:
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((5, 8)).astype(np.float32) * 3
    owners = rng.integers(0, 5, 200)
    points = truth[owners] + 0.2 * rng.standard_normal((200, 8)).astype(np.float32)
    centroids, found = k_means(points, 5, seed=1)
    assert np.sqrt(squared_distances(truth, centroids).min(axis=1)).max() < 0.3
    assert all(len(set(found[owners == each])) == 1 for each in range(5))
    again = k_means(points, 5, seed=1)
    np.testing.assert_array_equal(again[0], centroids)
    same, one = k_means(np.ones((4, 2), np.float32), 2)  # no two points differ
    assert np.isfinite(same).all()
    assert len(one) == 4


def test_windows_and_central_ones() -> None:
    windows = windows_of(TALK, 4)
    assert [len(window.splitlines()) for window in windows] == [4, 4, 4, 2]
    assert windows[0].splitlines()[0] == 'Ann said, "The falcon flew over the forest two times."'
    assert windows[3].splitlines()[0] == "The secret number of falcon is 4711."
    episodes = find_episodes(TALK, topics, 2, window=4, central=1)
    assert episodes.owners[0] == episodes.owners[2] != episodes.owners[1] == episodes.owners[3]
    assert [len(each) for each in episodes.central] == [1, 1]
    assert episodes.match("Who hunts in the forest?") == episodes.owners[0]
    assert episodes.match("Which wall?") == episodes.owners[1]
    prompts = episodes.prompts(TOKENIZER, 100)
    assert "wall in yellow" in TOKENIZER.decode(prompts[episodes.owners[1]])
    assert "wall in yellow" not in TOKENIZER.decode(prompts[episodes.owners[0]])
    assert all(len(prompt) <= 30 for prompt in episodes.prompts(TOKENIZER, 30))
    with pytest.raises(InputError, match="empty"):
        find_episodes([], topics, 2, window=4, central=1)


def test_long_replies_are_cut_into_sentences() -> None:
    told = [f"Sentence number {number} of a reply that goes on and on." for number in range(12)]
    reply = " ".join([*told, "Yes."])
    windows = windows_of([Utterance(reply, "Assistant")], 4)
    assert "\n".join(windows).splitlines() == [f'Assistant said, "{sentence}"' for sentence in told]
    assert [len(window.splitlines()) for window in windows] == [4, 4, 4]
    assert len(windows_of([Utterance(reply, "Ann")], 4)) == 1  # only what an assistant says
    assert len(windows_of([Utterance(told[0], "assistant")], 4)) == 1
    assert windows_of([Utterance("No. " * 200, "assistant")], 4) == [f'assistant said, "{"No. " * 200}"']


def test_prompts_of_models_that_follow_instructions(tmp_path: Path) -> None:
    assert Turn.of(DEMO) is None
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_bytes((DEMO / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text("<u>{{ messages[0].content }}</u><a>")
    turn = Turn.of(tmp_path)
    assert turn == Turn("<u>", "</u><a>")
    episodes = find_episodes(TALK, topics, 2, window=4, central=2)
    for plain, told in zip(episodes.prompts(TOKENIZER, 200), episodes.prompts(TOKENIZER, 200, turn)):
        text = TOKENIZER.decode(told)
        # as if the model had been asked for what matters and answered with the windows
        assert text == INSTRUCTION + "</u><a>" + TOKENIZER.decode(plain).removeprefix("\n")


def test_the_model_s_own_embeddings_tell_topics_apart() -> None:
    made = session("float16")
    matrix = made.decoder.weights.matrices[EMBEDDING]
    for plain in (True, False):
        encoder = MeanEmbedding(matrix, 256, TOKENIZER, plain=plain)
        points = encoder(windows_of(TALK, 4))
        np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1, rtol=1e-5)
        assert points[0] @ points[2] > points[0] @ points[1]
        question = encoder(["Where did the falcon fly?"])[0]
        assert question @ points[0] > question @ points[1]


def test_words_tell_topics_apart() -> None:
    encoder = HashedWords()
    points = encoder(windows_of(TALK, 4))
    assert points[0] @ points[2] > points[0] @ points[1]
    question = encoder(["Where do falcons hunt?", "xyz"])
    assert question[0] @ points[2] > question[0] @ points[1]
    assert np.isfinite(question).all()
    one = HashedWords(1 << 20)
    one(["a b c", "a b", "a"])
    weights = one(["a b c"])[0]
    # by hand: rarity log(4 / (n + 0.5)) for n = 3, 2, 1, times log 2 each
    want = np.log([4 / 3.5, 4 / 2.5, 4 / 1.5])
    np.testing.assert_allclose(np.sort(weights[weights != 0]), np.sort(want) / np.linalg.norm(want), rtol=1e-5)


def test_scores_are_the_most_attention_of_any_query() -> None:
    """Against the softmax written out; then the last keys are the queries' own, which see none behind."""
    queries = np.array([[[1.0], [2.0]], [[-1.0], [0.5]]], np.float32)
    keys = np.array([[0.0], [1.0], [2.0]], np.float32)
    rows = [np.exp(q * keys[:, 0]) / np.exp(q * keys[:, 0]).sum() for q in (1.0, 2.0, -1.0, 0.5)]
    np.testing.assert_allclose(most_attention(queries, keys, 1.0, 0), np.max(rows, axis=0), rtol=1e-5)
    first = [np.exp(q * keys[:2, 0]) / np.exp(q * keys[:2, 0]).sum() for q in (1.0, 2.0)]
    want = [
        max(first[0][0], first[1][0], rows[2][0], rows[3][0]),
        max(first[0][1], first[1][1], rows[2][1], rows[3][1]),
    ]
    np.testing.assert_allclose(most_attention(queries, keys, 1.0, 2), [*want, max(rows[2][2], rows[3][2])], rtol=1e-5)


def test_a_budget_of_all_tokens_equals_the_full_cache() -> None:
    made, cache = remembering("epicache(tokens=500,episodes=2,chunk=64)")
    full = session("float16")
    text = "".join(utterance.line for utterance in TALK)
    full.prefill([0, *TOKENIZER.encode(text, add_bos=False)])
    assert cache.kept_lengths == [[full.cache.length] * 4] * 8  # and no row of a patched prompt
    for question in ("\nThe secret number of falcon is", " and"):
        tokens = TOKENIZER.encode(question, add_bos=False)
        np.testing.assert_allclose(made.prefill(tokens), full.prefill(tokens), atol=0.03)


def test_episodes_differ_and_come_back_as_they_were() -> None:
    made, cache = remembering("epicache(tokens=40,episodes=2,chunk=64)")
    num_tokens = cache.length
    assert [sum(heads) for heads in cache.kept_lengths] == [160] * 8  # M * Hkv exactly, whatever the heads
    assert len({tuple(heads) for heads in cache.kept_lengths}) > 1
    question = TOKENIZER.encode("\nThe secret number of falcon is", add_bos=False)
    answers, values = [], []
    for episode in (0, 1, 0, 1):
        moved = cache.recall(episode)
        assert cache.length == num_tokens
        values.append(cache._layers[5].past.rows(160)[1].copy())
        answers.append(made.prefill(question).copy())
        assert moved in (0, 2 * 8 * 160 * 32 * 2)
    np.testing.assert_array_equal(values[0], values[2])
    np.testing.assert_array_equal(answers[1], answers[3])
    assert not np.array_equal(values[0], values[1])
    other = cache.fork()  # another branch of this episode: nothing more is evicted there either
    assert other.begin_prompt(200, 128) == [128, 72]
    assert (other.active, other.length) == (1, cache.length)
    other.release()
    before = cache.moved_bytes
    assert cache.recall(1) == 0  # already there: only the question goes
    assert cache.moved_bytes == before
    assert cache.length == num_tokens


def test_the_ledger_holds_the_episodes_and_the_peak_is_predicted() -> None:
    policy = "epicache(tokens=40,episodes=3,chunk=64)"
    made, cache = remembering(policy)
    predicted = kv.predict(policy, cache.shape, cache.length, 64, 600)
    rows = {row.owner: row.nbytes for row in made.ledger.rows() if row.owner.startswith("kv/")}
    assert rows[EPISODES] == predicted[EPISODES] == sum(cache.kept_episodes)
    assert all(nbytes <= predicted[owner] for owner, nbytes in rows.items())
    assert cache.nbytes == sum(rows.values())
    cache.forget()
    assert cache.nbytes == sum(rows.values()) - rows[EPISODES]
    cache.release()
    assert not [row for row in made.ledger.rows() if row.owner.startswith("kv/") and row.nbytes]


def test_the_peak_does_not_grow_with_the_history() -> None:
    peaks = []
    for repeats in (2, 3):
        made = session("epicache(tokens=40,episodes=2,chunk=64)", 1000)
        before = made.arena.used_bytes
        made.cache.remember(made.decoder, TOKENIZER, TALK * repeats, opening=[0])
        peaks.append(made.arena.peak_bytes - before)
    assert peaks[0] == peaks[1]


def test_old_units_are_scored_again() -> None:
    """What an earlier prompt kept goes when a later one does not look at it: other prompts, other tokens."""
    made = session("epicache(tokens=30,episodes=1,chunk=64,uniform=1)")
    cache: Any = made.cache
    tokens = [0, *TOKENIZER.encode("".join(u.line for u in TALK), add_bos=False)]
    kept = []
    for text in ("The falcon and the owl hunt", "Paint the wall in yellow and blue"):
        cache.read(made.decoder, tokens, TOKENIZER.encode(text, add_bos=False))
        kept.append(cache._layers[4].past.rows(120)[1].copy())
        assert cache.kept_lengths[4] == [30] * 4
    assert not np.array_equal(*kept)


def test_settings() -> None:
    shape = kv.CacheShape(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8)
    assert EpiSettings.from_policy(parse("epicache(0.1)"), shape, 5000).tokens == 500
    assert EpiSettings.from_policy(parse("epicache(tokens=7,episodes=4)"), shape, 5000).episodes == 4
    for policy, says in (
        ("epicache(0.5,tokens=9)", "not both"),
        ("epicache(2)", "at most 1"),
        ("epicache(chunk=0)", "at least 1"),
        ("epicache(page=3)", "unknown setting"),
        ("epicache(encoder=bert)", "must be one of words, model"),
    ):
        with pytest.raises(InputError, match=says):
            EpiSettings.from_policy(parse(policy), shape, 100)
    with pytest.raises(InputError, match="different numbers of rows"):
        kv.resolve("epicache+kivi")
    with pytest.raises(InputError, match="memwall fit"):
        session("epicache(tokens=50,alpha=1.1)")


def test_layers_budgets_follow_what_was_fitted() -> None:
    with Checkpoint(DEMO) as checkpoint:
        fingerprint = checkpoint.fingerprint()
    similarity = np.linspace(0.9, 0.5, 8, dtype=np.float32)
    fitted.save(fingerprint, EpiCache.fit_key(parse("epicache")), {"similarity": similarity})
    _, cache = remembering("epicache(tokens=40,episodes=1,chunk=64,alpha=1.1)")
    rows = [sum(heads) for heads in cache.kept_lengths]
    assert sum(rows) <= 40 * 4 * 8
    assert rows[0] == rows[1] == 40 // 4 * 4 or rows[0] == 40
    assert rows == sorted(rows)


def test_masked_attention_sees_its_block_the_half_before_and_the_first() -> None:
    config = ModelConfig.from_directory(DEMO)
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((512, heads, 32)).astype(np.float32) for heads in (8, 4, 4))
    cache, out = MaskedCache(config, 256, 5), np.empty_like(q)
    cache.append(0, k, v, np.arange(512))
    for begin in range(0, 512, 128):
        rows = slice(begin, begin + 128)
        cache.attend(0, q[rows], np.arange(begin, begin + 128), out[rows])
    for row in (3, 255, 256, 300, 511):
        start = row // 256 * 256
        seen = sorted({*range(min(5, row + 1)), *range(max(start - 128, 0) if start else 0, row + 1)})
        for head in (0, 7):
            logits = k[seen, head // 2] @ q[row, head] * 32**-0.5
            weights = np.exp(logits - logits.max())
            np.testing.assert_allclose(out[row, head], weights @ v[seen, head // 2] / weights.sum(), atol=1e-4)
    assert windows_likeness(k, k) == pytest.approx(1)
    assert windows_likeness(k, -k) == pytest.approx(-1)


def test_fitting_finds_layers_that_differ() -> None:
    text = (Path(__file__).parent / "test_locret.py").read_text()
    arrays = EpiCache.fit(parse("epicache"), DEMO, text, 1, None)
    similarity = arrays["similarity"]
    assert similarity.shape == (8,)
    assert similarity[0] == pytest.approx(1, abs=1e-5)  # the first layer's keys do not depend on attention
    assert similarity[1:].max() < 1
    with pytest.raises(InputError, match="at least"):
        EpiCache.fit(parse("epicache"), DEMO, "short", 1, None)


def test_histories_are_read_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "talk"
    path.write_text('{"speaker": "Ann", "text": "Hello  there."}\n\nA plain line.\n{"text": "No one said it."}\n')
    told = read_history(path)
    assert [each.line for each in told] == ["Ann: Hello there.\n", "A plain line.\n", "No one said it.\n"]
    for line, says in (('{"text": 3}', "line 1: must look like"), ("{oops", "line 1: not JSON")):
        path.write_text(line)
        with pytest.raises(InputError, match=says):
            read_history(path)
    with pytest.raises(InputError, match=r"conversation .*none\.jsonl: cannot be read"):
        read_history(tmp_path / "none.jsonl")


def test_questions_on_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    path.write_text("".join(json.dumps({"speaker": u.speaker, "text": u.text}) + "\n" for u in TALK))
    base = ["run", "demo", "--history", str(path), "--weights", "float16", "--max-new-tokens", "4", "--ignore-eos"]
    policy = ["--kv", "epicache(tokens=60,chunk=64)"]
    questions = "The secret number of falcon is\nWe painted the wall in\n"
    result = CliRunner().invoke(app, [*base, *policy, "--json"], input=questions)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert [answer["question"] for answer in found["answers"]] == questions.splitlines()
    assert found["answers"][0]["episode"] != found["answers"][1]["episode"]
    owners = {row["owner"]: row for row in found["ledger"]}
    assert owners[EPISODES]["bytes"] == owners[EPISODES]["predicted_bytes"] > 0
    again = CliRunner().invoke(app, [*base, *policy, questions.splitlines()[0]])
    assert again.exit_code == 0
    assert again.stdout.strip() == found["answers"][0]["text"].strip()
    assert "episode" in again.stderr
    for arguments, says in (
        ([*base, "--kv", "kivi", "x"], "works with --kv epicache"),
        ([*base, *policy, "--chat"], "give one of them"),
        ([*base, *policy, ""], "question is empty"),
    ):
        wrong = CliRunner().invoke(app, arguments)
        assert wrong.exit_code == 2
        assert says in wrong.stderr

"""The small text encoder: learns which passage a query asks for, and its vectors do not depend on the batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from safetensors.torch import load_file

from memwall.studies.text_encoder_torch import Encoder, EncoderSettings, _loss, embed, features, train

SETTINGS = EncoderSettings(dimensions=(16, 24), buckets=512, width=32, hidden=48, steps=60, batch=24, words=12)
TOPICS = ["river", "bread", "engine", "music", "garden", "winter", "letter", "bridge"]
OPPOSITE = {name: f"{name[::-1]} {name[::-1][:3]}" for name in TOPICS}  # no word is shared with the query


def test_it_learns_what_asks_for_what(tmp_path: Path) -> None:
    pairs = [(f"tell me of {name} {at}", f"here {OPPOSITE[name]} stands {at}") for name in TOPICS for at in range(6)]
    told: list[str] = []
    train(pairs, SETTINGS, tmp_path / "w", lambda done, whole, what: told.append(what))
    assert len(told) == 60
    asked = embed([f"tell me of {name}" for name in TOPICS], SETTINGS, tmp_path / "w")
    found = embed([f"here {OPPOSITE[name]} stands" for name in TOPICS], SETTINGS, tmp_path / "w")
    assert [one.shape for one in asked] == [(8, 16), (8, 24)]
    for queries, passages in zip(asked, found, strict=True):
        np.testing.assert_allclose(np.linalg.norm(queries, axis=1), 1, atol=1e-5)
        assert ((queries @ passages.T).argmax(axis=1) == np.arange(8)).mean() >= 0.75
    alone = embed(["tell me of river"], SETTINGS, tmp_path / "w")[0]
    np.testing.assert_allclose(alone[0], asked[0][0], atol=1e-5)


def test_the_step_that_does_best_on_held_out_pairs_is_kept(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    nonsense = [[" ".join(map(str, draw.integers(0, 10, 8))) for _ in range(2)] for _ in range(10 * SETTINGS.batch)]
    told: list[str] = []
    train([(a, b) for a, b in nonsense], SETTINGS, tmp_path / "w", lambda done, whole, what: told.append(what))
    least = [float(what.rsplit(" ", 1)[1]) for what in told]
    assert least[18] == float("inf")
    assert least == sorted(least, reverse=True)
    order = np.random.default_rng(SETTINGS.seed).permutation(len(nonsense))
    held = [tuple(features(text, SETTINGS) for text in nonsense[at]) for at in order[: SETTINGS.batch]]
    encoder = Encoder(SETTINGS)
    encoder.load_state_dict(load_file(tmp_path / "w"))
    assert _loss(encoder, held).item() == pytest.approx(least[-1], abs=0.006)


def test_features_are_words_and_pairs() -> None:
    found = features("A b, A", SETTINGS)
    assert len(found) == 4 + 3
    assert found[0] == found[3]
    assert len(features("", SETTINGS)) == 1
    assert len(features("word " * 100, SETTINGS)) == 12 + 11

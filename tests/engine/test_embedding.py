"""Vectors of many texts offline are those of one text at a time."""

from __future__ import annotations

import numpy as np
import pytest

from memwall.engine.embedding import TextEmbedder
from memwall.errors import InputError
from memwall.models import DEMO_DIRECTORY

TEXTS = ["The river rose in the spring.", "def add(a, b):", *(f"number {at}" for at in range(70))]


def test_texts_in_their_order() -> None:
    embedder = TextEmbedder(DEMO_DIRECTORY, weights="float32", threads=1)
    told: list[tuple[int, int]] = []
    together = embedder.embed(TEXTS, lambda done, whole: told.append((done, whole)))
    assert together.shape == (len(TEXTS), embedder.dimensions)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    for at in (0, 1, 50):
        # other numbers of rows at once, so products add up in another order
        np.testing.assert_allclose(embedder.embed([TEXTS[at]])[0], together[at], atol=1e-4)
    assert told[-1] == (len(TEXTS), len(TEXTS))
    assert embedder.embed([]).shape == (0, embedder.dimensions)
    with pytest.raises(InputError, match=r"text 2 has .* tokens; the model takes 1 to"):
        embedder.embed(["a", "word " * 2000])
    embedder.close()

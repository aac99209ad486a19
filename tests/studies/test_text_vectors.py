"""Stretches of sources, vectors of them, and arrays that are kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from memwall.studies.text_vectors import LONGEST, SHORTEST, cut, kept, source_stretches, text_vectors


def test_stretches_are_long_enough_and_stand_once(tmp_path: Path) -> None:
    lines = "\n".join(f"word{number} of a line that has some length" for number in range(40))
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text(lines)
    (tmp_path / "bad.py").write_bytes(b"\xff\xfe")
    found = source_stretches(1000, tmp_path)
    assert found == list(cut(lines))
    assert all(SHORTEST <= len(one) <= LONGEST for one in found)
    assert source_stretches(2, tmp_path) == found[:2]
    assert list(cut("short")) == []
    assert len(next(cut("x" * 5000))) == LONGEST


def test_texts_alike_have_vectors_alike() -> None:
    pytest.importorskip("sklearn")
    letters = "abcdefghij"
    draw = np.random.default_rng(0)
    texts = [
        " ".join(f"{letters[topic]}{letters[word]}word" for word in draw.integers(0, 10, 30))
        for topic in (0, 1, 2)
        for _ in range(20)
    ]
    x = text_vectors([*texts, "nothing known"], 4)
    assert x.shape == (60, 4)
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, atol=1e-5)
    cosines = x @ x.T
    assert cosines[:20, :20].mean() > 0.9
    assert abs(cosines[:20, 20:40]).mean() < 0.3


def test_arrays_are_kept(tmp_path: Path) -> None:
    made = []

    def make() -> np.ndarray:
        made.append(1)
        return np.arange(3)

    for _ in range(2):
        assert kept(tmp_path / "folder" / "x.npy", make).tolist() == [0, 1, 2]
    assert made == [1]

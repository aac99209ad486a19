"""Many vectors of real texts without a trained encoder: TF-IDF of stretches of text, in the directions of most weight.

The texts are stretches of some hundreds of characters of the Python packages that are installed, words and code, each
once. They are at hand wherever memwall is, come in hundreds of thousands, and lie as unevenly as real collections do:
much is said in nearly the same words many times over.

Units and shapes: vectors float32 [n, d] of length 1. Needs scikit-learn.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from memwall.errors import MissingDependency
from memwall.retrieve.base import unit

SHORTEST, LONGEST = 250, 600
"""Characters of a stretch."""
_FITTED = 60_000
_WORDS = 50_000


def source_stretches(most: int, root: Path | None = None) -> list[str]:
    """At most so many, in an order that digests of files' names give; of installed packages unless a root is named."""
    root = root or Path(sysconfig.get_path("purelib"))
    found: dict[str, None] = {}
    paths = [path.relative_to(root).as_posix() for path in root.rglob("*.py")]
    for name in sorted(paths, key=lambda one: hashlib.sha256(one.encode()).digest()):
        try:
            text = (root / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        found.update(dict.fromkeys(cut(text)))
        if len(found) >= most:
            break
    return list(found)[:most]


def cut(text: str) -> Iterator[str]:
    """Lines put together until they are long enough; a shorter rest is left out."""
    held = ""
    for line in text.splitlines():
        held = f"{held} {line.strip()}".strip()
        if len(held) >= SHORTEST:
            yield held[:LONGEST]
            held = ""


def text_vectors(texts: Sequence[str], d: int, seed: int = 0) -> np.ndarray:
    """float32 [n, d], n at most as many as texts: those of which no word is known have none."""
    try:
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError:
        raise MissingDependency("scikit-learn", "test") from None
    words = TfidfVectorizer(
        max_features=_WORDS, min_df=2, sublinear_tf=True, token_pattern=r"[A-Za-z]{2,}", dtype=np.float32
    )
    table = words.fit_transform(texts)
    some = np.random.default_rng(seed).permutation(table.shape[0])[:_FITTED]
    x = TruncatedSVD(d, n_iter=3, random_state=seed).fit(table[np.sort(some)]).transform(table)
    found = unit(np.ascontiguousarray(x, np.float32))
    return found[np.linalg.norm(found, axis=1) > 0]


def kept(path: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """An array of an earlier run, mapped, or of now."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as name:
            np.save(Path(name) / "x.npy", make())
            os.replace(Path(name) / "x.npy", path)
    found: np.ndarray = np.load(path, mmap_mode="r")
    return found

"""Passages with queries whose answer is known, for studies of retrieval: cut from text of several kinds.

    docstrings      the first sentence asks for the rest (of at most so many characters), by package
    paragraphs      a sentence from the middle asks for the paragraph that it was taken out of
    speeches        a line from the middle asks for the speech of a play that it was taken out of

A query and its passage share no sentence; two that are equal stand once.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from memwall.errors import InputError

SHARED = Path("shared/data")
LONGEST, SHORTEST = 600, 80
"""Characters of a passage."""
QUERY = (15, 240)
_NOT_READ = {"test", "tests", "testing", "idlelib", "site-packages", "_vendor"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """queries[i] asks for passages[i]."""

    name: str
    queries: list[str]
    passages: list[str]

    def __len__(self) -> int:
        return len(self.queries)


def pairs_of(name: str, found: Iterator[tuple[str, str]]) -> Pairs:
    """Each passage and each query once, within the lengths, in an order that digests give."""
    kept: dict[str, str] = {}
    asked: set[str] = set()
    for query, passage in found:
        query, passage = " ".join(query.split()), " ".join(passage.split())[:LONGEST]
        if QUERY[0] <= len(query) <= QUERY[1] and len(passage) >= SHORTEST and query not in asked:
            asked.add(query)
            kept.setdefault(passage, query)
    ordered = sorted(kept, key=lambda words: hashlib.sha256(words.encode()).digest())
    return Pairs(name=name, queries=[kept[one] for one in ordered], passages=ordered)


def text_folder(data: Path | None, experiment: Path) -> Path | None:
    """The folder with wikitext2-valid.txt and tinyshakespeare.txt: under `data`, else beside the checkout that holds
    the file of an experiment, if it lies there.
    """
    if data is not None:
        for folder in (data, data / "text"):
            if (folder / "wikitext2-valid.txt").is_file():
                return folder
        raise InputError(f"--data {data}: holds no wikitext2-valid.txt, nor does its folder `text`")
    for parent in experiment.resolve().parents:
        if (parent / SHARED / "text" / "wikitext2-valid.txt").is_file():
            return parent / SHARED / "text"
    return None


def docstrings(name: str, packages: tuple[str, ...], most: int) -> Pairs:
    """Of installed packages, in the order of their names here until there are so many (`stdlib`: the standard library).
    Packages that are not there are left out.
    """
    found = (pair for path in _files(packages) for pair in _of_file(path))
    return pairs_of(name, itertools.islice(found, most))


def _files(packages: tuple[str, ...]) -> Iterator[Path]:
    site, library = Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("stdlib"))
    for package in packages:
        root = library if package == "stdlib" else site / package
        for path in sorted(root.rglob("*.py")):
            if _NOT_READ.isdisjoint(path.relative_to(root).parts):
                yield path


def _of_file(path: Path) -> Iterator[tuple[str, str]]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            words = ast.get_docstring(node) or ""
            first, _, rest = words.partition("\n\n")
            if rest:
                yield first, rest


def paragraphs(name: str, text: str) -> Pairs:
    """Of WikiText: lines of words between headings, whose sentences end in ` . `."""

    def found() -> Iterator[tuple[str, str]]:
        for line in text.splitlines():
            sentences = [one for one in line.strip().split(" . ") if one.strip()]
            if not line.strip().startswith("=") and len(sentences) >= 3:
                middle = len(sentences) // 2
                yield sentences[middle], " . ".join(sentences[:middle] + sentences[middle + 1 :])

    return pairs_of(name, found())


def speeches(name: str, text: str) -> Pairs:
    """Of plays: a name and a colon, lines, an empty line."""

    def found() -> Iterator[tuple[str, str]]:
        for block in text.split("\n\n"):
            lines = block.strip().split("\n")[1:]
            if len(lines) >= 4:
                middle = len(lines) // 2
                yield lines[middle], " ".join(lines[:middle] + lines[middle + 1 :])

    return pairs_of(name, found())


def stretches(text: str, characters: int = 400) -> list[str]:
    """A text cut at the ends of sentences into stretches of about so many characters."""
    found, held = [], ""
    for sentence in re.split(r"(?<=[.!?])\s+", text):
        held = f"{held} {sentence}".strip()
        if len(held) >= characters:
            found.append(held[:LONGEST])
            held = ""
    return found

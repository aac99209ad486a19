"""Text of the same kind as the text that is scored, for studies that train: docstrings of Python's standard library.

The texts that travel with memwall are docstrings of some of its modules: 25 thousand tokens to calibrate on, 15
thousand that are scored. Methods that train on text ask for millions; the library of the Python that runs has some
three hundred thousand, and is at hand wherever memwall is. What shares SHINGLE characters in a row with the scored text
is left out.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import sysconfig
from pathlib import Path

from memwall.plan.choose import held_out_text

SHINGLE, ANCHOR, SHORTEST = 60, 30, 200
"""Characters; an anchor is half a stretch."""
_NOT_READ = {"site-packages", "test", "tests", "idlelib"}


def library_text(scored: str | None = None, root: Path | None = None) -> str:
    """All docstrings from SHORTEST on, each once, in an order that their digests give; those of the Python files under
    `root`, or of the standard library. scored: the text that none of them may share a stretch with, the planner's
    held-out text otherwise.
    """
    scored = held_out_text() if scored is None else scored
    anchors = {scored[at : at + ANCHOR] for at in range(len(scored) - ANCHOR + 1)}
    stretches = {scored[at : at + SHINGLE] for at in range(len(scored) - SHINGLE + 1)}

    def shares(words: str) -> bool:
        # a shared stretch covers an anchor at a multiple of its length: almost no text needs the search of all places
        return any(words[at : at + ANCHOR] in anchors for at in range(0, len(words), ANCHOR)) and any(
            words[at : at + SHINGLE] in stretches for at in range(len(words) - SHINGLE + 1)
        )

    found = _all_docstrings(root or Path(sysconfig.get_path("stdlib")))
    return "\n\n".join(words for words in found if not shares(words))


@functools.lru_cache(maxsize=4)
def _all_docstrings(root: Path) -> list[str]:
    """Each once, in the order of their digests."""
    found: set[str] = set()
    for path in root.rglob("*.py"):
        if _NOT_READ.isdisjoint(path.relative_to(root).parts):
            found |= _docstrings(path)
    return sorted(found, key=lambda words: hashlib.sha256(words.encode()).digest())


def _docstrings(path: Path) -> set[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return set()
    found = (
        ast.get_docstring(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
    )
    return {words for words in found if words and len(words) >= SHORTEST}

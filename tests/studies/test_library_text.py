"""Docstrings to train on: what is taken, and what is left out."""

from pathlib import Path

from memwall.studies.library_text import SHINGLE, library_text

LONG = "Words that a docstring has, number {}: " + "a module describes what it does, at some length, and how. " * 5


def written(path: Path, *docstrings: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n\n".join(f'def f{i}():\n    """{words}"""' for i, words in enumerate(docstrings)))


def test_docstrings_are_taken_once_but_for_short_ones_tests_and_what_is_no_python(tmp_path: Path) -> None:
    written(tmp_path / "a.py", LONG.format(1), "Short.", LONG.format(2))
    written(tmp_path / "b.py", LONG.format(2))
    written(tmp_path / "test" / "c.py", LONG.format(3))
    (tmp_path / "broken.py").write_text("def f(:")
    (tmp_path / "latin.py").write_bytes(b"# \xff\n")
    found = library_text(root=tmp_path, scored="")
    assert [found.count(f"number {i}:") for i in (1, 2, 3)] == [1, 1, 0]
    assert "Short" not in found


def test_what_shares_a_stretch_with_the_scored_text_is_left_out(tmp_path: Path) -> None:
    shared = "x" * 20 + "".join(chr(97 + i % 26) for i in range(7, 7 + SHINGLE))
    written(tmp_path / "a.py", LONG.format(1) + shared[20:], LONG.format(2) + shared[21:])
    found = library_text(root=tmp_path, scored=f"before {shared} after")
    assert "number 1:" not in found
    assert "number 2:" in found


def test_a_shared_stretch_is_found_wherever_it_lies(tmp_path: Path) -> None:
    shared = "".join(chr(1000 + i) for i in range(SHINGLE))
    written(tmp_path / "a.py", *(f"{'-' * offset}{shared}. {LONG.format(offset)}" for offset in range(SHINGLE + 1)))
    written(tmp_path / "b.py", f"{shared[1:]}. {LONG.format(99)}")  # one character short of a stretch
    found = library_text(root=tmp_path, scored=f"before {shared} after")
    assert found.strip() == f"{shared[1:]}. {LONG.format(99)}".strip()

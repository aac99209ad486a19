"""Rules of the house that a program can count: sizes of files and functions, units in one place, nothing unsafe."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

from memwall.systems import all_systems

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "memwall"
SOURCES = sorted(path for path in PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
TECHNIQUES = {system.file_stem for system in all_systems()}

MOST_LINES_TECHNIQUE = 300
MOST_LINES_OTHER = 400
MOST_LINES_FUNCTION = 60
# file or file:function -> why it may be longer
BOUNDS_OF_COUNTS = {"models/config.py"}
"""Files where such numbers bound counts and angles, not bytes."""
LONGER: dict[str, str] = {
    "cli/run.py:run": "its parameters are the options of the command, one to three lines each",
    "cli/compress.py:compress": "the same",
    "cli/tune.py:tune": "the same",
    "cli/serve.py:serve": "the same",
    "cli/bench.py:serve": "the same",
    "cli/simulate.py:serving": "the same",
    "cli/kernel.py:kernel": "the same",
    "cli/split.py:split": "the same",
    "cli/nanoflow.py:nanoflow": "the same",
    "cli/context.py:context": "the same",
    "cli/attention_io.py:attention_io": "the same",
    "cli/fusemax.py:fusemax": "the same",
    "cli/index.py:index": "the same",
    "cli/translation.py:translation": "the same",
}

SKIPPED_TOKENS = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def docstring_lines(tree: ast.AST) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def code_lines(text: str) -> set[int]:
    """Numbers of the lines that hold code: no blank ones, comments or docstrings."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in SKIPPED_TOKENS:
            lines.update(range(token.start[0], token.end[0] + 1))
    return lines - docstring_lines(ast.parse(text))


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_sizes(path: Path) -> None:
    text = path.read_text()
    lines = code_lines(text)
    cap = MOST_LINES_TECHNIQUE if path.stem in TECHNIQUES else MOST_LINES_OTHER
    assert len(lines) <= cap or name_of(path) in LONGER
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = len(lines & set(range(node.lineno, (node.end_lineno or node.lineno) + 1)))
            assert length <= MOST_LINES_FUNCTION or f"{name_of(path)}:{node.name}" in LONGER, (node.name, length)


def test_test_files_stay_readable() -> None:
    long = {path.name: count for path in TESTS if (count := len(code_lines(path.read_text()))) > MOST_LINES_OTHER}
    assert not long


def test_exceptions_to_the_caps_are_still_needed() -> None:
    for name in LONGER:
        file, _, function = name.partition(":")
        text = (PACKAGE / file).read_text()
        assert not function or re.search(rf"def {function}\b", text), name


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_every_module_says_what_lives_there(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring
    assert len(docstring) > 20


def test_units_live_in_one_place() -> None:
    """Factors between bytes and GB or GiB are written in hardware/units.py only."""
    stray = re.compile(
        r"\b1024\s*\*\*|\b1e9\b|\b10\s*\*\*\s*9\b|\b2\s*\*\*\s*30\b|<<\s*30\b|\b1_?000_?000_?000\b|1073741824"
    )
    places = [
        f"{name_of(path)}:{number}"
        for path in SOURCES
        if name_of(path) not in {"hardware/units.py", *BOUNDS_OF_COUNTS} and "_evidence" not in path.parts
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if stray.search(line.split("#")[0])
    ]
    assert not places


def test_nothing_unpickles_or_evaluates() -> None:
    modules = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    calls = {"eval", "exec", "torch.load"}
    wrong = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in calls:
                wrong.append(f"{name_of(path)}:{node.lineno} calls {ast.unparse(node.func)}")
            wrong += [f"{name_of(path)} imports {name}" for name in names if name.split(".")[0] in modules]
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert isinstance(node.value, ast.Constant)
                assert node.value.value is False, name_of(path)
    assert not wrong


def test_the_library_does_not_print() -> None:
    wrong = [
        f"{name_of(path)}:{node.lineno}"
        for path in SOURCES
        if "_evidence" not in path.parts
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not wrong


def test_there_are_no_junk_drawers() -> None:
    drawers = {"utils", "util", "helpers", "misc", "common"}
    assert not [name_of(path) for path in SOURCES if path.stem in drawers or path.parent.name in drawers]

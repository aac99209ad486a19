"""Which part may import which: a room only rooms listed before it, and the light paths nothing heavy."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from memwall.systems import ROOMS

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "memwall"
# single files above the rooms: what anyone may use, and what only the command line and the experiments use
FOR_ALL = {"errors", "_native"}
FOR_CLI = {"systems", "claims"}
HEAVY = ("torch", "transformers", "matplotlib", "scipy", "pandas", "rich")


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> Iterator[tuple[str, int]]:
    """Every part of memwall that a file imports, at any depth of its code."""
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            names = [node.module or ""]
            if node.module == "memwall":
                names = [f"memwall.{alias.name}" for alias in node.names if not alias.name.startswith("__")]
        for name in names:
            if name.startswith("memwall."):
                yield name.split(".")[1], node.lineno


def test_rooms_are_known() -> None:
    found = {path.name for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").is_file()}
    assert found <= {*ROOMS, "_evidence"}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_listed_before_it(room: str) -> None:
    allowed = {*ROOMS[: ROOMS.index(room) + 1], *FOR_ALL, *(FOR_CLI if room == "cli" else ())}
    wrong = [
        f"{path.relative_to(PACKAGE)}:{line} imports memwall.{target}"
        for path in sorted((PACKAGE / room).rglob("*.py"))
        for target, line in imported_rooms(path)
        if target not in allowed
    ]
    assert not wrong


def test_nothing_but_the_command_line_imports_the_command_line() -> None:
    users = {room_of(path) for path in PACKAGE.rglob("*.py") if any(t == "cli" for t, _ in imported_rooms(path))}
    assert users <= {"cli", "__main__"}


def test_heavy_libraries_are_imported_only_inside_functions() -> None:
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if any(word in path.stem for word in ("torch", "triton", "reference", "hf")) or "_evidence" in path.parts:
            continue  # files that exist for torch alone; the last test asserts that the CPU path leaves them out
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            wrong += [
                f"{path.relative_to(PACKAGE)}:{node.lineno} {name}" for name in names if name.split(".")[0] in HEAVY
            ]
    assert not wrong


def modules_after(*arguments: str) -> set[str]:
    """Names of the modules a `memwall` command has imported by the time it ends."""
    script = (
        "import sys\n"
        "from memwall.cli import main\n"
        "sys.argv = ['memwall', *sys.argv[1:]]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "print('\\n<<', *sys.modules)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rsplit("<<", 1)[1].split())


@pytest.mark.parametrize("arguments", [("--help",), ("run", "--help"), ("systems",)], ids=" ".join)
def test_help_and_systems_need_neither_numpy_nor_torch(arguments: tuple[str, ...]) -> None:
    assert not modules_after(*arguments) & {"numpy", "torch", "rich"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "demo", "The city", "--max-new-tokens", "2", "--memory", "200MB"),
        ("run", "demo", "The city", "--max-new-tokens", "2", "--weights", "int4", "--kv", "kivi", "--json"),
        ("plan", "demo", "--memory", "200MB", "--no-measure"),
    ],
    ids=["run", "run int4 kivi", "plan"],
)
def test_the_cpu_path_leaves_torch_alone(arguments: tuple[str, ...]) -> None:
    # asyncio and what it brings would take 4 MB of every budget
    assert not modules_after(*arguments) & {"torch", "transformers", "matplotlib", "pandas", "asyncio", "starlette"}

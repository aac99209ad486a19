"""The documents: generated parts are fresh, every verb is mentioned, links lead somewhere, examples are valid."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer.main

from memwall.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_docs", ROOT / "scripts" / "write_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


COMMANDS: dict[str, Any] = load_script().all_verbs(typer.main.get_command(app))
"""By name, those of a group under both names (`study kv`)."""


@pytest.mark.parametrize("name", ["docs/cli.md", "docs/systems.md", "README.md"])
def test_generated_parts_are_fresh(name: str) -> None:
    assert (ROOT / name).read_text() == load_script().GENERATED[name](), "run python scripts/write_docs.py"


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_verb_and_option_has_help_and_a_mention(verb: str) -> None:
    command = COMMANDS[verb]
    assert command.help
    assert all(parameter.help for parameter in command.params)
    written_by_hand = [page for page in PAGES if page.name not in ("cli.md", "systems.md")]
    assert any(f"memwall {verb}" in page.read_text() for page in written_by_hand)
    assert f"## memwall {verb}" in (ROOT / "docs" / "cli.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http:", "https:")):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file) if file else page
        assert path.exists(), target
        if anchor and path.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, target


def console_commands(page: Path) -> list[str]:
    blocks = re.findall(r"```console\n(.*?)```", page.read_text(), re.DOTALL)
    return [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ memwall")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_documents_exist(page: Path) -> None:
    for line in console_commands(page):
        words = shlex.split(line.split(" | ")[0], comments=True)
        command = COMMANDS.get(words[1]) or COMMANDS[" ".join(words[1:3])]
        known = {name for parameter in command.params for name in parameter.opts} | {"--help"}
        used = {word.split("=")[0] for word in words[2:] if word.startswith("--")}
        assert used <= known, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_examples_run(page: Path, tmp_path: Path) -> None:
    examples = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    if not examples:
        pytest.skip("no Python on this page")
    # in a process of its own: budgets count the whole process, and this one may hold torch
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(examples)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr

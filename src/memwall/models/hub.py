"""Folders of models in the local cache of the Hugging Face Hub, by the names that people know them by.

The cache keeps `models--ORG--NAME/snapshots/COMMIT/` with links into `blobs/`; `refs/main` says which commit is meant.
Nothing is downloaded here: whoever has a budget wants to know when gigabytes come.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from memwall.errors import InputError

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
COMMIT_CHARACTERS = 64


def is_repository(name: str) -> bool:
    """Whether a name has the form ORG/NAME, as on the Hub."""
    return REPOSITORY.fullmatch(name) is not None and ".." not in name and "--" not in name


def cache_folder() -> Path:
    """Where the Hub's own client keeps what it downloads."""
    if named := os.environ.get("HF_HUB_CACHE"):
        return Path(named).expanduser()
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(home).expanduser() / "hub"


def cached(name: str) -> Path | None:
    """The snapshot of ORG/NAME in the cache; None where it is not there."""
    return snapshot(cache_folder() / f"models--{name.replace('/', '--')}") if is_repository(name) else None


def snapshot(folder: Path) -> Path | None:
    """The model's folder within one of the cache's: what `refs/main` names, else the only snapshot."""
    held = folder / "snapshots"
    if not held.is_dir():
        return None
    main = folder / "refs" / "main"
    if main.is_file():
        with main.open(encoding="ascii", errors="replace") as file:
            commit = file.read(COMMIT_CHARACTERS).strip()
        if commit.isalnum() and (held / commit).is_dir():
            return held / commit
    found = sorted(path for path in held.iterdir() if path.is_dir())
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:3])
        raise InputError(f"{held}: has several snapshots ({names}); name the folder of one")
    return found[0] if found else None


def missing_hint(name: str) -> str:
    """For a name of the Hub that is not in its cache: how to have it there. Empty for other names."""
    if not is_repository(name):
        return ""
    return f", nor is it in the Hub's cache ({cache_folder()}): `hf download {name}` fetches it"

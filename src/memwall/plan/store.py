"""What planning measured and need not measure again: small JSON files under the user's cache folder, written whole or
not at all.

A damaged or foreign file counts as absent: everything in it can be measured again.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from memwall.hardware.system import cache_directory, write_whole

MAX_FILE_BYTES = 1 << 24


def read(name: str) -> dict[str, Any]:
    """The contents of a cache file; empty when there is none that can be read."""
    path = cache_directory() / f"{name}.json"
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            return {}
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def update(name: str, entries: dict[str, Any]) -> None:
    """Add entries to a cache file. A cache that cannot be written is no error: the figures are measured again next
    time.
    """
    if not entries:
        return
    folder: Path = cache_directory()
    text = json.dumps(read(name) | entries, indent=1, sort_keys=True, allow_nan=False)
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / f"{name}.json", text)

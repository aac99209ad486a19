"""Kept figures: merged, written whole, and never trusted when damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from memwall.plan import store


def test_entries_are_merged(own_cache: Path) -> None:
    store.update("figures", {"a": 1})
    store.update("figures", {"b": [2.5]})
    assert store.read("figures") == {"a": 1, "b": [2.5]}
    assert [path.name for path in own_cache.iterdir()] == ["figures.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_file_counts_as_absent(own_cache: Path, content: bytes) -> None:
    own_cache.mkdir(parents=True)
    (own_cache / "figures.json").write_bytes(content)
    assert store.read("figures") == {}
    store.update("figures", {"a": 1})
    assert store.read("figures") == {"a": 1}


def test_a_folder_that_cannot_be_written_is_no_error(own_cache: Path) -> None:
    own_cache.parent.mkdir(parents=True, exist_ok=True)
    own_cache.write_text("a file where the folder should be")
    store.update("figures", {"a": 1})
    assert store.read("figures") == {}


def test_relative_cache_home_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert store.cache_directory().is_absolute()

"""Models of the Hub's cache by their names: the layout that its client writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from memwall.errors import InputError
from memwall.models import ModelConfig, model_directory
from memwall.models.checkpoint import Checkpoint
from memwall.models.config import checked_directory
from memwall.models.hub import cache_folder, cached, is_repository, snapshot


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The demo model as `org/small`, its files links into blobs."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    home = tmp_path / "hub" / "models--org--small"
    (home / "blobs").mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("abc123")
    place = home / "snapshots" / "abc123"
    place.mkdir(parents=True)
    for number, file in enumerate(sorted(path for path in model_directory("demo").iterdir() if path.is_file())):
        blob = home / "blobs" / f"{number:08x}"
        blob.write_bytes(file.read_bytes())
        (place / file.name).symlink_to(Path("../../blobs") / blob.name)
    return home


def test_a_cached_model_is_found_by_its_name_and_by_its_folder(hub: Path) -> None:
    place = hub / "snapshots" / "abc123"
    assert cached("org/small") == place
    assert model_directory("org/small") == place
    assert model_directory(hub) == place
    assert model_directory(place) == place
    config = ModelConfig.from_directory(place)
    assert Checkpoint(place, config) is not None


def test_the_snapshot_is_what_main_names(hub: Path) -> None:
    (hub / "snapshots" / "zzz").mkdir()
    assert snapshot(hub) == hub / "snapshots" / "abc123"
    (hub / "refs" / "main").unlink()
    with pytest.raises(InputError, match="several snapshots"):
        snapshot(hub)
    (hub / "snapshots" / "zzz").rmdir()
    assert snapshot(hub) == hub / "snapshots" / "abc123"
    (hub / "refs" / "main").write_text("../../elsewhere")  # a name never becomes a path
    assert snapshot(hub) == hub / "snapshots" / "abc123"


def test_what_is_not_there_says_how_to_have_it(hub: Path) -> None:
    assert model_directory("org/other") == Path("org/other")
    with pytest.raises(InputError, match=r"nor is it in the Hub's cache .*hf download org/other"):
        checked_directory(model_directory("org/other"))
    with pytest.raises(InputError, match="give a model folder or 'demo'"):
        checked_directory(model_directory("nowhere"))


@pytest.mark.parametrize("name", ["a", "a/b/c", "../a", "a/..", "/a/b", "a b/c", "a/", "org/na--me"])
def test_other_names_are_no_repositories(name: str) -> None:
    assert not is_repository(name)


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "hub"
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
    assert cache_folder() == tmp_path / "c" / "huggingface" / "hub"


def test_a_home_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m").mkdir()
    assert model_directory("~/m") == tmp_path / "m"

"""The table of systems holds every published system once, and its states are honest."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from memwall import systems
from memwall.errors import InputError

ALL = systems.all_systems()


def test_every_system_is_there_once() -> None:
    slugs = [system.slug for system in ALL]
    assert len(slugs) == len(set(slugs)) == 84
    assert slugs == sorted(slugs)
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug) for slug in slugs)


@pytest.mark.parametrize("system", ALL, ids=lambda system: system.slug)
def test_facts_are_complete(system: systems.System) -> None:
    assert system.family in systems.FAMILIES
    assert system.room in systems.ROOMS
    assert 2000 < system.year < 2030
    assert system.name
    assert system.title
    assert system.source
    assert system.claims
    assert all(claim.strip() == claim and "\n" not in claim and len(claim) < 200 for claim in system.claims)


@pytest.mark.parametrize("system", ALL, ids=lambda system: system.slug)
def test_state_follows_from_the_files(system: systems.System) -> None:
    assert (system.module is None) == (system.state == "missing")
    if system.module is not None:
        assert importlib.util.find_spec(system.module) is not None
    if system.state == "works" or system.complete:
        assert system.evidence_path is not None
        assert system.module is not None


def test_every_experiment_belongs_to_a_system() -> None:
    folder = Path(systems.__file__).resolve().parents[2] / "evidence"
    stems = {system.file_stem for system in ALL}
    strays = [path.name for path in folder.glob("*.py") if path.stem not in stems and not path.stem.startswith("_")]
    assert not strays


def test_selection() -> None:
    codecs = systems.select_systems(family="codec")
    assert codecs
    assert {system.family for system in codecs} == {"codec"}
    parts = [systems.select_systems(state=state) for state in systems.STATES]
    assert sum(map(len, parts)) == len(ALL)
    with pytest.raises(InputError, match="cache policy"):
        systems.select_systems(family="caches")
    with pytest.raises(InputError, match="works, partial, missing"):
        systems.select_systems(state="done")


def test_unknown_slug_names_the_nearest() -> None:
    assert systems.find_system("kivi").name == "KIVI"
    with pytest.raises(InputError, match="kivi"):
        systems.find_system("kivy")


def test_json_has_the_promised_keys() -> None:
    for system in ALL:
        document = system.to_json()
        assert {"slug", "name", "family", "state", "module", "claims"} <= document.keys()
        assert isinstance(document["claims"], list)

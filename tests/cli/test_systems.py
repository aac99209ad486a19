"""`memwall systems`."""

from __future__ import annotations

import json
from typing import Any


def test_table_and_json(memwall: Any) -> None:
    table = memwall("systems")
    assert table.exit_code == 0
    assert "kivi" in table.stdout
    assert "84 systems" in table.stderr
    documents = json.loads(memwall("systems", "--json").stdout)
    assert len(documents) == 84
    assert all({"slug", "name", "family", "state", "module", "claims"} <= document.keys() for document in documents)


def test_filters(memwall: Any) -> None:
    documents = json.loads(memwall("systems", "--json", "--family", "learner", "--state", "missing").stdout)
    assert documents
    assert {(document["family"], document["state"]) for document in documents} == {("learner", "missing")}

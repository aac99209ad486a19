"""What was fitted to a model is found again for that model, with those settings, and for no other."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from memwall.errors import InputError
from memwall.kv import fitted, table
from memwall.kv.base import KVCache
from memwall.kv.policy import Policy, parse
from memwall.models import model_directory


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def model(fingerprint: str) -> Any:
    return SimpleNamespace(fingerprint=fingerprint, directory=Path("some-model"))


def test_arrays_come_back_for_the_same_model_and_key() -> None:
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}
    fitted.save("one", "half", arrays)
    found = fitted.load(model("one"), Policy("learn"), "half")
    assert {name: array.tolist() for name, array in found.items()} == {n: a.tolist() for n, a in arrays.items()}
    for other, key in (("two", "half"), ("one", "third")):
        with pytest.raises(InputError, match=r"memwall fit 'some-model' 'learn\(0.5\)'"):
            fitted.load(model(other), parse("learn(0.5)+kivi"), key)


def test_a_file_under_the_wrong_name_is_refused() -> None:
    path = fitted.save("one", "half", {"a": np.ones(2, np.float32)})
    path.rename(fitted.place("two", "half"))
    with pytest.raises(InputError, match="another model"):
        fitted.load(model("two"), Policy("learn"), "half")


class Learner(KVCache):
    fits = True
    seen: ClassVar[list[Any]] = []

    @classmethod
    def fit_key(cls, policy: Policy) -> str:
        return f"learner {policy.settings['amount']}"

    @classmethod
    def fit(cls, policy: Policy, directory: Path, *rest: Any) -> dict[str, np.ndarray]:
        cls.seen.append((str(policy), directory.name, rest))
        return {"w": np.full(3, 2.0, np.float32)}


def test_fitting_covers_the_parts_that_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    real = table.technique
    for place in (table, fitted):
        monkeypatch.setattr(place, "technique", lambda name: Learner if name == "learner" else real(name))
    (path,) = fitted.fit("learner(0.5)", model_directory("demo"), text="words", threads=1)
    assert path.is_file()
    assert Learner.seen == [("learner(0.5)", "demo", ("words", 1, None))]
    with pytest.raises(InputError, match="no part of it learns"):
        fitted.fit("kivi", model_directory("demo"))

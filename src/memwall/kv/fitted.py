"""What a policy learned of one model (factors, retaining heads, symbol statistics): fitted once, kept for all runs.

Arrays lie in a safetensors file in the user's cache folder, under a digest of the model's fingerprint and of the
settings that the fit depends on, so that they are found again for this very model and for no other.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from memwall.errors import InputError
from memwall.formats.safetensors_file import SafetensorsFile, SafetensorsWriter
from memwall.hardware.system import cache_directory
from memwall.kv.policy import Policy, parse
from memwall.kv.table import LEARNERS, POLICIES, learner, resolve, technique
from memwall.models.checkpoint import Checkpoint

if TYPE_CHECKING:
    from memwall.kv.base import CacheModel

Progress = Callable[[str, int, int], None]


def place(fingerprint: str, key: str) -> Path:
    """The file of what was fitted under `key` to the model of that fingerprint."""
    digest = hashlib.sha256(f"{fingerprint} {key}".encode()).hexdigest()
    return cache_directory() / "fitted" / f"{digest[:40]}.safetensors"


def save(fingerprint: str, key: str, arrays: Mapping[str, np.ndarray], policy: str = "") -> Path:
    """Writes the arrays; the file is whole or not there. policy: what the user fitted, for `stored` to tell."""
    path = place(fingerprint, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    specs = [(name, array.dtype, array.shape) for name, array in arrays.items()]
    with SafetensorsWriter(path, specs, {"model": fingerprint, "key": key, "policy": policy}) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
    return path


def load(model: CacheModel, policy: Policy, key: str, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays fitted under `key` to this model (those named that are there, or all), read into memory.

    InputError that says how to make them.
    """
    path = place(model.fingerprint, key)
    if not path.is_file():
        own, where = policy.parts[0], str(model.directory)
        raise InputError(f"{own} must be fitted to {where} once: run `memwall fit {where!r} '{own}'`")
    with SafetensorsFile(path) as file:
        if file.metadata.get("model") != model.fingerprint or file.metadata.get("key") != key:
            raise InputError(f"{path}: was fitted to another model or with other settings; remove it and fit again")
        return {name: np.array(file.tensor(name)) for name in file.names() if names is None or name in names}


def remembered(model: CacheModel, key: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """What `make` computes from the weights of this model: at the first use of it, then from the file it was kept in.

    For what takes seconds and needs no text, so that nobody has to ask for it.
    """
    path = place(model.fingerprint, key)
    if path.is_file():
        with SafetensorsFile(path) as file:
            if file.metadata.get("model") == model.fingerprint and file.metadata.get("key") == key:
                return {name: np.array(file.tensor(name)) for name in file.names()}
    arrays = make()
    with contextlib.suppress(OSError):  # a folder that cannot be written costs the time again, nothing else
        save(model.fingerprint, key, arrays)
    return arrays


def fit(
    policy: str,
    directory: Path,
    *,
    text: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Fits every part of a policy string that needs it to the model in `directory`; gives the files written.

    text: what to learn on; None takes the bundled calibration text. InputError when no part needs fitting.
    """
    if parse(policy).name in LEARNERS:
        learners = [(parse(policy), learner(parse(policy).name))]
    else:
        learners = [(part, technique(part.name)) for part in resolve(policy).parts if technique(part.name).fits]
    if not learners:
        fitting = "cskv and locret, for example, do"
        raise InputError(f"KV policy {policy}: no part of it learns from the model ({fitting}); it runs as it is")
    with Checkpoint(directory) as checkpoint:
        fingerprint = checkpoint.fingerprint()
    paths = []
    for part, kind in learners:
        arrays = kind.fit(part, directory, text, threads, progress)
        paths.append(save(fingerprint, kind.fit_key(part), arrays, str(part)))
    return paths


def stored(fingerprint: str) -> list[str]:
    """Policies (never codecs of saved caches) that were fitted to the model of that fingerprint, as `fit` was asked."""
    found = set()
    for path in sorted((cache_directory() / "fitted").glob("*.safetensors")):
        with contextlib.suppress(OSError, InputError), SafetensorsFile(path) as file:
            policy = file.metadata.get("policy", "")
            if file.metadata.get("model") == fingerprint and policy and parse(policy).name in POLICIES:
                found.add(policy)
    return sorted(found)


def missing(fingerprint: str, policy: str) -> list[str]:
    """Parts of a policy that must be fitted to the model before it can run, and have not been."""
    parts = ((part, technique(part.name)) for part in resolve(policy).parts)
    return [
        str(part)
        for part, kind in parts
        if kind.must_fit(part) and not place(fingerprint, kind.fit_key(part)).is_file()
    ]

"""`memwall study kv`: every method at every budget through every task, each cell stored as soon as it is finished.

A cell's file is named by what decides its figures (model, weights, policy, task, sizes, text, version), so that a study
that was stopped goes on where it was, one that is asked for more reuses what it has, and nothing stale is shown.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from memwall import __version__
from memwall.errors import InputError
from memwall.hardware.system import write_whole
from memwall.studies import kv_advice, kv_peers
from memwall.studies.kv_methods import Cell, Ground, cells
from memwall.studies.kv_resident import resident_bytes_of
from memwall.studies.kv_tasks import QUICK, TASKS, Sizes, Tasks
from memwall.studies.subjects import CacheSubject, StudyModel, Subject

STUDY_VERSION = 1
RESIDENT = "resident"

Progress = Callable[[int, int, str], None]


@dataclass(slots=True, kw_only=True)
class Row:
    """One policy: figures of the tasks that are finished, by task. library: memwall or the peer's name and version."""

    method: str
    policy: str
    budget: float | None
    library: str = "memwall"
    skipped: str = ""
    note: str = ""
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)

    def get(self, task: str, name: str) -> Any:
        """A figure, or None where its task has not been run."""
        return self.figures.get(task, {}).get(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """All rows, and what they were measured on."""

    model: str
    fingerprint: str
    weights: str
    sizes: Sizes
    machine: str
    seconds: float
    rows: list[Row]
    version: int = STUDY_VERSION

    def to_dict(self) -> dict[str, Any]:
        """The JSON object, version first; `advice` says what to take."""
        body = asdict(self)
        picks = [{"budget": p.budget, "goal": p.goal, "policy": p.policy} for p in kv_advice.picks(self)]
        return {"version": body.pop("version"), **body, "advice": picks}


class Store:
    """Finished cells in a folder: one small JSON file each, whole or not there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def read(self, key: str) -> dict[str, Any] | None:
        """Figures of a cell; None where it has none, or a file that cannot be read."""
        try:
            found = json.loads((self.folder / f"{key}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return found["figures"] if isinstance(found, dict) and isinstance(found.get("figures"), dict) else None

    def write(self, key: str, described: dict[str, Any], figures: dict[str, Any]) -> None:
        """Keeps a cell, and beside the figures what they are of, for a person who looks."""
        text = json.dumps({"cell": described, "figures": figures}, indent=1, allow_nan=False)
        write_whole(self.folder / f"{key}.json", text)


class Runner:
    """One model and its material; runs the cells that the store lacks."""

    def __init__(self, directory: Path, name: str, text: str, sizes: Sizes, weights: str, store: Store) -> None:
        self.directory, self.name, self.text, self.sizes, self.weights = directory, name, text, sizes, weights
        self.store = store
        self.model = StudyModel(directory, weights)
        self.tasks = Tasks(self.model, text, sizes)
        self.ground = Ground(
            shape=self.model.shape,
            fingerprint=self.model.fingerprint,
            model=name,
            prompt_tokens=sizes.recall_tokens,
            context_tokens=self.model.context_tokens,
        )

    def fill(self, row: Row, task: str, make: Callable[[], Subject]) -> None:
        """The row's figures of one task, from the store or measured now; what cannot run says why."""
        described = self._described(row, task)
        key = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]
        figures = self.store.read(key)
        if figures is None:
            began = time.perf_counter()
            try:
                figures = self._measured(row, task, make)
            except InputError as refused:
                row.skipped = str(refused)
                return
            figures["seconds"] = time.perf_counter() - began
            self.store.write(key, described, figures)
        row.figures[task] = figures

    def _measured(self, row: Row, task: str, make: Callable[[], Subject]) -> dict[str, Any]:
        if task == RESIDENT:
            return resident_bytes_of(self.directory, self.weights, row.policy, self.sizes.recall_tokens, self.text)
        subject = make()
        try:
            return self.tasks.run(task, subject)
        finally:
            subject.release()

    def _described(self, row: Row, task: str) -> dict[str, Any]:
        text = hashlib.sha256(self.text.encode()).hexdigest()[:16]
        return {
            "study": STUDY_VERSION, "memwall": __version__, "model": self.model.fingerprint, "weights": self.weights,
            "library": row.library, "policy": row.policy, "task": task, "sizes": asdict(self.sizes), "text": text,
        }  # fmt: skip


def study_kv(
    directory: Path,
    name: str,
    *,
    methods: Sequence[str],
    budgets: Sequence[float],
    sizes: Sizes,
    text: str,
    store: Path,
    weights: str = "float32",
    peers: bool = True,
    resident: bool = True,
    machine: str = "",
    progress: Progress | None = None,
) -> Study:
    """Runs what is missing and gives all rows. name: the model as the user called it. progress(done, in all, what)."""
    began = time.perf_counter()
    runner = Runner(directory, name, text, sizes, weights, Store(store))
    rows = [_row(cell) for cell in cells(methods, budgets, runner.ground)]
    others = kv_peers.peers(directory, budgets, runner.model, weights=weights, quick=sizes == QUICK) if peers else []
    jobs: list[tuple[Row, str, Callable[[], Subject]]] = []
    for row in rows:
        if not row.skipped:
            jobs += [(row, task, lambda row=row: CacheSubject(runner.model, row.policy)) for task in TASKS]  # type: ignore[misc]
    for peer in others:
        row = Row(
            method=peer.method, policy=peer.policy, budget=peer.budget, library=peer.library, skipped=peer.skipped,
            note=peer.note,
        )  # fmt: skip
        rows.append(row)
        if not peer.skipped:
            jobs += [(row, task, peer.make) for task in TASKS]
    extra = MOST_RESIDENT if resident else 0
    for done, (row, task, make) in enumerate(jobs):
        if progress is not None:
            progress(done, len(jobs) + extra, f"{row.policy or row.method}, {task}")
        if not row.skipped:
            runner.fill(row, task, make)
    if resident:
        for done, row in enumerate(_chosen(rows)):
            if progress is not None:
                progress(len(jobs) + min(done, extra - 1), len(jobs) + extra, f"{row.policy}, resident bytes")
            runner.fill(row, RESIDENT, lambda: CacheSubject(runner.model, "float16"))
    if progress is not None:
        progress(len(jobs) + extra, len(jobs) + extra, "done")
    return Study(
        model=name,
        fingerprint=runner.model.fingerprint,
        weights=weights,
        sizes=sizes,
        machine=machine,
        seconds=time.perf_counter() - began,
        rows=rows,
    )


def frontier(rows: Iterable[Row]) -> list[Row]:
    """Rows of which no other has fewer bytes and less divergence: the ones to choose from."""
    measured = [row for row in rows if row.get("text", "kl_nats") is not None]
    place = {id(row): (row.get("text", "kv_bytes"), row.get("text", "kl_nats")) for row in measured}
    return [
        row
        for row in measured
        if not any(
            place[id(other)] != place[id(row)] and all(a <= b for a, b in zip(place[id(other)], place[id(row)]))
            for other in measured
        )
    ]


MOST_RESIDENT = 6
"""Most rows whose resident bytes are measured."""


def _chosen(rows: Sequence[Row]) -> list[Row]:
    """float16, and memwall's own rows on the frontier, the smallest first."""
    own = [row for row in rows if row.library == "memwall"]
    plain = [row for row in own if row.policy == "float16"]
    best = sorted(frontier(own), key=lambda row: row.get("text", "kv_bytes"))
    return [*plain, *(row for row in best if row not in plain)][:MOST_RESIDENT]


def _row(cell: Cell) -> Row:
    return Row(method=cell.method, policy=cell.policy, budget=cell.budget, skipped=cell.skipped)

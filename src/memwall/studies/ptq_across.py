"""Format studies of several models side by side: which answers hold for all of them, and where models part.

The paper's answers differ by family: nf4 is calmer for one at low temperature, fp4 for another. So every question is
asked of every model alone, with its own errors, and nothing is averaged over models: a verdict is that of all of them,
or they differ.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from memwall.errors import InputError
from memwall.hardware.system import write_whole
from memwall.studies import ptq_report
from memwall.studies.ptq_answers import answers, to_dict
from memwall.studies.ptq_impact_study import STUDY_VERSION, Study

DIFFER = "models differ"


@dataclass(frozen=True, slots=True, kw_only=True)
class Across:
    """One question. verdict: what all models say, or that they differ; models: what each says, and its figures."""

    question: str
    verdict: str
    models: dict[str, tuple[str, str]]

    @property
    def told(self) -> str:
        """For the terminal."""
        if self.verdict != DIFFER:
            return f"{self.verdict} for {', '.join(self.models)}: {self.question}"
        each = "; ".join(f"{model} {verdict}" for model, (verdict, _) in self.models.items())
        return f"{DIFFER}: {self.question} ({each})"


def across(studies: Sequence[Study]) -> list[Across]:
    """Every question that one of them answers."""
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for study in studies:
        for one in answers(study):
            found.setdefault(one.question, {})[study.model] = (one.verdict, one.figures)
    return [
        Across(question=question, verdict=_common([verdict for verdict, _ in models.values()]), models=models)
        for question, models in found.items()
    ]


def _common(verdicts: Sequence[str]) -> str:
    return verdicts[0] if len(set(verdicts)) == 1 else DIFFER


def whole(studies: Sequence[Study]) -> dict[str, Any]:
    """The JSON object of several models: each as it has it alone, and the questions across them."""
    return {
        "version": STUDY_VERSION,
        "models": [to_dict(study) for study in studies],
        "across": [asdict(one) for one in across(studies)],
    }


def folder_names(models: Sequence[str]) -> list[str]:
    """A folder for each model's page: the end of its path. InputError where two are the same."""
    names = [Path(model).name or "model" for model in models]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"two of the models are called {twice}: give each once, in folders of different names")
    return names


def write(studies: Sequence[Study], folder: Path, memory_bytes: int | None = None) -> list[Path]:
    """A folder with all of `ptq_report.write` for each model, and study.json of all."""
    made = []
    for study, name in zip(studies, folder_names([study.model for study in studies]), strict=True):
        made += ptq_report.write(study, folder / name, memory_bytes)
    content = json.dumps(whole(studies), indent=1, allow_nan=False) + "\n"
    write_whole(folder / "study.json", content.encode())
    return [*made, folder / "study.json"]

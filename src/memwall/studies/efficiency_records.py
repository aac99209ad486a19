"""One record per run of the efficiency study, and the six metrics that it holds.

*Source*: EfficientLLM (2025), arXiv 2505.13840: AMU, PCU, AL, throughput (TT, ST, IT), AEC, MCR.
*Idea*: a table that is made of records alone can be checked and made again. A record says what ran, where, with what
seed, holds the raw samples, and nothing in a table comes from anywhere else.
*Units*: bytes, seconds, watts, joules; throughput in tokens or samples per second, per parameter where the paper
divides by it (TT, ST).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from memwall import __version__
from memwall.errors import InputError
from memwall.hardware.meter import Series
from memwall.memory import resident_bytes

RECORD_VERSION = 1
EXACTLY = partial(resident_bytes, exact=True)
"""For meters' ends: the quick count of resident bytes is off by up to half a megabyte, which small models feel."""
STAGES = ("pretraining", "fine-tuning", "inference")


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """The six, and what belongs beside them. None: it does not apply to this run."""

    amu_bytes: float
    """Mean resident bytes of the whole process over the stretch."""
    amu_own_bytes: float | None = None
    """The same without what the process held before the model was made."""
    pcu: float
    """Mean share of all processors, 1.0 = all busy."""
    al_s: float
    """Mean seconds of a step or request."""
    tt: float | None = None
    """Pretraining: tokens / parameters / seconds."""
    st: float | None = None
    """Fine-tuning: samples / parameters / seconds."""
    it: float | None = None
    """Inference: generated tokens / seconds."""
    aec_w: float
    """Mean power. The paper calls it energy; joules are the next two."""
    joules: float
    joules_per_token: float
    power_source: str
    """`rapl`, or `modelled` where there is no counter."""
    mcr: float | None = None
    """Size ratio times quality ratio over the group's baseline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One run.

    axis and group: what it is ranked with (`attention`, `peft`, ... and a model size or budget); technique: its name
    there; stage: one of STAGES. model: its configuration. flop_per_token: forward pass. tokens: seen in the stretch, or
    in all of training. quality: `losses` (nats per token, one per held-out window) for all, and what else was judged.
    figures: other measured numbers, such as `kv_bytes_per_token`.
    """

    axis: str
    group: str
    technique: str
    stage: str
    model: dict[str, Any]
    num_parameters: int
    num_trainable: int | None = None
    num_active: int | None = None
    flop_per_token: float
    tokens: int
    hardware: dict[str, Any]
    versions: dict[str, str]
    seed: int
    dt_s: float
    series: Series
    metrics: Metrics
    quality: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    version: int = RECORD_VERSION

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise InputError(f"stage {self.stage!r}: must be one of {', '.join(STAGES)}")

    @property
    def loss(self) -> float | None:
        """Mean held-out loss in nats per token, where it was measured."""
        losses = self.quality.get("losses")
        return sum(losses) / len(losses) if losses else None

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    @staticmethod
    def from_dict(told: dict[str, Any]) -> Record:
        """What `to_dict` gave; InputError for anything else."""
        known = {each.name for each in fields(Record)}
        try:
            if told["version"] != RECORD_VERSION:
                raise InputError(f"a record of version {told['version']}; this memwall reads {RECORD_VERSION}")
            unknown = told.keys() - known
            if unknown:
                raise InputError(f"a record with unknown fields: {', '.join(sorted(unknown))}")
            parts = {"series": Series.from_dict(told["series"]), "metrics": Metrics(**told["metrics"])}
            return Record(**{**told, **parts})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(f"not a record of the efficiency study: {error}") from None


def metrics_of(
    series: Series,
    *,
    steps_s: Sequence[float],
    stage: str,
    count: float,
    num_parameters: int,
    tokens: int,
    base_bytes: int | None = None,
    mcr: float | None = None,
) -> Metrics:
    """The metrics of a stretch.

    steps_s: seconds of each step or request (compute and communication; one process has only the first). count: tokens
    (pretraining, inference) or samples (fine-tuning) in them. base_bytes: resident before the model was made.
    """
    if not steps_s or not sum(steps_s) > 0:
        raise InputError("a run without steps has no latency")
    amu, rate = series.mean_memory_bytes, count / sum(steps_s)
    joules = series.mean_watts * series.seconds
    return Metrics(
        amu_bytes=amu,
        amu_own_bytes=None if base_bytes is None else amu - base_bytes,
        pcu=series.mean_utilisation,
        al_s=sum(steps_s) / len(steps_s),
        tt=rate / num_parameters if stage == "pretraining" else None,
        st=rate / num_parameters if stage == "fine-tuning" else None,
        it=rate if stage == "inference" else None,
        aec_w=series.mean_watts,
        joules=joules,
        joules_per_token=joules / max(tokens, 1),
        power_source=series.power_source,
        mcr=mcr,
    )


def compression_ratio(original_bytes: float, bytes_: float, original_loss: float, loss: float) -> float:
    """MCR = (size / compressed size) * (compressed quality / quality), quality = exp(-loss): a probability, so that
    more is better. A ratio of perplexities the other way round would reward damage.
    """
    return original_bytes / bytes_ * math.exp(original_loss - loss)


def software_versions() -> dict[str, str]:
    """Of memwall, Python and what does the arithmetic."""
    import platform

    found = {"memwall": __version__, "python": platform.python_version()}
    for name in ("numpy", "torch"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


class RecordStore:
    """Records in a folder, one JSON file a run, whole or not there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    @staticmethod
    def key(described: dict[str, Any]) -> str:
        """A file's name from all that decides a run."""
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]

    def read(self, key: str) -> Record | None:
        """None where there is no such record, or one that cannot be read."""
        try:
            return Record.from_dict(json.loads((self.folder / f"{key}.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError, InputError):
            return None

    def write(self, key: str, record: Record) -> None:
        """Keeps a record."""
        descriptor, name = tempfile.mkstemp(dir=self.folder, prefix=".record.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(record.to_dict(), file, allow_nan=False)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, self.folder / f"{key}.json")
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

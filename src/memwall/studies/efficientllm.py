"""`memwall study efficiency`: six metrics, with quality beside them, for every technique on one machine.

*Source*: EfficientLLM: Efficiency in Large Language Models (2025), arXiv 2505.13840.
*Idea*: papers report the metric that suits them. Here each run is metered by the same sampler and becomes one record;
ranks, scores and fronts are made of records alone. Five axes: attention and positional encodings at equal parameters,
experts at equal operations (models trained here, then decoded through their caches), precision (a stored model, as
`memwall run` runs it), and fine-tuning methods.
*Units and shapes*: `efficiency_records`.
*Differs from the paper*: models of one to sixteen million parameters on bytes of text instead of 0.5 to 72 billion on
tokens, and one processor instead of many GPUs, so that what the paper says of scale ("beyond 14B") is not tested.
Without counters of energy, watts are a declared model's and say so.
*Cost*: one training and one decoding a model and seed, each in a process of its own; a record is some 10 KB.
*Holds when*: nothing else works the machine; `others` in a record says how much of it other processes took.

A record's file is named by all that decides its run, so a study that was stopped goes on where it was. The weights of a
model wait beside the records until it has been decoded with.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memwall import __version__
from memwall.errors import InputError
from memwall.hardware.system import usable_processors
from memwall.models import Checkpoint, ModelConfig
from memwall.studies.efficiency_records import Record, RecordStore
from memwall.studies.efficiency_sizes import AXES, BASELINES, FULL, PEFT, PRECISION, TRAINED, Sizes
from memwall.studies.efficiency_worker import Worker

STUDY_VERSION = 2
PEFT_MODULE = "memwall.studies.efficiency_peft"
LEAST_TEXT_BYTES = 4096

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """All records, and what was left out with the reason."""

    records: tuple[Record, ...]
    left_out: tuple[str, ...]
    sizes: Sizes
    machine: str
    seconds: float
    version: int = STUDY_VERSION


@dataclass(kw_only=True)
class Runner:
    """What all runs share. text and held_out: bytes to train on and to judge on."""

    sizes: Sizes
    text: bytes
    held_out: bytes
    directory: Path
    name: str
    store: RecordStore
    threads: int
    progress: Progress | None
    whole: int = 0
    done: int = 0
    stack: ExitStack = field(default_factory=ExitStack)
    _workers: dict[str, Worker] = field(default_factory=dict)

    def __post_init__(self) -> None:
        least = max(LEAST_TEXT_BYTES, self.sizes.tokens + 2)
        for what, text in (("text to train on", self.text), ("held-out text", self.held_out)):
            if len(text) < least:
                raise InputError(f"the {what} has {len(text):,} bytes; give at least {least:,}")
        self._digest = hashlib.sha256(self.text + b"\0" + self.held_out).hexdigest()[:32]
        self.waiting = self.store.folder / "waiting"
        self.waiting.mkdir(exist_ok=True)
        folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory(prefix="memwall-study-")))
        self._text, self._held_out = folder / "text", folder / "held_out"
        self._text.write_bytes(self.text)
        self._held_out.write_bytes(self.held_out)

    def key(self, **more: Any) -> str:
        """Of a record's file."""
        return self.store.key(
            {"study": STUDY_VERSION, "memwall": __version__, "text": self._digest, "sizes": self.sizes.to_dict(),
             "threads": self.threads, **more}
        )  # fmt: skip

    def step(self, what: str, inside: float = 0.0) -> None:
        """Tells how far the study is; `inside`: share of the run at work."""
        if self.progress is not None:
            self.progress(int(100 * (self.done + inside)), 100 * self.whole, what)

    def call(self, module: str, job: str, what: str, request: dict[str, Any]) -> Record:
        """A record from a job of `module`, run in a process."""
        if module not in self._workers:
            self._workers[module] = self.stack.enter_context(Worker(module, threads=self.threads))
        request = {"sizes": self.sizes.to_dict(), "threads": self.threads, "held_out": str(self._held_out), **request}
        told = self._workers[module].call(
            job, request, lambda done, whole, doing: self.step(f"{what}: {doing}", done / max(whole, 1))
        )
        return Record.from_dict(told)

    def trained(self, axis: str, technique: str, seed: int) -> Iterator[Record]:
        """Records of training and of decoding; one that is kept is not made again."""
        keys = {
            stage: self.key(axis=axis, technique=technique, seed=seed, stage=stage) for stage in ("train", "decode")
        }
        weights = self.waiting / f"{keys['train']}.safetensors"
        made, decoded = self.store.read(keys["train"]), self.store.read(keys["decode"])
        what = f"{axis} {technique}, seed {seed}"
        request = {"axis": axis, "technique": technique, "seed": seed, "weights": str(weights)}
        module = "memwall.studies.efficiency_torch"
        self.step(what)
        if made is None or (decoded is None and not weights.exists()):
            made = self.call(module, "pretrain", what, request | {"text": str(self._text)})
            self.store.write(keys["train"], made)
        yield made
        self.done += 1
        self.step(what)
        if decoded is None:
            decoded = self.call(module, "decode", what, request | {"losses": made.quality["losses"]})
            self.store.write(keys["decode"], decoded)
        weights.unlink(missing_ok=True)
        self.done += 1
        yield decoded

    def precisions(self, techniques: Sequence[str]) -> Iterator[Record]:
        """A record a precision; the baseline's comes first, whatever is asked for, as others are held against it."""
        fingerprint = checked(self.directory)
        baseline: dict[str, Any] | None = None
        for technique in dict.fromkeys((BASELINES[PRECISION], *techniques)):
            self.step(f"{PRECISION} {technique}")
            key = self.key(axis=PRECISION, technique=technique, model=fingerprint)
            record = self.store.read(key)
            if record is None:
                request = {"directory": str(self.directory), "name": self.name, "technique": technique,
                           "baseline": baseline}  # fmt: skip
                module = "memwall.studies.efficiency_precision"
                record = self.call(module, "stored", f"{PRECISION} {technique}", request)
                self.store.write(key, record)
            if baseline is None:
                baseline = {"weight_bytes": record.figures["weight_bytes"], "losses": record.quality["losses"]}
            self.done += 1
            yield record


def study_efficiency(
    directory: Path,
    name: str,
    *,
    axes: Mapping[str, Sequence[str]] = AXES,
    sizes: Sizes = FULL,
    text: bytes,
    held_out: bytes,
    store: Path,
    threads: int | None = None,
    machine: str = "",
    progress: Progress | None = None,
) -> Study:
    """Measures what the store lacks, and gives all records. directory, name: the stored model whose precisions are
    compared. axes: axis -> techniques. store: folder of the records. progress(done, in all, what).
    """
    began = time.perf_counter()
    runner = Runner(
        sizes=sizes, text=text, held_out=held_out, directory=directory, name=name, store=RecordStore(store),
        threads=threads or usable_processors(), progress=progress,
    )  # fmt: skip
    lacking = missing(axes)
    if PRECISION in axes or PEFT in axes:
        checked(directory)  # before the minutes that training takes
    left_out = [f"{axis}: {why}" for axis, why in lacking.items()]
    jobs = [
        (axis, technique, seed)
        for axis, techniques in axes.items()
        if axis in TRAINED and axis not in lacking
        for seed in range(sizes.seeds)
        for technique in techniques  # seed by seed, so that what drifts on the machine meets all techniques
    ]
    precisions = [] if PRECISION in lacking else list(axes.get(PRECISION, ()))
    tuned = 0 if PEFT in lacking else len(axes.get(PEFT, ())) * sizes.tuned.seeds
    extra = bool(precisions) and BASELINES[PRECISION] not in precisions
    runner.whole = 2 * len(jobs) + len(precisions) + extra + tuned
    records: list[Record] = []
    with runner.stack:
        for job in jobs:
            records += runner.trained(*job)
        if precisions:
            records += runner.precisions(precisions)
        if tuned:
            runner.step(PEFT)
            runner.sizes, runner.text = sizes.tuned, runner.text[: sizes.tuned_bytes]
            records += importlib.import_module(PEFT_MODULE).peft_axis(runner, axes[PEFT])
        runner.done = runner.whole
        runner.step("done")
    with suppress(OSError):
        runner.waiting.rmdir()  # stays where another study has models in it
    return Study(
        records=tuple(records), left_out=tuple(left_out), sizes=sizes, machine=machine,
        seconds=time.perf_counter() - began,
    )  # fmt: skip


def checked(directory: Path) -> str:
    """Fingerprint of a stored model; InputError for one whose precisions cannot be compared."""
    config = ModelConfig.from_directory(directory)
    if config.ssm is not None:
        raise InputError(f"{directory}: a {config.family} model; precisions are compared of models with attention")
    with Checkpoint(directory, config) as checkpoint:
        if checkpoint.manifest is not None:
            raise InputError(f"{directory}: holds compressed weights; give the folder of the float model")
        return checkpoint.fingerprint()


def missing(axes: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Axes asked for that cannot be run here, and why."""
    torch = importlib.util.find_spec("torch") is not None
    found = {axis: "needs torch: pip install 'memwall[torch]'" for axis in axes if axis in TRAINED and not torch}
    if PEFT in axes and importlib.util.find_spec(PEFT_MODULE) is None:
        found[PEFT] = "this memwall has no fine-tuning axis"
    elif PEFT in axes and not torch:
        found[PEFT] = "needs torch: pip install 'memwall[torch]'"
    return found

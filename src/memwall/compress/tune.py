"""Fine-tune adapters on a frozen packed base inside a budget: `tune_model`, and the report of what it made."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memwall import kernels
from memwall.compress.saved import check_disk, file_sha256
from memwall.compress.teacher import Teacher, teacher_config
from memwall.compress.tune_memory import ACTIVATIONS, SCRATCH, tune_bytes
from memwall.compress.tune_work import TEACHER_NAME, ModelWork, TuneWork, Windows
from memwall.compress.tuning import TuneMethod, tune_method
from memwall.errors import BudgetExceeded, DoesNotFit, InputError, MissingDependency
from memwall.formats import codec
from memwall.hardware import available_memory_bytes
from memwall.hardware.units import format_bytes
from memwall.memory import Arena, Charge, Ledger, measure_runtime, peak_resident_bytes, reset_peak_resident
from memwall.memory.resident import RUNTIME_OWNER
from memwall.models.checkpoint import Checkpoint
from memwall.models.config import ModelConfig, check_whole
from memwall.models.lora import LoraWeights
from memwall.models.precision import is_matrix, resolve, source_spec
from memwall.models.tokenizer import Tokenizer
from memwall.models.weights import load_weights

if TYPE_CHECKING:
    from memwall.compress.torch_tuning import Trainer

HEADROOM_BYTES = 40 << 20
"""Kept free of a budget for what torch's heap and threads grow by with the first step (measured: 25 to 33 MB)."""

Progress = Callable[[int, int, str], None]
"""progress(done, total, what): steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneReport:
    """What a run made.

    history: per measurement the step, the mean training loss since the one before, and the loss of the windows held
    out. adapter_bytes: what was written, a whole model where the method trains that. effective_bits: bytes of the
    adapted matrices as packed and of the adapter, per weight of these matrices. rows: the ledger while steps were
    worked; predicted: what was expected of each row beforehand. held_out_losses: the last measured, window by window.
    """

    directory: str
    method: str
    base: str
    run_with: str
    rank: int
    alpha: float
    targets: tuple[str, ...]
    steps: int
    skipped_steps: int
    best_step: int
    resumed_from: int
    tokens: int
    history: list[dict[str, float]]
    held_out_losses: list[float]
    trained_parameters: int
    adapter_bytes: int
    base_bits: float
    effective_bits: float
    predicted: Mapping[str, int]
    rows: list[dict[str, str | int]]
    budget_bytes: int | None
    peak_resident_bytes: int
    seconds: float
    settings: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a run was asked for, checked as far as headers go. weights: a choice of `models.precision`."""

    model: Path
    data: Path
    out: Path
    method: TuneMethod
    config: ModelConfig
    weights: str
    specs: Mapping[str, str]
    teacher: Path | None
    start: LoraWeights | None
    windows: Windows

    def settings(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """All that the result depends on."""
        found: dict[str, Any] = {"model": checkpoint.fingerprint(), "weights": self.weights, "method": self.method.name}
        found |= {"text": file_sha256(self.data), **self.method.settings()}
        if self.teacher is not None:
            with Checkpoint(self.teacher) as other:
                found["teacher"] = other.fingerprint()
        if self.start is not None:
            found["lora"] = file_sha256(self.start.path)
        return found


def tune_model(
    model: Path,
    data: Path,
    out: Path,
    *,
    method: str = "qlora",
    options: Mapping[str, str] | None = None,
    weights: str | None = None,
    teacher: Path | None = None,
    lora: Path | None = None,
    budget_bytes: int | None = None,
    progress: Progress | None = None,
    force: bool = False,
) -> TuneReport:
    """Train an adapter for `model` on the text `data` and write it to the new folder `out`, in PEFT's form; methods
    that train the model itself write a model there.

    weights: the form of the base, a choice of `models.precision`; None is the method's own, or that of a compressed
    model. teacher: the float model whose answers are learned. lora: an adapter to go on from. budget_bytes: resident
    bytes of the process. A run that was interrupted goes on when it is called again with the same settings. InputError
    for what cannot be used, DoesNotFit with a budget that would do, MissingDependency without torch.
    """
    began = time.perf_counter()
    if find_spec("torch") is None:
        raise MissingDependency("torch", "torch")
    chosen = tune_method(method, options, teacher=teacher is not None)
    config = ModelConfig.from_directory(model)
    check_whole(config)
    if teacher is not None:
        teacher_config(teacher, config.vocab_size)
    with Checkpoint(model, config) as checkpoint:
        checkpoint.verify_once()
        choice = weights or ("saved" if checkpoint.manifest is not None else chosen.base or source_spec(config))
        specs = chosen.forms(config, choice, resolve(config, choice, checkpoint))
        tokenizer = Tokenizer.from_directory(model, config.vocab_size)
        asked = Asked(
            model=model,
            data=data,
            out=out,
            method=chosen,
            config=config,
            weights=choice,
            specs=specs,
            teacher=teacher,
            start=None if lora is None else _start(lora, config, chosen),
            windows=Windows.read(data, tokenizer, config, chosen.context, chosen.held_out),
        )
        result = 0 if chosen.makes_adapter else sum(checkpoint.stored_bytes(t.name) for t in config.tensors())
        check_disk(out.parent if out.parent.is_dir() else Path(), 16 * _trained(asked) + result + (1 << 20))
        kind = TuneWork if chosen.makes_adapter else ModelWork
        with kind(out, asked.settings(checkpoint), force=force) as work:
            return _Run(asked, checkpoint, work, budget_bytes, progress, began).finish()


class _Run:
    """One run with its memory: the arena's cap is the budget of the whole process."""

    def __init__(
        self,
        asked: Asked,
        checkpoint: Checkpoint,
        work: TuneWork,
        budget_bytes: int | None,
        progress: Progress | None,
        began: float,
    ) -> None:
        self.asked, self.checkpoint, self.work, self.began = asked, checkpoint, work, began
        self.budget_bytes, self.progress = budget_bytes, progress
        _import_torch()
        self.ledger = Ledger()
        self.arena = Arena(1 << 62, self.ledger)
        self.runtime: Charge = self.arena.charge(RUNTIME_OWNER, 0)
        measure_runtime(self.ledger, self.runtime)
        cap = available_memory_bytes() + self.runtime.nbytes if budget_bytes is None else budget_bytes
        self.paged, self.predicted = self._plan(cap)
        self.arena.set_cap(max(cap - HEADROOM_BYTES, 1))

    def finish(self) -> TuneReport:
        """All of it."""
        from memwall.compress.torch_tuning import Trainer
        from memwall.models.torch_frozen import frozen_decoder

        asked, method = self.asked, self.asked.method
        reset_peak_resident()
        objective = method.objective(self._ask_teacher())
        loaded = load_weights(asked.config, self.checkpoint, asked.specs, self.arena)
        charges = [self.arena.charge(owner, self.predicted[owner]) for owner in (SCRATCH, ACTIVATIONS)]
        adapted = method.fit(frozen_decoder(asked.config, loaded), loaded, self._place)
        if asked.start is not None:
            adapted.load(asked.start)
        trainer = Trainer(adapted, method, asked.windows, objective, self.work, self.arena, paged=self.paged)
        trainer.run(self.progress, settle=self._check)
        rows = self.ledger.to_json()
        num_bytes = self._write(adapted.factors())
        for charge in charges:
            charge.release()
        return self._report(trainer, num_bytes, rows)

    def _write(self, made: Mapping[str, np.ndarray]) -> int:
        asked, method = self.asked, self.asked.method
        told = {"method": method.name, "weights": asked.weights, "settings": method.settings()}
        if isinstance(self.work, ModelWork):
            return self.work.finish_model(self.checkpoint, made, told)
        return self.work.finish_adapter(
            made,
            rank=method.rank * method.stacked,
            alpha=method.alpha * method.stacked,
            base=str(asked.model),
            lora_dropout=method.dropout,
            memwall=told,
            **method.told,
        )

    def _ask_teacher(self) -> Teacher | None:
        """All answers of the teacher, made before the student is there."""
        asked = self.asked
        if asked.teacher is None:
            return None
        top = int(asked.method.settings()["teacher_top"])
        teacher = Teacher(self.work.path / TEACHER_NAME, asked.config.vocab_size, asked.method.context - 1, top)
        try:
            teacher.fill(asked.teacher, asked.windows.tokens, self.arena, self.progress)
        except BudgetExceeded as refused:
            raise DoesNotFit(f"the teacher does not fit the budget, and is not packed: {refused}") from refused
        return teacher

    def _place(self, shape: tuple[int, ...]) -> Any:
        import torch

        held = self.arena.allocate("adapters/weights", shape, np.float32)
        held[...] = 0
        return torch.from_numpy(held)

    def _plan(self, cap: int) -> tuple[bool, dict[str, int]]:
        """Whether moments are paged, and the bytes of every row. DoesNotFit where even that is not enough."""
        asked = self.asked
        for paged in (False, True) if asked.method.optimizer == "paged" else (False,):
            predicted = tune_bytes(
                asked.config, asked.specs, asked.method, paged=paged, held_out=bool(asked.windows.held_out)
            )
            needed = sum(predicted.values()) + self.runtime.nbytes + HEADROOM_BYTES
            if needed <= cap:
                return paged, predicted
        largest = max(predicted, key=lambda owner: predicted[owner])
        smaller = f"--set context={max(asked.method.context // 2, 2)}" if largest == ACTIVATIONS else "--weights int2"
        raise DoesNotFit(
            f"tuning needs {format_bytes(needed)} of memory, {format_bytes(self.runtime.nbytes)} of it for this "
            f"program with torch and {format_bytes(predicted[largest])} for {largest}, and the "
            f"budget is {format_bytes(cap)}: try --memory {needed}, or {smaller}"
        )

    def _check(self) -> None:
        """The budget holds as measured, not only as planned."""
        peak = peak_resident_bytes()
        if self.budget_bytes is not None and peak > self.budget_bytes:
            raise DoesNotFit(
                f"a step took {format_bytes(peak)} of memory, more than planned, and the budget is "
                f"{format_bytes(self.budget_bytes)}: try --memory {peak + HEADROOM_BYTES}"
            )

    def _report(self, trainer: Trainer, adapter_bytes: int, rows: list[dict[str, str | int]]) -> TuneReport:
        asked, method = self.asked, self.asked.method
        names = tuple(method.shapes(asked.config)) if method.makes_adapter else ()
        matrices = [t for t in asked.config.tensors() if is_matrix(t) and (not names or t.name.split(".")[-2] in names)]
        size = sum(tensor.size for tensor in matrices)
        packed = sum(codec(asked.specs[tensor.name]).nbytes(tensor.shape) for tensor in matrices)
        peak = peak_resident_bytes()
        where = asked.model if asked.model.name != "demo" else "demo"
        form = "" if asked.weights == "saved" else f" --weights {asked.weights}"
        run = f"{where}{form} --lora {asked.out}" if method.makes_adapter else str(asked.out)
        return TuneReport(
            directory=str(asked.out),
            method=method.name,
            base=asked.weights,
            run_with=f"memwall run {run}",
            rank=method.rank,
            alpha=method.alpha,
            targets=names,
            steps=trainer.step,
            skipped_steps=trainer.skipped,
            best_step=trainer.best_step if method.keep_best else trainer.step,
            resumed_from=trainer.resumed_from,
            tokens=asked.windows.num_train * (method.context - 1),
            history=trainer.history,
            held_out_losses=trainer.window_losses,
            trained_parameters=_trained(asked),
            adapter_bytes=adapter_bytes,
            base_bits=8 * packed / size,
            effective_bits=8 * (packed + (adapter_bytes if method.makes_adapter else 0)) / size,
            predicted=self.predicted | {RUNTIME_OWNER: self.runtime.nbytes},
            rows=rows,
            budget_bytes=self.budget_bytes,
            peak_resident_bytes=peak,
            seconds=time.perf_counter() - self.began,
            settings=method.settings(),
        )


def _trained(asked: Asked) -> int:
    return sum(math.prod(shape) for shape in asked.method.trained_shapes(asked.config))


def _start(lora: Path, config: ModelConfig, method: TuneMethod) -> LoraWeights:
    found = LoraWeights.read(lora, config)
    if not method.makes_adapter:
        raise InputError(
            f"--lora {lora}: method {method.name} trains the model itself and has no adapter to go on from"
        )
    if found.dora and "use_dora" not in method.told:
        raise InputError(f"--lora {lora}: is a DoRA adapter; go on from it with --method dora")
    return found


def _import_torch() -> None:
    """Import torch so that its threads sleep when they wait: two sets of threads that spin for work (these and the
    products' own) would take the cores from each other. Then bring in what every step needs.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import torch

    from memwall.compress.torch_tuning import warm_up

    torch.set_num_threads(kernels.num_threads())
    warm_up()

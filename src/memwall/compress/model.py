"""Compress a whole model folder into a new one: `compress_model`, and the report of what it made."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from memwall import _native, kernels
from memwall.compress import weight_method
from memwall.compress.job import Job
from memwall.compress.job_plan import Progress, Tuning
from memwall.compress.saved import WorkDirectory, check_output
from memwall.compress.sensitivity import relative_error
from memwall.compress.sizes import FolderSize
from memwall.compress.ssm_job import SsmJob
from memwall.errors import DoesNotFit, InputError
from memwall.hardware.units import format_bytes
from memwall.memory import Arena, Charge, Ledger, measure_runtime, peak_resident_bytes
from memwall.memory.resident import RUNTIME_OWNER
from memwall.models.checkpoint import Checkpoint
from memwall.models.config import ModelConfig, check_whole
from memwall.models.precision import bits_of

UNCAPPED_BYTES = 1 << 62
QUAMBA2 = "quamba2"
HEADROOM_BYTES = 3 << 20
"""Kept free of a budget for what the process may grow by between two measurements."""
GROWTH_BYTES = 2 << 20
"""What the program itself grows by with the first layer that is calibrated: threads' heaps, pages of library code."""
SPREAD_BYTES = 1 << 20
"""Runs of the same command differ by this much in what the program itself holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressReport:
    """What a run made.

    file_bytes: of weight files; folder_bytes: of all files.
    errors: share of each matrix' squared output that its form loses over the calibration text (over all inputs alike
    where there is none), for the parts that this run made itself.
    """

    directory: str
    method: str
    bits_per_weight: float
    source_bytes: int
    file_bytes: int
    folder_bytes: int
    specs: Mapping[str, str]
    errors: Mapping[str, float]
    num_calibration_tokens: int
    num_resumed_parts: int
    peak_resident_bytes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def compress_model(
    model_directory: str | Path,
    out_directory: str | Path,
    *,
    bits: float | str | None = None,
    size_bytes: int | None = None,
    method: str = "gptq",
    options: Mapping[str, str] | None = None,
    calibration_text: Path | None = None,
    group: int = 64,
    arena: Arena | None = None,
    budget_bytes: int | None = None,
    progress: Progress | None = None,
    force: bool = False,
    tuning: Tuning | None = None,
) -> CompressReport:
    """Write a compressed form of a float model to a new folder.

    bits: mean true bits per weight over all compressed matrices, scales included, such as 3.5; or one format for all,
    such as "int4" or "int3-g32-asym"; None for the method's default. size_bytes: instead of bits, what all files of the
    new folder may take together, which is then used to 99 % or more. method: a name of `METHODS`, options: its settings
    as text (`WeightMethod.configured`). calibration_text: a UTF-8 file, None for the bundled
    one. group: weights per scale of mixed formats. arena: caps the memory held. budget_bytes: caps the resident
    memory of the whole process. force: replace an existing compressed model and forget an unfinished run. progress: see
    `Progress`.

    Raises InputError, DoesNotFit (budget or disk too small). The same call takes an unfinished run up again.
    """
    began, source, out = time.perf_counter(), Path(model_directory), Path(out_directory)
    check_output(out, force=force)
    config = ModelConfig.from_directory(source)
    check_whole(config)
    with Checkpoint(source, config) as checkpoint:
        if checkpoint.manifest is not None:
            raise InputError(f"{source}: is already compressed; give the float model it was made from")
        arena, tuning, progress = arena or Arena(UNCAPPED_BYTES, Ledger()), tuning or Tuning(), progress or _silent
        job: Job | SsmJob
        if config.ssm is not None or method == QUAMBA2:
            _check_states(source, config, method, size_bytes, budget_bytes)
            job = SsmJob(config, checkpoint, arena, method, options, bits=bits, tuning=tuning, progress=progress)
        else:
            size = _size(size_bytes, bits, source, config)
            job = job_class(method)(
                config, checkpoint, arena, bits=bits, size=size, method=method, options=options, group=group,
                tuning=tuning, progress=progress,
            )  # fmt: skip
        if budget_bytes is not None and not job.method.keeps_budgets:
            raise InputError(
                f"{method} with these settings works in torch, which no budget holds: leave out --memory, or these"
            )
        job.read_text(source, calibration_text)
        if budget_bytes is not None and isinstance(job, Job):
            _cap_process(budget_bytes, job.arena, job)
        job.limit_text()
        with WorkDirectory(out, settings := job.settings(), force=force) as work:
            job.run(work)
            bits_per_weight = bits_of(ModelConfig.from_dict(job.model_config), job.specs)
            work.finish(source, job.model_config, {"bits_per_weight": bits_per_weight, **settings, **job.info})
        return CompressReport(
            directory=str(out),
            method=method,
            bits_per_weight=bits_per_weight,
            source_bytes=checkpoint.nbytes,
            file_bytes=sum(part.bytes for part in work.parts),
            folder_bytes=sum(path.stat().st_size for path in out.iterdir()),
            specs=job.specs,
            errors=job.errors,
            num_calibration_tokens=0 if job.tokens is None else job.tokens.size,
            num_resumed_parts=work.num_resumed,
            peak_resident_bytes=peak_resident_bytes(),
            seconds=time.perf_counter() - began,
        )


def _check_states(
    source: Path, config: ModelConfig, method: str, size_bytes: int | None, budget_bytes: int | None
) -> None:
    """Models that keep a state have a method of their own, and it is for them."""
    if config.ssm is None:
        raise InputError(f"{source}: a {config.family} model has attention; quamba2 is for Mamba models: use gptq")
    if method != QUAMBA2:
        raise InputError(f"{source}: a {config.family} model is compressed by --method {QUAMBA2}, not by {method}")
    for given, option in ((size_bytes, "--size"), (budget_bytes, "--memory")):
        if given is not None:
            raise InputError(f"{QUAMBA2} cannot keep to {option}: leave it out")


def _size(nbytes: int | None, bits: float | str | None, source: Path, config: ModelConfig) -> FolderSize | None:
    if nbytes is not None and bits is not None:
        raise InputError("bits and a size are both given: leave one of them out")
    return None if nbytes is None else FolderSize(nbytes=nbytes, source=source, model_config=config.source)


def job_class(method: str) -> type[Job]:
    """What carries a method out."""
    if not weight_method(method).stacks:
        return Job
    from memwall.compress.stack_job import StackJob

    return StackJob


def _cap_process(budget_bytes: int, arena: Arena, job: Job) -> None:
    """From here on the arena's cap holds for the whole process: what no array explains is a row of it."""
    kernels.num_threads()
    # code comes in at its first call, up to 2 MiB at a time: before it is measured
    tile = np.ones((16, 128), np.float32)
    relative_error(tile, kernels.encode("int4-g64", tile), None)
    if job.needs_calibration:
        for kind in (np.float32, np.float64):  # the matrix library keeps what it packs operands in
            staged = np.ones((512, 512), kind)
            np.linalg.inv(np.linalg.cholesky(staged.T @ staged + np.eye(512, dtype=kind)))
            del staged
    job.settle = partial(_settle, arena, arena.charge(RUNTIME_OWNER, 0))
    job.settle()
    needed_bytes = arena.used_bytes + job.least_bytes() + HEADROOM_BYTES
    if job.needs_calibration:
        needed_bytes += GROWTH_BYTES
    if needed_bytes > budget_bytes:
        runtime = format_bytes(arena.used_bytes)
        raise DoesNotFit(
            f"compressing needs {format_bytes(needed_bytes)} of memory, {runtime} for this program itself, and the "
            f"budget is {format_bytes(budget_bytes)}: try --memory {needed_bytes + SPREAD_BYTES}"
            + ("" if job.tokens is None else ", or --method rtn and one format (--bits int4), which read no text")
        )
    arena.set_cap(budget_bytes - HEADROOM_BYTES)


def _settle(arena: Arena, runtime: Charge) -> None:
    _native.give_back_freed_memory()
    measure_runtime(arena.ledger, runtime)


def _silent(stage: str, done: int, total: int) -> None:
    """No progress wanted."""

"""The job of the efficiency study that decodes with a stored model in one precision; run by `efficiency_worker`.

The model is loaded as `memwall run --weights FORMAT` loads it, embedding and head included, and runs as it runs there:
products of packed weights round activations. Decoding goes on for `Sizes.stored_s` seconds, a stretch of text again and
again from the same prompt. torch is not imported.

Declared work of a token, where no counter of joules can be read: two operations for each weight of a product and for
each number of keys and values seen; the bytes of all weights and of the cache.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from memwall import _native, kernels
from memwall.hardware.meter import Meter
from memwall.hardware.power import WorkModel, power_source
from memwall.hardware.system import describe_system
from memwall.memory import resident_bytes
from memwall.models.precision import is_matrix
from memwall.studies.efficiency_records import EXACTLY, Record, compression_ratio, metrics_of, software_versions
from memwall.studies.efficiency_sizes import PRECISION, Sizes
from memwall.studies.efficiency_worker import Report
from memwall.studies.low_bit_judge import token_losses
from memwall.studies.subjects import CacheSubject, StudyModel

CACHE = "float16"
WINDOW_TOKENS = 256
RANDOM_PROMPT_TOKENS = 32
"""Before what is decoded, where no text is given: only time and bytes are measured then."""


def stored(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """One precision. request: directory, name (of the model), technique (a choice of `--weights`), sizes, threads,
    held_out (path of a text; none: losses are not measured), baseline (bytes and losses; none: this is it).
    """
    kernels.set_num_threads(request["threads"])
    sizes, form = Sizes(**request["sizes"]), request["technique"]
    base_bytes = resident_bytes(exact=True)
    model = StudyModel(Path(request["directory"]), form, WINDOW_TOKENS + 1, exact=False, logit_rows=64)
    subject = CacheSubject(model, CACHE)
    _native.give_back_freed_memory()
    report(1, 3, "loaded")
    tokens = _tokens(model, request)
    weight_bytes = sum(matrix.nbytes for matrix in {id(m): m for m in model.decoder.weights.matrices.values()}.values())
    series, steps_s, context = _decode(model, subject, tokens, sizes, weight_bytes)
    report(2, 3, "decoded")
    quality: dict[str, Any] = {}
    if request.get("held_out"):
        length = min(WINDOW_TOKENS, model.context_tokens - 1)
        count = min(sizes.windows, len(tokens) // length)
        windows = tokens[: count * length].reshape(count, length)
        quality["losses"] = [float(np.mean(token_losses(subject, model, row[:1], row[1:]))) for row in windows]
    return _record(request, sizes, model, series, steps_s, base_bytes, weight_bytes, context, quality)


def _tokens(model: StudyModel, request: dict[str, Any]) -> np.ndarray:
    if request.get("held_out"):
        return np.asarray(model.encode(Path(request["held_out"]).read_text(encoding="utf-8")))
    count = Sizes(**request["sizes"]).decoded + RANDOM_PROMPT_TOKENS
    return np.random.default_rng(0).integers(0, model.config.vocab_size, count)


def _decode(
    model: StudyModel, subject: CacheSubject, tokens: np.ndarray, sizes: Sizes, weight_bytes: int
) -> tuple[Any, list[float], int]:
    """The metered stretch: its series, seconds of each token, and the mean context."""
    config = model.config
    prompt = max(min(WINDOW_TOKENS, model.context_tokens, len(tokens)) - sizes.decoded - len(model.opening), 1)
    head = [*model.opening, *map(int, tokens[:prompt])]
    rest = [int(token) for token in tokens[prompt : prompt + sizes.decoded]]
    subject.begin()
    subject.read(head)
    for token in rest[: sizes.warm_up]:
        subject.step(token)
    work = WorkModel()
    steps_s: list[float] = []
    flop, per_token = flop_of(model), 4 * config.num_heads * config.head_dim * config.num_layers
    meter = Meter(dt_s=sizes.inference_dt_s, memory=resident_bytes, exact=EXACTLY, power=power_source(work))
    meter.start()
    while not steps_s or sum(steps_s) < sizes.stored_s:
        subject.cache.truncate(len(head))
        for place, token in enumerate(rest):
            began = time.perf_counter()
            subject.step(token)
            steps_s.append(time.perf_counter() - began)
            work.add(flop + per_token * (len(head) + place + 1), weight_bytes + subject.nbytes)
    return meter.stop(), steps_s, len(head) + len(rest) // 2


def flop_of(model: StudyModel) -> float:
    """Of one token's products with weights; experts that are not chosen count too."""
    tensors = model.config.tensors()
    products = sum(t.size for t in tensors if t.role in ("linear", "expert", "router", "head"))
    tied = not any(t.role == "head" for t in tensors)
    return 2.0 * (products + (sum(t.size for t in tensors if t.role == "embedding") if tied else 0))


def _record(
    request: dict[str, Any], sizes: Sizes, model: StudyModel, series: Any, steps_s: list[float], base_bytes: int,
    weight_bytes: int, context: int, quality: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    config, system = model.config, describe_system()
    count = sum(t.size for t in config.tensors())
    baseline = request.get("baseline") or {"weight_bytes": weight_bytes, **quality}
    mcr = None
    if quality:
        losses = [sum(each) / len(each) for each in (baseline["losses"], quality["losses"])]
        mcr = compression_ratio(baseline["weight_bytes"], weight_bytes, *losses)
    metrics = metrics_of(
        series, steps_s=steps_s, stage="inference", count=len(steps_s), num_parameters=count, tokens=len(steps_s),
        base_bytes=base_bytes, mcr=mcr,
    )  # fmt: skip
    matrices = sum(t.size for t in config.tensors() if is_matrix(t))
    return Record(
        axis=PRECISION,
        group=f"{request['name']}, {count / 1e6:.1f}M",
        technique=request["technique"],
        stage="inference",
        model={"directory": request["name"], "family": config.family, "width": config.hidden_size,
               "num_layers": config.num_layers, "fingerprint": model.fingerprint},
        num_parameters=count,
        num_active=count,
        flop_per_token=flop_of(model),
        tokens=len(steps_s),
        hardware={**asdict(system), "caches": len(system.caches), "threads": request["threads"]},
        versions=software_versions(),
        seed=0,
        dt_s=sizes.inference_dt_s,
        series=series,
        metrics=metrics,
        quality=quality,
        figures={
            "context": context, "steps_s": steps_s, "others": series.mean_others, "weight_bytes": weight_bytes,
            "bits_per_weight": 8 * weight_bytes / matrices,
        },
    ).to_dict()  # fmt: skip

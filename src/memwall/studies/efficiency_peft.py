"""The fine-tuning axis of the efficiency study: a small trained model is moved to a new domain by each method in turn.

*Source*: EfficientLLM (2025), arXiv 2505.13840, the fine-tuning axis: LoRA, LoRA+, rsLoRA, DoRA, PiSSA, freeze, full.
*Idea*: every method is run by what `memwall tune` runs, from the same weights on the same windows, and metered while it
steps: after the first ones, before the last, which is judged and saved. The domain is the study's text with each letter
thirteen places on: a language that no model of English has seen, with the structure of one that it knows, and the same
on every machine. The model before the first step is the yardstick.
*Units and shapes*: `efficiency_records`; ST is samples (windows) per parameter of the whole model and second.
*Differs from the paper*: models of 7 (the demo model) or 22 million weights (`efficiency_grown_torch`) instead of 1 to
24 billion, held-out perplexity for task accuracy. What is said there of models beyond 14B is not tested. All adapters
have the paper's example rank 8 on all projections; the base is float32 for all, so that methods differ in nothing else.
*Cost*: one run a method and seed, each in a process of its own.

The model of declared work, where no counter of joules can be read: a layer that learns is run forwards twice and
backwards through its inputs once, one that also makes gradients of its weights once more; a frozen layer below all that
learn is run once. Bytes: the weights at each of these, and each trained number ten times (see `efficiency_torch`).
"""

from __future__ import annotations

import codecs
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from memwall import kernels
from memwall.compress.tune import tune_model
from memwall.compress.tuning import TuneMethod, tune_method
from memwall.hardware.meter import Meter
from memwall.hardware.power import WorkModel, power_source
from memwall.hardware.system import describe_system
from memwall.memory import resident_bytes
from memwall.models import Checkpoint, ModelConfig
from memwall.studies.efficiency_records import Record, RecordStore, metrics_of, software_versions
from memwall.studies.efficiency_sizes import AXES, PEFT, Sizes
from memwall.studies.efficiency_worker import Report

TECHNIQUES = AXES[PEFT]
MODULE = "memwall.studies.efficiency_peft"
RATES = {"full": 1e-4, "freeze": 5e-4}
"""Learning rates beside 1e-3. The paper's examples (1e-4, full 1e-5) are for billions of weights and long runs."""
CONTEXT = 128
HELD_OUT = 0.1


class Runner(Protocol):
    """What the study gives: its sizes, text and model, a store of records, and how jobs are called."""

    sizes: Sizes
    text: bytes
    directory: Path
    name: str
    store: RecordStore
    done: int

    def key(self, **more: Any) -> str:
        """Of a record's file."""

    def call(self, module: str, job: str, what: str, request: dict[str, Any]) -> Record:
        """A record from a job of `module`."""


def domain_text(text: str) -> str:
    """The new domain."""
    return codecs.encode(text, "rot13")


def peft_axis(runner: Runner, techniques: Sequence[str] = TECHNIQUES) -> list[Record]:
    """A record a method and seed, seed by seed; one that the store has is not made again.

    runner.sizes and runner.text: as this axis takes them (`Sizes.tuned`, `Sizes.tuned_bytes`).
    """
    config = ModelConfig.from_directory(runner.directory)
    with Checkpoint(runner.directory, config) as checkpoint:
        fingerprint = checkpoint.fingerprint()
    found: list[Record] = []
    with tempfile.TemporaryDirectory(prefix="memwall-peft-") as name:
        text = Path(name) / "domain.txt"
        text.write_text(domain_text(runner.text.decode(errors="replace")), encoding="utf-8")
        for seed in range(runner.sizes.seeds):
            for technique in techniques:
                key = runner.key(axis=PEFT, technique=technique, seed=seed, model=fingerprint)
                record = runner.store.read(key)
                if record is None:
                    request = {"directory": str(runner.directory), "name": runner.name, "technique": technique,
                               "seed": seed, "text": str(text), "out": f"{name}/{technique}-{seed}"}  # fmt: skip
                    record = runner.call(MODULE, "tuned", f"{PEFT} {technique}, seed {seed}", request)
                    runner.store.write(key, record)
                found.append(record)
                runner.done += 1
    return found


def settings_of(technique: str, seed: int, sizes: Sizes) -> dict[str, str]:
    """What `memwall tune` is given."""
    found = {
        "learning_rate": RATES.get(technique, 1e-3), "batch": sizes.batch, "context": CONTEXT, "seed": seed,
        "steps": sizes.warm_up + sizes.steps + 1, "save_every": 1 << 40, "held_out": HELD_OUT,
    }  # fmt: skip
    return {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in found.items()}


def tuned(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """One method and seed. request: directory, name, technique, seed, text, out (a free path), sizes, threads."""
    kernels.set_num_threads(request["threads"])
    sizes, technique, directory = Sizes(**request["sizes"]), request["technique"], Path(request["directory"])
    options = settings_of(technique, request["seed"], sizes)
    method, config = tune_method(technique, options), ModelConfig.from_directory(directory)
    stretch = _Stretch(method, config, sizes, report)
    made = tune_model(
        directory, Path(request["text"]), Path(request["out"]), method=technique, options=options, weights="float32",
        progress=stretch.stepped,
    )  # fmt: skip
    held_out = [each["held_out"] for each in made.history if "held_out" in each]
    series, count = stretch.series, sum(tensor.size for tensor in config.tensors())
    windows = len(stretch.steps_s) * sizes.batch
    tokens = windows * (CONTEXT - 1)
    metrics = metrics_of(
        series, steps_s=stretch.steps_s, stage="fine-tuning", count=windows, num_parameters=count, tokens=tokens,
        base_bytes=made.predicted["runtime"],
    )  # fmt: skip
    rows = {str(row["owner"]): int(row["bytes"]) for row in made.rows}
    system = describe_system()
    return Record(
        axis=PEFT,
        group=f"{request['name']}, {count / 1e6:.1f}M",
        technique=technique,
        stage="fine-tuning",
        model={"directory": request["name"], "family": config.family, "width": config.hidden_size,
               "num_layers": config.num_layers},
        num_parameters=count,
        num_trainable=made.trained_parameters,
        num_active=count,
        flop_per_token=2.0 * _products(config),
        tokens=tokens,
        hardware={**asdict(system), "caches": len(system.caches), "threads": request["threads"]},
        versions=software_versions(),
        seed=request["seed"],
        dt_s=sizes.training_dt_s,
        series=series,
        metrics=metrics,
        quality={"losses": made.held_out_losses},
        figures={
            "loss_before": held_out[0], "steps_s": stretch.steps_s, "others": series.mean_others, "rows": rows,
            "optimizer_bytes": rows["optimizer"], "peak_bytes": made.peak_resident_bytes,
            "result_bytes": made.adapter_bytes, "settings": made.settings,
        },
    ).to_dict()  # fmt: skip


class _Stretch:
    """The metered steps of a run: `stepped` is the run's progress."""

    def __init__(self, method: TuneMethod, config: ModelConfig, sizes: Sizes, report: Report) -> None:
        self._sizes, self._report = sizes, report
        self._work = WorkModel()
        self._meter = Meter(dt_s=sizes.training_dt_s, memory=resident_bytes, power=power_source(self._work))
        self._flop, self._bytes = step_work(method, config, sizes.batch * (CONTEXT - 1))
        self._before = 0.0
        self.steps_s: list[float] = []

    @property
    def series(self) -> Any:
        """What was metered."""
        return self._meter.series

    def stepped(self, done: int, whole: int, what: str) -> None:
        """After each step."""
        now = time.perf_counter()
        if self._sizes.warm_up < done < whole:
            self.steps_s.append(now - self._before)
            self._work.add(self._flop, self._bytes)
            if done == whole - 1:
                self._meter.stop()
        self._report(done, whole, what)
        if done == self._sizes.warm_up:
            self._meter.start()
        self._before = time.perf_counter()


def step_work(method: TuneMethod, config: ModelConfig, tokens: int) -> tuple[float, float]:
    """Declared operations and bytes of a step of so many tokens."""
    sizes = [tensor.size for tensor in config.tensors() if tensor.role in ("linear", "expert", "router")]
    body, trained = sum(sizes), _count(method, config)
    first = method.first_layer(config) / config.num_layers
    head = _products(config) - body
    own = 0 if method.makes_adapter else trained
    passes = body * (first + 3 * (1 - first)) + 2 * head + own
    added = 3 * trained if method.makes_adapter else 0
    return 2.0 * tokens * (passes + added), 4.0 * (passes + 10 * trained)


def _products(config: ModelConfig) -> int:
    """Weights of products, a tied head's too."""
    tensors = config.tensors()
    tied = not any(tensor.role == "head" for tensor in tensors)
    roles = ("linear", "expert", "router", "head") + (("embedding",) if tied else ())
    return sum(tensor.size for tensor in tensors if tensor.role in roles)


def _count(method: TuneMethod, config: ModelConfig) -> int:
    return sum(math.prod(shape) for shape in method.trained_shapes(config))

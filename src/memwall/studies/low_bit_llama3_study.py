"""`memwall study low-bit`: every method of weight compression at every width, on one bench.

*Source*: How Good Are Low-bit Quantized LLaMA3 Models? An Empirical Study (W. Huang, 2024), arXiv 2404.14047.
*Idea*: methods are published on other models, texts and group sizes. Here all of them compress the same model with the
same calibration text, are saved, loaded as they are stored, and read the same held-out windows, recall prompts and
choices; what is reported as bits counts every byte of the stored form.
*Units and shapes*: losses in nats per token, one per window; shares of right answers; bytes of files.
*Differs from the paper*: tasks are held-out text, recall of hidden facts and choices out of the text or a file given,
as its data sets do not travel with the package. Its two fine-tuned rows, QLoRA and IR-QLoRA, are not here yet.
*Cost*: one compression and one evaluation per row; one model in memory at a time, its folder removed afterwards.
*Holds when*: as the methods do.

A cell's file is named by all that decides its figures, so a study that was stopped goes on, and so does the compression
that it was stopped in.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from memwall import __version__
from memwall.compress import METHODS
from memwall.compress.calibration import BUNDLED_TEXT, CalibrationSettings
from memwall.compress.job_plan import Tuning
from memwall.compress.model import compress_model
from memwall.errors import InputError
from memwall.formats import codec
from memwall.models import Checkpoint, ModelConfig
from memwall.models.precision import is_matrix
from memwall.models.tokenizer import Tokenizer
from memwall.studies.choice_task import Question, from_text
from memwall.studies.kv_study import Store
from memwall.studies.low_bit_judge import judged
from memwall.studies.recall_task import Hidden, hide_facts

STUDY_VERSION = 1
BASE = "float16"
TUNED = {
    "qlora": "its base is the row nf4-dq; what tuning adds depends on the text: memwall tune --method qlora",
    "ir-qlora tuned": "its base is the row irnf4; what tuning adds depends on the text: memwall tune --method ir-qlora",
}
"""Methods of the published table that make an adapter, not a model."""

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A method at a width. bits: what it is asked for; nominal: bits as its paper counts; rounded: activations too."""

    method: str
    bits: str
    nominal: float
    options: dict[str, str] = field(default_factory=dict)
    rounded: bool = False

    @property
    def name(self) -> str:
        """As the table shows it."""
        more = "".join(f" {name}={value}" for name, value in self.options.items())
        return f"{self.method} {self.bits}{more}"


def _widths(method: str, specs: Iterable[str], **more: Any) -> list[Variant]:
    """Rows whose width is the first digit of what is asked for."""
    first = {spec: float(next(letter for letter in spec if letter.isdigit())) for spec in specs}
    return [Variant(method=method, bits=spec, nominal=bits, **more) for spec, bits in first.items()]


GRID = (
    *_widths("rtn", ("int8-g128-asym", "int4-g128-asym", "int3-g128-asym", "int2-g128-asym")),
    *_widths("gptq", ("int8-g128-asym", "int4-g128-asym", "int3-g128-asym", "int2-g128-asym")),
    *_widths("awq", ("int4-g128-asym", "int3-g128-asym", "int2-g128-asym")),
    *_widths("smoothquant", ("int8", "int6", "int4"), rounded=True),
    *_widths("spqr", ("4", "3", "2")),
    *_widths("quip", ("4", "3", "2")),
    *_widths("vptq", ("2",)),
    *_widths("bitstack", ("4", "3", "2")),
    *_widths("db-llm", ("2",)),
    *_widths("ir-qlora", ("irnf4",)),
    Variant(method="rtn", bits="nf4-dq", nominal=4.0),
    Variant(method="pb-llm", bits="2", nominal=2.0),
    Variant(method="pb-llm", bits="1.7", nominal=1.7),
    Variant(method="billm", bits="1.1", nominal=1.1),
)
QUICK_METHODS = ("rtn", "gptq", "quip", "db-llm", "pb-llm", "billm")
QUICK_MOST_BITS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is read. calibration: tokens, in sequences; prompts: of `prompt_tokens` with four facts each."""

    calibration: int = 128 * 2048
    sequence_tokens: int = 2048
    windows: int = 24
    window_tokens: int = 512
    prompts: int = 8
    prompt_tokens: int = 384
    questions: int = 64


FULL = Sizes()
QUICK = Sizes(
    calibration=4096, sequence_tokens=512, windows=6, window_tokens=256, prompts=4, prompt_tokens=256, questions=24
)


@dataclass(slots=True, kw_only=True)
class Row:
    """A method at a width and what was measured of it; skipped: why nothing was."""

    name: str
    method: str
    nominal: float
    figures: dict[str, Any] = field(default_factory=dict)
    skipped: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """All rows, the float model's first, and what they were measured on."""

    model: str
    fingerprint: str
    sizes: Sizes
    machine: str
    seconds: float
    rows: list[Row]
    version: int = STUDY_VERSION

    @property
    def measured(self) -> list[Row]:
        """Rows that have figures."""
        return [row for row in self.rows if row.figures]


def select(methods: Sequence[str] | None, bits: Sequence[float] | None, quick: bool) -> list[Variant]:
    """The grid's rows that are asked for; InputError for a method or width that it does not have."""
    known = list(dict.fromkeys(variant.method for variant in GRID))
    for method in methods or ():
        if method not in known:
            raise InputError(f"--methods: unknown method {method!r}; the study has {', '.join(known)}")
    wanted = methods or (QUICK_METHODS if quick else known)
    found = [variant for variant in GRID if variant.method in wanted]
    if bits is not None:
        found = [variant for variant in found if variant.nominal in bits]
        if not found:
            widths = sorted({variant.nominal for variant in GRID})
            raise InputError(f"--bits: no method has these; the study has {', '.join(f'{w:g}' for w in widths)}")
    elif quick:
        found = [variant for variant in found if variant.nominal <= QUICK_MOST_BITS]
    return found


@dataclass(slots=True, kw_only=True)
class Material:
    """What every row reads: windows [n, tokens], prompts with facts, questions."""

    windows: np.ndarray
    hidden: list[Hidden]
    questions: list[Question]
    digest: str


def material(
    directory: Path, config: ModelConfig, text: str, sizes: Sizes, questions: list[Question] | None
) -> Material:
    """Cut from held-out text, the same for all rows and runs."""
    tokenizer = Tokenizer.from_directory(directory)
    tokens = np.asarray(tokenizer.encode(text, add_bos=False))
    size = min(sizes.window_tokens, config.max_position - 1)
    if len(tokens) < sizes.windows * size:
        raise InputError(f"the text has {len(tokens):,} tokens; give at least {sizes.windows * size:,}")
    random, opening = np.random.default_rng(0), config.bos_token_id
    longest = min(sizes.prompt_tokens, config.max_position - 16)
    hidden = [hide_facts(tokenizer, tokens, random, num_tokens=longest, opening=opening) for _ in range(sizes.prompts)]
    asked = from_text(tokens, random, count=sizes.questions) if questions is None else questions
    longest = max(len(q.context) + max(map(len, q.choices)) for q in asked)
    if longest + 1 > config.max_position:
        raise InputError(f"a question has {longest} tokens; this model takes {config.max_position - 1}")
    described = json.dumps([text, sizes.windows, size, longest, [[q.context, q.choices, q.answer] for q in asked]])
    return Material(
        windows=tokens[: sizes.windows * size].reshape(sizes.windows, size), hidden=hidden, questions=asked,
        digest=hashlib.sha256(described.encode()).hexdigest()[:32],
    )  # fmt: skip


def study_low_bit(
    directory: Path,
    name: str,
    *,
    variants: Sequence[Variant] = GRID,
    sizes: Sizes = FULL,
    text: str,
    store: Path,
    questions: list[Question] | None = None,
    calibration: Path | None = None,
    machine: str = "",
    progress: Progress | None = None,
) -> Study:
    """Compresses and measures what the store lacks, and gives all rows. name: the model as the user called it.

    store: folder of the finished cells; models are made beside it and removed. progress(done, in all, what).
    """
    began = time.perf_counter()
    config = ModelConfig.from_directory(directory)
    with Checkpoint(directory, config) as checkpoint:
        if checkpoint.manifest is not None:
            raise InputError(f"{directory}: holds compressed weights; give the folder of the float model")
        fingerprint = checkpoint.fingerprint()
    read = material(directory, config, text, sizes, questions)
    source = (calibration or BUNDLED_TEXT).read_bytes()
    cells = Store(store)
    rows = []
    for done, variant in enumerate((None, *variants)):
        if progress is not None:
            progress(done, len(variants) + 1, BASE if variant is None else variant.name)
        if variant is None:
            row = Row(name=BASE, method=BASE, nominal=16.0)
        else:
            row = Row(name=variant.name, method=variant.method, nominal=variant.nominal)
        rows.append(row)
        if variant is not None and variant.method not in METHODS:
            row.skipped = f"this memwall has no method {variant.method!r}"
            continue
        described = {
            "study": f"low-bit {STUDY_VERSION}", "memwall": __version__, "model": fingerprint, "variant": row.name,
            "material": read.digest, "calibration": hashlib.sha256(source).hexdigest()[:32],
            "sizes": [sizes.calibration, sizes.sequence_tokens, sizes.prompts],
        }  # fmt: skip
        key = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]
        figures = cells.read(key)
        if figures is None:
            figures = _measured(directory, config, variant, sizes, read, calibration, store.parent / "made" / key)
            cells.write(key, described, figures)
        row.figures = figures
    with suppress(OSError):  # another study may be at work beside this one
        (store.parent / "made").rmdir()
    rows += [Row(name=each, method=each, nominal=4.0, skipped=f"not run: {why}") for each, why in TUNED.items()]
    if progress is not None:
        progress(len(variants) + 1, len(variants) + 1, "done")
    return Study(
        model=name,
        fingerprint=fingerprint,
        sizes=sizes,
        machine=machine,
        seconds=time.perf_counter() - began,
        rows=rows,
    )


def _measured(
    directory: Path,
    config: ModelConfig,
    variant: Variant | None,
    sizes: Sizes,
    read: Material,
    calibration: Path | None,
    folder: Path,
) -> dict[str, Any]:
    """Figures of one row: the model is compressed into `folder`, loaded from there, judged, and removed."""
    if variant is None:
        return judged(directory, BASE, read, exact=True) | {
            "bits_per_weight": 16.0,
            "mean_bits": 16.0,
            "file_bytes": 2 * sum(tensor.size for tensor in config.tensors()),
            "compress_seconds": 0.0,
        }
    folder.parent.mkdir(parents=True, exist_ok=True)
    length = min(sizes.sequence_tokens, config.max_position)
    text = CalibrationSettings(max_tokens=sizes.calibration, sequence_tokens=length)
    report = compress_model(
        directory, folder, bits=variant.bits if not _is_number(variant.bits) else float(variant.bits),
        method=variant.method, options=variant.options, calibration_text=calibration, tuning=Tuning(calibration=text),
        force=True,
    )  # fmt: skip
    linear = [t for t in config.tensors() if is_matrix(t) and t.role in ("linear", "expert")]
    nbytes = sum(codec(report.specs[t.name]).nbytes(t.shape) for t in linear)
    figures = judged(folder, "saved", read, exact=not variant.rounded) | {
        "bits_per_weight": 8 * nbytes / sum(t.size for t in linear),
        "mean_bits": report.bits_per_weight,
        "file_bytes": report.file_bytes,
        "compress_seconds": report.seconds,
        "calibration_tokens": report.num_calibration_tokens,
    }
    shutil.rmtree(folder)
    return figures


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()

"""What a run over one model is given, the bits it may spend and the memory it will hold: known before it begins."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from memwall.compress import sensitivity, weight_method
from memwall.compress.allocate import Candidate, allocate
from memwall.compress.base import MethodConfig, Statistics, WeightMethod
from memwall.compress.calibration import BUNDLED_TEXT, CalibrationSettings, Collector, read_text, token_sequences
from memwall.compress.parts import model_parts
from memwall.compress.sizes import FolderSize
from memwall.compress.transforms import TRANSFORM_BYTES
from memwall.errors import BudgetExceeded, DoesNotFit, InputError
from memwall.formats import codec
from memwall.memory import Arena
from memwall.models.checkpoint import Checkpoint
from memwall.models.config import EMBEDDING, ModelConfig, TensorSpec
from memwall.models.decoder import activation_bytes, scratch_bytes
from memwall.models.precision import LADDER, MIN_EMBEDDING_BITS, code_bits, is_matrix, resolve, source_spec
from memwall.models.tokenizer import Tokenizer

Progress = Callable[[str, int, int], None]
"""progress(stage, done, total): `stage` is "measure" or "compress", which count weights, or "train", in steps."""

MIN_BITS, MAX_BITS = 2.0, 16.0
MOST_JOBS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """What seldom needs changing: see `MethodConfig` and `CalibrationSettings`. damping: None for the method's own.

    jobs: matrices that are compressed at once; the bytes that are made do not depend on it.
    """

    damping: float | None = None
    activation_order: bool = True
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    jobs: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.jobs <= MOST_JOBS:
            raise InputError(f"jobs is {self.jobs}; give a number of matrices to work on at once, 1 to {MOST_JOBS}")


class JobPlan:
    """One run as it was asked for. `Job` carries it out."""

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        arena: Arena,
        *,
        bits: float | str | None,
        size: FolderSize | None = None,
        method: str,
        options: Mapping[str, str] | None = None,
        group: int,
        tuning: Tuning,
        progress: Progress,
    ) -> None:
        """size: of the whole folder, in place of bits."""
        self.config = config
        self.checkpoint = checkpoint
        self.arena = arena
        self.method = weight_method(method, options).for_model(config)
        self.tuning = tuning
        self.size = size
        self.info: dict[str, Any] = {}
        """What the manifest is to say beside the settings."""
        self.specs: dict[str, str] = {}
        self.errors: dict[str, float] = {}
        self.tokens: np.ndarray | None = None
        self._progress = progress
        self.settle: Callable[[], object] = _nothing
        """Called where the process may have grown beside the arena, to count that against its cap."""
        self._parts = model_parts(config)
        self._matrices = [tensor for part in self._parts for tensor in part.matrices]
        ladder = self.method.ladder or LADDER
        self._ladder = tuple(codec(spec.replace("-g64", f"-g{group}")).spec for spec in ladder)
        self._bits = _parsed_bits(bits, self.method) if size is None or self.method.stacks else _any_bits(self.method)
        self._text_sha256 = ""
        if isinstance(self._bits, str):
            self.specs = resolve(config, self._bits, method=self.method.makes or self.method.name)
            if self.method.ends:
                self.specs |= {t.name: self.method.ends for t in self._matrices if t.role in ("embedding", "head")}
            for spec in {self.specs[t.name] for t in self._matrices if t.role in ("linear", "expert")}:
                self.method.check(spec)
        else:
            self._choose(
                [
                    [Candidate(spec=s, nbytes=codec(s).nbytes(t.shape), loss=0.0) for s in self._rungs(t)]
                    for t in self._matrices
                ]
            )

    @property
    def model_config(self) -> dict[str, Any]:
        """Of the compressed model."""
        return dict(self.config.source)

    @property
    def needs_calibration(self) -> bool:
        """Whether any text has to be read."""
        return self.method.reads_text(self._bits)

    def read_text(self, source: Path, calibration_text: Path | None) -> None:
        """Read the calibration text, all of it that is wanted; `limit_text` comes next."""
        if not self.needs_calibration:
            return
        path = calibration_text or BUNDLED_TEXT
        text = read_text(path)
        tokenizer = Tokenizer.from_directory(source, self.config.vocab_size)
        tokens = token_sequences(text, tokenizer, self.config, self.tuning.calibration, str(path))
        self._text_sha256 = hashlib.sha256(text.encode()).hexdigest()
        self.tokens = tokens

    def limit_text(self) -> None:
        """Keep as much of the text as the arena has room for; BudgetExceeded where that is none."""
        if self.tokens is None:
            return
        num_sequences, length = self.tokens.shape
        sequence_bytes = self._sequence_bytes(length)
        affordable = (self.arena.free_bytes - self.least_bytes()) // sequence_bytes + 1
        if affordable < 1:
            what = f"calibration on one sequence of {length} tokens"
            raise BudgetExceeded(what, self.least_bytes(), self.arena.free_bytes, self.arena.cap_bytes)
        # powers of two: a run taken up with a little more or less memory free then reads the same text
        kept = num_sequences if affordable >= num_sequences else 1 << (affordable.bit_length() - 1)
        self.tokens = self.tokens[:kept]

    def settings(self) -> dict[str, Any]:
        """All that the result depends on."""
        return {
            "model": self.checkpoint.fingerprint(),
            "method": self.method.name,
            "options": self.method.settings(),
            "bits": self._bits,
            "size": None if self.size is None else self.size.nbytes,
            "ladder": list(self._ladder),
            "damping": self._damping,
            "activation_order": self.tuning.activation_order,
            "calibration_sha256": self._text_sha256,
            "calibration_shape": [] if self.tokens is None else list(self.tokens.shape),
        }

    @property
    def _num_weights(self) -> int:
        return sum(tensor.size for tensor in self._matrices)

    @property
    def _chooses(self) -> bool:
        """Whether forms are found by measurement."""
        return not isinstance(self._bits, str) or self._bits == self.method.adaptive

    @property
    def _allowed_bytes(self) -> int:
        """Of all matrices together: those of a mean number of bits, or of a choice made without measurement."""
        if not isinstance(self._bits, str):
            return int(self._bits * self._num_weights / 8)
        specs = resolve(self.config, self._bits, method=self.method.name)
        return sum(codec(specs[tensor.name]).nbytes(tensor.shape) for tensor in self._matrices)

    def _rungs(self, tensor: TensorSpec) -> list[str]:
        """The forms that a matrix may take; where a size was asked for, floats too."""
        ends = tensor.role in ("embedding", "head")
        if ends and self.method.keeps_ends:
            return [source_spec(self.config)]
        at_least = MIN_EMBEDDING_BITS if ends else 0
        floats = [] if self.size is None else ["bfloat16" if self.config.dtype == "bfloat16" else "float16"]
        return [*(spec for spec in self._ladder if code_bits(spec) >= at_least), *floats]

    def _choose(self, table: Sequence[Sequence[Candidate]]) -> list[Candidate]:
        least_bytes, most_bytes = (sum(pick(c.nbytes for c in options) for options in table) for pick in (min, max))
        overhead_bytes = 0 if self.size is None else self._overhead_bytes(self.size)
        if self.size is not None:
            self.size.check(most_bytes + overhead_bytes, "16-bit floats")
        allowed = self._allowed_bytes if self.size is None else self.size.nbytes - overhead_bytes
        try:
            return allocate(table, allowed)
        except DoesNotFit:
            if self.size is not None:
                needed = least_bytes + overhead_bytes
                raise DoesNotFit(
                    f"size {self.size}: the least this model takes is {needed:,} bytes; try --size {needed}"
                ) from None
            least = 8 * least_bytes / self._num_weights
            message = f"bits {self._bits}: the least this model takes is {least:.2f} bits per weight, scales included"
            raise InputError(f"{message}; try --bits {np.ceil(10 * least) / 10:g}") from None

    def _overhead_bytes(self, size: FolderSize) -> int:
        """At most what a folder of this size holds beside matrices."""
        forms = [
            {t.name: max(self._rungs(t), key=len) if is_matrix(t) else self._stored_spec(t) for t in part.tensors}
            for part in self._parts
        ]
        names = [self._part_name(index) for index in range(len(forms))]
        # what is not yet read or known counts as long as it can be
        longest = {"bits_per_weight": 1 / 3, "calibration_sha256": "0" * 64, "calibration_shape": [1 << 40] * 2}
        return size.overhead_bytes(names, self._parts, forms, {**self.settings(), **longest, "size": 1 << 60})

    def _part_name(self, index: int) -> str:
        return f"model-{index + 1:05d}-of-{len(self._parts):05d}.safetensors"

    def _method_for(self, statistics: Statistics | None) -> WeightMethod:
        lacks = statistics is None and self.method.calibrates
        return weight_method("rtn") if lacks else self.method

    @property
    def _damping(self) -> float:
        return self.method.damping if self.tuning.damping is None else self.tuning.damping

    def _config(self, spec: str) -> MethodConfig:
        return MethodConfig(spec=spec, damping=self._damping, activation_order=self.tuning.activation_order)

    def _stored_spec(self, tensor: TensorSpec) -> str:
        if is_matrix(tensor):
            return self.specs[tensor.name]
        dtype = self.checkpoint.source_dtype(tensor.name)
        return "float32" if dtype == "float64" else dtype

    def _remaining_bytes(self, num_done: int) -> int:
        left = [tensor for part in self._parts[num_done:] for tensor in part.tensors]
        return sum(codec(self._stored_spec(tensor)).nbytes(tensor.shape) for tensor in left)

    def least_bytes(self) -> int:
        """What a run holds at its fullest with one sequence of calibration text, or none where none is read."""
        plain = weight_method("rtn")
        if self.tokens is None:
            return max(self._form_bytes(tensor, plain) for tensor in self._matrices)
        length = self.tokens.shape[1]
        layers = [part for part in self._parts if part.layer is not None]
        source_bytes = max(self._source_bytes(part.tensors) for part in layers)
        tensor_bytes = max(
            Collector.nbytes(t.shape[1])
            + max(Collector.work_bytes(t.shape[1]), tensor_work_bytes(t, self.method.work_bytes(*t.shape)))
            for t in self._matrices
            if t.name != EMBEDDING
        )
        ends_bytes = max(self._form_bytes(t, plain) for t in self._matrices if t.name == EMBEDDING)
        fixed_bytes = activation_bytes(self.config, length) + scratch_bytes(self.config, self.specs, length, exact=True)
        if self._chooses:
            fixed_bytes += self._probe_bytes()
        if self.method.transforms:
            # one sequence before and after a layer, and the layer's matrices as floats, scaled and rounded
            fixed_bytes += 3 * self._sequence_bytes(length)
            fixed_bytes += max(TRANSFORM_BYTES * sum(t.size for t in part.matrices) for part in layers)
        if not self._chooses and any(codec(self.specs[t.name]).method for t in self._matrices):
            fixed_bytes += max(sum(t.size for t in part.matrices) for part in layers)  # see _make_part; a byte a weight
        # the stream keeps one sequence more, to work on
        return fixed_bytes + 2 * self._sequence_bytes(length) + max(source_bytes + tensor_bytes, ends_bytes)

    def _sequence_bytes(self, length: int) -> int:
        return 4 * length * self.config.hidden_size

    def _form_bytes(self, tensor: TensorSpec, method: WeightMethod) -> int:
        """Resident while one matrix is compressed: its pages, the result (a byte a weight, and scales), what a method
        that corrects errors holds beside them (the weights in float32 too), and the rows that the loss is taken from.
        """
        result_bytes = tensor.size + tensor.size // 16
        sample_bytes = 3 * 4 * min(tensor.shape[0], sensitivity.SAMPLE_ROWS) * tensor.shape[1]
        floats_bytes = 4 * tensor.size if method.calibrates else 0
        work_bytes = max(method.work_bytes(*tensor.shape) + floats_bytes, sample_bytes)
        return self.checkpoint.stored_bytes(tensor.name) + result_bytes + work_bytes

    def _probe_bytes(self) -> int:
        """What measuring holds: embedding and head, probed states, probed forms of a layer (a byte a weight)."""
        ends = [tensor for part in (self._parts[0], self._parts[-1]) for tensor in part.tensors]
        most = max(len(part.matrices) for part in self._parts)
        forms_bytes = max(sum(tensor.size for tensor in part.matrices) for part in self._parts)
        return self._source_bytes(ends) + sensitivity.Probe.work_bytes(self.config, most) + forms_bytes

    def _source_bytes(self, tensors: Iterable[TensorSpec]) -> int:
        return sum(self.checkpoint.stored_bytes(tensor.name) for tensor in tensors)


def _nothing() -> None:
    """Memory that nobody watches settles by itself."""


def _parsed_bits(bits: float | str | None, method: WeightMethod) -> float | str:
    """A mean number of bits, or the canonical name of one format for all."""
    wanted = method.default_bits if bits is None else bits
    with suppress(ValueError):
        wanted = float(wanted)
    form = method.form(wanted)
    if form is not None:
        return form
    mean = float(wanted)
    if not MIN_BITS <= mean <= MAX_BITS:
        raise InputError(f"bits {mean:g}: give a mean between {MIN_BITS:g} and {MAX_BITS:g}, or a format such as int4")
    return mean


def _any_bits(method: WeightMethod) -> float:
    """For a size, where widths are mixed to whatever mean it leaves."""
    try:
        mixes = method.form(MAX_BITS / 4) is None
    except InputError:
        mixes = False
    if not mixes:
        raise InputError(f"{method.name} does not mix widths to a size: use --method gptq, rtn, awq or bitstack")
    return MAX_BITS


def tensor_work_bytes(tensor: TensorSpec, work_bytes: int) -> int:
    """While one matrix is worked on: itself in float32 twice and its codes, and what the method holds."""
    return 9 * tensor.size + work_bytes

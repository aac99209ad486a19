"""One run of Quamba2 over a Mamba model: embedding, layers in order, head; a part of the folder each.

A layer is read, changed into an equal one (`ssm_transforms`), looked at over the calibration text, packed, and run as
it is stored; what it hands on is what the next one is calibrated on. A run that was cut off is taken up behind its last
whole part: its parts are read back and run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from memwall import kernels
from memwall.compress import sensitivity, ssm_transforms, weight_method
from memwall.compress.base import MethodConfig, Statistics
from memwall.compress.calibration import BUNDLED_TEXT, CalibrationSettings, read_text, token_sequences
from memwall.compress.job_plan import Tuning
from memwall.compress.quamba2 import MIXED, Quamba2, matrix_spec
from memwall.compress.saved import WorkDirectory, read_part
from memwall.compress.sort_cluster import Order
from memwall.compress.ssm_run import LayerRun, Seen
from memwall.errors import InputError
from memwall.formats import Packed, codec
from memwall.kernels.scan import hadamard_size
from memwall.memory import Arena
from memwall.models.checkpoint import Checkpoint
from memwall.models.config import EMBEDDING, HEAD, HEAD_SCALE, ModelConfig
from memwall.models.ssm_config import Quantized, SsmConfig, with_quantized
from memwall.models.tokenizer import Tokenizer

Progress = Callable[[str, int, int], None]
MEASURED_SEQUENCES = 4
"""Of calibration text that layers of `w4ax` are compared on."""


class SsmJob:
    """Compress the model of `checkpoint` into a work directory."""

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        arena: Arena,
        method: str,
        options: Mapping[str, str] | None,
        *,
        bits: float | str | None,
        tuning: Tuning,
        progress: Progress,
    ) -> None:
        assert config.ssm is not None
        self.config, self.checkpoint, self.arena = config, checkpoint, arena
        self.method = cast(Quamba2, weight_method(method, options))
        self.ssm: SsmConfig = config.ssm
        self.form = self.method.form(self.method.default_bits if bits is None else bits)
        if self.ssm.proj_bias and self.form != "w4a16":
            raise InputError(
                f"{self.form}: this model's projections have biases (use_bias), which products in 8 bits do not add; "
                "use --bits w4a16"
            )
        for width in (config.hidden_size, self.ssm.inner_size):
            hadamard_size(width)
            matrix_spec("w4a8" if self.form == MIXED else self.form, width)
        self.errors: dict[str, float] = {}
        self.specs: dict[str, str] = {}
        self.tokens = np.empty((0, 0), np.int64)
        self.info: dict[str, Any] = {}
        self.quantized: Quantized | None = None
        self._tuning, self._progress, self._digest = tuning, progress, ""
        self._total = sum(tensor.size for tensor in config.tensors())

    def read_text(self, source: Path, calibration_text: Path | None) -> None:
        """Read the calibration text."""
        path = calibration_text or BUNDLED_TEXT
        text = read_text(path)
        tokenizer = Tokenizer.from_directory(source, self.config.vocab_size)
        length = self._tuning.calibration.sequence_tokens
        most = min(self.method.samples * length, self._tuning.calibration.max_tokens * self.method.samples)
        settings = CalibrationSettings(max_tokens=most, sequence_tokens=length)
        self.tokens = token_sequences(text, tokenizer, self.config, settings, str(path))
        self._digest = hashlib.sha256(text.encode()).hexdigest()

    def limit_text(self) -> None:
        """All that was asked for is read."""

    def settings(self) -> dict[str, Any]:
        """All that the result depends on."""
        return {
            "model": self.checkpoint.fingerprint(),
            "method": self.method.name,
            "options": self.method.settings(),
            "bits": self.form,
            "calibration_sha256": self._digest,
            "calibration_shape": list(self.tokens.shape),
        }

    @property
    def model_config(self) -> dict[str, Any]:
        """Of the compressed model, once `run` is through."""
        assert self.quantized is not None
        return with_quantized(self.config.source, self.quantized)

    # -- the run ------------------------------------------------------------------------------------------------------

    def run(self, work: WorkDirectory) -> None:
        """Make every part that the work directory does not hold yet."""
        forms = work.notes.get("layers") or self._forms()
        work.note("layers", list(forms))
        head = "w4a16" if self.form == MIXED else self.form
        self.quantized = self.method.quantized(self.ssm, tuple(forms), head)
        num_parts = self.config.num_layers + 2
        hidden = np.empty(0, np.float32)
        done = 0
        for index in range(num_parts):
            file = f"model-{index + 1:05d}-of-{num_parts:05d}.safetensors"
            layer = index - 1
            if index >= len(work.parts):
                if index == 0:
                    made = self._embedding()
                elif layer < self.config.num_layers:
                    made = self._layer(layer, forms[layer], hidden)
                else:
                    made = self._ends(head, hidden)
                with work.writer(file, {name: (packed.spec, packed.shape) for name, packed in made.items()}) as writer:
                    for name, packed in made.items():
                        writer.write(name, packed)
            made = read_part(work.path / file)
            self.specs.update({name: packed.spec for name, packed in made.items()})
            if index == 0:
                hidden = self._embedded(made[EMBEDDING])
            elif layer < self.config.num_layers:
                self._advance(layer, forms[layer], made, hidden)
            done += sum(packed.size for packed in made.values())
            self._progress("compress", min(done, self._total), self._total)

    def _embedding(self) -> dict[str, Packed]:
        rows = ssm_transforms.turned_rows(self.checkpoint.alone(EMBEDDING))
        spec = "int8-g64" if self.form == "w8a8" else "int4-g64"
        self.errors[EMBEDDING] = sensitivity.relative_error(rows, packed := kernels.encode(spec, rows), None)
        return {EMBEDDING: packed}

    def _embedded(self, packed: Packed) -> np.ndarray:
        hidden = np.empty((*self.tokens.shape, self.config.hidden_size), np.float32)
        matrix = kernels.matrix(packed)
        for ids, states in zip(self.tokens, hidden, strict=True):
            kernels.gather_rows(matrix, ids, states)
        return hidden

    def _read(self, layer: int) -> dict[str, np.ndarray]:
        """A layer's tensors as floats, its norm fused and its residual turned."""
        names = [name for name, _, _ in self.ssm.rows(layer)]
        prefix = f"model.layers.{layer}."
        tensors = {name: self.checkpoint.alone(prefix + name).astype(np.float32) for name in names}
        return ssm_transforms.rotate_residual(ssm_transforms.fuse_norm(tensors))

    def _prepared(self, layer: int, form: str, hidden: np.ndarray) -> tuple[dict[str, np.ndarray], Order | None, Seen]:
        """A layer in its new order, and what it shows then; the hidden states stay as they are."""
        tensors, order = self._read(layer), None
        if form.endswith("a8") and not self.ssm.is_first:
            run = LayerRun(self.config, tensors, None, self.arena, hidden.shape[1])
            order = self.method.order(self.ssm, run.look(hidden.copy(), products=False))
            run.release()
            tensors = ssm_transforms.reorder(tensors, self.ssm, order.channels, order.heads)
        tensors = ssm_transforms.turn_output(tensors)
        run = LayerRun(self.config, tensors, self._as("float"), self.arena, hidden.shape[1])
        seen = run.look(hidden.copy(), quantile=self.method.percentile)
        run.release()
        return tensors, order, seen

    def _as(self, form: str) -> Quantized:
        return self.method.quantized(self.ssm, (form,), "float")

    def _packed(
        self, form: str, method: Quamba2, tensors: dict[str, np.ndarray], order: Order | None, seen: Seen
    ) -> dict[str, Packed]:
        made = method.pack(self.ssm, form, tensors, seen.statistics)
        if form.endswith("a8"):
            ssm = replace(self.ssm, quantized=self._as(form))
            scales = method.scales(ssm, seen, order)
            made |= {name: codec("float32").encode(values) for name, values in scales.items()}
        return made

    def _layer(self, layer: int, form: str, hidden: np.ndarray) -> dict[str, Packed]:
        tensors, order, seen = self._prepared(layer, form, hidden)
        made = self._packed(form, self.method, tensors, order, seen)
        for name, statistics in seen.statistics.items():
            error = sensitivity.relative_error(tensors[name], made[name], statistics)
            self.errors[f"model.layers.{layer}.{name}"] = error
        return {f"model.layers.{layer}.{name}": packed for name, packed in made.items()}

    def _advance(self, layer: int, form: str, made: Mapping[str, Packed], hidden: np.ndarray) -> None:
        prefix = f"model.layers.{layer}."
        own = {name.removeprefix(prefix): packed for name, packed in made.items()}
        run = LayerRun(self.config, own, self._as(form), self.arena, hidden.shape[1])
        run.run(hidden)
        run.release()

    def _ends(self, head: str, hidden: np.ndarray) -> dict[str, Packed]:
        """Final norm of ones, and the head with that norm's weights in it, on its own though it may have been tied."""
        norm = self.checkpoint.alone("model.norm.weight").astype(np.float32)
        weight = ssm_transforms.turned_rows(self.checkpoint.tensor(HEAD).astype(np.float32) * norm)
        statistics = Statistics(np.zeros((len(norm),) * 2, np.float32))
        peak, ones = 0.0, np.ones_like(norm)
        for states in hidden:
            kernels.rms_norm(states, ones, self.config.rms_norm_eps, states)
            statistics.add(states)
            peak = max(peak, float(np.abs(states).max()))
        packed = self.method.compress(weight, statistics, MethodConfig(spec=matrix_spec(head, len(norm)), tensor=HEAD))
        self.errors[HEAD] = sensitivity.relative_error(weight, packed, statistics)
        made = {"model.norm.weight": codec("float32").encode(ones), HEAD: packed}
        if head.endswith("a8"):
            made[HEAD_SCALE] = codec("float32").encode(np.array([max(peak / 127, 1e-6)], np.float32))
        return made

    # -- which layers keep 16-bit activations --------------------------------------------------------------------------

    def _forms(self) -> list[str]:
        """The form of every layer; of a mix, by what each form adds to the error of the float layer's output."""
        num_layers = self.config.num_layers
        if self.form != MIXED:
            return [self.form] * num_layers
        plain = Quamba2(**{**self.method.settings(), "rounding": "rtn"})
        rows = ssm_transforms.turned_rows(self.checkpoint.alone(EMBEDDING))
        hidden = rows[self.tokens[:MEASURED_SEQUENCES]]
        gains = []
        for layer in range(num_layers):
            errors = {}
            float_out = hidden.copy()
            tensors, order, seen = self._prepared(layer, "w4a8", hidden)
            run = LayerRun(self.config, tensors, self._as("float"), self.arena, hidden.shape[1])
            run.run(float_out)
            run.release()
            for form in ("w4a8", "w4a16"):
                out = hidden.copy()
                made = self._packed(form, plain, tensors, order, seen)
                run = LayerRun(self.config, made, self._as(form), self.arena, hidden.shape[1])
                run.run(out)
                run.release()
                errors[form] = float(np.square(out - float_out).sum())
            gains.append((errors["w4a8"] - errors["w4a16"]) / float(np.square(float_out).sum()))
            hidden = float_out
            self._progress("measure", layer + 1, num_layers)
        kept = max(1, round(self.method.a16_share * num_layers)) if self.method.a16_share > 0 else 0
        chosen = set(np.argsort(gains)[::-1][:kept].tolist())
        return ["w4a16" if layer in chosen else "w4a8" for layer in range(num_layers)]

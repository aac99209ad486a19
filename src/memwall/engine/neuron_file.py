"""Makes a model whose feed-forward streams from disk: neurons in a file of rows, predictors, and the rest as it was.

Source: LLM in a flash (Keivan Alizadeh, 2023, arXiv 2312.11514), sections 3.1 to 3.3. A text runs through the model
once; what its feed-forwards read trains a predictor for each layer (`neuron_predictors`), and how many neurons the last
k tokens of it are predicted to wake, at most, is what windows of k tokens will have room for. The model must fit in
memory for this, once.

The folder that is written holds `neurons.bin` (`models.neurons`), `model.safetensors` without the feed-forwards'
matrices and with predictors (float16), and the tokenizer's files; nothing of it is there until all of it is.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from memwall.compress.calibration import BUNDLED_TEXT, CalibrationSettings, read_text, token_sequences
from memwall.compress.saved import COPIED_NAMES
from memwall.engine.loading import Settings, cache_shape, load_decoder
from memwall.engine.neuron_predictors import Judgement, Predictor, Training, judge, train
from memwall.errors import InputError
from memwall.formats import checked_json
from memwall.formats.manifest import MANIFEST_NAME
from memwall.formats.safetensors_file import SafetensorsWriter
from memwall.kv import build
from memwall.models.checkpoint import SINGLE_NAME, Checkpoint
from memwall.models.config import ModelConfig
from memwall.models.neurons import FILE_NAME, KEY, NeuronLayout
from memwall.models.precision import source_spec
from memwall.models.tokenizer import Tokenizer

WINDOWS = 8
SLACK = 0.1
"""Rows beyond the most that the text wanted."""
BLOCK_NEURONS = 1024

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class FlashReport:
    """What was made. judged: of each layer's predictor, on tokens it was not trained on."""

    neuron_bytes: int
    resident_bytes: int
    predictor_bytes: int
    num_tokens: int
    judged: tuple[Judgement, ...]
    layout: NeuronLayout


def make_flash_model(
    source: Path,
    out: Path,
    *,
    text: Path | None = None,
    max_tokens: int = 16_384,
    training: Training | None = None,
    progress: Progress | None = None,
) -> FlashReport:
    """Writes the folder `out`. InputError for models without a ReLU, and where `out` is there already.

    text: what predictors are trained on; the bundled calibration text otherwise.
    """
    config = ModelConfig.from_directory(source)
    check_source(source, config)
    if out.exists():
        raise InputError(f"{out}: is there already; name a new folder")
    told = progress or (lambda done, whole, what: None)
    words = read_text(text or BUNDLED_TEXT)
    tokenizer = Tokenizer.from_directory(source, config.vocab_size)
    settings = CalibrationSettings(max_tokens=max_tokens, sequence_tokens=min(512, config.max_position))
    ids = token_sequences(words, tokenizer, config, settings, str(text or BUNDLED_TEXT))
    inputs = feed_forward_inputs(source, ids, told)
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        with Checkpoint(source, config) as checkpoint:
            found = [
                train_layer(checkpoint, config, layer, x, training or Training(), told)
                for layer, x in enumerate(inputs)
            ]
            layout = layout_of(config, [each[0] for each in found], _held(found, inputs, len(ids)), checkpoint)
            told(config.num_layers, config.num_layers, "writing")
            written = _write(source, partial, checkpoint, config, layout, [each[0] for each in found])
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    predictor_bytes = sum(2 * (each.down.size + each.up.size) + 4 * each.bias.size for each, _ in found)
    return FlashReport(
        neuron_bytes=layout.file_bytes, resident_bytes=written, predictor_bytes=predictor_bytes,
        num_tokens=ids.size, judged=tuple(each[1] for each in found), layout=layout,
    )  # fmt: skip


def check_source(source: Path, config: ModelConfig) -> None:
    """InputError for a model whose neurons cannot be streamed."""
    if config.neurons is not None:
        raise InputError(f"{source}: its neurons stream already")
    if (source / MANIFEST_NAME).is_file():
        raise InputError(f"{source}: is compressed; give the float model it was made from")
    if config.feed_forward not in ("relu", "reglu") or config.num_experts or config.ssm is not None:
        kind = config.feed_forward if config.ssm is None and not config.num_experts else config.family
        raise InputError(
            f"{source}: its feed-forward ({kind}) has no neurons that a token leaves at zero; streaming them needs a "
            "ReLU (hidden_act relu or fatrelu in Llama's form, activation relu in Falcon's)"
        )


def feed_forward_inputs(source: Path, ids: np.ndarray, told: Progress) -> list[np.ndarray]:
    """Of each layer what its feed-forward reads, float32 [tokens, H], for sequences of tokens [S, T]."""
    tokens, shape = ids.shape[1], ModelConfig.from_directory(source)
    loaded = load_decoder(source, Settings(weights=source_spec(shape), segment_tokens=tokens, context_tokens=tokens))
    config, decoder = loaded.config, loaded.decoder
    places = {f"model.layers.{layer}.mlp.up_proj.weight": layer for layer in range(config.num_layers)}
    found: list[list[np.ndarray]] = [[] for _ in places]

    def see(name: str, x: np.ndarray) -> None:
        if name in places:
            found[places[name]].append(x.copy())

    decoder.observer = see
    try:
        for done, sequence in enumerate(ids):
            told(done, len(ids), "reading the text")
            cache = build("float16", cache_shape(config), loaded.arena, tokens)
            decoder.hidden(sequence, cache)
            cache.release()
    finally:
        decoder.release()
        loaded.weights.release()
    return [np.concatenate(parts) for parts in found]


def first_matrix(checkpoint: Checkpoint, config: ModelConfig, layer: int) -> tuple[np.ndarray, np.ndarray | None]:
    """What decides whether neurons are active: float32 [F, H], and its bias."""
    name = f"model.layers.{layer}.mlp.{'gate' if config.gated else 'up'}_proj"
    bias = checkpoint.tensor(f"{name}.bias").astype(np.float32) if config.mlp_bias else None
    return checkpoint.tensor(f"{name}.weight").astype(np.float32), bias


def train_layer(
    checkpoint: Checkpoint, config: ModelConfig, layer: int, x: np.ndarray, settings: Training, told: Progress
) -> tuple[Predictor, Judgement]:
    """A layer's predictor, its numbers as they will be stored, and how it does on tokens that training did not see."""
    first, bias = first_matrix(checkpoint, config, layer)
    told(layer, config.num_layers, f"training the predictor of layer {layer + 1} of {config.num_layers}")
    made = train(first, bias, x, settings, cut=config.relu_threshold)
    for part in (made.down, made.up):
        part[...] = part.astype(np.float16)
    apart = x[-max(int(settings.held_out * len(x)), 1) :]
    activations = apart @ first.T + (0 if bias is None else bias)
    activations[activations <= config.relu_threshold] = 0
    return made, judge(made.active(apart), activations)


def rows_wanted(active: np.ndarray, windows: int, sequences: int = 1) -> list[int]:
    """The most neurons that any k successive tokens wake, for k = 1 to `windows`. active: [sequences * T, F]."""
    found = []
    parts = np.split(active, sequences) if len(active) % sequences == 0 else [active]
    for window in range(1, windows + 1):
        most = 0
        for part in parts:
            counts = np.add.accumulate(np.pad(part, ((1, 0), (0, 0))).astype(np.int32), axis=0)
            last = min(window, len(part))
            most = max(most, int((counts[last:] > counts[:-last]).sum(1).max()))
        found.append(max(most, 1))
    return found


def _held(
    found: Sequence[tuple[Predictor, Judgement]], inputs: Sequence[np.ndarray], sequences: int
) -> list[list[int]]:
    """Rows by window and layer, with slack. Sequences are looked at one by one: windows do not span them."""
    by_layer = []
    for (predictor, _), x in zip(found, inputs, strict=True):
        most = [0] * WINDOWS
        for part in np.split(x, sequences)[-max(sequences // 4, 1) :]:
            most = [max(pair) for pair in zip(most, rows_wanted(predictor.active(part), WINDOWS), strict=True)]
        by_layer.append([min(int(rows * (1 + SLACK)) + 1, len(predictor.bias)) for rows in most])
    return [list(rows) for rows in zip(*by_layer, strict=True)]


def layout_of(
    config: ModelConfig, predictors: Sequence[Predictor], held: Sequence[Sequence[int]], checkpoint: Checkpoint
) -> NeuronLayout:
    """How the neurons of a model will lie."""
    form = checkpoint.source_dtype("model.layers.0.mlp.up_proj.weight")
    return NeuronLayout(
        form=form if form in ("float16", "bfloat16") else "float32",
        num_layers=config.num_layers,
        num_neurons=config.intermediate_size,
        width=config.hidden_size,
        parts=3 if config.gated else 2,
        ranks=tuple(len(each.down) for each in predictors),
        thresholds=tuple(each.threshold for each in predictors),
        held=tuple(map(tuple, held)),
    )


def _write(
    source: Path, out: Path, checkpoint: Checkpoint, config: ModelConfig, layout: NeuronLayout,
    predictors: Sequence[Predictor],
) -> int:  # fmt: skip
    """The folder's files; gives the bytes of the resident weights."""
    for name in COPIED_NAMES:
        if (source / name).is_file() and name != "config.json":
            shutil.copyfile(source / name, out / name)
    values = {**checked_json.read(source / "config.json", infinite=True), KEY: layout.to_json()}
    (out / "config.json").write_text(json.dumps(values, indent=1))
    streamed = replace(config, neurons=layout)
    made = {}
    for layer, predictor in enumerate(predictors):
        prefix = f"model.layers.{layer}.mlp.predictor."
        made[prefix + "down.weight"] = predictor.down.astype(np.float16)
        made[prefix + "up.weight"] = predictor.up.astype(np.float16)
        made[prefix + "up.bias"] = predictor.bias.astype(np.float32)
    specs = [
        (spec.name, made[spec.name].dtype if spec.name in made else checkpoint.tensor(spec.name).dtype, spec.shape)
        for spec in streamed.tensors()
    ]
    with SafetensorsWriter(out / SINGLE_NAME, specs) as writer:
        for name, _, _ in specs:
            writer.write(name, made[name] if name in made else np.ascontiguousarray(checkpoint.tensor(name)))
        nbytes = writer.nbytes
    write_neurons(out / FILE_NAME, checkpoint, config, layout)
    return nbytes


def write_neurons(path: Path, checkpoint: Checkpoint, config: ModelConfig, layout: NeuronLayout) -> None:
    """The rows of all layers, some at a time."""
    names = ("gate", "up") if config.gated else ("up",)
    with path.open("wb") as file:
        for layer in range(config.num_layers):
            prefix = f"model.layers.{layer}.mlp."
            firsts = [checkpoint.tensor(f"{prefix}{name}_proj.weight") for name in names]
            down = checkpoint.tensor(f"{prefix}down_proj.weight")
            for begin in range(0, layout.num_neurons, BLOCK_NEURONS):
                some = slice(begin, min(begin + BLOCK_NEURONS, layout.num_neurons))
                parts = [first[some] for first in firsts] + [down[:, some].T]
                block = np.zeros((some.stop - begin, layout.row_bytes), np.uint8)
                numbers = np.concatenate([part.astype(layout.dtype) for part in parts], axis=1)
                block[:, : numbers.shape[1] * numbers.dtype.itemsize] = numbers.view(np.uint8)
                file.write(block.data)
        file.flush()
        os.fsync(file.fileno())

"""The CPU engine's decoder for models without attention: Mamba and Mamba-2, in floats or as Quamba2 stores them.

Like `decoder`, NumPy holds the buffers, native kernels do the work and torch is never imported; a segment goes through
one layer before the next begins. Inside a layer rows are worked in chunks, whose last state is all that the next chunk
needs, so memory does not grow with the text. Layers on 8-bit activations hold integers from in_proj's output to
out_proj's input; their state is rounded once per chunk, and a token at a time is a chunk of one.

Shapes: T new tokens, B rows of a chunk, d hidden, W rows of in_proj, E inner size; see `ssm_config`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from memwall import kernels
from memwall.errors import InputError
from memwall.kernels import scan
from memwall.memory import Arena
from memwall.models.config import EMBEDDING, HEAD, HEAD_SCALE, ModelConfig
from memwall.models.decoder import OWNER, SCRATCH, Observer
from memwall.models.ssm_config import SsmConfig
from memwall.models.ssm_tables import StaticScales, Tables
from memwall.models.weights import Weights

CHUNK_ROWS = 256
"""Tokens between two roundings of an 8-bit state (Quamba2, section 4: chunks of 256), and most rows of a product."""
_SINGLE, _BYTE = np.dtype(np.float32), np.dtype(np.int8)


class StateStore(Protocol):
    """What the decoder asks of a sequence's memory (`kv.ssm_state`)."""

    states: list[np.ndarray]
    inputs: list[np.ndarray]

    @property
    def length(self) -> int:
        """Tokens taken in."""

    def advance(self, num_tokens: int) -> None:
        """All layers have taken in so many more."""


def buffer_shapes(
    config: ModelConfig, segment_tokens: int, logit_rows: int = 1
) -> dict[str, tuple[tuple[int, int], np.dtype]]:
    """Buffers that the decoder keeps for segments of up to `segment_tokens`."""
    ssm = _ssm(config)
    rows, hidden, inner = min(segment_tokens, CHUNK_ROWS), config.hidden_size, ssm.inner_size
    static = [ssm.is_static(layer) for layer in range(config.num_layers)]
    shapes: dict[str, tuple[tuple[int, int], np.dtype]] = {
        "hidden": ((segment_tokens, hidden), _SINGLE),
        "normed": ((rows, hidden), _SINGLE),
        "y": ((rows, inner), _SINGLE),
        "logits": ((logit_rows, config.vocab_size), _SINGLE),
        "scan": (scan.scan_scratch_shape(ssm.head_dim, ssm.state_size, kernels.num_threads()), _SINGLE),
    }
    if not all(static):
        shapes |= {"proj": ((rows, ssm.proj_size), _SINGLE), "conv": ((rows, ssm.conv_size), _SINGLE)}
    if any(static):
        for name, width in (("proj8", ssm.proj_size), ("conv8", ssm.conv_size), ("y8", inner)):
            shapes[name] = ((rows, width), _BYTE)
    if any(static) or (ssm.quantized is not None and ssm.quantized.head.endswith("a8")):
        shapes["normed8"] = ((max(rows, logit_rows), hidden), _BYTE)
    if ssm.is_first:
        shapes |= {"selected": ((rows, ssm.dt_rank + 2 * ssm.state_size), _SINGLE)}
        shapes |= {"narrow": ((rows, ssm.dt_rank), _SINGLE), "dt": ((rows, inner), _SINGLE)}
        if any(static):
            shapes |= {"dt8": ((rows, inner), _BYTE), "x": ((rows, inner), _SINGLE)}
            shapes |= {"bc": ((rows, ssm.state_size), _SINGLE), "b8": ((rows, ssm.state_size), _BYTE)}
            shapes |= {"c8": ((rows, ssm.state_size), _BYTE)}
    return shapes


def ssm_scratch_bytes(
    config: ModelConfig,
    specs: Mapping[str, str],
    segment_tokens: int,
    *,
    exact: bool = False,
    threads: int | None = None,
) -> int:
    """What the kernels keep between calls for products with floats: see `decoder.scratch_bytes`."""
    ssm = _ssm(config)
    tokens, widest = min(segment_tokens, CHUNK_ROWS), max(config.hidden_size, ssm.inner_size)
    groups = {
        group
        for spec in set(specs.values())
        if not spec.startswith("static")
        for group in kernels.roundings(spec, exact=exact)
    }
    panels = kernels.predict_scratch_bytes(tokens, widest, group=0, threads=threads)
    rounded = sum(kernels.predict_scratch_bytes(tokens, widest, group=g, threads=threads) - panels for g in groups)
    return panels + rounded


def _ssm(config: ModelConfig) -> SsmConfig:
    assert config.ssm is not None
    return config.ssm


class StatePart(Protocol):
    """Rows [begin, end) of a batch are the next tokens of one sequence."""

    begin: int
    end: int
    cache: Any


class StateParts(Protocol):
    """A batch of sequences, each with a memory of its own (`engine.own_caches`)."""

    parts: Sequence[StatePart]

    def settle(self, layer: int) -> None:
        """Called once, after the last layer."""


Pieces = Sequence[tuple[slice, np.ndarray, np.ndarray]]
"""Rows of a chunk, and the state and inputs of the sequence that they go on."""


class SsmDecoder:
    """A Mamba model ready to run on the CPU; `exact`, `segment_tokens` and `logit_rows` as in `decoder.Decoder`.

    `observer(name, x)` sees, in layers of floats, the inputs of products by their tensors' names, and what stands
    between them as `...mixer.proj` (in_proj's outputs) and `...mixer.conv`; `peaks` receives the largest states.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        arena: Arena,
        *,
        segment_tokens: int = 512,
        logit_rows: int = 1,
        exact: bool = False,
    ) -> None:
        self.config = config
        self.weights = weights
        self.exact = exact
        self.segment_tokens = segment_tokens
        self.observer: Observer | None = None
        self.peaks: dict[int, np.ndarray] = {}
        self._ssm = _ssm(config)
        self._arena = arena
        scratch = ssm_scratch_bytes(config, weights.specs, segment_tokens, exact=exact)
        self._scratch = arena.charge(SCRATCH, scratch)
        try:
            self._tables = Tables(config, weights.vectors, arena)
            try:
                self._buffers = arena.allocate_all(OWNER, buffer_shapes(config, segment_tokens, logit_rows))
            except BaseException:
                self._tables.release()
                raise
        except BaseException:
            self._scratch.release()
            raise

    def adapt(self, lora: object) -> None:
        """Adapters have no place in these layers."""
        if lora is not None:
            raise InputError("adapters (LoRA) go with models that have attention; this one is a Mamba model")

    def release(self) -> None:
        """Gives the buffers back; the decoder is of no more use."""
        for buffer in self._buffers.values():
            self._arena.free(buffer)
        self._buffers = {}
        self._tables.release()
        self._scratch.release()

    def forward(self, tokens: np.ndarray, cache: StateStore, *, all_logits: bool = False) -> np.ndarray:
        """Logits [V] of the last of new tokens [T], or [T, V]; see `decoder.Decoder.forward`."""
        hidden = self.hidden(tokens, cache)
        return self.logits(hidden) if all_logits else self.logits(hidden[-1:])[0]

    def hidden(self, tokens: np.ndarray, cache: StateStore) -> np.ndarray:
        """Final normed hidden states [T, d] of new tokens; the state moves on."""
        if not 0 < len(tokens) <= self.segment_tokens:
            raise ValueError(f"forward takes 1 to {self.segment_tokens} tokens at a time, got {len(tokens)}")
        hidden = self._buffers["hidden"][: len(tokens)]
        kernels.gather_rows(self.weights.matrices[EMBEDDING], np.asarray(tokens, np.int64), hidden)
        for layer in range(self.config.num_layers):
            self.run_layer(layer, hidden, cache.states[layer], cache.inputs[layer])
        cache.advance(len(tokens))
        eps = self.config.rms_norm_eps
        kernels.rms_norm(hidden, self.weights.vectors["model.norm.weight"], eps, hidden)
        return hidden

    def batch(self, tokens: np.ndarray, positions: np.ndarray, cache: StateParts) -> np.ndarray:
        """Final normed hidden states [B, d] of tokens of several sequences; see `decoder.Decoder.batch`."""
        if not 0 < len(tokens) <= self.segment_tokens:
            raise ValueError(f"batch takes 1 to {self.segment_tokens} tokens at a time, got {len(tokens)}")
        hidden = self._buffers["hidden"][: len(tokens)]
        kernels.gather_rows(self.weights.matrices[EMBEDDING], np.asarray(tokens, np.int64), hidden)
        groups = _groups(cache.parts)
        for layer in range(self.config.num_layers):
            for group in groups:
                first = group[0][0].start
                pieces = [(slice(rows.start - first, rows.stop - first), part.cache.states[layer],
                           part.cache.inputs[layer]) for rows, part in group]  # fmt: skip
                self._run_chunk(layer, hidden[first : group[-1][0].stop], pieces)
        for part in cache.parts:
            part.cache.advance(part.end - part.begin)
        cache.settle(self.config.num_layers - 1)
        eps = self.config.rms_norm_eps
        kernels.rms_norm(hidden, self.weights.vectors["model.norm.weight"], eps, hidden)
        return hidden

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """Normed hidden states [n, d] -> logits [n, V] (n at most the logit_rows given at construction)."""
        out = self._buffers["logits"][: len(hidden)]
        matrix = self.weights.static.get(HEAD)
        if matrix is None:
            self._linear(HEAD, np.ascontiguousarray(hidden), out)
            return out
        scale = float(self.weights.vectors[HEAD_SCALE][0])
        matrix.multiply(scan.round_static(hidden, scale, self._buffers["normed8"][: len(hidden)]), scale, out)
        return out

    def run_layer(self, layer: int, hidden: np.ndarray, state: np.ndarray, inputs: np.ndarray) -> None:
        """One layer over the hidden states [T, d] of the next tokens, in place; its state and inputs move on."""
        for start in range(0, len(hidden), CHUNK_ROWS):
            rows = hidden[start : start + CHUNK_ROWS]
            self._run_chunk(layer, rows, [(slice(0, len(rows)), state, inputs)])

    def _run_chunk(self, layer: int, rows: np.ndarray, pieces: Pieces) -> None:
        """A layer over at most CHUNK_ROWS rows of one sequence or several, in place."""
        static, norm = self._tables.layers[layer].static, self.weights.vectors[f"model.layers.{layer}.norm.weight"]
        normed = self._buffers["normed"][: len(rows)]
        kernels.rms_norm(rows, norm, self.config.rms_norm_eps, normed)
        if static is None:
            self._float_rows(layer, normed, rows, pieces)
        else:
            self._static_rows(layer, static, normed, rows, pieces)

    def _scan(
        self,
        layer: int,
        conv: np.ndarray,
        selected: tuple[np.ndarray, np.ndarray, np.ndarray] | None,
        parts: dict[str, np.ndarray],
        pieces: Pieces,
        y: np.ndarray,
        **told: Any,
    ) -> None:
        """y [T, inner] of the convolution's outputs; selected: Mamba-1's B, C and dt; Mamba-2 has them in its parts."""
        ssm, mixer, vectors = self._ssm, f"model.layers.{layer}.mixer.", self.weights.vectors
        if selected is not None:
            x, (b, c, dt), bias = conv, selected, vectors[mixer + "dt_proj.bias"]
        else:
            x, b, c = _cut(conv, {"x": ssm.inner_size, "b": ssm.bc_size, "c": ssm.bc_size}).values()
            dt, bias = parts["dt"], vectors[mixer + "dt_bias"]
        for rows, state, _ in pieces:
            scan.selective_scan(
                x[rows], b[rows], c[rows], dt[rows], dt_bias=bias, decay=self._tables.layers[layer].decay,
                skip=vectors[mixer + "D"], dt_limits=ssm.dt_limits, state=state, y=y[rows],
                scratch=self._buffers["scan"], **told,
            )  # fmt: skip

    # -- layers of floats ----------------------------------------------------------------------------------------

    def _float_rows(self, layer: int, normed: np.ndarray, residual: np.ndarray, pieces: Pieces) -> None:
        ssm, mixer = self._ssm, f"model.layers.{layer}.mixer."
        proj, conv, y = (self._buffers[name][: len(normed)] for name in ("proj", "conv", "y"))
        vector = self.weights.vectors.get
        self._linear(mixer + "in_proj.weight", normed, proj, vector(mixer + "in_proj.bias"))
        self._see(mixer + "proj", proj)
        parts = _cut(proj, ssm.proj_parts)
        into = parts["x"] if ssm.is_first else proj[:, ssm.inner_size : ssm.inner_size + ssm.conv_size]
        for rows, _, inputs in pieces:
            scan.conv_silu(into[rows], inputs, self._conv_weight(mixer), vector(mixer + "conv1d.bias"), conv[rows])
        self._see(mixer + "conv", conv)
        selected = self._select(mixer, conv) if ssm.is_first else None
        self._scan(layer, conv, selected, parts, pieces, y, peak=self.peaks.get(layer))
        self._gate(mixer, y, parts["z"], 0.0)
        self._linear(mixer + "out_proj.weight", y, residual, vector(mixer + "out_proj.bias"), accumulate=True)

    def _select(self, mixer: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mamba-1's B, C and dt of the convolution's outputs."""
        ssm = self._ssm
        selected, narrow, dt = (self._buffers[name][: len(x)] for name in ("selected", "narrow", "dt"))
        self._linear(mixer + "x_proj.weight", x, selected)
        self._see(mixer + "selected", selected)
        np.copyto(narrow, selected[:, : ssm.dt_rank])
        self._linear(mixer + "dt_proj.weight", narrow, dt)
        self._see(mixer + "dt", dt)
        bc = selected[:, ssm.dt_rank :]
        return bc[:, : ssm.state_size], bc[:, ssm.state_size :], dt

    # -- layers on integers of 8 bits --------------------------------------------------------------------------------

    def _static_rows(
        self,
        layer: int,
        scales: StaticScales,
        normed: np.ndarray,
        residual: np.ndarray,
        pieces: Pieces,
    ) -> None:
        ssm, mixer, count = self._ssm, f"model.layers.{layer}.mixer.", len(normed)
        normed8, proj, conv, y8 = (self._buffers[name][:count] for name in ("normed8", "proj8", "conv8", "y8"))
        y = self._buffers["y"][:count]
        matrices, vector = self.weights.static, self.weights.vectors.get
        scan.round_static(normed, scales.input, normed8)
        matrices[mixer + "in_proj.weight"].multiply_rounded(normed8, scales.input, proj, scales.proj_inverse)
        parts = _cut(proj, ssm.proj_parts)
        into = parts["x"] if ssm.is_first else proj[:, ssm.inner_size : ssm.inner_size + ssm.conv_size]
        for rows, _, inputs in pieces:
            scan.conv_silu(
                into[rows], inputs, self._conv_weight(mixer), vector(mixer + "conv1d.bias"), conv[rows],
                in_scale=scales.conv_in, out_inverse=scales.conv_inverse,
            )  # fmt: skip
        selected = self._select_static(mixer, scales, conv) if ssm.is_first else None
        self._scan(layer, conv, selected, parts, pieces, y, tables=scales.scan)
        self._gate(mixer, y, parts["z"], scales.parts["z"])
        scan.round_static(y, scales.out, y8)
        matrices[mixer + "out_proj.weight"].multiply(y8, scales.out, residual, accumulate=True)

    def _select_static(
        self, mixer: str, scales: StaticScales, x: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same from integers to integers: x_proj and dt_proj are small and stay in floats."""
        wide = self._buffers["x"][: len(x)]
        np.multiply(x, scales.scan.x[0], out=wide, dtype=np.float32)
        b, c, dt = self._select(mixer, wide)
        dt8, bc = self._buffers["dt8"][: len(x)], self._buffers["bc"][: len(x)]
        scan.round_static(dt, scales.scan.dt, dt8)
        rounded = []
        for part, scale, name in ((b, scales.scan.b, "b8"), (c, scales.scan.c, "c8")):
            np.copyto(bc, part)
            rounded.append(scan.round_static(bc, float(scale[0]), self._buffers[name][: len(x)]))
        return rounded[0], rounded[1], dt8

    # -- common to both ----------------------------------------------------------------------------------------

    def _conv_weight(self, mixer: str) -> np.ndarray:
        return self.weights.vectors[mixer + "conv1d.weight"].reshape(self._ssm.conv_size, self._ssm.conv_taps)

    def _gate(self, mixer: str, y: np.ndarray, z: np.ndarray, z_scale: float) -> None:
        """Gate and norm y in place; turned where the model's out_proj is made for that."""
        weight = None if self._ssm.is_first else self.weights.vectors[mixer + "norm.weight"]
        eps, groups = self.config.rms_norm_eps, self._ssm.num_groups
        scan.gated_norm(y, z, weight, eps, y, groups=groups, z_scale=z_scale)
        if self._ssm.quantized is not None:
            scan.hadamard_rows(y)

    def _see(self, name: str, x: np.ndarray) -> None:
        if self.observer is not None:
            self.observer(name, x)

    def _linear(
        self, name: str, x: np.ndarray, out: np.ndarray, bias: np.ndarray | None = None, *, accumulate: bool = False
    ) -> None:
        self._see(name, x)
        matrix = self.weights.matrices[name]
        kernels.linear(x, [matrix], [out], exact=self.exact, accumulate=accumulate, biases=[bias])


def _cut(rows: np.ndarray, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Columns of rows [T, W] as views, by name and in order."""
    ends = np.cumsum(list(sizes.values()))
    return {name: rows[:, end - size : end] for (name, size), end in zip(sizes.items(), ends)}


def _groups(parts: Sequence[StatePart]) -> list[list[tuple[slice, StatePart]]]:
    """Chunks of a batch's sequences, each cut as if it came alone, that are worked together: CHUNK_ROWS at most."""
    groups: list[list[tuple[slice, StatePart]]] = []
    room = 0
    for part in parts:
        for begin in range(part.begin, part.end, CHUNK_ROWS):
            rows = slice(begin, min(begin + CHUNK_ROWS, part.end))
            if rows.stop - rows.start > room:
                groups.append([])
                room = CHUNK_ROWS
            groups[-1].append((rows, part))
            room -= rows.stop - rows.start
    return groups

"""One token, or one of each of several sequences, through the decoder's layers with as little Python as possible.

Decoding makes the same kernel calls for every token. Through Python each costs microseconds of checks and look-ups, the
more so as the weights sweep the interpreter out of the processor's caches at every token: a twentieth of a step of a
1B model, most of one of a small model. So the calls between two uses of the cache are recorded once, over fixed
buffers, and run as one (`kernels.Program`); with a cache whose part is kernel calls too, all layers are one.

Shapes: B tokens, one unless sequences are worked together; H hidden size, D numbers a head.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np

from memwall import kernels

if TYPE_CHECKING:
    from memwall.kernels.lora import LoraBatch
    from memwall.models.base import DecoderCache, RecordedCache
    from memwall.models.config import ModelConfig
    from memwall.models.weights import Weights


class Norm:
    """RMS norm, or LayerNorm where it has biases. name: without `.weight`."""

    def __init__(self, config: ModelConfig, weights: Weights, name: str) -> None:
        self._weight, self._bias = weights.vectors[name + ".weight"], weights.vectors.get(name + ".bias")
        self._eps = config.rms_norm_eps

    def into(self, x: np.ndarray, out: np.ndarray) -> None:
        """Rows of x [n, H], normed; out may be x."""
        if self._bias is None:
            kernels.rms_norm(x, self._weight, self._eps, out)
        else:
            kernels.layer_norm(x, self._weight, self._bias, self._eps, out)

    def record(self, program: kernels.Program, x: np.ndarray, out: np.ndarray) -> None:
        """Adds it to a program."""
        if self._bias is None:
            program.rms_norm(x, self._weight, self._eps, out)
        else:
            program.layer_norm(x, self._weight, self._bias, self._eps, out)


class Layer:
    """Names and matrices of one layer, looked up once.

    post_norm: None where the feed-forward reads what attention reads. inner: what its first products make, by the names
    of the decoder's buffers.
    """

    def __init__(self, config: ModelConfig, weights: Weights, index: int) -> None:
        prefix = f"model.layers.{index}."
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        vector = weights.vectors.get
        self.weights = weights
        self.parallel = config.parallel
        self.input_norm = Norm(config, weights, prefix + "input_layernorm")
        post = prefix + "post_attention_layernorm"
        self.post_norm = None if config.shared_norm else Norm(config, weights, post)
        self.qkv = [attention + name + ".weight" for name in ("q_proj", "k_proj", "v_proj")]
        self.qkv_bias = [vector(attention + name + ".bias") for name in ("q_proj", "k_proj", "v_proj")]
        self.output = attention + "o_proj.weight"
        self.output_bias = vector(attention + "o_proj.bias")
        self.q_norm, self.k_norm = vector(attention + "q_norm.weight"), vector(attention + "k_norm.weight")
        self.inner = ("gate", "up") if config.gated else ("up",)
        self.inner_targets = (4, 5) if config.gated else (5,)
        self.gate_up = [f"{mlp}{name}_proj.weight" for name in self.inner]
        self.gate_up_bias = [vector(f"{mlp}{name}_proj.bias") for name in self.inner]
        self._kind, self._threshold = config.feed_forward, config.relu_threshold
        self.down, self.down_bias = mlp + "down_proj.weight", vector(mlp + "down_proj.bias")
        moe = prefix + "block_sparse_moe."
        self.router = moe + "gate.weight"
        self.experts = [
            ([f"{moe}experts.{e}.w1.weight", f"{moe}experts.{e}.w3.weight"], f"{moe}experts.{e}.w2.weight")
            for e in range(config.num_experts)
        ]

    def activate(self, inner: Sequence[np.ndarray]) -> np.ndarray:
        """What `down` reads, of what gate_up's products made; it lies in the first of these."""
        if self._kind == "swiglu":
            return kernels.swiglu(inner[0], inner[1], inner[0])
        if self._kind in ("relu", "reglu"):
            return kernels.relu(inner[0], inner[0], threshold=self._threshold, up=inner[1] if len(inner) == 2 else None)
        return kernels.gelu(inner[0], inner[0], near=self._kind == "gelu_tanh")

    def record_activation(self, program: kernels.Program, inner: Sequence[np.ndarray]) -> np.ndarray:
        """Adds it to a program; gives where the result lies."""
        if self._kind == "swiglu":
            program.swiglu(inner[0], inner[1], inner[0])
        elif self._kind == "reglu":
            program.reglu(inner[0], inner[1], self._threshold, inner[0])
        elif self._kind == "relu":
            program.relu(inner[0], self._threshold, inner[0])
        else:
            program.gelu(inner[0], self._kind == "gelu_tanh", inner[0])
        return inner[0]


class DecodeStep:
    """All layers for a fixed number of tokens, over the decoder's own buffers (their first rows)."""

    def __init__(
        self,
        layers: Sequence[Layer],
        last_norm: Norm,
        weights: Weights,
        buffers: dict[str, np.ndarray],
        *,
        eps: float,
        exact: bool,
        lora: LoraBatch | None = None,
        apart: bool = False,
    ) -> None:
        """apart: products that are added to the residual are complete before that (`LoraBatch.lengthens`). buffers:
        float32 arrays `hidden`, `normed`, `queries`, `keys`, `values`, `attended`, `gate` (if any), `up` of B rows
        each, `cos` and `sin` [B, D / 2]. eps: of norms of heads.
        """
        self.generation = weights.generation
        self._buffers = buffers
        self._weights = weights
        self._eps, self._exact, self._lora, self._apart = eps, exact, lora, apart
        rows, head_dim = len(buffers["cos"]), 2 * buffers["cos"].shape[1]
        self._k, self._v, self._q, self._out = (
            buffers[name].reshape(rows, -1, head_dim) for name in ("keys", "values", "queries", "attended")
        )
        self._programs = [kernels.Program() for _ in range(len(layers) + 1)]
        for index, layer in enumerate(layers):
            self._record_before(self._programs[index], index, layer)
            self._record_after(self._programs[index + 1], index, layer)
        last_norm.record(self._programs[-1], buffers["hidden"], buffers["hidden"])
        self._whole: tuple[weakref.ref[RecordedCache], kernels.Program] | None = None

    def run(self, cache: DecoderCache, positions: np.ndarray) -> None:
        """From the embedding in `hidden` to the normed last hidden state there; keys and values go to the cache.

        `cos` and `sin` must hold the token's rotation.
        """
        if cache.records:
            self._run_recorded(cast("RecordedCache", cache), positions)
            return
        for index, program in enumerate(self._programs[:-1]):
            program.run()
            cache.append(index, self._k, self._v, positions)
            cache.attend(index, self._q, positions, self._out)
            cache.settle(index)
        self._programs[-1].run()

    def _run_recorded(self, cache: RecordedCache, positions: np.ndarray) -> None:
        """All layers at once: what uses the cache is recorded too, anew whenever another one comes."""
        if self._whole is None or self._whole[0]() is not cache:
            whole = kernels.Program()
            for index, program in enumerate(self._programs[:-1]):
                whole.extend(program)
                cache.record(whole, index, self._k, self._v, self._q, self._out)
            whole.extend(self._programs[-1])
            self._whole = (weakref.ref(cache), whole)
        cache.begin_recorded(positions)
        self._whole[1].run()
        cache.end_recorded()

    def _record_before(self, program: kernels.Program, index: int, layer: Layer) -> None:
        b = self._buffers
        layer.input_norm.record(program, b["hidden"], b["normed"])
        outs = [b["queries"], b["keys"], b["values"]]
        self._linear(program, b["normed"], layer.qkv, outs, layer.qkv_bias)
        self._add_lora(program, index, b["normed"], (0, 1, 2), outs)
        for x, norm in ((self._k, layer.k_norm), (self._q, layer.q_norm)):
            if norm is not None:
                heads = x.reshape(-1, x.shape[-1])
                program.rms_norm(heads, norm, self._eps, heads)
            program.rope(x, b["cos"], b["sin"])

    def _record_after(self, program: kernels.Program, index: int, layer: Layer) -> None:
        b = self._buffers
        if not layer.parallel:
            self._add_product(program, index, b["attended"], layer.output, layer.output_bias, 3)
        if layer.post_norm is not None:
            layer.post_norm.record(program, b["hidden"], b["normed"])
        outs = [b[name] for name in layer.inner]
        self._linear(program, b["normed"], layer.gate_up, outs, layer.gate_up_bias)
        self._add_lora(program, index, b["normed"], layer.inner_targets, outs)
        inner = layer.record_activation(program, outs)
        if layer.parallel:  # not before: the feed-forward's norm reads the same hidden state
            self._add_product(program, index, b["attended"], layer.output, layer.output_bias, 3)
        self._add_product(program, index, inner, layer.down, layer.down_bias, 6)

    def _add_product(
        self, program: kernels.Program, index: int, x: np.ndarray, name: str, bias: np.ndarray | None, target: int
    ) -> None:
        """hidden += the product with what adapters make of it; `normed` is free where this is wanted."""
        out = self._buffers["normed" if self._apart else "hidden"]
        self._linear(program, x, [name], [out], [bias], accumulate=not self._apart)
        self._add_lora(program, index, x, (target,), [out])
        if self._apart:
            program.add(out, self._buffers["hidden"])

    def _add_lora(
        self, program: kernels.Program, index: int, x: np.ndarray, targets: tuple[int, ...], outs: list[np.ndarray]
    ) -> None:
        if self._lora is not None:
            self._lora.record(program, index, x, targets, outs)

    def _linear(
        self,
        program: kernels.Program,
        x: np.ndarray,
        names: list[str],
        outs: list[np.ndarray],
        biases: list[np.ndarray | None],
        accumulate: bool = False,
    ) -> None:
        held = [self._weights.matrices[name] for name in names]
        program.linear(x, held, outs, exact=self._exact, accumulate=accumulate, biases=biases)

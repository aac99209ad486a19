"""The CPU engine's decoder: one forward pass for Llama, Mistral, Qwen2, Qwen3, Mixtral and Falcon.

NumPy holds the buffers, native kernels do the work, torch is never imported. The pass is layer-major: a whole prompt
segment goes through one layer before the next begins, so weights are read once per segment and at most one layer holds
its new keys and values in full precision. Inside a layer, rows are worked in blocks, which bounds the feed-forward
activations.

Shapes: T new tokens, B rows of a block, H hidden size, F intermediate size, V vocabulary; activations are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from memwall import kernels
from memwall.errors import InputError
from memwall.kernels.lora import LoraBatch
from memwall.memory import Arena
from memwall.models.base import DecoderCache, SelectedCache, StreamedFeedForward
from memwall.models.config import EMBEDDING, HEAD, ModelConfig, check_attention, check_whole
from memwall.models.decode import DecodeStep, Layer, Norm
from memwall.models.rope import rope_tables
from memwall.models.weights import Weights

BLOCK_ROWS = 128
RECORDED_ROWS = 64
"""Batches of up to so many tokens run as recorded calls; where there are more, Python's part no longer shows."""
OWNER = "activations"
SCRATCH = "kernels/scratch"
QKV, OUTPUT, DOWN = (0, 1, 2), (3,), (6,)
"""Places of projections among `kernels.lora.TARGETS`."""

# observer(tensor_name, x): called with the input [rows, cols] of each linear, for calibration
Observer = Callable[[str, np.ndarray], None]


def activation_shapes(config: ModelConfig, segment_tokens: int, logit_rows: int = 1) -> dict[str, tuple[int, int]]:
    """Buffers the decoder keeps for segments of up to `segment_tokens`, by name; all float32."""
    block = min(segment_tokens, BLOCK_ROWS)
    q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes = {
        "hidden": (segment_tokens, config.hidden_size),
        "keys": (segment_tokens, kv_width),
        "values": (segment_tokens, kv_width),
        "cos": (segment_tokens, config.head_dim // 2),
        "sin": (segment_tokens, config.head_dim // 2),
        "normed": (block if config.neurons is None else segment_tokens, config.hidden_size),
        "queries": (block, q_width),
        "attended": (block, q_width),
        **(dict.fromkeys(_inner(config), (block, config.intermediate_size))),
        "logits": (logit_rows, config.vocab_size),
    }
    if config.num_experts:
        shapes["router"] = (block, config.num_experts)
        shapes["expert_in"] = (block, config.hidden_size)
        shapes["expert_out"] = (block, config.hidden_size)
    return shapes


def _inner(config: ModelConfig) -> tuple[str, ...]:
    """What the decoder itself makes of a feed-forward."""
    if config.neurons is not None:
        return ()
    return ("gate", "up") if config.gated else ("up",)


def activation_bytes(config: ModelConfig, segment_tokens: int, logit_rows: int = 1) -> int:
    """Bytes of the buffers above."""
    shapes = activation_shapes(config, segment_tokens, logit_rows).values()
    return sum(rows * cols for rows, cols in shapes) * np.dtype(np.float32).itemsize


def scratch_bytes(
    config: ModelConfig,
    specs: Mapping[str, str],
    segment_tokens: int,
    *,
    exact: bool = False,
    threads: int | None = None,
    sequences: int = 1,
    shared: bool = False,
) -> int:
    """Bytes the kernels keep between calls: activations rounded for the widest matrix, a panel per thread, and what
    each thread attends with. threads: None for those in use. sequences: most of them whose tokens are worked together;
    shared: and these may go on from prefixes that they share.
    """
    tokens = min(segment_tokens, BLOCK_ROWS)
    attention = kernels.predict_attention_scratch_bytes(
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        tokens,
        threads=threads,
        sequences=sequences,
        shared_rows=tokens if shared else 0,
    )
    return product_scratch_bytes(config, specs, tokens, exact=exact, threads=threads) + attention


def product_scratch_bytes(
    config: ModelConfig, specs: Mapping[str, str], tokens: int, *, exact: bool = False, threads: int | None = None
) -> int:
    """What of these bytes products keep that are of so many tokens at once."""
    widest = max(config.hidden_size, config.intermediate_size, config.query_size)
    groups = {group for spec in set(specs.values()) for group in kernels.roundings(spec, exact=exact)}
    panels = kernels.predict_scratch_bytes(tokens, widest, group=0, threads=threads)
    rounded = sum(kernels.predict_scratch_bytes(tokens, widest, group=g, threads=threads) - panels for g in groups)
    return panels + rounded


class Decoder:
    """A model ready to run on the CPU.

    exact: use float arithmetic on packed weights instead of 8-bit activations (slower; the reference for quality).
    segment_tokens: longest segment of new tokens that `forward` takes; longer prompts are fed in segments.
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
        sequences: int = 1,
        shared: bool = False,
    ) -> None:
        check_attention(config)
        self.config = config
        self.weights = weights
        self.exact = exact
        self.segment_tokens = segment_tokens
        self.observer: Observer | None = None
        self.feed_forward: StreamedFeedForward | None = None
        """Of a model whose neurons are not among its weights; whoever makes the decoder sets it."""
        self._lora: LoraBatch | None = None
        self._steps: dict[tuple[int, bool], DecodeStep] = {}
        self._layers = [Layer(config, weights, index) for index in range(config.num_layers)]
        self.last_norm = Norm(config, weights, "model.norm")
        # the kernels allocate this themselves, at the first product; it counts against the cap from now on
        self._arena = arena
        scratch = scratch_bytes(config, weights.specs, segment_tokens, exact=exact, sequences=sequences, shared=shared)
        self._scratch = arena.charge(SCRATCH, scratch)
        shapes = activation_shapes(config, segment_tokens, logit_rows)
        try:
            self._buffers = arena.allocate_all(OWNER, {name: (shape, np.float32) for name, shape in shapes.items()})
        except BaseException:
            self._scratch.release()
            raise

    def adapt(self, lora: LoraBatch | None) -> None:
        """From now on products get what `lora` adds to the rows that it says; rows as in `batch` or `hidden`."""
        if lora is not None and self.config.neurons is not None:
            raise InputError("neurons that stream from disk take no adapter; give the model that they were made of")
        self._lora = lora
        self._steps.clear()

    def release(self) -> None:
        """Gives the buffers back; the decoder is of no more use."""
        for buffer in self._buffers.values():
            self._arena.free(buffer)
        self._buffers = {}
        self._scratch.release()
        if self.feed_forward is not None:
            self.feed_forward.release()

    def forward(self, tokens: np.ndarray, cache: DecoderCache, *, all_logits: bool = False) -> np.ndarray:
        """Run new tokens [T] through the model and keep their keys and values in `cache`.

        Returns float32 logits: [V] of the last token, or [T, V] with all_logits (needs logit_rows >= T). The array is
        the decoder's own buffer and is overwritten by the next call. When the cache refuses to grow (BudgetExceeded),
        it is left as it was before the call.
        """
        hidden = self.hidden(tokens, cache)
        return self.logits(hidden) if all_logits else self.logits(hidden[-1:])[0]

    def hidden(self, tokens: np.ndarray, cache: DecoderCache) -> np.ndarray:
        """Final normed hidden states [T, H] of new tokens; see `forward`."""
        num_tokens = len(tokens)
        if not 0 < num_tokens <= self.segment_tokens:
            raise ValueError(f"forward takes 1 to {self.segment_tokens} tokens at a time, got {num_tokens}")
        start = cache.length
        positions = np.arange(start, start + num_tokens, dtype=np.int64)
        cos, sin = self._rotation(cache, positions)
        hidden = self._buffers["hidden"][:num_tokens]
        kernels.gather_rows(self.weights.matrices[EMBEDDING], np.asarray(tokens, np.int64), hidden)
        step = self._decode_step() if num_tokens == 1 and not cache.takes_inputs else None
        try:
            if step is not None:
                step.run(cache, positions)
                return hidden
            for index, layer in enumerate(self._layers):
                self._run_layer(index, layer, hidden, positions, cos, sin, cache)
        except BaseException:
            cache.truncate(start)
            raise
        self.last_norm.into(hidden, hidden)
        return hidden

    def selected(self, tokens: np.ndarray, positions: np.ndarray, cache: SelectedCache) -> np.ndarray:
        """Final normed hidden states of chosen tokens [T] at any ascending positions; the cache has the others' rows.

        After each layer the cache may say which of them go on; the rest need no later layer. Gives those that reached
        the end.
        """
        if not 0 < len(tokens) <= self.segment_tokens:
            raise ValueError(f"selected takes 1 to {self.segment_tokens} tokens at a time, got {len(tokens)}")
        hidden = self._buffers["hidden"][: len(tokens)]
        kernels.gather_rows(self.weights.matrices[EMBEDDING], np.asarray(tokens, np.int64), hidden)
        cos, sin = self._rotation(cache, positions)
        for index, layer in enumerate(self._layers):
            self._run_layer(index, layer, hidden, positions, cos, sin, cache)
            staying = cache.staying(index)
            if staying is not None:
                positions = np.ascontiguousarray(positions[staying])
                hidden[: len(positions)] = hidden[staying]
                hidden = hidden[: len(positions)]
                cos, sin = self._rotation(cache, positions)
        self.last_norm.into(hidden, hidden)
        return hidden

    def batch(self, tokens: np.ndarray, positions: np.ndarray, cache: DecoderCache) -> np.ndarray:
        """Final normed hidden states [B, H] of tokens of several sequences, each at its own position.

        The cache knows whose token each row is: it is handed the keys, values and queries of all rows in their order.
        Weights are read once for all of them.
        """
        num_tokens = len(tokens)
        if not 0 < num_tokens <= self.segment_tokens:
            raise ValueError(f"batch takes 1 to {self.segment_tokens} tokens at a time, got {num_tokens}")
        hidden = self._buffers["hidden"][:num_tokens]
        kernels.gather_rows(self.weights.matrices[EMBEDDING], np.asarray(tokens, np.int64), hidden)
        cos, sin = self._rotation(cache, positions)
        recorded = num_tokens <= min(RECORDED_ROWS, BLOCK_ROWS) and not cache.takes_inputs
        step = self._decode_step(num_tokens) if recorded else None
        if step is not None:
            step.run(cache, positions)
            return hidden
        for index, layer in enumerate(self._layers):
            self._run_layer(index, layer, hidden, positions, cos, sin, cache)
        self.last_norm.into(hidden, hidden)
        return hidden

    def _decode_step(self, num_rows: int = 1) -> DecodeStep | None:
        """The recorded form of one token's layers, or of a batch's; None where a layer's calls depend on its numbers
        (experts, streamed neurons) or an observer wants to see them.
        """
        if self.config.num_experts or self.config.neurons is not None or self.observer is not None:
            return None
        apart = self._lora is not None and self._lora.lengthens
        step = self._steps.get((num_rows, apart))
        if step is None or step.generation != self.weights.generation:
            rows = {name: buffer[:num_rows] for name, buffer in self._buffers.items()}
            step = DecodeStep(
                self._layers, self.last_norm, self.weights, rows,
                eps=self.config.rms_norm_eps, exact=self.exact, lora=self._lora, apart=apart,
            )  # fmt: skip
            self._steps[num_rows, apart] = step
        return step

    def run_layer(self, index: int, hidden: np.ndarray, cache: DecoderCache) -> None:
        """One layer over the hidden states [T, H] of the next T tokens, in place; calibration goes layer by layer."""
        positions = np.arange(cache.length, cache.length + len(hidden), dtype=np.int64)
        cos, sin = self._rotation(cache, positions)
        self._run_layer(index, self._layers[index], hidden, positions, cos, sin, cache)

    def _rotation(self, cache: DecoderCache, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin of new tokens, in the decoder's buffers.

        A cache that packs what it keeps has tokens turn by their place there, not in the sequence.
        """
        turns = positions + (cache.next_position - cache.length)
        tables = (self._buffers["cos"][: len(positions)], self._buffers["sin"][: len(positions)])
        return rope_tables(self.config.rope, self.config.head_dim, turns, tables)

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """Normed hidden states [n, H] -> logits [n, V] (n at most the logit_rows given at construction)."""
        out = self._buffers["logits"][: len(hidden)]
        self._linear(hidden, [HEAD], [out])
        return out

    def _linear(
        self,
        x: np.ndarray,
        names: list[str],
        outs: list[np.ndarray],
        biases: list[np.ndarray | None] | None = None,
        accumulate: bool = False,
    ) -> None:
        if self.observer is not None:
            for name in names:
                self.observer(name, x)
        held = self.weights.matrices
        kernels.linear(x, [held[name] for name in names], outs, exact=self.exact, accumulate=accumulate, biases=biases)

    def _run_layer(
        self,
        index: int,
        layer: Layer,
        hidden: np.ndarray,
        positions: np.ndarray,
        cos: np.ndarray,
        sin: np.ndarray,
        cache: DecoderCache,
    ) -> None:
        if self.feed_forward is None:
            check_whole(self.config)
        num_tokens = len(hidden)
        blocks = [slice(a, min(a + BLOCK_ROWS, num_tokens)) for a in range(0, num_tokens, BLOCK_ROWS)]
        keys, values = self._buffers["keys"][:num_tokens], self._buffers["values"][:num_tokens]
        one_block = len(blocks) == 1
        for rows in blocks:
            normed, queries = self._block("normed", rows), self._block("queries", rows)
            layer.input_norm.into(hidden[rows], normed)
            if cache.takes_inputs:
                cache.take_inputs(index, normed, positions[rows])
            first = 0 if one_block else 1  # queries of a single block ride along; else each block makes its own below
            outs = [queries, keys[rows], values[rows]][first:]
            self._linear(normed, layer.qkv[first:], outs, layer.qkv_bias[first:])
            self._add_lora(index, rows, normed, QKV[first:], outs)
        self._finish_heads(keys, layer.k_norm, self.config.num_kv_heads, cos, sin)
        head_shape = (num_tokens, self.config.num_kv_heads, self.config.head_dim)
        cache.append(index, keys.reshape(head_shape), values.reshape(head_shape), positions)
        for rows in blocks:
            normed, queries = self._block("normed", rows), self._block("queries", rows)
            if not one_block:
                layer.input_norm.into(hidden[rows], normed)
                self._linear(normed, layer.qkv[:1], [queries], layer.qkv_bias[:1])
                self._add_lora(index, rows, normed, QKV[:1], [queries])
            self._finish_heads(queries, layer.q_norm, self.config.num_heads, cos[rows], sin[rows])
            attended = self._block("attended", rows)
            q_shape = (len(queries), self.config.num_heads, self.config.head_dim)
            cache.attend(index, queries.reshape(q_shape), positions[rows], attended.reshape(q_shape))
            if not layer.parallel:
                self._add_product(index, rows, attended, layer.output, layer.output_bias, OUTPUT, hidden[rows])
            if layer.post_norm is not None:
                layer.post_norm.into(hidden[rows], normed)
            if self.feed_forward is not None:
                if layer.parallel:
                    self._add_product(index, rows, attended, layer.output, layer.output_bias, OUTPUT, hidden[rows])
                continue
            if self.config.num_experts:
                self._experts(layer, normed, hidden[rows])
                continue
            inner = self._feed_forward(index, rows, layer, normed)
            if layer.parallel:  # not before: the feed-forward's norm reads the same hidden state
                self._add_product(index, rows, attended, layer.output, layer.output_bias, OUTPUT, hidden[rows])
            self._add_product(index, rows, inner, layer.down, layer.down_bias, DOWN, hidden[rows])
        if self.feed_forward is not None:  # a layer's neurons come once, for all rows
            self.feed_forward.run(index, self._buffers["normed"][:num_tokens], hidden)
        cache.settle(index)

    def _block(self, name: str, rows: slice) -> np.ndarray:
        """Where a block of rows is worked; what streamed neurons read is kept of all of them."""
        if name == "normed" and self.feed_forward is not None:
            return self._buffers[name][rows]
        return self._buffers[name][: rows.stop - rows.start]

    def _finish_heads(
        self, x: np.ndarray, norm: np.ndarray | None, num_heads: int, cos: np.ndarray, sin: np.ndarray
    ) -> None:
        """Per-head norm (Qwen3) and rotation of x [T, num_heads * head_dim], in place."""
        head_dim = self.config.head_dim
        if norm is not None:
            per_head = x.reshape(-1, head_dim)
            kernels.rms_norm(per_head, norm, self.config.rms_norm_eps, per_head)
        kernels.rope(x.reshape(len(x), num_heads, head_dim), cos, sin)

    def _feed_forward(self, index: int, rows: slice, layer: Layer, normed: np.ndarray) -> np.ndarray:
        """What the last product of the feed-forward reads."""
        outs = [self._buffers[name][: len(normed)] for name in layer.inner]
        self._linear(normed, layer.gate_up, outs, layer.gate_up_bias)
        self._add_lora(index, rows, normed, layer.inner_targets, outs)
        return layer.activate(outs)

    def _add_product(
        self, index: int, rows: slice, x: np.ndarray, name: str, bias: np.ndarray | None, target: tuple[int, ...],
        residual: np.ndarray,
    ) -> None:  # fmt: skip
        """residual += the product with what adapters make of it, which some make of the whole product alone."""
        apart = self._lora is not None and self._lora.lengthens
        out = self._block("normed", rows) if apart else residual
        self._linear(x, [name], [out], [bias], accumulate=not apart)
        self._add_lora(index, rows, x, target, [out])
        if apart:
            residual += out

    def _add_lora(
        self, index: int, rows: slice, x: np.ndarray, targets: tuple[int, ...], outs: list[np.ndarray]
    ) -> None:
        if self._lora is not None:
            self._lora.add(index, rows.start, x, targets, outs)

    def _experts(self, layer: Layer, normed: np.ndarray, residual: np.ndarray) -> None:
        """Each token goes through its top experts, weighted by the softmax over the router's logits."""
        router = self._buffers["router"][: len(normed)]
        self._linear(normed, [layer.router], [router])
        router -= router.max(axis=1, keepdims=True)
        np.exp(router, out=router)
        router /= router.sum(axis=1, keepdims=True)
        top = np.argsort(-router, axis=1, kind="stable")[:, : self.config.num_experts_per_token]
        shares = np.take_along_axis(router, top, axis=1)
        if self.config.norm_topk_prob:
            shares /= shares.sum(axis=1, keepdims=True)
        for expert, (gate_up, down) in enumerate(layer.experts):
            tokens, slots = np.nonzero(top == expert)
            if not len(tokens):
                continue
            x, out = self._buffers["expert_in"][: len(tokens)], self._buffers["expert_out"][: len(tokens)]
            gate, up = self._buffers["gate"][: len(tokens)], self._buffers["up"][: len(tokens)]
            np.take(normed, tokens, axis=0, out=x)
            self._linear(x, gate_up, [gate, up])
            kernels.swiglu(gate, up, gate)
            self._linear(gate, [down], [out])
            out *= shares[tokens, slots, None]
            out += np.take(residual, tokens, axis=0, out=x)
            residual[tokens] = out

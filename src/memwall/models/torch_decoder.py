"""The torch form of the decoder: plain modules over the same configuration and checkpoint as the CPU engine.

It is the reference that fast paths are tested against, the place where calibration looks at activations, and the form
that runs on a GPU. Module and parameter names are those of the checkpoint, so a tensor's name finds its layer. This is
the only file of the room that imports torch; import it only where torch is wanted.

Shapes: B sequences of T new tokens, H hidden size, V vocabulary. `forward` takes tokens [T] or [B, T] and gives logits
in the same form. All sequences of a batch share their positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from memwall.errors import InputError
from memwall.formats import codec
from memwall.models.checkpoint import Checkpoint
from memwall.models.config import HEAD, ModelConfig, check_attention, check_whole
from memwall.models.rope import inverse_frequencies

# observer(tensor name, x): called with the input [..., cols] of each linear layer
Observer = Callable[[str, Tensor], None]


class TorchCache:
    """Keys and values of past tokens in one allocation per layer, [B, kv heads, capacity, head_dim]."""

    def __init__(
        self,
        config: ModelConfig,
        capacity_tokens: int,
        *,
        batch_size: int = 1,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        shape = (config.num_layers, 2, batch_size, config.num_kv_heads, capacity_tokens, config.head_dim)
        self._held = torch.zeros(shape, dtype=dtype, device=device)
        self.positions = torch.zeros(capacity_tokens, dtype=torch.long, device=device)
        self.capacity_tokens = capacity_tokens
        self.length = 0

    @property
    def nbytes(self) -> int:
        return self._held.nbytes

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Puts new keys and values behind the old ones and gives all of them; the length moves on with `advance`."""
        stop = self.length + keys.shape[2]
        self._held[layer, 0, :, :, self.length : stop] = keys
        self._held[layer, 1, :, :, self.length : stop] = values
        return self._held[layer, 0, :, :, :stop], self._held[layer, 1, :, :, :stop]

    def extend(self, positions: Tensor) -> Tensor:
        """Room for new tokens: gives the positions of all keys that the new queries can see."""
        stop = self.length + len(positions)
        if stop > self.capacity_tokens:
            raise InputError(f"the cache holds {self.capacity_tokens} tokens; {stop} are wanted")
        self.positions[self.length : stop] = positions
        return self.positions[:stop]

    def advance(self, num_tokens: int) -> None:
        self.length += num_tokens

    def truncate(self, length: int) -> None:
        """Forgets tokens from `length` on."""
        self.length = min(self.length, length)


class Norm(nn.Module):
    """RMS norm over the last axis, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class LayerNorm(nn.Module):
    """LayerNorm with biases over the last axis, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(size), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed = functional.layer_norm(x.float(), self.weight.shape, self.weight.float(), self.bias.float(), self.eps)
        return normed.to(x.dtype)


def _norm(config: ModelConfig) -> nn.Module:
    """Of hidden states."""
    return (LayerNorm if config.layer_norm else Norm)(config.hidden_size, config.rms_norm_eps)


class Attention(nn.Module):
    """Grouped-query attention with rotary embedding; per-head norms (Qwen3) and biases where the family has them."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.window = config.sliding_windows[layer]
        hidden, query, kv = config.hidden_size, config.query_size, config.kv_size
        self.q_proj = nn.Linear(hidden, query, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden, kv, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden, kv, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query, hidden, bias=config.output_bias)
        self.q_norm = Norm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = Norm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, context: Context) -> Tensor:
        queries = context.rotate(self.q_norm(self._heads(self.q_proj(x))))
        keys = context.rotate(self.k_norm(self._heads(self.k_proj(x))))
        values = self._heads(self.v_proj(x))
        if context.cache is not None:
            keys, values = context.cache.append(self.layer, keys, values)
        mask = context.mask(self.window)
        attended = functional.scaled_dot_product_attention(
            queries, keys.to(x.dtype), values.to(x.dtype), attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        joined: Tensor = self.o_proj(attended.transpose(1, 2).flatten(2))
        return joined

    def _heads(self, x: Tensor) -> Tensor:
        """[B, T, heads * head_dim] -> [B, heads, T, head_dim]."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class Context:
    """What all layers of one pass share: rotation of the new tokens, who sees whom, and the cache."""

    def __init__(
        self, inv_freq: Tensor, factor: float, positions: Tensor, cache: TorchCache | None, *, is_start: bool = False
    ) -> None:
        angles = positions.float()[:, None] * inv_freq
        self.cos, self.sin = angles.cos() * factor, angles.sin() * factor
        self.positions = positions
        self.cache = cache
        self.is_start = is_start
        self.key_positions = positions if cache is None else cache.extend(positions)
        self._masks: dict[int | None, Tensor] = {}

    def rotate(self, x: Tensor) -> Tensor:
        """Rotary embedding of [B, heads, T, head_dim]; an element turns with the one half a head further."""
        first, second = x.float().chunk(2, -1)
        turned = (first * self.cos - second * self.sin, second * self.cos + first * self.sin)
        return torch.cat(turned, -1).to(x.dtype)

    def mask(self, window: int | None) -> Tensor | None:
        """True where a query [T] may see a key [S]: not later, and within the window, its own position counted.

        None at the start of a sequence that fits the window: plain causal attention, for which there are lean kernels.
        """
        if self.is_start and (window is None or window >= len(self.positions)):
            return None
        if window not in self._masks:
            distance = self.positions[:, None] - self.key_positions[None, :]
            self._masks[window] = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        return self._masks[window]


class FeedForward(nn.Module):
    """SwiGLU or ReGLU, or a GELU or ReLU between two projections. The names of the three differ between dense
    models and experts.
    """

    def __init__(
        self, config: ModelConfig, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    ) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.names = names
        self.gated, self.form, self.threshold = config.gated, config.feed_forward, config.relu_threshold
        for name, shape in zip(names, ((hidden, inner), (hidden, inner), (inner, hidden))):
            if config.gated or name != names[0]:
                self.add_module(name, nn.Linear(*shape, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        up, down = (self.get_submodule(name) for name in self.names[1:])
        if self.gated:
            result: Tensor = down(self._activated(self.get_submodule(self.names[0])(x)) * up(x))
        else:
            result = down(self._activated(up(x)))
        return result

    def _activated(self, x: Tensor) -> Tensor:
        if self.form == "swiglu":
            return functional.silu(x)
        if self.form in ("relu", "reglu"):
            return functional.relu(x) if self.threshold == 0 else functional.threshold(x, self.threshold, 0.0)
        return functional.gelu(x, approximate="tanh" if self.form == "gelu_tanh" else "none")


class Experts(nn.Module):
    """Mixtral's block: each token goes through its top experts, weighted by the softmax over the router's logits."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_chosen = config.num_experts_per_token
        self.norm_topk_prob = config.norm_topk_prob
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(config, ("w1", "w3", "w2")) for _ in range(config.num_experts))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        shares, chosen = self.gate(flat).float().softmax(-1).topk(self.num_chosen)
        if self.norm_topk_prob:
            shares = shares / shares.sum(-1, keepdim=True)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows, slots = torch.where(chosen == number)
            if len(rows):
                out.index_add_(0, rows, (expert(flat[rows]) * shares[rows, slots, None]).to(out.dtype))
        return out.view_as(x)


class Layer(nn.Module):
    """Attention and feed-forward, each on normed input and added to the residual, one after the other or together."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = _norm(config)
        self.self_attn = Attention(config, index)
        if not config.shared_norm:
            self.post_attention_layernorm = _norm(config)
        self.parallel, self.shared_norm = config.parallel, config.shared_norm
        if config.num_experts:
            self.block_sparse_moe = Experts(config)
        else:
            self.mlp = FeedForward(config)
        self.has_experts = config.num_experts > 0

    def forward(self, x: Tensor, context: Context) -> Tensor:
        normed = self.input_layernorm(x)
        block = self.block_sparse_moe if self.has_experts else self.mlp
        attended: Tensor = self.self_attn(normed, context)
        if self.parallel:
            added: Tensor = block(normed if self.shared_norm else self.post_attention_layernorm(x))
            return x + attended + added
        x = x + attended
        result: Tensor = x + block(self.post_attention_layernorm(x))
        return result


class Body(nn.Module):
    """All but the head; it exists so that parameter names start with `model.` as in the checkpoint."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # not drawn at random, which for tensors without memory brings in torch's compiler, 150 MB of it
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_layers))
        self.norm = _norm(config)


class TorchDecoder(nn.Module):
    """A whole model in torch. Make it with `from_checkpoint` or `from_directory`."""

    inv_freq: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        check_attention(config)
        check_whole(config)
        self.config = config
        self.model = Body(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.requires_grad_(False)

    @staticmethod
    def from_directory(
        directory: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> TorchDecoder:
        with Checkpoint(directory) as checkpoint:
            return TorchDecoder.from_checkpoint(checkpoint, dtype=dtype, device=device)

    @staticmethod
    def from_checkpoint(
        checkpoint: Checkpoint, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> TorchDecoder:
        """Loads tensor by tensor; packed tensors are decoded. Nothing is allocated twice."""
        config = checkpoint.config
        with torch.device("meta"):
            decoder = TorchDecoder(config)
        for spec in config.tensors():
            owner, _, field = spec.name.rpartition(".")
            tensor = _read(checkpoint, spec.name).to(device=device, dtype=dtype)
            setattr(decoder.get_submodule(owner), field, nn.Parameter(tensor, requires_grad=False))
            checkpoint.drop(spec.name)
        if config.tie_word_embeddings:
            decoder.lm_head.weight = decoder.model.embed_tokens.weight
        frequencies = torch.from_numpy(inverse_frequencies(config.rope, config.head_dim).copy())
        decoder.register_buffer("inv_freq", frequencies.to(device), persistent=False)
        return decoder.eval()

    def forward(self, tokens: Tensor, positions: Tensor | None = None, cache: TorchCache | None = None) -> Tensor:
        """Logits [T, V] or [B, T, V] of new tokens. `positions` [T] default to those after the cache's."""
        return self.logits(self.hidden(tokens, positions, cache))

    def hidden(self, tokens: Tensor, positions: Tensor | None = None, cache: TorchCache | None = None) -> Tensor:
        """Final normed hidden states, [T, H] or [B, T, H]; `logits` of some rows of it saves the other rows' logits."""
        batch = tokens if tokens.dim() == 2 else tokens[None]
        x: Tensor = self.model.embed_tokens(batch.to(self.inv_freq.device))
        context = self.context(batch.shape[1], positions, cache)
        for layer in self.model.layers:
            x = layer(x, context)
        if cache is not None:
            cache.advance(batch.shape[1])
        x = self.model.norm(x)
        return x if tokens.dim() == 2 else x[0]

    def logits(self, hidden: Tensor) -> Tensor:
        result: Tensor = self.lm_head(hidden)
        return result

    def context(self, num_tokens: int, positions: Tensor | None = None, cache: TorchCache | None = None) -> Context:
        """What the layers need beside the hidden states; for callers that run the layers one by one."""
        device = self.inv_freq.device
        start = 0 if cache is None else cache.length
        is_start = positions is None and start == 0
        if positions is None:
            positions = torch.arange(start, start + num_tokens, device=device)
        factor = self.config.rope.attention_factor
        return Context(self.inv_freq, factor, positions.to(device), cache, is_start=is_start)

    def linears(self) -> dict[str, nn.Module]:
        """Every matrix product of a pass, by the name of its weight tensor; a tied head has its own name."""
        names = [spec.name for spec in self.config.tensors() if spec.role in ("linear", "expert", "router", "head")]
        if HEAD not in names:
            names.append(HEAD)
        return {name: self.get_submodule(name.removesuffix(".weight")) for name in names}

    def replace_linear(self, name: str, module: nn.Module) -> None:
        """Puts another module (a packed GPU layer, say) in the place of the linear layer whose weight is `name`."""
        path = name.removesuffix(".weight")
        if name not in self.linears():
            raise InputError(f"{name}: the model has no such linear layer")
        owner, _, field = path.rpartition(".")
        setattr(self.get_submodule(owner), field, module)

    @contextmanager
    def observed(self, observer: Observer) -> Iterator[None]:
        """While open, `observer(tensor name, x)` is called with the input of every linear layer."""

        def hook_for(name: str) -> Callable[[nn.Module, Any], None]:
            return lambda module, inputs: observer(name, inputs[0])

        handles = [module.register_forward_pre_hook(hook_for(name)) for name, module in self.linears().items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _read(checkpoint: Checkpoint, name: str) -> Tensor:
    """A torch tensor of its own; torch takes no bfloat16 from NumPy, so those bits pass as int16."""
    packed = checkpoint.packed(name)
    values = checkpoint.tensor(name) if packed is None else codec(packed.spec).decode(packed)
    if values.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(values.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(values))

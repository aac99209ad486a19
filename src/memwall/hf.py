"""memwall's KV caches inside transformers: `model.generate(..., cache=KVPolicy("kivi(2bit)"))`.

    model.set_attn_implementation("memwall")
    out = model.generate(**inputs, cache=KVPolicy("snapkv(0.25)+kivi(2bit)"))

(Older transformers call the argument `past_key_values`.)

Built on what transformers offers in public: a `Cache` that hands new keys and values on, and an attention function
registered under the name `memwall` that gives them to memwall's cache and attends on its stored form. With any other
cache that attention is plain `sdpa`.

Units and shapes: as transformers has them, [1, heads, tokens, head_dim]; one sequence at a time, on the CPU. Policies
that look into memwall's own weights (`KVCache.needs_model`) run in memwall's engine only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from memwall import kv
from memwall.errors import InputError
from memwall.kv.table import technique
from memwall.memory import Arena, Budget, Ledger

ATTENTION = "memwall"
NO_CAP_BYTES = 1 << 62


class KVPolicy(Cache):
    """A transformers cache that keeps keys and values as a memwall policy says.

    policy: as `memwall run --kv` takes it. context_tokens: most tokens it will hold (None: the model's own limit).
    memory: cap on the cache's bytes, such as "200MB" (None: no cap); BudgetExceeded instead of going over it.
    """

    def __init__(self, policy: str, *, context_tokens: int | None = None, memory: str | None = None) -> None:
        super().__init__(layers=[])
        self._policy = kv.resolve(policy)
        for part in self._policy.parts:
            if technique(part.name).must_have_model(part):
                raise InputError(f"KV policy {part} looks into memwall's own weights: use it with `memwall run`")
        self._context_tokens = context_tokens
        self.ledger = Ledger()
        cap = Budget.parse(memory).ram if memory is not None else None
        self._arena = Arena(NO_CAP_BYTES if cap is None else cap, self.ledger)
        self._cache: kv.KVCache | None = None
        self._start = 0
        self._pending: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return self._cache.nbytes if self._cache is not None else 0

    @property
    def bits_per_value(self) -> float:
        """Bits held per number of the keys and values taken in."""
        return self._cache.bits_per_value if self._cache is not None else 0.0

    # ---- what transformers asks of a cache ---------------------------------------------------------------------

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hands the new rows on, marked, for the attention function to take in."""
        if self._pending is not None:
            raise InputError(
                f"the keys of layer {self._pending} never reached memwall's attention: call "
                f'model.set_attn_implementation("{ATTENTION}") before using KVPolicy (transformers lets no other '
                "attention into some models, such as Falcon: memwall run has all policies for them)"
            )
        if key_states.shape[0] != 1 or key_states.device.type != "cpu":
            raise InputError(
                f"KVPolicy holds one sequence on the CPU, not {key_states.shape[0]} on {key_states.device}; "
                "make one KVPolicy per sequence"
            )
        self._pending = layer_idx
        key_states.memwall_cache = self  # type: ignore[attr-defined]
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens taken in."""
        return self._cache.length if self._cache is not None else 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(keys seen by the new tokens, place of the first)."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: no fixed size."""
        return -1

    def reset(self) -> None:
        """Forgets everything and gives the memory back."""
        if self._cache is not None:
            self._cache.release()
        self._cache, self._pending = None, None

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last `-tokens_to_remove` tokens; InputError where the policy has dropped what would be needed."""
        length = self.get_seq_length() - abs(tokens_to_remove)
        if self._cache is None or tokens_to_remove == 0:
            return
        if self._cache.rewindable(length) != length:
            raise InputError(f"{self._policy} cannot go back to {length} tokens: some of them were dropped")
        self._cache.truncate(length)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        raise InputError("KVPolicy holds one sequence: beam search is not possible with it")

    def batch_repeat_interleave(self, repeats: int) -> None:
        if repeats != 1:
            raise InputError(f"KVPolicy holds one sequence, not {repeats}")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        raise InputError("KVPolicy holds one sequence: none can be selected")

    @property
    def batch_size(self) -> int:
        """Always 1."""
        return 1

    # ---- attention ---------------------------------------------------------------------------------------------

    def attend(
        self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        """Takes the new rows in and attends over all that is held; gives [1, tokens, heads, head_dim]."""
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        self._pending = None
        if self._cache is None:
            self._cache = self._build(module.config, query, key, scale)  # type: ignore[arg-type]
        if layer == 0:
            self._start = self._cache.length
        q, k, v = (_rows(x) for x in (query, key, value))
        positions = np.arange(self._start, self._start + len(q), dtype=np.int64)
        out = np.empty_like(q)
        try:
            self._cache.append(layer, k, v, positions)
            self._cache.attend(layer, q, positions, out)
            self._cache.settle(layer)
        except BaseException:
            self._cache.truncate(self._start)
            raise
        return torch.from_numpy(out).to(query.dtype)[None]

    def _build(
        self, config: PreTrainedConfig, query: torch.Tensor, key: torch.Tensor, scale: float | None
    ) -> kv.KVCache:
        shape = kv.CacheShape(
            num_layers=config.num_hidden_layers,
            num_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            head_dim=query.shape[3],
            windows=_windows(config),
            scale=scale,
            hidden_size=config.hidden_size,
        )
        capacity = self._context_tokens or config.max_position_embeddings
        return kv.build(self._policy, shape, self._arena, capacity)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function `memwall`: on a KVPolicy's stored form, otherwise `sdpa`."""
    cache = getattr(key, "memwall_cache", None)
    if cache is None:
        found: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return found
    if attention_mask is not None and not _is_causal(attention_mask, query.shape[2], cache, module):
        raise InputError("KVPolicy attends to every token before; padded or custom masks do not work with it")
    return cache.attend(module, query.detach(), key.detach(), value.detach(), scaling), None


def _is_causal(mask: torch.Tensor, num_queries: int, cache: KVPolicy, module: torch.nn.Module) -> bool:
    """Whether a mask hides only what comes later, or lies before the layer's sliding window."""
    allowed = mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] >= 0
    start = allowed.shape[1] - num_queries
    keys, queries = torch.arange(allowed.shape[1])[None], torch.arange(start, allowed.shape[1])[:, None]
    wanted = keys <= queries
    windows = _windows(module.config)  # type: ignore[arg-type]
    window = windows[int(module.layer_idx)] if windows is not None else None  # type: ignore[arg-type]
    if window is not None:
        wanted &= keys > queries - window
    return bool((allowed == wanted).all())


def _windows(config: PreTrainedConfig) -> tuple[int | None, ...] | None:
    window = getattr(config, "sliding_window", None)
    if window is None:
        return None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _rows(states: torch.Tensor) -> np.ndarray:
    """[1, heads, tokens, D] of any float type -> contiguous float32 [tokens, heads, D]."""
    return states[0].transpose(0, 1).to(torch.float32).contiguous().numpy()


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)

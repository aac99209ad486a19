"""Falcon: what its `config.json` says, and where its tensors lie in files.

A block has LayerNorms with biases and a feed-forward of two matrices around a GELU. Attention and feed-forward read the
same hidden state and add to it together (`parallel`), through one norm or one each; the oldest form
(`parallel_attn: false`) has them one after the other. One head of keys and values is read by all queries
(`multi_query`, 7B) or by those of its group (`new_decoder_architecture`, 11B, 40B and 180B).

Tensors go by names like those of other families; queries, keys and values, which files hold as the rows of one matrix,
are three here (`fused`). A folder that has them apart already is read as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from memwall.errors import InputError
from memwall.formats.checked_json import Fields, shown
from memwall.models.fused import Rows, Stored

NAME = "falcon"
MAX_POSITIONS = 2048
"""What transformers takes where the configuration says nothing."""
NEAR = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_accurate")
"""Names of GELU with a tanh."""
ACTIVATIONS = ("gelu", "gelu_python", *NEAR, "relu")
_NAMES = {
    "transformer.word_embeddings.weight": "model.embed_tokens.weight",
    "transformer.ln_f.weight": "model.norm.weight",
    "transformer.ln_f.bias": "model.norm.bias",
}
_PARTS = {
    "input_layernorm": "input_layernorm", "ln_attn": "input_layernorm", "ln_mlp": "post_attention_layernorm",
    "post_attention_layernorm": "post_attention_layernorm", "self_attention.dense": "self_attn.o_proj",
    "mlp.dense_h_to_4h": "mlp.up_proj", "mlp.dense_4h_to_h": "mlp.down_proj",
}  # fmt: skip
_IN_LAYER = re.compile(r"transformer\.h\.(\d{1,6})\.(.+)\.(weight|bias)")
_FUSED = "self_attention.query_key_value"


@dataclass(frozen=True, slots=True, kw_only=True)
class FalconShape:
    """What differs from other families. The fused matrix has a part for each head of keys and values: the rows of its
    queries, then those of the keys, then those of the values.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    bias: bool
    activation: Literal["gelu", "gelu_tanh", "relu"]
    parallel: bool
    shared_norm: bool

    def settings(self) -> dict[str, Any]:
        """As `ModelConfig` has them."""
        return {
            "num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads, "head_dim": self.head_dim,
            "intermediate_size": self.intermediate_size, "qkv_bias": self.bias, "output_bias": self.bias,
            "mlp_bias": self.bias, "layer_norm": True, "feed_forward": self.activation,
            "parallel": self.parallel, "shared_norm": self.shared_norm,
        }  # fmt: skip

    def names(self, stored: str) -> Mapping[str, Rows | None]:
        """Names here of a tensor of a file, and which of its rows each is (None: all)."""
        match = _IN_LAYER.fullmatch(stored)
        if match is None:
            return {_NAMES.get(stored, stored): None}
        layer, part, end = match.groups()
        prefix = f"model.layers.{layer}."
        if part != _FUSED:
            return {f"{prefix}{_PARTS[part]}.{end}" if part in _PARTS else stored: None}
        groups, size = self.num_kv_heads, self.head_dim
        queries = self.num_heads // groups * size
        places = {"q_proj": (0, queries), "k_proj": (queries, size), "v_proj": (queries + size, size)}
        return {
            f"{prefix}self_attn.{name}.{end}": Rows(groups=groups, first=first, count=count, of=queries + 2 * size)
            for name, (first, count) in places.items()
        }

    def stored(self, tensors: Mapping[str, tuple[int, ...]]) -> list[Stored]:
        """The tensors of a file that holds ours, which have these shapes by name."""
        found = []
        for name in dict.fromkeys(map(self._stored_name, tensors)):
            parts = self.names(name)
            rows = sum(tensors[part][0] for part in parts)
            found.append(Stored(name=name, shape=(rows, *tensors[next(iter(parts))][1:]), parts=parts))
        return found

    def _stored_name(self, ours: str) -> str:
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", ours)
        if match is None:
            return next((stored for stored, name in _NAMES.items() if name == ours), ours)
        layer, part, end = match.groups()
        if part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            return f"transformer.h.{layer}.{_FUSED}.{end}"
        apart = self.parallel and not self.shared_norm
        norms = ("ln_attn", "ln_mlp") if apart else ("input_layernorm", "post_attention_layernorm")
        known = (*norms, *(stored for stored in _PARTS if "norm" not in stored and "ln_" not in stored))
        return f"transformer.h.{layer}.{next(stored for stored in known if _PARTS[stored] == part)}.{end}"


def read(fields: Fields, hidden_size: int) -> FalconShape:
    """Checked sizes and choices; InputError for what is not supported."""
    if fields.flag("alibi", False):
        raise InputError(
            f"{fields.source}: alibi is true: attention with ALiBi's biases (falcon-rw) is not supported; Falcon "
            "models with rotary embedding (alibi false) are"
        )
    num_heads = fields.integer("num_attention_heads", 1, 2**16)
    if hidden_size % num_heads:
        raise fields.error("hidden_size", hidden_size, f"a multiple of num_attention_heads ({num_heads})")
    head_dim = hidden_size // num_heads
    if head_dim % 2:
        raise fields.error("hidden_size", hidden_size, "an even number for each head (rotary embedding turns pairs)")
    new = fields.flag("new_decoder_architecture", False)
    parallel = fields.flag("parallel_attn", True)
    return FalconShape(
        num_heads=num_heads,
        num_kv_heads=_kv_heads(fields, num_heads, new),
        head_dim=head_dim,
        intermediate_size=fields.integer("ffn_hidden_size", 1, 2**22, 4 * hidden_size),
        bias=fields.flag("bias", False),
        activation=_activation(fields),
        parallel=parallel,
        shared_norm=_norms(fields, new=new, parallel=parallel) == 1,
    )


def _kv_heads(fields: Fields, num_heads: int, new: bool) -> int:
    if not new:
        return 1 if fields.flag("multi_query", True) else num_heads
    count = fields.integer("num_kv_heads", 1, num_heads, num_heads)
    if num_heads % count:
        raise fields.error("num_kv_heads", count, f"a divisor of num_attention_heads ({num_heads})")
    return count


def _norms(fields: Fields, *, new: bool, parallel: bool) -> int:
    """Norms of a block. transformers knows these combinations and no others."""
    if not parallel:
        if new:
            raise fields.error("parallel_attn", False, "true, as new_decoder_architecture is")
        return 2
    norms = fields.integer("num_ln_in_parallel_attn", 1, 2, 2 if new else 1)
    if norms == 2 and not new:
        raise fields.error("num_ln_in_parallel_attn", norms, "1 where new_decoder_architecture is false")
    return norms


def _activation(fields: Fields) -> Literal["gelu", "gelu_tanh", "relu"]:
    activation = fields.text("activation", "gelu")
    if activation not in ACTIVATIONS:
        raise InputError(
            f"{fields.source}: activation {shown(activation)} is not supported; those of Falcon are "
            f"{', '.join(ACTIVATIONS)}"
        )
    if activation == "relu":
        return "relu"
    return "gelu_tanh" if activation in NEAR else "gelu"

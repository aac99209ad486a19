"""What a model is, read from a Hugging Face `config.json`: sizes, rotary settings, windows, and every tensor it must
have.

Reads the form of transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and of transformers 5 (`rope_parameters`,
`dtype`). Each field is checked by type and range; nothing is allocated from a declared size before it was checked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from memwall.errors import InputError
from memwall.formats import checked_json
from memwall.formats.checked_json import Fields, shown
from memwall.formats.manifest import MANIFEST_NAME, Manifest
from memwall.models import falcon, ssm_config
from memwall.models.falcon import FalconShape
from memwall.models.fused import Names
from memwall.models.hub import missing_hint
from memwall.models.neurons import KEY as NEURONS_KEY
from memwall.models.neurons import NeuronLayout
from memwall.models.rope_config import MAX_POSITION as MAX_POSITION
from memwall.models.rope_config import RopeConfig as RopeConfig
from memwall.models.rope_config import read_rope
from memwall.models.ssm_config import SsmConfig

FeedForwardKind = Literal["swiglu", "reglu", "gelu", "gelu_tanh", "relu"]
Role = Literal["embedding", "head", "linear", "norm", "bias", "router", "expert", "other"]

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "MixtralForCausalLM": "mixtral",
    "MambaForCausalLM": "mamba",
    "Mamba2ForCausalLM": "mamba2",
    "FalconForCausalLM": "falcon",
}
FAMILIES = tuple(ARCHITECTURES.values())
DTYPES = ("float32", "float16", "bfloat16")
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
HEAD_SCALE = "lm_head.scale"
"""Of the head's inputs, where these are integers of 8 bits."""
MAX_EXPERT_TENSORS = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One tensor that the checkpoint must hold. `layer` and `expert` are None where there is none."""

    name: str
    shape: tuple[int, ...]
    role: Role
    layer: int | None = None
    expert: int | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder of one of the supported families. `source` is the Hugging Face configuration it was read from.

    ssm: of families without attention (Mamba); their heads are those of the scan. layer_norm: norms take the mean off
    and have biases, rms_norm_eps being theirs; else they are RMS norms. feed_forward: its activation, `swiglu` or
    `reglu` (of two products, gate and up), `relu` or a GELU (of up alone), exact or by tanh. relu_threshold: what a
    ReLU's input must be above. neurons: where the feed-forward's matrices are, if not among the weights. parallel:
    attention and feed-forward read the same hidden state and are added together; shared_norm: through one norm.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position: int
    tie_word_embeddings: bool
    sliding_windows: tuple[int | None, ...]
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    num_experts: int = 0
    num_experts_per_token: int = 0
    norm_topk_prob: bool = False
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    dtype: str
    source: Mapping[str, Any]
    ssm: SsmConfig | None = None
    layer_norm: bool = False
    feed_forward: FeedForwardKind = "swiglu"
    relu_threshold: float = 0.0
    neurons: NeuronLayout | None = None
    parallel: bool = False
    shared_norm: bool = False
    falcon: FalconShape | None = None

    @staticmethod
    def from_directory(directory: str | Path) -> ModelConfig:
        """Reads `config.json` and the token ids of `generation_config.json`, or the manifest of a compressed model."""
        folder = checked_directory(directory)
        if (folder / MANIFEST_NAME).is_file():
            return ModelConfig.from_dict(Manifest.load(folder).model_config, str(folder / MANIFEST_NAME))
        path = folder / "config.json"
        if not path.is_file():
            found = ", ".join(sorted(item.name for item in folder.iterdir())[:5])
            raise InputError(f"{folder}: no config.json here, so it is not a model folder (it holds {found})")
        values = checked_json.read(path, infinite=True)
        generation_path = folder / "generation_config.json"
        if generation_path.is_file():
            generation = checked_json.read(generation_path)
            for name in ("bos_token_id", "eos_token_id"):
                if generation.get(name) is not None:
                    values[name] = generation[name]
        return ModelConfig.from_dict(values, str(path))

    @staticmethod
    def from_dict(values: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
        """A checked configuration from the contents of a `config.json`."""
        fields = Fields(values, source)
        family = _family(fields)
        if fields.has("quantization_config"):
            method = fields.mapping("quantization_config").get("quant_method")
            hint = ", or convert this one first: memwall convert MODEL OUT" if method in ("gptq", "awq") else ""
            raise InputError(
                f"{source}: weights already quantized by {shown(method)}; give the float model (bfloat16, float16, "
                f"float32){hint}"
            )
        hidden_size = fields.integer("hidden_size", 1, 2**20)
        if family == falcon.NAME:
            return _with_neurons(_falcon_model(fields, hidden_size), fields)
        activation = fields.text("hidden_act", "silu", _ACTIVATIONS.get(family, ("silu", "swish")))
        if family in ssm_config.FAMILIES:
            return _ssm_model(fields, family, hidden_size)
        shared = _of_all(fields)
        num_heads, num_kv_heads, head_dim = _heads(fields, family, hidden_size)
        max_position = fields.integer("max_position_embeddings", 1, MAX_POSITION, _DEFAULT_POSITIONS[family])
        num_experts, per_token = _experts(fields, family, shared["num_layers"])
        attention_bias = family in ("llama", "qwen3") and fields.flag("attention_bias", False)
        config = ModelConfig(
            **shared,
            family=family,
            hidden_size=hidden_size,
            intermediate_size=fields.integer("intermediate_size", 1, 2**22),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=fields.number("rms_norm_eps", 0.0, 1.0, 1e-5 if family == "mixtral" else 1e-6),
            rope=read_rope(fields, family, max_position),
            max_position=max_position,
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
            sliding_windows=_sliding_windows(fields, family, shared["num_layers"]),
            qkv_bias=family == "qwen2" or attention_bias,
            output_bias=attention_bias,
            mlp_bias=family == "llama" and fields.flag("mlp_bias", False),
            qk_norm=family == "qwen3",
            num_experts=num_experts,
            num_experts_per_token=per_token,
            norm_topk_prob=num_experts > 0,
            feed_forward="reglu" if "relu" in activation else "swiglu",
            relu_threshold=fields.number("hidden_act_param", 0.0, 1e6, 0.01) if activation == "fatrelu" else 0.0,
        )
        return _with_neurons(config, fields)

    def stored_names(self) -> Names | None:
        """What tensors of Hugging Face's files are here; None where they go by the same names."""
        if self.falcon is not None:
            return self.falcon.names
        return (lambda name: {ssm_config.known_as(name): None}) if self.ssm is not None else None

    @property
    def gated(self) -> bool:
        """Whether the feed-forward multiplies an activated product (gate) with another (up)."""
        return self.feed_forward in ("swiglu", "reglu")

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def num_parameters(self) -> int:
        """Count of stored weights; tied embeddings count once."""
        return sum(spec.size for spec in self.tensors())

    def tensors(self) -> list[TensorSpec]:
        """Every tensor of the checkpoint, in the order in which a forward pass meets them."""
        hidden = self.hidden_size
        specs = [TensorSpec(name=EMBEDDING, shape=(self.vocab_size, hidden), role="embedding")]
        for layer in range(self.num_layers):
            specs += _layer_tensors(self, layer) if self.ssm is None else _ssm_layer_tensors(self.ssm, layer)
        specs += _norm(self, "model.norm", None)
        if not self.tie_word_embeddings:
            specs.append(TensorSpec(name=HEAD, shape=(self.vocab_size, hidden), role="head"))
        if self.ssm is not None and self.ssm.quantized is not None and self.ssm.quantized.head.endswith("a8"):
            specs.append(TensorSpec(name=HEAD_SCALE, shape=(1,), role="other"))
        return specs


def checked_directory(directory: str | Path) -> Path:
    """The folder as a path, or an error that says what is wrong with it."""
    folder = Path(directory)
    try:
        if not folder.exists():
            hint = missing_hint(str(directory)) or "; give a model folder or 'demo'"
            raise InputError(f"{folder}: there is no such folder{hint}")
        if not folder.is_dir():
            hint = ", or convert it: memwall convert FILE OUT" if folder.suffix == ".gguf" else ""
            raise InputError(f"{folder}: is a file; give the folder that holds config.json{hint}")
        if not any(folder.iterdir()):
            raise InputError(f"{folder}: the folder is empty; a model folder holds config.json and *.safetensors")
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{shown(str(folder))}: cannot be read: {error}") from None
    return folder


def check_attention(config: ModelConfig) -> None:
    """InputError for models without attention, where attention is what is worked on."""
    if config.ssm is not None:
        raise InputError(
            f"a {config.family} model keeps a state and has no attention, which this needs; it can be run, planned, "
            "evaluated (memwall run, plan, eval) and compressed (memwall compress --method quamba2)"
        )


_RELU = ("silu", "swish", "relu", "fatrelu")
_ACTIVATIONS = {"llama": _RELU, "mistral": _RELU}
"""What families' gates may be activated by, beside SiLU."""


def check_whole(config: ModelConfig) -> None:
    """InputError for models whose neurons lie in a file of their own, where all weights are worked on."""
    if config.neurons is not None:
        raise InputError(
            "this model's neurons stream from disk, and this needs all weights: give the model that it was made of"
        )


# What transformers assumes for a field that config.json leaves out.
_DEFAULT_POSITIONS = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768, "mixtral": 131072}
_DEFAULT_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32, "mixtral": 8}


def _family(fields: Fields) -> str:
    supported = f"supported are {', '.join(ARCHITECTURES)}"
    for architecture in fields.items("architectures", 16, []):
        if isinstance(architecture, str) and architecture in ARCHITECTURES:
            return ARCHITECTURES[architecture]
        raise InputError(f"{fields.source}: unknown architecture {shown(architecture)}; {supported}")
    model_type = fields.values.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise InputError(
            f"{fields.source}: names no known architecture (model_type is {shown(model_type)}); {supported}"
        )
    return model_type


def _of_all(fields: Fields) -> dict[str, Any]:
    """Fields that all families have by the same names."""
    vocab_size = fields.integer("vocab_size", 1, 2**24)
    return {
        "vocab_size": vocab_size,
        "num_layers": fields.integer("num_hidden_layers", 1, 2048),
        "bos_token_id": next(iter(_token_ids(fields, "bos_token_id", vocab_size)), None),
        "eos_token_ids": _token_ids(fields, "eos_token_id", vocab_size),
        "dtype": fields.text("dtype", fields.text("torch_dtype", "float32", DTYPES), DTYPES),
        "source": dict(fields.values),
    }


def _heads(fields: Fields, family: str, hidden_size: int) -> tuple[int, int, int]:
    num_heads = fields.integer("num_attention_heads", 1, 2**16)
    # a null means "as many as heads"; an absent field means the family's default
    absent = "num_key_value_heads" not in fields.values
    default = min(_DEFAULT_KV_HEADS.get(family, num_heads), num_heads) if absent else num_heads
    num_kv_heads = fields.integer("num_key_value_heads", 1, num_heads, default)
    if num_heads % num_kv_heads:
        raise fields.error("num_key_value_heads", num_kv_heads, f"a divisor of num_attention_heads ({num_heads})")
    if fields.has("head_dim") or family == "qwen3":
        head_dim = fields.integer("head_dim", 2, 2**14, 128)
    elif hidden_size % num_heads:
        raise fields.error("hidden_size", hidden_size, f"a multiple of num_attention_heads ({num_heads})")
    else:
        head_dim = hidden_size // num_heads
    if head_dim % 2:
        raise fields.error("head_dim", head_dim, "even (rotary embedding turns pairs)")
    return num_heads, num_kv_heads, head_dim


def _experts(fields: Fields, family: str, num_layers: int) -> tuple[int, int]:
    if family != "mixtral":
        return 0, 0
    num_experts = fields.integer("num_local_experts", 1, min(4096, MAX_EXPERT_TENSORS // num_layers), 8)
    return num_experts, fields.integer("num_experts_per_tok", 1, num_experts, min(2, num_experts))


def _token_ids(fields: Fields, name: str, vocab_size: int) -> tuple[int, ...]:
    value = fields.values.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if len(ids) > 64 or any(type(item) is not int or not 0 <= item < vocab_size for item in ids):
        raise fields.error(name, value, f"a token id below vocab_size ({vocab_size}), or a list of them")
    return tuple(dict.fromkeys(ids))


def _sliding_windows(fields: Fields, family: str, num_layers: int) -> tuple[int | None, ...]:
    """Per layer: how many positions, its own included, a token sees; None sees all."""
    if family == "llama":
        return (None,) * num_layers
    if family in ("mistral", "mixtral"):
        absent = family == "mistral" and "sliding_window" not in fields.values
        window = 4096 if absent else _window(fields, None)
        return (window,) * num_layers
    window = _window(fields, 4096) if fields.flag("use_sliding_window", False) else None
    if fields.has("layer_types"):
        types = fields.items("layer_types", num_layers)
        if len(types) != num_layers or any(kind not in ("full_attention", "sliding_attention") for kind in types):
            raise fields.error("layer_types", types, f"{num_layers} times full_attention or sliding_attention")
        if window is None and "sliding_attention" in types:
            raise fields.error("layer_types", types, "full_attention throughout, since use_sliding_window is off")
        return tuple(window if kind == "sliding_attention" else None for kind in types)
    first = fields.integer("max_window_layers", 0, 2**20, 28)
    return tuple(window if layer >= first else None for layer in range(num_layers))


def _window(fields: Fields, default: int | None) -> int | None:
    if fields.has("sliding_window") or default is not None:
        return fields.integer("sliding_window", 1, MAX_POSITION, default)
    return None


def _layer_tensors(config: ModelConfig, layer: int) -> Iterator[TensorSpec]:
    prefix = f"model.layers.{layer}."
    hidden, query, kv = config.hidden_size, config.query_size, config.kv_size
    yield from _norm(config, prefix + "input_layernorm", layer)
    projections = (
        ("q_proj", query, hidden, config.qkv_bias),
        ("k_proj", kv, hidden, config.qkv_bias),
        ("v_proj", kv, hidden, config.qkv_bias),
        ("o_proj", hidden, query, config.output_bias),
    )
    for name, rows, cols, bias in projections:
        yield from _linear(prefix + "self_attn." + name, rows, cols, bias, layer)
    if config.qk_norm:
        for name in ("q_norm", "k_norm"):
            full_name = f"{prefix}self_attn.{name}.weight"
            yield TensorSpec(name=full_name, shape=(config.head_dim,), role="norm", layer=layer)
    if not config.shared_norm:
        yield from _norm(config, prefix + "post_attention_layernorm", layer)
    inner = config.intermediate_size
    if not config.num_experts:
        gate = (("gate_proj", inner, hidden),) if config.gated else ()
        for name, rows, cols in (*gate, ("up_proj", inner, hidden), ("down_proj", hidden, inner)):
            specs = _linear(prefix + "mlp." + name, rows, cols, config.mlp_bias, layer)
            yield from (spec for spec in specs if config.neurons is None or spec.role == "bias")
        if config.neurons is not None:
            rank = config.neurons.ranks[layer]
            yield from _linear(f"{prefix}mlp.predictor.down", rank, hidden, False, layer)
            yield from _linear(f"{prefix}mlp.predictor.up", inner, rank, True, layer)
        return
    block = prefix + "block_sparse_moe."
    yield TensorSpec(name=block + "gate.weight", shape=(config.num_experts, hidden), role="router", layer=layer)
    for expert in range(config.num_experts):
        for name, rows, cols in (("w1", inner, hidden), ("w3", inner, hidden), ("w2", hidden, inner)):
            full_name = f"{block}experts.{expert}.{name}.weight"
            yield TensorSpec(name=full_name, shape=(rows, cols), role="expert", layer=layer, expert=expert)


def _norm(config: ModelConfig, name: str, layer: int | None) -> Iterator[TensorSpec]:
    for end in ("weight", "bias") if config.layer_norm else ("weight",):
        yield TensorSpec(name=f"{name}.{end}", shape=(config.hidden_size,), role="norm", layer=layer)


def _linear(name: str, rows: int, cols: int, bias: bool, layer: int) -> Iterator[TensorSpec]:
    yield TensorSpec(name=name + ".weight", shape=(rows, cols), role="linear", layer=layer)
    if bias:
        yield TensorSpec(name=name + ".bias", shape=(rows,), role="bias", layer=layer)


def _with_neurons(config: ModelConfig, fields: Fields) -> ModelConfig:
    """With the layout of neurons that lie in a file of their own, if the configuration has one."""
    if not fields.has(NEURONS_KEY):
        return config
    if config.feed_forward not in ("relu", "reglu") or config.num_experts:
        raise InputError(f"{fields.source}: {NEURONS_KEY} goes with a ReLU feed-forward without experts")
    layout = NeuronLayout.read(
        Fields(fields.mapping(NEURONS_KEY), f"{fields.source}: {NEURONS_KEY}"), num_layers=config.num_layers,
        num_neurons=config.intermediate_size, width=config.hidden_size, parts=3 if config.gated else 2,
    )  # fmt: skip
    return replace(config, neurons=layout)


def _ssm_layer_tensors(ssm: SsmConfig, layer: int) -> Iterator[TensorSpec]:
    for name, shape, role in ssm.rows(layer):
        yield TensorSpec(name=f"model.layers.{layer}.{name}", shape=shape, role=cast(Role, role), layer=layer)


def _ssm_model(fields: Fields, family: str, hidden_size: int) -> ModelConfig:
    shared = _of_all(fields)
    ssm = ssm_config.read(fields, cast(ssm_config.Kind, family), hidden_size, shared["num_layers"])
    return ModelConfig(
        **shared,
        family=family,
        hidden_size=hidden_size,
        intermediate_size=ssm.inner_size,
        num_heads=ssm.num_heads,
        num_kv_heads=ssm.num_heads,
        head_dim=ssm.head_dim,
        rms_norm_eps=fields.number("layer_norm_epsilon", 0.0, 1.0, 1e-5),
        rope=RopeConfig(),
        max_position=MAX_POSITION,
        tie_word_embeddings=fields.flag("tie_word_embeddings", family == "mamba"),
        sliding_windows=(None,) * shared["num_layers"],
        ssm=ssm,
    )


def _falcon_model(fields: Fields, hidden_size: int) -> ModelConfig:
    shape = falcon.read(fields, hidden_size)
    shared = _of_all(fields)
    max_position = fields.integer("max_position_embeddings", 1, MAX_POSITION, falcon.MAX_POSITIONS)
    return ModelConfig(
        **shared,
        family=falcon.NAME,
        hidden_size=hidden_size,
        **shape.settings(),
        rms_norm_eps=fields.number("layer_norm_epsilon", 0.0, 1.0, 1e-5),
        rope=read_rope(fields, falcon.NAME, max_position),
        max_position=max_position,
        tie_word_embeddings=fields.flag("tie_word_embeddings", True),
        sliding_windows=(None,) * shared["num_layers"],
        falcon=shape,
    )

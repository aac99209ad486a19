"""What a GGUF file says of its model, in Hugging Face's terms: configuration, names of tensors, tokenizer, template.

llama.cpp turns neighbouring rows of a head together for the `llama` architecture where Hugging Face turns row i with
row i + head_dim / 2; so rows of q and k lie in another order there, and `row_order` undoes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from memwall.errors import InputError
from memwall.formats.checked_json import shown
from memwall.formats.gguf_file import GgufFields, GgufFile
from memwall.models.config import EMBEDDING, HEAD, ModelConfig, RopeConfig
from memwall.models.rope import inverse_frequencies

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
ENDS = {EMBEDDING: "token_embd.weight", HEAD: "output.weight", "model.norm.weight": "output_norm.weight"}
PARTS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "q_proj": "attn_q", "k_proj": "attn_k",
    "v_proj": "attn_v", "o_proj": "attn_output", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down", "gate": "ffn_gate_inp",
    "w1": "ffn_gate_exps", "w3": "ffn_up_exps", "w2": "ffn_down_exps",
}  # fmt: skip
ROPE_FREQUENCIES = "rope_freqs.weight"
"""Divisors of the rotary frequencies, which stand for Llama 3's scaling."""
LLAMA3_POSITIONS = 8192

# How a text is cut before its pieces are merged, by the name that files give it. None: as GPT-2 does.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS: dict[str, str | None] = {
    "default": None, "gpt-2": None, "llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3,
    "qwen2": _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),
}  # fmt: skip
CONTROL, USER_DEFINED, BYTE = 3, 4, 6
SPACE = "\u2581"


def model_config(file: GgufFile) -> dict[str, Any]:
    """The contents of a `config.json`."""
    fields = GgufFields(file.metadata, str(file.path))
    if fields.architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise InputError(f"{file.path}: unknown architecture {shown(fields.architecture)}; supported are {known}")
    hidden, heads = fields.integer(".embedding_length"), fields.integer(".attention.head_count")
    experts = fields.integer(".expert_count", 0)
    vocab = file.info(ENDS[EMBEDDING]).shape[0]
    config: dict[str, Any] = {
        "architectures": ["MixtralForCausalLM" if experts else ARCHITECTURES[fields.architecture]],
        "model_type": "mixtral" if experts else fields.architecture,
        "hidden_size": hidden,
        "intermediate_size": fields.integer(".feed_forward_length"),
        "num_hidden_layers": fields.integer(".block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.integer(".attention.head_count_kv", heads),
        "head_dim": fields.integer(".attention.key_length", hidden // max(heads, 1)),
        "max_position_embeddings": fields.integer(".context_length"),
        "rms_norm_eps": fields.number(".attention.layer_norm_rms_epsilon"),
        "rope_theta": fields.number(".rope.freq_base", 10000.0),
        "tie_word_embeddings": ENDS[HEAD] not in file.tensors,
        "vocab_size": vocab,
        "dtype": "float16",
    }
    if experts:
        config |= {"num_local_experts": experts, "num_experts_per_tok": fields.integer(".expert_used_count")}
    window = fields.integer(".attention.sliding_window", 0)
    if fields.architecture == "llama" and window and not experts:
        config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}
    elif fields.architecture == "llama":
        config |= {"attention_bias": "blk.0.attn_q.bias" in file.tensors}
    for name in ("bos", "eos"):
        key = f"tokenizer.ggml.{name}_token_id"
        if fields.has(key):
            config[f"{name}_token_id"] = fields.integer(key)
    scaling = _rope_scaling(fields, file, config)
    return {**config, **({"rope_scaling": scaling} if scaling else {})}


def _rope_scaling(fields: GgufFields, file: GgufFile, config: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = fields.text(".rope.scaling.type", "none")
    if ROPE_FREQUENCIES in file.tensors:
        return _llama3_scaling(file, config)
    if kind == "none":
        return None
    found: dict[str, Any] = {"rope_type": kind, "factor": fields.number(".rope.scaling.factor")}
    if kind == "yarn" and fields.has(".rope.scaling.original_context_length"):
        found["original_max_position_embeddings"] = fields.integer(".rope.scaling.original_context_length")
    return found


def _llama3_scaling(file: GgufFile, config: Mapping[str, Any]) -> dict[str, Any]:
    """The scaling whose frequencies the file's divisors are. All Llama 3 models differ in `factor` alone."""
    info = file.info(ROPE_FREQUENCIES)
    divisors = info.block.decode(file.raw(ROPE_FREQUENCIES)[None])[0].astype(np.float64)
    theta, dim, factor = config["rope_theta"], config["head_dim"], float(divisors.max())
    scaled = RopeConfig(type="llama3", theta=theta, factor=factor, original_max_position=LLAMA3_POSITIONS)
    plain, wanted = (inverse_frequencies(rope, dim) for rope in (RopeConfig(theta=theta), scaled))
    if divisors.shape != wanted.shape or not np.allclose(plain / divisors, wanted, rtol=1e-3):
        raise InputError(f"{file.path}: {ROPE_FREQUENCIES} is no scaling of Llama 3's kind, and no other is known")
    return {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": scaled.low_freq_factor,
        "high_freq_factor": scaled.high_freq_factor, "original_max_position_embeddings": LLAMA3_POSITIONS,
    }  # fmt: skip


def source_name(name: str) -> tuple[str, int | None]:
    """(tensor of the file, expert in it) for a tensor by its Hugging Face name."""
    if name in ENDS:
        return ENDS[name], None
    pieces = name.split(".")
    expert = int(pieces[pieces.index("experts") + 1]) if "experts" in pieces else None
    return f"blk.{pieces[2]}.{PARTS[pieces[-2]]}.{pieces[-1]}", expert


def row_order(name: str, config: ModelConfig, architecture: str) -> np.ndarray | None:
    """Rows of the file's tensor in the order that Hugging Face has them; None where it is the same."""
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(name.split(".")[-2])
    if heads is None or architecture != "llama":
        return None
    rows = np.arange(heads * config.head_dim)
    return rows.reshape(heads, config.head_dim // 2, 2).swapaxes(1, 2).ravel()


def tokenizer_files(file: GgufFile) -> dict[str, str]:
    """`tokenizer.json` and `tokenizer_config.json` from the file's vocabulary."""
    fields = GgufFields(file.metadata, str(file.path))
    tokens = fields.texts("tokenizer.ggml.tokens")
    if not tokens:
        raise InputError(f"{file.path}: has no vocabulary; give the model's tokenizer with --tokenizer")
    kinds = [int(kind) for kind in fields.numbers("tokenizer.ggml.token_type")] or [1] * len(tokens)
    scores = list(fields.numbers("tokenizer.ggml.scores"))
    if len(kinds) != len(tokens) or (scores and len(scores) != len(tokens)) or len(set(tokens)) != len(tokens):
        raise InputError(f"{file.path}: tokens, their types and scores do not match each other")
    family = fields.text("tokenizer.ggml.model")
    if family == "gpt2":
        document = _byte_level(fields, tokens)
    elif family == "llama":
        document = _sentence_pieces(fields, tokens, kinds, scores)
    else:
        raise InputError(f"{file.path}: a tokenizer of kind {shown(family)}; give one with --tokenizer FOLDER")
    document["added_tokens"] = [
        {
            "id": number, "content": tokens[number], "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": kind == CONTROL,
        }
        for number, kind in enumerate(kinds)
        if kind in (CONTROL, USER_DEFINED)
    ]  # fmt: skip
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if fields.has(f"tokenizer.ggml.{key}_token_id"):
            number = fields.integer(f"tokenizer.ggml.{key}_token_id")
            if number >= len(tokens):
                raise InputError(f"{file.path}: the token {key} is {number}, beyond {len(tokens):,} tokens")
            settings[f"{name}_token"] = tokens[number]
    settings["add_bos_token"] = fields.flag("tokenizer.ggml.add_bos_token", family == "llama")
    if fields.has("tokenizer.chat_template"):
        settings["chat_template"] = fields.text("tokenizer.chat_template")
    files = {"tokenizer.json": document, "tokenizer_config.json": settings}
    return {name: json.dumps(value, ensure_ascii=False, indent=1) for name, value in files.items()}


def _byte_level(fields: GgufFields, tokens: list[str]) -> dict[str, Any]:
    """GPT-2's kind: bytes as printable characters, merged by rank."""
    name = fields.text("tokenizer.ggml.pre", "default")
    if name not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise InputError(
            f"{fields.source}: cuts texts as {shown(name)} does; known are {known}. Give the model's tokenizer with "
            "--tokenizer FOLDER"
        )
    pattern = PRE_TOKENIZERS[name]
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": pattern is None}
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    steps = [last] if pattern is None else [cut, last]
    merges = [merge.split(" ", 1) for merge in fields.texts("tokenizer.ggml.merges")]
    vocab = {token: number for number, token in enumerate(tokens)}
    if not all(len(m) == 2 and m[0] in vocab and m[1] in vocab and m[0] + m[1] in vocab for m in merges):
        raise InputError(f"{fields.source}: merges whose parts or result are no tokens")
    return {
        "version": "1.0",
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": pattern is not None},
    }


def _sentence_pieces(fields: GgufFields, tokens: list[str], kinds: list[int], scores: list[float]) -> dict[str, Any]:
    """SentencePiece's kind: every way to put a token together of two others is a merge, ranked by the token's score."""
    vocab = {token: number for number, token in enumerate(tokens)}
    found: list[tuple[float, int, int, list[str]]] = []
    for token, kind, score in zip(tokens, kinds, scores or [0.0] * len(tokens), strict=True):
        if kind in (CONTROL, BYTE):
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                found.append((-score, vocab[left], vocab[right], [left, right]))
    found.sort(key=lambda merge: merge[:3])
    unknown = tokens[fields.integer("tokenizer.ggml.unknown_token_id", 0)]
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    ends: list[dict[str, Any]] = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if fields.flag("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, {"type": "Prepend", "prepend": SPACE})
        ends.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    return {
        "version": "1.0",
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "decoder": {"type": "Sequence", "decoders": [back, *ends]},
        "model": {
            "type": "BPE", "vocab": vocab, "merges": [merge[3] for merge in found], "byte_fallback": True,
            "fuse_unk": True, "unk_token": unknown,
        },
    }  # fmt: skip

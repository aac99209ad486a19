"""Models in the forms of others: GGUF written by the `gguf` package, GPTQ's, AWQ's and MARLIN's packing by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from memwall.models import ModelConfig
from memwall.models.checkpoint import Checkpoint, stored_tensors
from memwall.models.fused import joined
from memwall.models.gguf import row_order, source_name
from tests.kernels.test_marlin import published_scales, published_words

CODED = ("_proj.weight", "query_key_value.weight", "dense.weight", "4h.weight", "_to_h.weight")
TOKEN_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def float_tensors(folder: Path) -> dict[str, np.ndarray]:
    with Checkpoint(folder) as checkpoint:
        return {name: np.array(checkpoint.tensor(name), np.float32) for name in checkpoint.names()}


def source_tensors(folder: Path) -> dict[str, np.ndarray]:
    """By the names that files of the family have, several of ours in one where they have them so."""
    values, found = float_tensors(folder), {}
    for each in stored_tensors(ModelConfig.from_directory(folder)):
        found[each.name] = joined(each, {name: values[name] for name in each.parts})
    return found


def write_gguf(folder: Path, path: Path, kind: str, **changes: Any) -> Path:
    """A model folder (Llama or Qwen form) as a GGUF file whose matrices are of one type. changes: metadata."""
    import gguf
    from gguf.quants import quantize

    config = ModelConfig.from_directory(folder)
    architecture = "llama" if config.family in ("mistral", "mixtral") else config.family
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.sliding_windows[0]:
        writer.add_sliding_window(config.sliding_windows[0])
    if config.num_experts:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_token)
    if config.rope.type != "default":
        writer.add_rope_scaling_type(gguf.RopeScalingType(config.rope.type))
        writer.add_rope_scaling_factor(config.rope.factor)
    _add_tokens(writer, folder)
    for key, value in changes.items():
        writer.add_string(key.replace("__", "."), value)
    experts: dict[str, list[np.ndarray]] = {}
    for name, values in float_tensors(folder).items():
        theirs, expert = source_name(name)
        if expert is not None:
            experts.setdefault(theirs, []).append(values)
            continue
        order = row_order(name, config, architecture)
        if order is not None:
            turned = np.empty_like(values)
            turned[order] = values
            values = turned
        if values.ndim == 1 or kind == "F32":
            writer.add_tensor(theirs, values)
        else:
            packing = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(theirs, quantize(values, packing), raw_dtype=packing)
    for theirs, one in experts.items():
        writer.add_tensor(theirs, np.stack(one))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokens(writer: Any, folder: Path) -> None:
    document = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    vocab = dict(document["model"]["vocab"])
    added = {token["content"]: token["id"] for token in document["added_tokens"]}
    tokens = sorted({**vocab, **added}.items(), key=lambda item: item[1])
    assert [number for _, number in tokens] == list(range(len(tokens)))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in document["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_types([3 if token in added else 1 for token, _ in tokens])
    writer.add_token_merges(merges)
    for name in ("bos", "eos"):
        token = settings.get(f"{name}_token")
        if token:
            getattr(writer, f"add_{name}_token_id")(added[token])
    writer.add_add_bos_token(bool(settings.get("add_bos_token")))


def quantized(values: np.ndarray, bits: int, group: int, *, symmetric: bool) -> tuple[np.ndarray, ...]:
    """Codes [out, in], zero points and float16 scales [out, groups] of a plain rounding."""
    out, columns = values.shape
    groups = values.reshape(out, columns // group, group)
    top = (1 << bits) - 1
    if symmetric:
        zeros = np.full(groups.shape[:2], 1 << (bits - 1))
        scales = np.abs(groups).max(-1) / (1 << (bits - 1))
    else:
        low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
        scales = (high - low) / top
        zeros = np.clip(np.round(-low / scales), 1, top)
    scales = scales.astype(np.float16)
    codes = np.clip(np.round(groups / scales[..., None].astype(np.float32)) + zeros[..., None], 0, top)
    return codes.reshape(out, columns).astype(np.uint32), zeros.astype(np.uint32), scales


def words_down(codes: np.ndarray, bits: int) -> np.ndarray:
    """[n, m] -> int32 [n * bits / 32, m]: codes of a column as one stream of bits, low ones first."""
    count = codes.shape[0]
    found = np.zeros((count * bits // 32, codes.shape[1]), np.uint64)
    for place in range(count):
        for bit in range(bits):
            at = place * bits + bit
            found[at // 32] |= ((codes[place] >> bit & 1).astype(np.uint64)) << np.uint64(at % 32)
    return found.astype(np.uint32).view(np.int32)


def words_across(codes: np.ndarray) -> np.ndarray:
    """[n, m] -> int32 [n, m / 8] as AWQ has it."""
    found = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for column in range(codes.shape[1]):
        place = (0, 2, 4, 6, 1, 3, 5, 7).index(column % 8)
        found[:, column // 8] |= codes[:, column] << np.uint32(4 * place)
    return found.view(np.int32)


def write_quantized(folder: Path, out: Path, method: str, bits: int, group: int, **how: Any) -> dict[str, np.ndarray]:
    """A model folder in GPTQ's, AWQ's or MARLIN's form; gives every tensor as the form decodes it.

    how: symmetric, shuffled (GPTQ's activation order), v2 (GPTQ's second form of zero points).
    """
    out.mkdir()
    for name in TOKEN_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    values, stored, decoded = source_tensors(folder), {}, {}
    draw = np.random.default_rng(0)
    for name, tensor in values.items():
        if not name.endswith(CODED):
            stored[name] = tensor.astype(np.float16)
            decoded[name] = stored[name].astype(np.float32)
            continue
        columns = tensor.shape[1]
        width = columns if group == -1 else group
        order = draw.permutation(columns) if how.get("shuffled") else np.arange(columns)
        codes, zeros, scales = quantized(tensor[:, order], bits, width, symmetric=how.get("symmetric", False))
        groups = np.arange(columns) // width
        plain = (codes.astype(np.float32) - zeros[:, groups]) * scales[:, groups].astype(np.float32)
        back = np.argsort(order)
        decoded[name], codes, groups = plain[:, back], codes[:, back], groups[back]
        stem = name.removesuffix(".weight")
        if method == "marlin":
            stored[f"{stem}.B"] = published_words(np.ascontiguousarray(codes.T))
            stored[f"{stem}.s"] = published_scales(np.ascontiguousarray(scales.T))
            continue
        stored[f"{stem}.scales"] = np.ascontiguousarray(scales.T)
        if method == "gptq":
            offset = 0 if how.get("v2") else 1
            stored[f"{stem}.qweight"] = words_down(np.ascontiguousarray(codes.T), bits)
            stored[f"{stem}.qzeros"] = np.ascontiguousarray(words_down(zeros - offset, bits).T)
            stored[f"{stem}.g_idx"] = groups.astype(np.int32)
        else:
            stored[f"{stem}.qweight"] = words_across(np.ascontiguousarray(codes.T))
            stored[f"{stem}.qzeros"] = words_across(np.ascontiguousarray(zeros.T))
    save_file(stored, out / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": method, "bits": bits, "group_size": group, "zero_point": True,
        **({"checkpoint_format": "gptq_v2"} if how.get("v2") else {}),
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config))
    return decoded

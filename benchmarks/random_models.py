"""Random-weight Llama models for speed and memory benchmarks, as a Hugging Face directory and as a Q4_0 GGUF file.

Both forms hold the same numbers: the GGUF file is packed from the directory. Tensors are made and written a block of
rows at a time, so a model far larger than the memory at hand can be made. Run as a script it makes one form:

    python benchmarks/random_models.py directory 1b FOLDER
    python benchmarks/random_models.py gguf 1b FOLDER        (needs the `gguf` package; makes the directory first)

Shapes: `demo` is that of the bundled model; `1b` is that of Llama-3.2-1B; `0.5b` is that of Qwen2.5-0.5B in Llama form
(no biases on q, k, v); all without rope scaling, theta 500,000. `tiny` is for trying the benchmark out. The
tokenizer has 256 byte tokens: benchmarks feed token ids.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

BLOCK_WEIGHTS = 1 << 22
ROPE_THETA = 500_000.0
NORM_EPSILON = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Llama with tied embeddings."""

    name: str
    num_layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    intermediate: int
    vocab: int
    head_dim: int = 64
    max_positions: int = 8192

    @property
    def num_matrix_weights(self) -> int:
        """Weights of all matrices, each read once per decoded token (the tied embedding as output head)."""
        return sum(dims[0] * dims[1] for dims in tensor_shapes(self).values() if len(dims) == 2)

    @property
    def kv_values_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(name="tiny", num_layers=4, hidden=512, num_heads=8, num_kv_heads=2, intermediate=1536, vocab=8192),
        Shape(
            name="demo",
            num_layers=8,
            hidden=256,
            num_heads=8,
            num_kv_heads=4,
            intermediate=704,
            vocab=4096,
            head_dim=32,
        ),
        Shape(name="0.5b", num_layers=24, hidden=896, num_heads=14, num_kv_heads=2, intermediate=4864, vocab=151936),
        Shape(name="1b", num_layers=16, hidden=2048, num_heads=32, num_kv_heads=8, intermediate=8192, vocab=128256),
    )
}


def tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Every stored tensor by its Hugging Face name, in the order of the file."""
    query, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab, shape.hidden)}
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}."
        tensors |= {
            prefix + "input_layernorm.weight": (shape.hidden,),
            prefix + "self_attn.q_proj.weight": (query, shape.hidden),
            prefix + "self_attn.k_proj.weight": (kv, shape.hidden),
            prefix + "self_attn.v_proj.weight": (kv, shape.hidden),
            prefix + "self_attn.o_proj.weight": (shape.hidden, query),
            prefix + "post_attention_layernorm.weight": (shape.hidden,),
            prefix + "mlp.gate_proj.weight": (shape.intermediate, shape.hidden),
            prefix + "mlp.up_proj.weight": (shape.intermediate, shape.hidden),
            prefix + "mlp.down_proj.weight": (shape.hidden, shape.intermediate),
        }
    tensors["model.norm.weight"] = (shape.hidden,)
    return tensors


def make_directory(shape: Shape, folder: Path, *, seed: int = 0) -> Path:
    """Writes the Hugging Face directory (bfloat16) unless it is there already; returns it."""
    folder = Path(folder)
    if (folder / "model.safetensors").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", _config(shape))
    _write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1})
    _write_json(folder / "tokenizer.json", _byte_tokenizer())
    _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    _write_safetensors(shape, folder / "model.safetensors", seed)
    return folder


def make_gguf(shape: Shape, directory: Path, path: Path, kind: str = "Q4_0", *, vocabulary: bool = False) -> Path:
    """Packs the directory's weights as `kind` (embedding included, norms float32) unless the file is there already.

    vocabulary: with a text for every token, which llama.cpp's server asks for.
    """
    import gguf
    from gguf.quants import quant_shape_to_byte_shape, quantize

    path = Path(path)
    if path.exists():
        return path
    packing = gguf.GGMLQuantizationType[kind]
    part = path.with_name(path.name + ".part")
    writer = gguf.GGUFWriter(part, "llama")
    _add_gguf_settings(writer, shape, file_type=int(file_type_of(gguf, kind)))
    if vocabulary:
        _add_vocabulary(writer, shape)
    else:
        writer.add_tokenizer_model("none")
    for name, dims in tensor_shapes(shape).items():
        if len(dims) == 1:
            writer.add_tensor_info(_gguf_name(name), dims, np.dtype(np.float32), 4 * dims[0])
        else:
            byte_dims = quant_shape_to_byte_shape(dims, packing)
            writer.add_tensor_info(_gguf_name(name), byte_dims, np.dtype(np.uint8), int(np.prod(byte_dims)), packing)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, dims in tensor_shapes(shape).items():
        tensor = read_tensor(directory, name)
        if len(dims) == 2:
            heads = {"q_proj": shape.num_heads, "k_proj": shape.num_kv_heads}.get(name.split(".")[-2])
            tensor = _interleave_halves(tensor, heads) if heads else tensor
            tensor = np.concatenate([quantize(widen(block), packing) for block in _row_blocks(tensor)])
        else:
            tensor = widen(tensor)
        writer.write_tensor_data(np.ascontiguousarray(tensor))
    writer.close()
    os.replace(part, path)
    return path


def file_type_of(gguf, kind: str):
    """The file type that says a model is mostly of this tensor type."""
    return getattr(gguf.LlamaFileType, f"MOSTLY_{kind}", gguf.LlamaFileType.GUESSED)


def with_words(directory: Path, shape: Shape) -> Path:
    """A second directory of the same model whose tokenizer has a text for every id, as servers' clients need one."""
    folder = Path(directory).with_name(Path(directory).name + "-words")
    folder.mkdir(exist_ok=True)
    for item in Path(directory).iterdir():
        if item.name != "tokenizer.json" and not (folder / item.name).exists():
            os.link(item, folder / item.name)
    tokenizer = _byte_tokenizer()
    tokenizer["model"]["vocab"] |= {f"w{number}": number for number in range(256, shape.vocab)}
    _write_json(folder / "tokenizer.json", tokenizer)
    return folder


def read_tensor(directory: Path, name: str) -> np.ndarray:
    """A memory-mapped view of one tensor as bfloat16 bit patterns (uint16)."""
    path = Path(directory) / "model.safetensors"
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(header_bytes))[name]
    start = 8 + header_bytes + entry["data_offsets"][0]
    return np.memmap(path, np.uint16, "r", offset=start, shape=tuple(entry["shape"]))


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns -> float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """Finite float32 -> bfloat16 bit patterns, rounding half to even."""
    bits = values.astype(np.float32, copy=False).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def _config(shape: Shape) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.max_positions,
        "rope_theta": ROPE_THETA,
        "rms_norm_eps": NORM_EPSILON,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "bfloat16",
    }


def _byte_tokenizer() -> dict:
    """Byte-level BPE without merges: printable Latin-1 bytes stand for themselves, others for characters from 256."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    stand_ins = iter(range(256, 512))
    vocab = {chr(byte if byte in printable else next(stand_ins)): byte for byte in range(256)}
    return {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }


def _write_safetensors(shape: Shape, path: Path, seed: int) -> None:
    header, offset = {}, 0
    for name, dims in tensor_shapes(shape).items():
        size = 2 * int(np.prod(dims))
        header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for index, (name, dims) in enumerate(tensor_shapes(shape).items()):
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            damping = (2 * shape.num_layers) ** -0.5 if residual else 1.0
            for block in _random_blocks(dims, np.random.default_rng([seed, index]), damping):
                block.tofile(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def _random_blocks(dims: tuple[int, ...], generator: np.random.Generator, damping: float) -> Iterator[np.ndarray]:
    """Norm weights near one; matrices scaled by their inputs, and damped by the depth where they write to the residual,
    so that activations keep the size they have in trained models."""
    if len(dims) == 1:
        yield narrow(1 + 0.1 * generator.standard_normal(dims, dtype=np.float32))
        return
    rows, cols = dims
    scale = damping * cols**-0.5
    step = max(1, BLOCK_WEIGHTS // cols)
    for start in range(0, rows, step):
        yield narrow(scale * generator.standard_normal((min(step, rows - start), cols), dtype=np.float32))


def _row_blocks(tensor: np.ndarray) -> Iterator[np.ndarray]:
    step = max(1, BLOCK_WEIGHTS // tensor.shape[1])
    for start in range(0, len(tensor), step):
        yield tensor[start : start + step]


def _interleave_halves(tensor: np.ndarray, heads: int) -> np.ndarray:
    """GGUF's `llama` rotates neighbouring rows of a head together, Hugging Face rows i and i + head_dim/2: reorders."""
    rows, cols = tensor.shape
    return tensor.reshape(heads, 2, rows // heads // 2, cols).swapaxes(1, 2).reshape(rows, cols)


def _add_gguf_settings(writer, shape: Shape, *, file_type: int) -> None:
    writer.add_file_type(file_type)
    writer.add_context_length(shape.max_positions)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.num_layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(ROPE_THETA)
    writer.add_layer_norm_rms_eps(NORM_EPSILON)
    writer.add_vocab_size(shape.vocab)


def _add_vocabulary(writer, shape: Shape) -> None:
    """The bytes of `_byte_tokenizer`, then made-up words: every id can be said."""
    letters = list(_byte_tokenizer()["model"]["vocab"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(letters + [f"w{number}" for number in range(len(letters), shape.vocab)])
    writer.add_token_types([1] * shape.vocab)
    writer.add_token_merges(["w 1"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def _gguf_name(name: str) -> str:
    plain = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in plain:
        return plain[name]
    parts = {
        "input_layernorm": "attn_norm",
        "q_proj": "attn_q",
        "k_proj": "attn_k",
        "v_proj": "attn_v",
        "o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "gate_proj": "ffn_gate",
        "up_proj": "ffn_up",
        "down_proj": "ffn_down",
    }
    pieces = name.split(".")
    return f"blk.{pieces[2]}.{parts[pieces[-2]]}.weight"


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("form", choices=["directory", "gguf"])
    parser.add_argument("size", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vocabulary", action="store_true", help="gguf: with a text for every token, for a server")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.size]
    directory = make_directory(shape, arguments.folder / f"llama-{shape.name}")
    if arguments.form == "gguf":
        stem = f"llama-{shape.name}-q4_0{'-vocabulary' if arguments.vocabulary else ''}"
        make_gguf(shape, directory, arguments.folder / f"{stem}.gguf", vocabulary=arguments.vocabulary)


if __name__ == "__main__":
    main()

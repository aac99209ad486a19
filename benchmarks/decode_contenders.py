"""The engines that benchmarks/decode.py compares, each behind the same few calls on token ids.

A contender holds one sequence: `extend(tokens)` appends tokens and returns the logits after the last one,
`truncate(length)` forgets the rest. Nothing is imported before `load`, so that start-up and resident memory are each
contender's own.
"""

from __future__ import annotations

import importlib.metadata
import os
import threading
import time
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np

PROMPT_BLOCK_TOKENS = 512


class Contender(ABC):
    """One engine with one model and one sequence."""

    weight_bits: float
    kv_bytes_per_value: float = 2.0

    @abstractmethod
    def load(self, model: Path, *, threads: int, max_tokens: int) -> None: ...

    @abstractmethod
    def extend(self, tokens: np.ndarray) -> np.ndarray: ...

    @abstractmethod
    def truncate(self, length: int) -> None: ...

    def prepare(self, model: Path, out: Path) -> None:
        """Makes the engine's own form of the model, where it has one."""
        return

    @abstractmethod
    def about(self) -> dict[str, str]:
        """Versions and settings that matter, for the record."""

    def ledger(self) -> dict[str, int]:
        """Bytes by owner, where the engine can tell."""
        return {}


class Memwall(Contender):
    """memwall from a directory that `memwall compress` wrote (or, lacking that, compressing while it loads)."""

    def __init__(self, *, kv: str, weights: str = "int4") -> None:
        self.kv, self.weights = kv, weights

    def prepare(self, model: Path, out: Path) -> None:
        from memwall.compress.model import compress_model

        if not (out / "memwall.json").exists():
            compress_model(model, out, bits=self.weights, method="rtn")

    def load(self, model: Path, *, threads: int, max_tokens: int) -> None:
        import memwall
        from memwall import kernels, kv
        from memwall.engine import Settings, load
        from memwall.models.precision import bits_of

        self.kernels, self.version = kernels, memwall.__version__
        self.saved = (model / "memwall.json").exists()
        settings = Settings(
            weights="saved" if self.saved else self.weights,
            kv=self.kv,
            context_tokens=max_tokens,
            segment_tokens=PROMPT_BLOCK_TOKENS,
            threads=threads,
        )
        self.session = load(model, settings)
        self.weight_bits = bits_of(self.session.config, self.session.decoder.weights.specs)
        shape = self.session.cache.shape
        float_bytes = kv.read_bytes("float16", shape, max_tokens)
        self.kv_bytes_per_value = 2 * kv.read_bytes(self.kv, shape, max_tokens) / float_bytes

    def extend(self, tokens: np.ndarray) -> np.ndarray:
        return self.session.prefill([int(token) for token in tokens])

    def truncate(self, length: int) -> None:
        self.session.cache.truncate(length)

    def about(self) -> dict[str, str]:
        specs = sorted(set(self.session.decoder.weights.specs.values()) - {"float32"})
        source = "from a compressed directory" if self.saved else "compressed while loading"
        settings = f"{', '.join(specs)} {source}, KV {self.kv}, {self.kernels.isa()} kernels"
        return {"version": f"memwall {self.version}", "settings": settings}

    def ledger(self) -> dict[str, int]:
        return {row.owner: row.nbytes for row in self.session.ledger.rows()}


class LlamaCpp(Contender):
    """llama.cpp by the C interface of llama-cpp-python: 16-bit cache, memory-mapped file, the binding's batch size."""

    weight_bits = 4.5

    def __init__(self, *, fused_attention: bool, repack: bool, kind: str = "Q4_0", weight_bits: float = 4.5) -> None:
        self.fused_attention = fused_attention
        self.repack = repack
        self.kind = kind
        self.weight_bits = weight_bits

    def load(self, model: Path, *, threads: int, max_tokens: int) -> None:
        import llama_cpp

        self.lib = llama_cpp
        self._log = llama_cpp.llama_log_callback(lambda level, text, user: None)
        llama_cpp.llama_log_set(self._log, None)
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 0
        settings.use_extra_bufts = self.repack
        self.model = llama_cpp.llama_model_load_from_file(os.fsencode(model), settings)
        if not self.model:
            raise ValueError(f"llama.cpp cannot load {model.name}")
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = max_tokens
        context.n_batch = context.n_ubatch = PROMPT_BLOCK_TOKENS
        context.n_threads = context.n_threads_batch = threads
        context.flash_attn_type = 1 if self.fused_attention else 0
        context.no_perf = True
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        if not self.context:
            raise ValueError("llama.cpp cannot make a context with these settings")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def extend(self, tokens: np.ndarray) -> np.ndarray:
        lib = self.lib
        for start in range(0, len(tokens), PROMPT_BLOCK_TOKENS):
            block = [int(token) for token in tokens[start : start + PROMPT_BLOCK_TOKENS]]
            array = (lib.llama_token * len(block))(*block)
            status = lib.llama_decode(self.context, lib.llama_batch_get_one(array, len(block)))
            if status:
                raise RuntimeError(f"llama_decode returned {status}")
        return np.ctypeslib.as_array(lib.llama_get_logits_ith(self.context, -1), shape=(self.vocab,))

    def truncate(self, length: int) -> None:
        self.lib.llama_memory_seq_rm(self.memory, -1, length, -1)

    def about(self) -> dict[str, str]:
        return {
            "version": f"llama-cpp-python {importlib.metadata.version('llama-cpp-python')}",
            "settings": f"{self.kind}, KV float16, flash attention {'on' if self.fused_attention else 'off'}, "
            f"weight repacking {'on' if self.repack else 'off'}",
            "system": self.lib.llama_print_system_info().decode().strip(),
        }


class Transformers(Contender):
    """Hugging Face transformers in eager PyTorch."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self.weight_bits = {"float32": 32, "bfloat16": 16}[dtype]
        self.kv_bytes_per_value = self.weight_bits / 8

    def load(self, model: Path, *, threads: int, max_tokens: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.torch, self.transformers = torch, transformers
        dtype = getattr(torch, self.dtype)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
        self.cache = transformers.DynamicCache()

    def extend(self, tokens: np.ndarray) -> np.ndarray:
        ids = self.torch.as_tensor(np.asarray(tokens, np.int64)[None])
        out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits[0, -1].float().numpy()

    def truncate(self, length: int) -> None:
        if length:
            self.cache.crop(length - self.cache.get_seq_length())  # negative: how many tokens to drop
        else:
            self.cache = self.transformers.DynamicCache()

    def about(self) -> dict[str, str]:
        versions = f"transformers {self.transformers.__version__}, torch {self.torch.__version__}"
        return {"version": versions, "settings": f"{self.dtype}, {self.model.config._attn_implementation} attention"}


class Memory(Contender):
    """Not an engine: reads a large buffer with all threads, the measure that decoding is held against."""

    weight_bits = 0.0
    buffer_bytes = 1 << 29
    pass_seconds = 0.4

    def load(self, model: Path, *, threads: int, max_tokens: int) -> None:
        self.threads = threads
        try:
            from memwall import _native
            from memwall.hardware.system import processor_order

            self.native, self.processors = _native, processor_order()
        except ImportError:
            self.native = None
            self.parts = np.array_split(np.ones(self.buffer_bytes // 4, np.float32), threads)

    def read_bytes_per_s(self) -> float:
        """Best of a few passes over a buffer far larger than the caches."""
        if self.native is not None:
            return max(
                self.native.probe_memory("read", self.buffer_bytes, self.threads, self.processors, self.pass_seconds)
            )
        return self.buffer_bytes / min(self._numpy_seconds() for _ in range(5))

    def _numpy_seconds(self) -> float:
        workers = [threading.Thread(target=np.dot, args=(part, part)) for part in self.parts]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return time.perf_counter() - start

    def extend(self, tokens: np.ndarray) -> np.ndarray:
        return np.zeros(1, np.float32)

    def truncate(self, length: int) -> None:
        return

    def about(self) -> dict[str, str]:
        how = f"NumPy {np.__version__}" if self.native is None else "memwall's native probe"
        return {
            "version": how,
            "settings": f"{self.threads} threads, {self.buffer_bytes >> 20} MiB, best pass of a round",
        }


GGUF_BITS = {
    "Q1_0": 1.125,
    "TQ1_0": 1.6875,
    "TQ2_0": 2.0625,
    "Q2_K": 2.625,
    "Q3_K": 3.4375,
    "MXFP4": 4.25,
    "IQ4_NL": 4.5,
    "Q4_0": 4.5,
    "Q4_K": 4.5,
    "Q5_0": 5.5,
    "Q5_K": 5.5,
    "Q6_K": 6.5625,
    "Q8_0": 8.5,
    "BF16": 16.0,
}
"""Types of llama.cpp by their bits per weight, as its block sizes give them."""


def make_contender(name: str) -> Contender:
    """`memwall:FORMAT` and `llama.cpp:TYPE` name any format of either; products alone: `product_contenders`."""
    engine, _, form = name.partition(":")
    if form and engine in ("products", "torchao", "bitsandbytes"):
        from product_contenders import make_products

        return make_products(engine, form)
    if form and engine == "memwall":
        return Memwall(kv="float16", weights=form)
    if form in GGUF_BITS and engine == "llama.cpp":
        return LlamaCpp(fused_attention=True, repack=True, kind=form, weight_bits=GGUF_BITS[form])
    makers = {
        "memory": Memory,
        "memwall": lambda: Memwall(kv="float16"),
        "memwall-kivi": lambda: Memwall(kv="kivi(2bit)"),
        "llama.cpp": lambda: LlamaCpp(fused_attention=True, repack=True),
        "llama.cpp-unfused": lambda: LlamaCpp(fused_attention=False, repack=True),
        "llama.cpp-unpacked": lambda: LlamaCpp(fused_attention=True, repack=False),
        "transformers-float32": lambda: Transformers("float32"),
        "transformers-bfloat16": lambda: Transformers("bfloat16"),
    }
    if name not in makers:
        raise ValueError(f"unknown contender {name!r}; known: {', '.join(makers)}")
    return makers[name]()

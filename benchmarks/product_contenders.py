"""Matrix products alone, for libraries that have kernels and no engine: one token through the matrices of some layers.

A step multiplies one token with every matrix of `LAYERS` layers (more bytes than any cache holds) and attends to
nothing. `products:FORMAT` is memwall's side; `torchao:int4`, `torchao:int8`, `bitsandbytes:nf4` and `bitsandbytes:fp4`
are linear layers of those libraries with bfloat16 activations, on the processor.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from decode_contenders import Contender

LAYERS = 4
TORCH_FORMATS = {"torchao": ("int4", "int8"), "bitsandbytes": ("nf4", "fp4")}


def matrix_shapes(config: dict[str, Any]) -> list[tuple[int, int]]:
    """[rows, cols] of a layer's matrices, those joined that read the same input."""
    hidden, wide, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    joined = (heads + 2 * kv_heads) * head
    return [(joined, hidden), (hidden, heads * head), (2 * wide, hidden), (hidden, wide)]


class Products(Contender):
    """One token times the matrices; what comes out is not used."""

    work: Callable[[], object]

    def extend(self, tokens: np.ndarray) -> np.ndarray:
        self.work()
        return np.zeros(1, np.float32)

    def truncate(self, length: int) -> None:
        return


def _shapes(model: Path) -> list[tuple[int, int]]:
    return matrix_shapes(json.loads((model / "config.json").read_text(encoding="utf-8"))) * LAYERS


class MemwallProducts(Products):
    """memwall's kernels."""

    def __init__(self, form: str) -> None:
        self.form = form

    def load(self, model: Path, *, threads: int, max_tokens: int) -> None:
        from drawn_models import draw_matrix

        import memwall
        from memwall import kernels
        from memwall.formats import codec

        kernels.set_num_threads(threads)
        self.version, self.isa, self.spec = memwall.__version__, kernels.isa(), codec(self.form).spec
        held = [kernels.matrix(draw_matrix(self.spec, shape)) for shape in _shapes(model)]
        self.weight_bits = 8 * sum(m.nbytes for m in held) / sum(m.rows * m.cols for m in held)
        inputs = {m.cols: np.random.default_rng(0).standard_normal((1, m.cols), np.float32) for m in held}
        outs = {m.rows: np.empty((1, m.rows), np.float32) for m in held}

        def work() -> None:
            for matrix in held:
                kernels.linear(inputs[matrix.cols], [matrix], [outs[matrix.rows]])

        self.work = work

    def about(self) -> dict[str, str]:
        return {"version": f"memwall {self.version}", "settings": f"{self.spec}, {self.isa} kernels, products only"}


class TorchProducts(Products):
    """Linear layers of a library over torch."""

    def __init__(self, library: str, form: str) -> None:
        self.library, self.form = library, form

    def load(self, model: Path, *, threads: int, max_tokens: int) -> None:
        import torch

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        make = {"torchao": _torchao, "bitsandbytes": _bitsandbytes}[self.library]
        layers = [(make(torch, self.form, *shape), shape[1]) for shape in _shapes(model)]
        inputs = {cols: torch.randn(1, cols, dtype=torch.bfloat16) for _, cols in layers}
        groups = {"int4": 4 + 32 / 128, "int8": 8.0}
        self.weight_bits = groups.get(self.form, 4 + 32 / 64)  # codes and float32 (torchao: two bfloat16) a group

        def work() -> None:
            for layer, cols in layers:
                layer(inputs[cols])

        self.work = work

    def about(self) -> dict[str, str]:
        version = f"{self.library} {importlib.metadata.version(self.library)}"
        return {"version": version, "settings": f"{self.form}, bfloat16 activations, products only"}


def _linear(torch: Any, rows: int, cols: int) -> Any:
    layer = torch.nn.Linear(cols, rows, bias=False, dtype=torch.bfloat16, device="meta").to_empty(device="cpu")
    layer.weight.normal_(0, cols**-0.5)
    return layer


def _torchao(torch: Any, form: str, rows: int, cols: int) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layer = torch.nn.Sequential(_linear(torch, rows, cols))
    if form == "int8":
        quantize_(layer, Int8WeightOnlyConfig(set_inductor_config=False))
        return layer
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    quantize_(layer, PrototypeInt4WeightOnlyConfig(group_size=128, set_inductor_config=False))
    return layer


def _bitsandbytes(torch: Any, form: str, rows: int, cols: int) -> Any:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(cols, rows, bias=False, compute_dtype=torch.bfloat16, quant_type=form)
    layer.load_state_dict({"weight": _linear(torch, rows, cols).weight.float()})
    return layer.to("cpu")


def make_products(engine: str, form: str) -> Products:
    """The contender of a name `ENGINE:FORMAT`."""
    return MemwallProducts(form) if engine == "products" else TorchProducts(engine, form)

"""Native kernels behind one dispatcher.

C++ for CPUs lives in `cpp/` (portable, AVX2 and AVX-512, chosen when the program runs); the modules here are its Python
faces. `reference` has each operation in plain torch; only tests import it.
"""

from __future__ import annotations

from memwall._native import Program, best_isa, force_isa, isa, num_threads, set_num_threads
from memwall.kernels.attention import (
    attend_float,
    attend_kivi,
    attend_ragged,
    attend_scattered,
    merge_partials,
    predict_attention_scratch_bytes,
)
from memwall.kernels.elementwise import gelu, int8_rows, layer_norm, relu, rms_norm, rope, store_int8, swiglu
from memwall.kernels.encode import encode
from memwall.kernels.linear import Matrix, gather_rows, linear, matrix, predict_scratch_bytes, roundings, scratch_bytes

__all__ = [
    "Matrix",
    "Program",
    "attend_float",
    "attend_kivi",
    "attend_ragged",
    "attend_scattered",
    "best_isa",
    "encode",
    "force_isa",
    "gather_rows",
    "gelu",
    "int8_rows",
    "isa",
    "layer_norm",
    "linear",
    "matrix",
    "merge_partials",
    "num_threads",
    "predict_attention_scratch_bytes",
    "predict_scratch_bytes",
    "relu",
    "rms_norm",
    "rope",
    "roundings",
    "scratch_bytes",
    "set_num_threads",
    "store_int8",
    "swiglu",
]

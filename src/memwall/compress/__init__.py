"""Weight compression: calibration statistics, one compensated sweep, bit allocation, one file per method, saved models.

`METHODS` is the table, name -> "module:Class", loaded on demand; a method is one file and one line here.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

from memwall.compress.base import MethodConfig, Statistics, WeightMethod
from memwall.errors import InputError

METHODS: dict[str, str] = {
    "rtn": "memwall.compress.rtn:RoundToNearest",
    "gptq": "memwall.compress.gptq:Gptq",
    "awq": "memwall.compress.awq:Awq",
    "smoothquant": "memwall.compress.smoothquant:SmoothQuant",
    "spqr": "memwall.compress.spqr:Spqr",
    "ir-qlora": "memwall.compress.ir_qlora:InformationCalibrated",
    "billm": "memwall.compress.billm:Billm",
    "quip": "memwall.compress.quip:Quip",
    "db-llm": "memwall.compress.db_llm:DbLlm",
    "pb-llm": "memwall.compress.pb_llm:PbLlm",
    "vptq": "memwall.compress.vptq:Vptq",
    "sparsegpt": "memwall.compress.sparsegpt:SparseGpt",
    "accllm": "memwall.compress.accllm:AccLlm",
    "edkm": "memwall.compress.edkm:Edkm",
    "xr-npe": "memwall.compress.xr_npe:XrNpe",
    "bitstack": "memwall.compress.bitstack:BitStack",
    "comet": "memwall.compress.comet:Comet",
    "quamba2": "memwall.compress.quamba2:Quamba2",
}

__all__ = ["METHODS", "MethodConfig", "Statistics", "WeightMethod", "weight_method"]


def weight_method(name: str, options: Mapping[str, str] | None = None) -> WeightMethod:
    """The method of the table called `name`, with settings as `WeightMethod.configured` takes them."""
    if name not in METHODS:
        raise InputError(f"unknown compression method {name!r}; known are {', '.join(METHODS)}")
    module, _, class_name = METHODS[name].partition(":")
    method: type[WeightMethod] = getattr(import_module(module), class_name)
    return method.configured(options or {})

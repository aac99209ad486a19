"""How numbers become bytes: codecs, the packed form, and the files it is kept in.

`codec("int4-g64")` gives the codec of a spec string; `CODECS` is the table, one line per family, loaded on demand. A
spec starts with its family's name, so adding a family is one file and one line here.
"""

from __future__ import annotations

import re
from functools import lru_cache
from importlib import import_module

from memwall.errors import InputError
from memwall.formats.base import Codec, Packed

CODECS: dict[str, str] = {
    "float": "memwall.formats.floats:FloatCodec",
    "bfloat": "memwall.formats.floats:FloatCodec",
    "int": "memwall.formats.integer:IntegerCodec",
    "ordered": "memwall.formats.ordered:OrderedCodec",
    "nf": "memwall.formats.leveled:LevelCodec",
    "fp": "memwall.formats.leveled:LevelCodec",
    "e": "memwall.formats.leveled:LevelCodec",
    "posit": "memwall.formats.leveled:LevelCodec",
    "mxfp": "memwall.formats.leveled:LevelCodec",
    "mxint": "memwall.formats.leveled:LevelCodec",
    "bfp": "memwall.formats.leveled:LevelCodec",
    "bipolar": "memwall.formats.leveled:LevelCodec",
    "ternary": "memwall.formats.leveled:LevelCodec",
    "binary": "memwall.formats.leveled:ResidualBinaryCodec",
    "irnf": "memwall.formats.shifted:ShiftedCodec",
    "dual": "memwall.formats.db_llm:DualBinaryCodec",
    "billm": "memwall.formats.sign_mask:BillmCodec",
    "pbllm": "memwall.formats.sign_mask:PbLlmCodec",
    "quip": "memwall.formats.quip:QuipCodec",
    "spqr": "memwall.formats.spqr:SpqrCodec",
    "sparse": "memwall.formats.sparse:SparseCodec",
    "vptq": "memwall.formats.vptq:VptqCodec",
    "comet": "memwall.formats.comet:CometCodec",
    "bitstack": "memwall.formats.bitstack:BitStackCodec",
    "static": "memwall.formats.static8:StaticCodec",
    "w": "memwall.formats.apmm_bipolar_int:BitPlaneCodec",
}

__all__ = ["CODECS", "Codec", "Packed", "codec", "codec_class"]


def codec_class(family: str) -> type[Codec]:
    """The codec class behind one entry of the table."""
    module, _, name = CODECS[family].partition(":")
    found: type[Codec] = getattr(import_module(module), name)
    return found


@lru_cache(maxsize=256)
def codec(spec: str) -> Codec:
    """Codec of a spec string such as `float16`, `int4`, `int3-g32-asym`, `int2-g32-asym-rows`."""
    family = re.match(r"[a-z]*", spec)
    if family is None or family.group() not in CODECS:
        from memwall.formats.format_names import known_names

        raise InputError(
            f"unknown number format {spec!r}; known are float32, float16, bfloat16, int2 to int8, {known_names()}"
        )
    return codec_class(family.group()).parse(spec)

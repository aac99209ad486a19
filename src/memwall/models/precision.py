"""Which tensor is stored in which format.

A *choice* is what a user writes: a dtype (`float16`), a width (`int4`), a format (`nf4`), a full codec spec
(`int4-g64-asym`), a mean number of bits (`mixed-3.70`), also over formats of one's own (`mixed(e2m1,posit8)-5.20`),
those of one engine mixed by layer (`xr-npe`, `xr-npe-6.50`), `saved` for a directory that memwall compressed, or
`stack-120` for so many blocks of one that holds a stack. `resolve` turns it into one codec spec per tensor, from the
configuration alone, so that the planner, the loader and the ledger agree to the byte before any weight is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from memwall.errors import InputError
from memwall.formats import codec
from memwall.formats.apmm_bipolar_int import BitPlaneCodec
from memwall.formats.leveled import LevelCodec
from memwall.formats.ordered import OrderedCodec
from memwall.formats.sparse import SparseCodec
from memwall.models.checkpoint import Checkpoint
from memwall.models.config import ModelConfig, TensorSpec
from memwall.models.stack_index import CHOICE as STACK_CHOICE
from memwall.models.stack_index import StackIndex

FLOAT_CHOICES = ("float32", "float16", "bfloat16")
INT_CHOICES = ("int8", "int6", "int5", "int4", "int3", "int2")
# one name of each family of formats.leveled; all its specs may be written out
LEVEL_CHOICES = (
    "nf4",
    "nf4-dq",
    "irnf4",
    "fp4",
    "e2m1",
    "e4m3",
    "posit8",
    "mxfp4",
    "mxfp8",
    "bfp4",
    "bipolar3",
    "ternary",
)

# The ladder that mixed precision climbs, one tensor at a time. Narrow codes get a minimum per group as well as a scale:
# at 2 and 3 bits the quarter bit it costs buys more than the same bytes spent on wider codes elsewhere.
LADDER = ("int2-g64-asym", "int3-g64-asym", "int4-g64", "int5-g64", "int6-g64", "int8-g64")

# XR-NPE (arXiv 2508.13049) gives each layer 4-bit floats or 8-bit posits, the wide ones to 18 % of the layers (share of
# the authors' mixed notebook), and leaves the first and the last layer, here embedding and head, as they are.
LAYER_ADAPTIVE = "xr-npe"
LAYER_ADAPTIVE_LADDER = ("e2m1-g64", "posit8es0-g64")
WIDE_SHARE = 0.18

# Embedding rows are read one at a time, so each token sees the full error of its row, and the head decides between
# thousands of near-equal logits: neither goes below this.
MIN_EMBEDDING_BITS = 4
FLOAT_ENDS = ("spqr", "vptq", "bitstack", "comet")
"""Methods whose papers leave embedding and head in half precision; those of other methods' forms get integers."""

ALIGNMENT_BYTES = 64
MATRIX_ROLES = frozenset({"embedding", "head", "linear", "expert"})


def is_matrix(tensor: TensorSpec) -> bool:
    """Whether a tensor takes part in compression (the rest stays float32)."""
    return tensor.role in MATRIX_ROLES


def aligned(nbytes: int) -> int:
    """Bytes rounded up to the alignment of weight buffers."""
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def resolve(
    config: ModelConfig, choice: str, checkpoint: Checkpoint | None = None, *, method: str | None = None
) -> dict[str, str]:
    """Codec spec of every tensor of `config`.

    checkpoint: needed for (and only used by) the choice `saved`. method: the compression method at work, whose own
    formats may be chosen then. Raises InputError for an unknown choice.
    """
    tensors = config.tensors()
    if choice.startswith(STACK_CHOICE):
        index = StackIndex.of(checkpoint) if checkpoint is not None else None
        if index is None:
            raise InputError(f"weights {choice!r} need a directory that `memwall compress --method bitstack` wrote")
        return {**resolve(config, "saved", checkpoint), **index.specs(index.chosen(choice))}
    if choice.lower() == "w4a4kv4":
        raise InputError(
            f"weights {choice!r} name the cache too, which run, eval and plan take; give saved here, with a model that "
            "memwall compress --method comet made"
        )
    if choice == "saved":
        if checkpoint is None or checkpoint.manifest is None:
            raise InputError("weights 'saved' needs a directory that `memwall compress` wrote")
        return {t.name: checkpoint.source_dtype(t.name) if is_matrix(t) else "float32" for t in tensors}
    ceiling = source_spec(config)
    if choice == LAYER_ADAPTIVE:
        return _layer_adaptive(tensors, ceiling)
    if match := re.fullmatch(r"mixed(\([^()]*\))-(.*)", choice):
        return _mixed(tensors, _parse_mean_bits(choice), (*parse_ladder(match[1]), ceiling))
    if choice.startswith(("mixed-", f"{LAYER_ADAPTIVE}-")):
        mean = _parse_mean_bits(choice)
        if choice.startswith("mixed-"):
            return _mixed(tensors, mean, (*LADDER, ceiling))
        return _mixed(tensors, mean, (*LAYER_ADAPTIVE_LADDER, ceiling), ends=ceiling)
    spec = _canonical(choice)
    made_by = codec(spec).method
    if made_by not in (None, method):
        raise InputError(
            f"weights {choice!r} need calibration: memwall compress MODEL OUT --method {made_by}, then use OUT"
        )
    return {tensor.name: _for_tensor(tensor, spec) for tensor in tensors}


def source_spec(config: ModelConfig) -> str:
    """The dtype the checkpoint was saved in: storing more bits than that buys nothing."""
    return config.dtype if config.dtype in FLOAT_CHOICES else "float32"


def bits_of(config: ModelConfig, specs: Mapping[str, str]) -> float:
    """Mean true bits per weight over the matrices, scales and padding included."""
    matrices = [tensor for tensor in config.tensors() if is_matrix(tensor)]
    nbytes = sum(codec(specs[tensor.name]).nbytes(tensor.shape) for tensor in matrices)
    return 8 * nbytes / sum(tensor.size for tensor in matrices)


def weight_bytes(config: ModelConfig, specs: Mapping[str, str]) -> dict[str, int]:
    """Resident bytes per ledger owner (`weights/int4-g64`, ...), each buffer aligned as the loader lays it out."""
    totals: dict[str, int] = {}
    for tensor in config.tensors():
        owner = weight_owner(specs[tensor.name])
        totals[owner] = totals.get(owner, 0) + tensor_bytes(tensor, specs[tensor.name])
    return totals


def weight_owner(spec: str) -> str:
    """The ledger's row for weights in a format."""
    return f"weights/{codec(spec).label}"


def level_formats(specs: Mapping[str, str]) -> list[str]:
    """The level formats among the specs of tensors: their tables and encoder are made when they are first used."""
    return sorted(spec for spec in set(specs.values()) if isinstance(codec(spec), LevelCodec))


def tensor_bytes(tensor: TensorSpec, spec: str) -> int:
    """Resident bytes of one tensor in one format, alignment included."""
    buffers = codec(spec).buffers(tensor.shape).values()
    return sum(aligned(math.prod(shape) * dtype.itemsize) for shape, dtype in buffers)


def _canonical(choice: str) -> str:
    try:
        found = codec(choice)
    except ValueError as error:
        accepted = ", ".join((*FLOAT_CHOICES, *INT_CHOICES, *LEVEL_CHOICES, "w4a8", LAYER_ADAPTIVE))
        raise InputError(
            f"unknown weight format {choice!r}; use one of {accepted}, a spec such as int4-g64-asym, or auto ({error})"
        ) from error
    if getattr(found, "layout", "tiles") != "tiles":
        raise InputError(f"weights {choice!r}: products read weights in tiles; leave out -rows, -flat or -raw")
    return found.spec


def code_bits(spec: str) -> int:
    """Bits of a code; 16 for floats as they are, which are wide enough for anything."""
    return int(getattr(codec(spec), "bits", 16))


def _for_tensor(tensor: TensorSpec, spec: str) -> str:
    if not is_matrix(tensor):
        return "float32"
    if tensor.role in ("embedding", "head") and (
        isinstance(codec(spec), BitPlaneCodec) or codec(spec).method in FLOAT_ENDS
    ):
        # as their papers have it: of planes, because activations of the head stay whole then; of a method's own forms,
        # because calibration is what they are good for
        return "float16"
    if tensor.role in ("embedding", "head") and isinstance(found := codec(spec), OrderedCodec):
        return _for_tensor(tensor, found.inner.spec)  # rows are looked up, and have no use for an order of columns
    if tensor.role in ("embedding", "head") and isinstance(codec(spec), SparseCodec):
        return f"int{max(MIN_EMBEDDING_BITS, code_bits(spec))}-g64"  # a row of an embedding is a token: none are spared
    if tensor.role in ("embedding", "head") and (code_bits(spec) < MIN_EMBEDDING_BITS or codec(spec).method):
        return f"int{MIN_EMBEDDING_BITS}-g64"
    return spec


def _parse_mean_bits(choice: str) -> float:
    prefix, _, number = choice.rpartition("-")
    try:
        bits = float(number)
    except ValueError:
        bits = float("nan")
    if not 1 <= bits <= 32:
        raise InputError(
            f"weights {choice!r}: write {prefix or choice}- and a mean number of bits between 2.5 and 32, such as "
            f"mixed-3.70 or {LAYER_ADAPTIVE}-6.50"
        )
    return bits


def parse_ladder(text: str) -> tuple[str, ...]:
    """Formats between brackets, such as (e2m1,posit8), as specs from the fewest bits up."""
    names = [name.strip() for name in text.strip("()").split(",")]
    specs = sorted({_canonical(name) for name in names if name}, key=lambda spec: codec(spec).nbytes((1024, 1024)))
    if len(specs) < 2:
        raise InputError(f"{text}: name two formats or more to mix, such as (e2m1,nf4,posit8)")
    needs = [spec for spec in specs if codec(spec).method is not None]
    if needs:
        raise InputError(f"{text}: {needs[0]} is made by memwall compress alone and cannot be mixed")
    return tuple(specs)


def _start(tensors: list[TensorSpec], spec: str, ends: str | None) -> dict[str, str]:
    """All matrices in one form, the embedding and the head in `ends`, if given."""
    return {t.name: ends if ends and t.role in ("embedding", "head") else _for_tensor(t, spec) for t in tensors}


def _mixed(
    tensors: list[TensorSpec], mean_bits: float, rungs: tuple[str, ...], *, ends: str | None = None
) -> dict[str, str]:
    """Climb the ladder rung by rung, most sensitive tensors first, while the mean stays at or under `mean_bits`."""
    matrices = [tensor for tensor in tensors if is_matrix(tensor)]
    allowed = int(mean_bits * sum(tensor.size for tensor in matrices) / 8)
    specs = _start(tensors, rungs[0], ends)
    used = sum(codec(specs[tensor.name]).nbytes(tensor.shape) for tensor in matrices)
    if used > allowed:
        smallest = 8 * used / sum(tensor.size for tensor in matrices)
        raise InputError(f"a mean of {mean_bits:g} bits: the least this model takes is {smallest:.2f} bits per weight")
    order = sorted(matrices, key=lambda tensor: sensitivity_rank(tensor, tensors))
    for rung in rungs[1:]:
        before = dict(specs)
        for tensor in order:
            spec = _for_tensor(tensor, rung)
            extra = codec(spec).nbytes(tensor.shape) - codec(specs[tensor.name]).nbytes(tensor.shape)
            if extra > 0 and used + extra <= allowed:
                specs[tensor.name] = spec
                used += extra
        if any(
            specs[tensor.name] != _for_tensor(tensor, rung) and specs[tensor.name] == before[tensor.name]
            for tensor in order
            if ends is None or tensor.role not in ("embedding", "head")
        ):
            break  # this rung is not filled: a higher one would take bytes from tensors that still wait for it
    return specs


def _layer_adaptive(tensors: list[TensorSpec], ends: str) -> dict[str, str]:
    """The most sensitive 18 % of the matrices in 8-bit posits, the others in 4-bit floats."""
    narrow, wide = LAYER_ADAPTIVE_LADDER
    specs = _start(tensors, narrow, ends)
    inner = [tensor for tensor in tensors if is_matrix(tensor) and tensor.role not in ("embedding", "head")]
    order = sorted(inner, key=lambda tensor: sensitivity_rank(tensor, tensors))
    for tensor in order[: round(WIDE_SHARE * len(order))]:
        specs[tensor.name] = wide
    return specs


def sensitivity_rank(tensor: TensorSpec, tensors: list[TensorSpec]) -> tuple[int, int]:
    """Order in which tensors get more bits when nothing was measured: (class, layer), least first.

    Values and the second matrix of the feed-forward block write straight into the residual stream and suffer most from
    low bits; the first and the last layer more than those between. (`memwall compress` measures instead.)
    """
    last = max((other.layer for other in tensors if other.layer is not None), default=0)
    layer = tensor.layer if tensor.layer is not None else -1
    if tensor.role in ("embedding", "head"):
        return (1, layer)
    writes = any(part in tensor.name for part in ("v_proj", "down_proj", ".w2."))
    edge = layer in (0, last)
    return ((0 if edge else 2) if writes else (3 if edge else 4), layer)

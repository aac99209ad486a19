"""PEFT's LoRA directories: checked when they are read, fetched into pages when they are wanted.

A directory has `adapter_config.json` and `adapter_model.safetensors`. What is kept of it is small (a few numbers and
where each tensor lies), so that thousands of adapters can be known at once; their numbers stay in the file and in the
system's page cache until `fetch`.

Source: LoRA, Hu 2021, arXiv 2106.09685; scaling alpha / sqrt(rank) of rsLoRA, Kalajdzievski 2023, arXiv 2312.03732.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from memwall.errors import InputError
from memwall.formats import checked_json
from memwall.formats.checked_json import Fields, shown
from memwall.formats.safetensors_file import SafetensorsFile, SafetensorsWriter, TensorInfo
from memwall.kernels.lora import TARGETS, LoraRoom, PagedLora
from memwall.models.config import ModelConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FORMS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
MOST_RANK = 512
KEY = re.compile(
    r"(?:base_model\.model\.)?(?:model\.)?layers\.(\d{1,6})\.(?:self_attn|mlp)\.(\w+)"
    r"\.lora_(?:([AB])\.weight|magnitude_vector)"
)
UNSUPPORTED = {
    "use_qalora": "QA-LoRA pools inputs",
    "lora_bias": "biases of the low-rank factors",
    "modules_to_save": "whole layers trained beside the adapter",
    "rank_pattern": "ranks that differ between layers",
    "alpha_pattern": "an alpha that differs between layers",
    "fan_in_fan_out": "weights stored the other way round",
    "trainable_token_indices": "trained token embeddings",
    "target_parameters": "adapters of bare parameters",
    "layer_replication": "layers that are repeated",
    "alora_invocation_tokens": "adapters that begin at a token",
}
"""Fields of the configuration that change what an adapter does, and what they stand for."""
MAGNITUDE = 2
"""Place of a row's lengths behind A and B."""
CHANGE_BASE = ("pissa", "olora", "corda", "loftq")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraWeights:
    """One adapter on disk, made for one shape of model.

    form: numbers of A and B in the file. offsets: int64 [layers, 7, 2], the byte where A and B of each target begin, or
    -1. dora: each adapted weight's rows have lengths of their own, kept beside A and B (`models.dora`).
    """

    path: Path
    rank: int
    alpha: float
    scale: float
    targets: tuple[str, ...]
    form: str
    base: str
    shapes: dict[str, tuple[int, int, int]]
    offsets: np.ndarray
    nbytes: int
    dora: bool
    identity: tuple[int, int, int] = field(repr=False)

    @staticmethod
    def read(directory: str | Path, config: ModelConfig) -> LoraWeights:
        """Reads and checks headers only. InputError says what is wrong, or that the adapter is for another base."""
        folder = _folder(directory)
        fields = Fields(checked_json.read(folder / CONFIG), str(folder / CONFIG))
        rank, alpha, scale = _scaling(fields)
        path = folder / WEIGHTS
        shapes = target_shapes(config)
        with SafetensorsFile(path) as file:
            found = dict(_tensors(file, path))
            layers = max((layer for layer, _, _ in found), default=-1) + 1
            base = str(fields.values.get("base_model_name_or_path") or "an unnamed model")[:200]
            if layers > config.num_layers:
                raise InputError(
                    f"{path}: the adapter changes layer {layers - 1}, but the model has {config.num_layers} layers; "
                    f"it was made for {shown(base)}"
                )
            offsets = np.full((config.num_layers, len(TARGETS), 3), -1, np.int64)
            for (layer, name, part), info in found.items():
                place = TARGETS.index(name)
                _check(path, info, name, part, rank, shapes, base, config)
                offsets[layer, place, part] = info.start
            forms = {info.dtype for (_, _, part), info in found.items() if part != MAGNITUDE}
            state = os.stat(path)
        dora = fields.flag("use_dora", False)
        _check_pairs(path, offsets[..., :MAGNITUDE], forms)
        _check_magnitudes(path, offsets, dora)
        targets = tuple(name for place, name in enumerate(TARGETS) if (offsets[:, place, 0] >= 0).any())
        return LoraWeights(
            path=path,
            rank=rank,
            alpha=alpha,
            scale=scale,
            targets=targets,
            form=FORMS[forms.pop()],
            base=base,
            shapes={name: (rank, *shapes[name]) for name in targets},
            offsets=np.ascontiguousarray(offsets[..., :MAGNITUDE]),
            nbytes=sum(info.nbytes for (_, _, part), info in found.items() if part != MAGNITUDE),
            dora=dora,
            identity=_identity(state),
        )

    def paged(self, room: LoraRoom, *, exact: bool = False) -> PagedLora:
        """Its form in pages. float32 numbers become float16 unless `exact`."""
        return PagedLora(
            room, "float16" if self.form == "float32" and not exact else self.form, self.scale, self.shapes
        )

    def fetch(self, paged: PagedLora, pool: np.ndarray) -> int:
        """Copies its numbers into the pages `paged` lies in; bytes read.

        InputError when the file is no longer the one that was checked.
        """
        try:
            with open(self.path, "rb") as file:
                if _identity(os.fstat(file.fileno())) != self.identity:
                    raise InputError(f"{self.path}: changed since it was read; load the adapter again")
                return paged.fetch(pool, file.fileno(), self.form, self.offsets)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read: {error.strerror or error}") from None

    def factors(self, layer: int, target: str) -> tuple[np.ndarray, np.ndarray] | None:
        """A [rank, in] and B [out, rank] as float32; None where the adapter leaves the product alone. For references
        and for merging.
        """
        place = TARGETS.index(target)
        if self.offsets[layer, place, 0] < 0:
            return None
        rank, inputs, outputs = self.shapes[target]
        found = []
        with SafetensorsFile(self.path) as file:
            by_start = {file.info(name).start: name for name in file.names()}
            for part, shape in enumerate(((rank, inputs), (outputs, rank))):
                name = by_start[int(self.offsets[layer, place, part])]
                found.append(file.tensor(name).astype(np.float32).reshape(shape))
        return found[0], found[1]

    def magnitudes(self) -> dict[tuple[int, str], np.ndarray]:
        """Of a `dora` adapter, the lengths of the rows of each adapted weight, float32 [out], by layer and target."""
        with SafetensorsFile(self.path) as file:
            return {
                (layer, target): file.tensor(info.name).astype(np.float32)
                for (layer, target, part), info in _tensors(file, self.path)
                if part == MAGNITUDE
            }


def target_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of each projection that an adapter may change."""
    hidden, queries, keys, wide = config.hidden_size, config.query_size, config.kv_size, config.intermediate_size
    shapes = {
        "q_proj": (hidden, queries), "k_proj": (hidden, keys), "v_proj": (hidden, keys), "o_proj": (queries, hidden),
    }  # fmt: skip
    if not config.num_experts:
        shapes |= {"gate_proj": (hidden, wide)} if config.gated else {}
        shapes |= {"up_proj": (hidden, wide), "down_proj": (wide, hidden)}
    return shapes


def tensor_name(layer: int, target: str, part: str) -> str:
    """PEFT's name of factor `part` (A or B), or of the rows' lengths (`magnitude_vector`)."""
    parent = "self_attn" if target in TARGETS[:4] else "mlp"
    end = ".weight" if part in ("A", "B") else ""
    return f"base_model.model.model.layers.{layer}.{parent}.{target}.lora_{part}{end}"


def write_lora(
    folder: Path, tensors: Mapping[str, np.ndarray], *, rank: int, alpha: float, base: str, **fields: Any
) -> Path:
    """Writes a directory that this module and PEFT read. tensors: by `tensor_name`; fields: more configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    specs = [(name, value.dtype, value.shape) for name, value in tensors.items()]
    with SafetensorsWriter(folder / WEIGHTS, specs, {"format": "pt"}) as writer:
        for name, value in tensors.items():
            writer.write(name, np.ascontiguousarray(value))
    told = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha, "bias": "none",
        "target_modules": sorted({name.split(".lora_")[0].rsplit(".", 1)[-1] for name in tensors}),
        "base_model_name_or_path": base, **fields,
    }  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    return folder


def _folder(directory: str | Path) -> Path:
    folder = Path(directory)
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder; give the folder that holds {CONFIG}")
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder}: no {CONFIG} here, so it is not a LoRA adapter in PEFT's form")
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        hint = "adapter_model.bin is a pickle, which is never read; save it again as safetensors" if pickled else ""
        raise InputError(f"{folder}: no {WEIGHTS} here{'; ' if hint else ''}{hint}")
    return folder


def _scaling(fields: Fields) -> tuple[int, float, float]:
    fields.text("peft_type", "LORA", ("LORA",))
    for name, meaning in UNSUPPORTED.items():
        if fields.values.get(name):
            raise InputError(f"{fields.source}: {name} is set ({meaning}), which is not supported; train without it")
    fields.text("bias", "none", ("none",))
    start: Any = fields.values.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGE_BASE):
        raise InputError(
            f"{fields.source}: init_lora_weights {shown(start)} changes the base's weights too; save the adapter "
            "converted to plain LoRA (path_initial_model_for_weight_conversion of PEFT's save_pretrained)"
        )
    rank = fields.integer("r", 1, MOST_RANK)
    alpha = fields.number("lora_alpha", -1e6, 1e6, 8)
    return rank, alpha, alpha / (math.sqrt(rank) if fields.flag("use_rslora", False) else rank)


def _tensors(file: SafetensorsFile, path: Path) -> Iterator[tuple[tuple[int, str, int], TensorInfo]]:
    """((layer, target, 0 for A, 1 for B or `MAGNITUDE`), where it lies) of each tensor."""
    for name in file.names():
        match = KEY.fullmatch(name)
        if match is None or match[2] not in TARGETS:
            what = re.sub(r"\.lora_\w+(\.weight)?$", "", name).rsplit(".", 1)[-1] if ".lora_" in name else name
            raise InputError(
                f"{path}: tensor {shown(name)} is not supported: adapters may change {', '.join(TARGETS)}, "
                f"not {shown(what)}"
            )
        yield (int(match[1]), match[2], MAGNITUDE if match[3] is None else "AB".index(match[3])), file.info(name)


def _check(
    path: Path,
    info: TensorInfo,
    name: str,
    part: int,
    rank: int,
    shapes: dict[str, tuple[int, int]],
    base: str,
    config: ModelConfig,
) -> None:
    if name not in shapes:
        raise InputError(f"{path}: {shown(info.name)} changes {name}, which this {config.family} model has in experts")
    if info.dtype not in FORMS:
        raise InputError(f"{path}: {shown(info.name)} is {info.dtype}; known are {', '.join(FORMS)}")
    inputs, outputs = shapes[name]
    if part == MAGNITUDE:
        if info.shape != (outputs,):
            raise InputError(f"{path}: {shown(info.name)} is {list(info.shape)}, but {name} needs [{outputs}]")
        return
    wanted, widths = ((rank, inputs), (outputs, rank))[part], ((1, 0), (0, 1))[part]
    if info.shape == wanted:
        return
    if len(info.shape) == 2 and info.shape[widths[1]] == rank:
        raise InputError(
            f"{path}: {shown(info.name)} is {list(info.shape)}, but {name} of this model needs {list(wanted)}: "
            f"the adapter was made for another base ({shown(base)})"
        )
    raise InputError(f"{path}: {shown(info.name)} is {list(info.shape)}; rank {rank} needs {list(wanted)}")


def _check_pairs(path: Path, offsets: np.ndarray, forms: set[str]) -> None:
    if not (offsets >= 0).any():
        raise InputError(f"{path}: holds no tensor; an adapter has lora_A and lora_B of some projection")
    lone = np.argwhere((offsets[:, :, 0] >= 0) != (offsets[:, :, 1] >= 0))
    if len(lone):
        layer, place = (int(value) for value in lone[0])
        has = "A" if offsets[layer, place, 0] >= 0 else "B"
        raise InputError(f"{path}: layer {layer} has lora_{has} of {TARGETS[place]} without its other half")
    if len(forms) > 1:
        raise InputError(f"{path}: tensors are of several number formats ({', '.join(sorted(forms))}); save one")


def _check_magnitudes(path: Path, offsets: np.ndarray, dora: bool) -> None:
    wrong = np.argwhere((offsets[:, :, 0] >= 0) & dora != (offsets[:, :, MAGNITUDE] >= 0))
    if len(wrong):
        layer, place = (int(value) for value in wrong[0])
        what = "set, but" if dora else "not set, and yet"
        raise InputError(
            f"{path}: use_dora is {what} layer {layer} has {'no' if dora else 'a'} lora_magnitude_vector of "
            f"{TARGETS[place]}"
        )


def _identity(state: os.stat_result) -> tuple[int, int, int]:
    return state.st_ino, state.st_size, state.st_mtime_ns

"""Fuzzing the readers of foreign files: any bytes are read or refused with InputError, quickly and in little memory.

Inputs are raw bytes, JSON documents of any form, and valid documents with a few values, keys or bytes changed; the last
kind gets deepest. The cases are fixed (derandomized), so a failure here is a failure everywhere.
"""

from __future__ import annotations

import copy
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from memwall.errors import InputError
from memwall.formats import checked_json
from memwall.formats.manifest import FileEntry, Manifest, PackedEntry
from memwall.formats.safetensors_file import SafetensorsFile, parse_header
from memwall.models import Checkpoint, ModelConfig
from memwall.models.chat import ChatTemplate

MAX_PEAK_BYTES = 4_000_000
bounded = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "eos_token_id": [1, 2],
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "use_sliding_window": True,
    "sliding_window": 4,
    "layer_types": ["full_attention", "sliding_attention"],
    "torch_dtype": "float16",
}
MIXTRAL = {**CONFIG, "architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2}
MANIFEST = json.loads(
    Manifest(
        model_config=CONFIG,
        files={"model.safetensors": FileEntry(bytes=10, sha256="0" * 64)},
        tensors={"a.weight": PackedEntry(spec="int4-g64", shape=(4, 64), buffers=("codes", "scales"))},
    ).to_json()
)
SAFETENSORS = save({"a": np.zeros((2, 3), np.float32), "b": np.zeros(5, np.int8)}, {"format": "np"})
HEADER = json.loads(SAFETENSORS[8 : 8 + int.from_bytes(SAFETENSORS[:8], "little")])

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from([2**31, 2**48, 2**63, 2**64, -(2**63), 10**400]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        ["../x", "/etc/passwd", "a\0b", "\ud800", "llama", "linear", "llama3", "int4", "F32", "MixtralForCausalLM"]
    ),
)
documents = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def changed(draw: st.DrawFn, original: dict[str, Any]) -> dict[str, Any]:
    """The original with one to three values replaced, removed or added somewhere."""
    document = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 3))):
        place: Any = document
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], (dict, list)) and draw(st.booleans()):
                place = place[key]
                continue
            action = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
            if action == "replace":
                place[key] = draw(documents)
            elif action == "remove":
                del place[key]
            elif isinstance(place, dict):
                place[draw(st.text(max_size=5))] = draw(documents)
            else:
                place.append(draw(documents))
            break
    return document


@st.composite
def changed_bytes(draw: st.DrawFn, original: bytes) -> bytes:
    """The original with bytes replaced, cut off or put in."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        where = draw(st.integers(0, len(data)))
        action = draw(st.sampled_from(["replace", "cut", "insert", "end"]))
        if action == "end":
            del data[where:]
        elif action == "insert":
            data[where:where] = draw(st.binary(max_size=4))
        else:
            data[where : where + draw(st.integers(1, 8))] = b"" if action == "cut" else draw(st.binary(max_size=4))
    return bytes(data)


def as_bytes(document: Any) -> bytes:
    return json.dumps(document).encode()


def survives(read: Callable[[], object]) -> None:
    """`read` ends well or with InputError, and holds little memory on the way."""
    tracemalloc.start()
    try:
        read()
    except InputError as error:
        message = str(error)
        assert message
        assert len(message) < 3000
        message.encode()
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MAX_PEAK_BYTES


def read_config(document: dict[str, Any]) -> None:
    config = ModelConfig.from_dict(document)
    if config.num_layers * (config.num_experts + 10) < 10_000:
        assert config.num_parameters > 0


@bounded
@given(data=st.one_of(st.binary(max_size=200), documents.map(as_bytes), changed_bytes(as_bytes(CONFIG))))
def test_json(data: bytes) -> None:
    survives(lambda: checked_json.parse(data, "x"))


@bounded
@given(data=st.one_of(st.binary(max_size=100), changed_bytes(SAFETENSORS)))
def test_safetensors_bytes(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(data)

    def read() -> None:
        with SafetensorsFile(path) as file:
            for name in file.names():
                assert file.tensor(name).nbytes == file.info(name).nbytes

    survives(read)


@bounded
@given(document=st.one_of(changed(HEADER), documents), data_bytes=st.sampled_from([0, 4, 29, 29, 29, 1000]))
def test_safetensors_headers(document: Any, data_bytes: int) -> None:
    survives(lambda: parse_header(as_bytes(document), data_bytes, "x"))


@bounded
@given(
    document=st.one_of(changed(CONFIG), changed(MIXTRAL), st.dictionaries(st.text(max_size=5), documents, max_size=4))
)
def test_configurations(document: dict[str, Any]) -> None:
    survives(lambda: read_config(document))


@bounded
@given(document=st.one_of(changed(MANIFEST), documents))
def test_manifests(document: Any) -> None:
    survives(lambda: Manifest.from_bytes(as_bytes(document)))


@bounded
@given(data=changed_bytes(as_bytes(MANIFEST)))
def test_manifest_bytes(data: bytes) -> None:
    survives(lambda: Manifest.from_bytes(data))


@settings(bounded, max_examples=60)
@given(document=st.one_of(changed({"metadata": {}, "weight_map": {"a": "model.safetensors", "b": "x"}}), documents))
def test_indexes(document: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(as_bytes(CONFIG))
    (tmp_path / "model.safetensors.index.json").write_bytes(as_bytes(document))
    with pytest.raises(InputError):
        Checkpoint(tmp_path)


@settings(bounded, max_examples=60)
@given(
    document=changed({"bos_token": {"content": "<s>"}, "chat_template": [{"name": "default", "template": "{{ x }}"}]})
)
def test_tokenizer_settings(document: Any, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_bytes(as_bytes(document))
    message = {"role": "user", "content": "x"}

    def read() -> None:
        try:
            ChatTemplate.from_directory(tmp_path).render([message])
        finally:
            tracemalloc.reset_peak()  # Jinja's own compiler is no reader of ours

    survives(read)


def test_a_declared_giant_allocates_nothing(tmp_path: Path) -> None:
    """Sizes that only stand in the header: 2^47 bytes of tensors in a file of a hundred bytes."""
    entry = {"dtype": "U8", "shape": [2**47], "data_offsets": [0, 2**47]}
    survives(lambda: parse_header(as_bytes({"x": entry}), 100, "x"))
    survives(lambda: read_config({**MIXTRAL, "num_hidden_layers": 2048, "num_local_experts": 4096}))
    survives(lambda: read_config({**CONFIG, "vocab_size": 2**24, "hidden_size": 2**20, "num_hidden_layers": 2048}))
    path = tmp_path / "m.safetensors"
    path.write_bytes((90_000_000).to_bytes(8, "little") + b"{")
    survives(lambda: SafetensorsFile(path))

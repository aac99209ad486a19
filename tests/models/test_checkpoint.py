"""Checkpoints, single, sharded, tied and compressed: every missing, extra, misplaced or damaged piece is named."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from memwall.errors import InputError
from memwall.formats import Packed, codec
from memwall.formats.manifest import FileEntry, Manifest, PackedEntry
from memwall.models import DEMO_DIRECTORY, Checkpoint, ModelConfig

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
Tensors = dict[str, np.ndarray]


def make(folder: Path, change: Callable[[Tensors], object] = lambda tensors: None, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    values = {**CONFIG, **config}
    rng = np.random.default_rng(0)
    specs = ModelConfig.from_dict(values).tensors()
    tensors = {spec.name: rng.standard_normal(spec.shape).astype(np.float32) for spec in specs}
    change(tensors)
    (folder / "config.json").write_text(json.dumps(values))
    save_file(tensors, folder / "model.safetensors")
    return folder


def make_sharded(folder: Path) -> Path:
    make(folder)
    with Checkpoint(folder) as checkpoint:
        tensors = {name: checkpoint.tensor(name).copy() for name in checkpoint.names()}
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for shard, members in shards.items():
        save_file({name: tensors[name] for name in members}, folder / shard)
    weight_map = {name: shard for shard, members in shards.items() for name in members}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


PACKED_NAME = "model.layers.0.mlp.up_proj.weight"


def packed_matrix() -> Packed:
    return codec("int4-g64").encode(np.random.default_rng(1).standard_normal((12, 8)).astype(np.float32))


def make_compressed(folder: Path, change: Callable[[Tensors], object] = lambda tensors: None) -> Path:
    """A folder in memwall's form: one packed tensor, the rest as floats."""

    def pack(tensors: Tensors) -> None:
        del tensors[PACKED_NAME]
        parts = {f"{PACKED_NAME}::{name}": buffer for name, buffer in packed_matrix().buffers.items()}
        tensors.update(parts)
        change(tensors)

    make(folder, pack)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    data = (folder / "model.safetensors").read_bytes()
    manifest = Manifest(
        model_config=config,
        files={"model.safetensors": FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())},
        tensors={PACKED_NAME: PackedEntry(spec="int4-g64", shape=(12, 8), buffers=("codes", "scales"))},
    )
    (folder / "memwall.json").write_text(manifest.to_json())
    return folder


def test_the_demo_model_is_tied() -> None:
    with Checkpoint(DEMO_DIRECTORY) as checkpoint:
        assert checkpoint.tensor("lm_head.weight").shape == (4096, 256)
        assert checkpoint.source_dtype("lm_head.weight") == "float16"
        assert checkpoint.stored_bytes("lm_head.weight") == 2 * 4096 * 256
        assert checkpoint.packed("lm_head.weight") is None
        checkpoint.drop("lm_head.weight")
        checkpoint.drop_all()
        checkpoint.verify(digests=True)


def test_shards_hold_the_same_tensors(tmp_path: Path) -> None:
    with Checkpoint(make(tmp_path / "one")) as one, Checkpoint(make_sharded(tmp_path / "many")) as many:
        assert one.names() == many.names()
        for name in one.names():
            np.testing.assert_array_equal(one.tensor(name), many.tensor(name))
        assert one.fingerprint() != many.fingerprint()


def test_fingerprint_follows_the_contents(tmp_path: Path) -> None:
    first = make(tmp_path / "a")
    second = make(tmp_path / "b")
    assert Checkpoint(first).fingerprint() == Checkpoint(second).fingerprint()
    data = bytearray((second / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (second / "model.safetensors").write_bytes(data)
    assert Checkpoint(first).fingerprint() != Checkpoint(second).fingerprint()


def test_missing_extra_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    cases: list[tuple[Callable[[Tensors], object], str]] = [
        (lambda t: t.pop("lm_head.weight"), r"missing tensors: 'lm_head\.weight'"),
        (lambda t: [t.pop(name) for name in list(t)[:9]], "and 6 more"),
        (lambda t: t.update(other=np.zeros(1)), "does not know: 'other'"),
        (lambda t: t.update({"model.norm.weight": np.zeros(9)}), r"model\.norm\.weight has shape \[9\]"),
        (lambda t: t.update({"model.norm.weight": np.zeros(8, np.int8)}), "stored as int8"),
    ]
    for number, (change, message) in enumerate(cases):
        folder = make(tmp_path / str(number), change)
        with pytest.raises(InputError, match=message):
            Checkpoint(folder)


def test_harmless_extras_are_ignored(tmp_path: Path) -> None:
    inv_freq = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2, np.float32)}
    Checkpoint(make(tmp_path / "a", lambda t: t.update(inv_freq))).close()
    copy = {"lm_head.weight": np.zeros((16, 8), np.float32)}
    Checkpoint(make(tmp_path / "b", lambda t: t.update(copy), tie_word_embeddings=True)).close()


def test_missing_and_truncated_files_are_named(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    data = (folder / "model.safetensors").read_bytes()
    for size in (0, 5, 40, len(data) // 2, len(data) - 1):
        (folder / "model.safetensors").write_bytes(data[:size])
        with pytest.raises(InputError, match=r"model\.safetensors"):
            Checkpoint(folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"no model\.safetensors .*save it as safetensors"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"model.norm.weight": "../a.safetensors"}, "plain file name"),
        ({"model.norm.weight": "/etc/passwd"}, "plain file name"),
        ({"model.norm.weight": 3}, "plain file name"),
        ({"model.norm.weight": "c.safetensors"}, "missing"),
        ({"nothing": "a.safetensors"}, "not there"),
        ([], "weight_map must be an object"),
    ],
)
def test_a_bad_index_is_refused(tmp_path: Path, weight_map: object, message: str) -> None:
    folder = make_sharded(tmp_path / "a")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match=message):
        Checkpoint(folder)


def test_one_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = make_sharded(tmp_path / "a")
    shutil.copy(folder / "a.safetensors", folder / "c.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "c.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="is also in"):
        Checkpoint(folder)


def test_a_compressed_folder_gives_packed_tensors(tmp_path: Path) -> None:
    with Checkpoint(make_compressed(tmp_path / "a")) as checkpoint:
        packed, expected = checkpoint.packed(PACKED_NAME), packed_matrix()
        assert packed is not None
        assert (packed.spec, packed.shape) == ("int4-g64", (12, 8))
        for name, buffer in expected.buffers.items():
            np.testing.assert_array_equal(packed.buffers[name], buffer)
        assert checkpoint.stored_bytes(PACKED_NAME) == expected.nbytes
        assert checkpoint.packed("model.norm.weight") is None
        assert checkpoint.source_dtype(PACKED_NAME) == "int4-g64"
        with pytest.raises(InputError, match="stored packed"):
            checkpoint.tensor(PACKED_NAME)
        checkpoint.drop(PACKED_NAME)
        calls: list[tuple[str, int, int]] = []
        checkpoint.verify(digests=True, progress=lambda *call: calls.append(call))
        assert calls[-1][1] == calls[-1][2] == checkpoint.nbytes


def test_packed_buffers_that_no_kernel_could_use_are_refused(tmp_path: Path) -> None:
    codes, scales = f"{PACKED_NAME}::codes", f"{PACKED_NAME}::scales"
    wrong_shape = make_compressed(tmp_path / "a", lambda t: t.update({codes: t[codes].reshape(-1)}))
    with pytest.raises(InputError, match=r"::codes is U8 \[512\]; int4-g64 needs uint8"):
        Checkpoint(wrong_shape)
    wrong_dtype = make_compressed(tmp_path / "b", lambda t: t.update({scales: t[scales].astype(np.float32)}))
    with pytest.raises(InputError, match=r"::scales is F32 .* needs float16"):
        Checkpoint(wrong_dtype)
    document = json.loads((wrong_dtype / "memwall.json").read_text())
    document["tensors"][PACKED_NAME]["spec"] = "int4-g64-asym"
    (wrong_dtype / "memwall.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match="other buffers than its form int4-g64-asym"):
        Checkpoint(wrong_dtype)
    document["tensors"][PACKED_NAME]["spec"] = "int99"
    (wrong_dtype / "memwall.json").write_text(json.dumps(document))
    with pytest.raises(InputError):
        Checkpoint(wrong_dtype)


def test_damage_to_a_compressed_folder_is_named(tmp_path: Path) -> None:
    folder = make_compressed(tmp_path / "a")
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(InputError, match=r"model\.safetensors: truncated"):
        Checkpoint(folder)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with (
        Checkpoint(folder) as checkpoint,
        pytest.raises(InputError, match=r"model\.safetensors: altered or damaged"),
    ):
        checkpoint.verify(digests=True)
    path.unlink()
    with pytest.raises(InputError, match="but missing"):
        Checkpoint(folder)


def test_a_manifest_that_lacks_a_buffer_or_knows_too_much_is_refused(tmp_path: Path) -> None:
    folder = make_compressed(tmp_path / "a")
    document = json.loads((folder / "memwall.json").read_text())
    entry = document["tensors"][PACKED_NAME]
    entry["buffers"] = ["codes", "scales", "mins"]
    (folder / "memwall.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"missing tensors: .*::mins"):
        Checkpoint(folder)
    entry["buffers"] = ["codes", "scales"]
    document["tensors"]["ghost"] = {**entry, "shape": [1]}
    (folder / "memwall.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match="does not know: 'ghost'"):
        Checkpoint(folder)


def test_files_that_passed_are_not_hashed_again_and_changed_ones_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = make_compressed(tmp_path / "model")
    hashed: list[str] = []
    with Checkpoint(folder) as checkpoint:
        checkpoint.verify_once(lambda name, done, total: hashed.append(name))
        first = len(hashed)
        checkpoint.verify_once(lambda name, done, total: hashed.append(name))
    assert first == len(hashed) > 0
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with Checkpoint(folder) as checkpoint, pytest.raises(InputError, match=r"model\.safetensors: altered"):
        checkpoint.verify_once()

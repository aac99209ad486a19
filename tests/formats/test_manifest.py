"""The manifest of a compressed model: what is written reads back; what is wrong is refused by field."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from memwall.errors import InputError
from memwall.formats.manifest import FileEntry, Manifest, PackedEntry, buffer_tensor_name

GOOD = Manifest(
    model_config={"model_type": "llama"},
    files={"model.safetensors": FileEntry(bytes=10, sha256="0" * 64)},
    tensors={"a.weight": PackedEntry(spec="int4-g64", shape=(4, 64), buffers=("codes", "scales"))},
    info={"method": "gptq"},
)


def test_round_trip(tmp_path: Path) -> None:
    (tmp_path / "memwall.json").write_text(GOOD.to_json())
    assert Manifest.load(tmp_path) == GOOD
    assert Manifest.from_bytes(GOOD.to_json().encode()) == GOOD
    assert buffer_tensor_name("a.weight", "codes") == "a.weight::codes"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "not a memwall manifest"),
        ({"version": 2}, "update memwall"),
        ({"version": None}, "version must be"),
        ({"tensor": {}}, "did you mean tensors"),
        ({"files": {"../x": {"bytes": 1, "sha256": "0" * 64}}}, "plain file name"),
        ({"files": {"x": {"bytes": -1, "sha256": "0" * 64}}}, "bytes must be"),
        ({"files": {"x": {"bytes": 1, "sha256": "xyz"}}}, "sha256 must be"),
        ({"files": {"x": 3}}, "expected an object"),
        ({"tensors": {"x": {"spec": "int4", "shape": [2**60], "buffers": ["a"]}}}, "shape must be"),
        ({"tensors": {"x": {"spec": "../../x", "shape": [2], "buffers": ["a"]}}}, "spec must be"),
        ({"tensors": {"x": {"spec": "int4", "shape": [2], "buffers": []}}}, "buffers must be"),
        ({"tensors": {"x": {"spec": "int4", "shape": [2], "buffers": ["a", "a"]}}}, "buffers must be"),
        ({"tensors": {"x": {"spec": "int4", "shape": [2], "buffers": [3]}}}, "buffers must be"),
        ({"model_config": []}, "model_config must be"),
    ],
)
def test_faults_are_refused_by_field(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Manifest.from_dict({**json.loads(GOOD.to_json()), **change})

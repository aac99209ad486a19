"""Models in the forms of others become ours, number by number."""

from __future__ import annotations

import json
import random
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from memwall.cli import app
from memwall.compress.convert import convert
from memwall.engine import Settings, load
from memwall.errors import InputError
from memwall.formats import codec
from memwall.formats.gguf_file import GgufFields, GgufFile
from memwall.models import DEMO_DIRECTORY, ModelConfig
from memwall.models.checkpoint import Checkpoint, stored_tensors
from memwall.models.fused import joined
from memwall.models.gguf import _sentence_pieces
from memwall.models.tokenizer import Tokenizer
from tests.compress.foreign import float_tensors, write_gguf, write_quantized
from tests.models.families import make_family

TEXT = (
    "The history of the city begins with 1,234 stones: caf\u00e9, na\u00efve \u65e5\u672c!\n\n  def f(x):\n    return x"
)


def logits(folder: Path, weights: str = "saved", ids: list[int] | None = None) -> np.ndarray:
    session = load(folder, Settings(weights=weights, exact=True))
    return np.array(session.prefill(ids or [5, 6, 7, 8, 9]))


def gpt2_cut(folder: Path, out: Path) -> Tokenizer:
    """The folder's tokenizer, but that it cuts texts as GPT-2 does, which is what the GGUF file says."""
    shutil.copytree(folder, out)
    document = json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))
    document["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    (out / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    return Tokenizer.from_directory(out)


def decoded(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    with Checkpoint(folder) as checkpoint:
        for name in checkpoint.names():
            packed = checkpoint.packed(name)
            found[name] = (
                np.array(checkpoint.tensor(name), np.float32) if packed is None else codec(packed.spec).decode(packed)
            )
    return found


class TestGguf:
    @pytest.fixture(autouse=True)
    def _needs_gguf(self) -> None:
        pytest.importorskip("gguf", reason="needs the gguf package")

    @pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0", "Q5_1"])
    def test_the_demo_model(self, tmp_path: Path, kind: str) -> None:
        import gguf
        from gguf.quants import dequantize, quantize

        source = write_gguf(DEMO_DIRECTORY, tmp_path / "demo.gguf", kind)
        report = convert(source, tmp_path / "out")
        assert report.rounded_weights == 0
        theirs = gguf.GGMLQuantizationType[kind]
        found, floats = decoded(tmp_path / "out"), float_tensors(DEMO_DIRECTORY)
        for name, values in floats.items():
            coded = values.ndim > 1 and kind != "F32"
            wanted = dequantize(quantize(values, theirs), theirs) if coded else values
            np.testing.assert_array_equal(found[name], wanted, err_msg=name)
        old, new = gpt2_cut(DEMO_DIRECTORY, tmp_path / "tokenizer"), Tokenizer.from_directory(tmp_path / "out")
        assert new.encode(TEXT) == old.encode(TEXT)
        assert new.decode(new.encode(TEXT)) == old.decode(old.encode(TEXT))
        if kind == "F32":
            np.testing.assert_array_equal(logits(tmp_path / "out"), logits(DEMO_DIRECTORY, "float32"))

    @pytest.mark.parametrize("family", ["llama", "llama-tied", "llama-linear", "mistral", "qwen2", "qwen3", "mixtral"])
    def test_families(self, tmp_path: Path, family: str) -> None:
        folder = make_family(family, tmp_path)
        convert(write_gguf(folder, tmp_path / "m.gguf", "F32"), tmp_path / "out")
        np.testing.assert_array_equal(logits(tmp_path / "out"), logits(folder, "float32"))

    def test_bad_input(self, tmp_path: Path) -> None:
        source = write_gguf(DEMO_DIRECTORY, tmp_path / "demo.gguf", "Q8_0")
        (tmp_path / "cut.gguf").write_bytes(source.read_bytes()[:-1000])
        strange = write_gguf(DEMO_DIRECTORY, tmp_path / "strange.gguf", "Q8_0", tokenizer__ggml__pre="klingon")
        run = CliRunner().invoke
        for wrong, message in (
            (tmp_path / "cut.gguf", "truncated"),
            (tmp_path / "none.gguf", "none.gguf: cannot be read"),
            (tmp_path / "nowhere", "nowhere: there is no such file or folder"),
            (DEMO_DIRECTORY, "not quantized: use memwall compress"),
            (strange, "--tokenizer FOLDER"),
        ):
            result = run(app, ["convert", str(wrong), str(tmp_path / "out")])
            assert result.exit_code == 2, result.output
            assert message in result.stderr
            assert not (tmp_path / "out").exists()
        good = ["convert", str(strange), str(tmp_path / "out"), "--tokenizer", str(DEMO_DIRECTORY), "--json"]
        result = run(app, good)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["rounded_weights"] == 0
        again = run(app, good)
        assert again.exit_code == 2
        assert "exists already" in again.stderr
        hint = run(app, ["run", str(source), "hello"])
        assert hint.exit_code == 2
        assert "memwall convert" in hint.stderr


@pytest.mark.parametrize(
    ("method", "bits", "group", "how"),
    [
        ("gptq", 4, 64, {}),
        ("gptq", 3, 64, {}),
        ("gptq", 2, 32, {"v2": True}),
        ("gptq", 8, -1, {"symmetric": True}),
        ("gptq", 4, 32, {"symmetric": True}),
        ("gptq", 4, 64, {"shuffled": True}),
        ("gptq", 3, 32, {"shuffled": True, "symmetric": True}),
        ("gptq", 2, 64, {"shuffled": True, "v2": True}),
        ("awq", 4, 64, {}),
        ("awq", 4, 32, {"symmetric": True}),
    ],
)
def test_folders_of_gptq_and_awq(tmp_path: Path, method: str, bits: int, group: int, how: dict[str, Any]) -> None:
    wanted = write_quantized(DEMO_DIRECTORY, tmp_path / "model", method, bits, group, **how)
    report = convert(tmp_path / "model", tmp_path / "out")
    bound = 0.0 if how.get("symmetric") else 2**-10
    assert report.rounded_weights == 0
    ordered = sum(spec.startswith("ordered-") for spec in report.specs.values())
    assert ordered == (sum(name.endswith("_proj.weight") for name in wanted) if how.get("shuffled") else 0)
    for name, found in decoded(tmp_path / "out").items():
        scale = np.abs(wanted[name]).max()
        assert np.abs(found - wanted[name]).max() <= bound * scale, name
    assert np.isfinite(logits(tmp_path / "out")).all()


@pytest.mark.parametrize("how", [{"symmetric": True}, {"shuffled": True}, {}])
@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("family", ["falcon-tied", "falcon-heads", "falcon-groups"])
def test_matrices_that_files_hold_as_one(family: str, method: str, how: dict[str, Any], tmp_path: Path) -> None:
    """Rows of Falcon's queries, keys and values are dealt out with their scales and zero points."""
    if method == "awq" and how.get("shuffled"):
        return
    folder = make_family(family, tmp_path)
    wanted = write_quantized(folder, tmp_path / "model", method, 4, 32, **how)
    assert convert(tmp_path / "model", tmp_path / "out").rounded_weights == 0
    found, bound = decoded(tmp_path / "out"), 0.0 if how.get("symmetric") else 2**-10
    for each in stored_tensors(ModelConfig.from_directory(folder)):
        whole = joined(each, {name: found[name] for name in each.parts})
        assert np.abs(whole - wanted[each.name]).max() <= bound * np.abs(wanted[each.name]).max(), each.name
    assert np.isfinite(logits(tmp_path / "out")).all()


def test_groups_of_other_sizes_are_rounded_anew(tmp_path: Path) -> None:
    """No writer is known that makes them; what `g_idx` says is followed, and what it cannot say is refused."""
    write_quantized(DEMO_DIRECTORY, tmp_path / "model", "gptq", 4, 64, shuffled=True)
    path = tmp_path / "model" / "model.safetensors"
    stored = load_file(path)
    name = next(name for name in stored if name.endswith("q_proj.g_idx"))
    groups = stored[name]
    groups[np.flatnonzero(groups == 0)[0]] = 1
    save_file(stored, path)
    report = convert(tmp_path / "model", tmp_path / "out")
    weight = name.replace("g_idx", "weight")
    assert report.specs[weight] == "int8-g32"
    with Checkpoint(tmp_path / "out") as checkpoint:
        assert report.rounded_weights == np.prod(checkpoint.packed(weight).shape)
    for wrong, message in ((groups + 1, "outside of 0 to"), (groups[:-1], "g_idx has shape")):
        save_file({**stored, name: wrong}, path)
        with pytest.raises(InputError, match=message):
            convert(tmp_path / "model", tmp_path / "again")


@pytest.mark.parametrize("group", [64, -1])
def test_folders_of_marlin(tmp_path: Path, group: int) -> None:
    """Codes in the order of tensor cores carry over, number for number."""
    wanted = write_quantized(DEMO_DIRECTORY, tmp_path / "model", "marlin", 4, group, symmetric=True)
    path = tmp_path / "model" / "config.json"
    assert convert(tmp_path / "model", tmp_path / "out").rounded_weights == 0
    for name, found in decoded(tmp_path / "out").items():
        np.testing.assert_array_equal(found, wanted[name])
    assert np.isfinite(logits(tmp_path / "out")).all()
    config = json.loads(path.read_text())
    config["quantization_config"] |= {"quant_method": "gptq", "checkpoint_format": "marlin"}
    path.write_text(json.dumps(config))
    convert(tmp_path / "model", tmp_path / "again")
    for name, found in decoded(tmp_path / "again").items():
        np.testing.assert_array_equal(found, wanted[name])
    config["quantization_config"] |= {"group_size": 32}
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match="s has shape"):
        convert(tmp_path / "model", tmp_path / "other")


def test_quantized_folders_that_are_not_read(tmp_path: Path) -> None:
    write_quantized(DEMO_DIRECTORY, tmp_path / "model", "awq", 4, 64)
    path = tmp_path / "model" / "config.json"
    good = json.loads(path.read_text())
    for change, message in (
        ({"quant_method": "bitsandbytes"}, "quant_method"),
        ({"version": "gemv"}, "packing"),
        ({"bits": 3}, "3 bits"),
        ({"group_size": 24}, "groups of 24"),
        ({"group_size": 32}, "has shape"),
    ):
        changed = {**good, "quantization_config": {**good["quantization_config"], **change}}
        path.write_text(json.dumps(changed))
        with pytest.raises(InputError, match=message):
            convert(tmp_path / "model", tmp_path / "out")
    path.write_text(json.dumps(good))
    result = CliRunner().invoke(app, ["run", str(tmp_path / "model"), "hello"])
    assert result.exit_code == 2
    assert "memwall convert" in result.stderr


def pieces_by_score(word: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's merging: the neighbours whose union scores best, first ones first, until none is a token."""
    parts = list(word)
    while True:
        best = max(((scores[a + b], -i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in scores), default=None)
        if best is None:
            return parts
        at = -best[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def test_sentence_pieces_are_merged_by_score() -> None:
    import tokenizers

    draw = random.Random(1)
    letters = ["\u2581", *"abcde"]
    tokens = ["<unk>", "<s>", *letters]
    while len(tokens) < 60:
        made = draw.choice(tokens[2:]) + draw.choice(tokens[2:])
        if made not in tokens and "\u2581" not in made[1:] and len(made) < 7:
            tokens.append(made)
    scores = [0.0, 0.0, *(-float(i) for i in range(len(tokens) - 2))]
    metadata = {"general.architecture": "llama", "tokenizer.ggml.unknown_token_id": 0}
    document = _sentence_pieces(GgufFields(metadata, "m"), tokens, [2, 3, *[1] * (len(tokens) - 2)], scores)
    found = tokenizers.Tokenizer.from_str(json.dumps({**document, "added_tokens": []}))
    ranks = dict(zip(tokens, scores))
    for _ in range(200):
        words = ["".join(draw.choices("abcde", k=draw.randrange(1, 9))) for _ in range(draw.randrange(1, 4))]
        wanted = pieces_by_score("\u2581" + "\u2581".join(words), ranks)
        assert found.encode(" ".join(words)).tokens == wanted
        assert found.decode(found.encode(" ".join(words)).ids) == " ".join(words)


def test_llama3_scaling_is_found_again(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="needs the gguf package")
    from memwall.models.config import RopeConfig
    from memwall.models.gguf import ROPE_FREQUENCIES, _llama3_scaling
    from memwall.models.rope import inverse_frequencies

    scaled = RopeConfig(type="llama3", theta=500000.0, factor=32.0, original_max_position=8192)
    plain = RopeConfig(theta=500000.0)
    divisors = inverse_frequencies(plain, 64) / inverse_frequencies(scaled, 64)
    for values, good in ((divisors, True), (divisors + 0.5, False)):
        path = tmp_path / f"{good}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_tensor(ROPE_FREQUENCIES, values.astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with GgufFile(path) as file:
            if good:
                assert _llama3_scaling(file, {"rope_theta": 500000.0, "head_dim": 64})["factor"] == 32.0
            else:
                with pytest.raises(InputError, match="no scaling of Llama 3's kind"):
                    _llama3_scaling(file, {"rope_theta": 500000.0, "head_dim": 64})


def test_an_unfinished_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_quantized(DEMO_DIRECTORY, tmp_path / "model", "awq", 4, 64)

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "model", tmp_path / "out", progress=stop)
    assert not (tmp_path / "out").exists()
    convert(tmp_path / "model", tmp_path / "out")
    convert(tmp_path / "model", tmp_path / "whole")
    for name, values in decoded(tmp_path / "whole").items():
        np.testing.assert_array_equal(values, decoded(tmp_path / "out")[name])
    assert ModelConfig.from_directory(tmp_path / "out").num_layers == 8

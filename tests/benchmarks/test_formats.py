"""The formats benchmark: models drawn in their packed form load and run, and results are judged and kept in parts."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from memwall.engine import Settings, load
from memwall.formats import codec
from memwall.models.precision import bits_of

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def formats():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("formats_benchmark", BENCHMARKS / "formats.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["formats_benchmark"] = module
        spec.loader.exec_module(module)
        import drawn_models
        import product_contenders
        import random_models

        module.drawn_models, module.product_contenders, module.random_models = (
            drawn_models, product_contenders, random_models,
        )  # fmt: skip
        yield module
    finally:
        sys.path.remove(str(BENCHMARKS))


def shape(formats):
    return formats.random_models.Shape(
        name="small", num_layers=2, hidden=256, num_heads=4, num_kv_heads=2, intermediate=512, vocab=320
    )


@pytest.mark.parametrize("form", ["int3", "nf4-dq", "mxfp6", "binary2", "bfloat16"])
def test_drawn_models_load_and_run(formats, tmp_path, form):
    folder = formats.drawn_models.draw_directory(shape(formats), tmp_path / form, form)
    weights = "saved" if (folder / "memwall.json").exists() else form
    session = load(folder, Settings(weights=weights))
    try:
        logits = session.prefill([5, 6, 7])
        assert np.isfinite(logits).all()
        assert logits.std() > 0
        specs = session.decoder.weights.specs
        assert specs["model.layers.1.mlp.up_proj.weight"] == codec(form).spec
        assert bits_of(session.config, specs) <= 16
    finally:
        session.release()


def test_a_drawn_matrix_repeats_what_was_encoded(formats):
    packed = formats.drawn_models.draw_matrix("int4-g64", (48, 256))
    values = codec("int4-g64").decode(packed)
    expected = formats.drawn_models.drawn(8192, 256, 0)[:48]
    assert np.abs(values - expected).max() < 0.2 * np.abs(expected).max()


def test_files_of_llama_cpp_have_the_size_of_their_type(formats, tmp_path):
    pytest.importorskip("gguf")
    small = shape(formats)
    for kind in ("Q3_K", "Q4_0", "TQ2_0"):
        path = tmp_path / f"{kind}.gguf"
        bits = formats.drawn_models.draw_gguf(small, path, kind)
        assert abs(path.stat().st_size - bits * small.num_matrix_weights / 8) < 40_000
    assert formats.drawn_models.gguf_kinds(small, "TQ2_0")["model.embed_tokens.weight"] == "Q4_K"


def test_every_part_names_contenders_that_exist(formats):
    import decode_contenders

    for part in formats.PARTS:
        for name in formats.contenders(part):
            assert decode_contenders.make_contender(name) is not None
    for library in formats.LIBRARIES:
        engine, _, form = library.partition(":")
        assert form in formats.product_contenders.TORCH_FORMATS[engine]


def test_what_is_wanted_is_judged_from_what_was_measured(formats):
    assert formats.wanted({}) == []
    rates = {"int2": 9.0, "int3": 8, "int4": 7, "int5": 6, "int6": 5, "int7": 4, "int8": 3}
    widths = {"summary": {f"memwall:{width}": {"steps_per_s": rate} for width, rate in rates.items()}}
    int4 = {"summary": {"memwall:int4": {}, "llama.cpp:Q4_0": {"ratio": 0.9}}}
    rows = formats.wanted({"widths": widths, "int4": int4})
    assert [row["passed"] for row in rows] == [True, False]
    widths["summary"]["memwall:int5"]["steps_per_s"] = 7.5
    assert not formats.wanted({"widths": widths})[0]["passed"]


def test_parts_are_merged_and_other_machines_refused(formats, tmp_path):
    path, arguments = tmp_path / "found.json", formats.parse(["--work", str(tmp_path), "--model", "tiny"])
    found = formats.stored(path, arguments)
    contender = {"weight_bits": 4.25, "about": {}}
    summary = {"steps_per_s": 100.0, "step_bytes": 1e6, "bandwidth_fraction": 0.5}
    part = {"contenders": {"memwall:int4": contender}, "summary": {"memwall:int4": summary}, "others_share": 0.25}
    found["measured"]["int4"] = part
    formats.write(path, found)
    assert formats.stored(path, arguments)["measured"].keys() == {"int4"}
    text = path.with_suffix(".md").read_text()
    assert "| `int4` | memwall:int4 | 4.25 |" in text
    assert "up to 25% of the processors" in text
    path.write_text(json.dumps(found | {"threads": 64}))
    with pytest.raises(SystemExit, match="another machine"):
        formats.stored(path, arguments)

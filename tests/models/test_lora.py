"""Adapters in PEFT's form: what is read, how it is scaled, and what is refused with which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwall.errors import InputError
from memwall.kernels.lora import TARGETS, LoraBatch, LoraRoom, PagedLora
from memwall.models import DEMO_DIRECTORY, ModelConfig
from memwall.models.lora import LoraWeights, target_shapes, tensor_name, write_lora
from tests.models.loras import ATTENTION, make_lora

CONFIG = ModelConfig.from_directory(DEMO_DIRECTORY)
ROOM = LoraRoom(num_layers=CONFIG.num_layers, unit_bytes=2 * CONFIG.kv_size, units_per_block=32)


def test_rows_take_units_of_the_width_of_keys(tmp_path: Path) -> None:
    read = LoraWeights.read(make_lora(tmp_path, CONFIG, rank=8), CONFIG)
    assert read.targets == ATTENTION
    assert read.form == "float16"
    paged = read.paged(ROOM)
    # inputs and outputs of 256 take two units of 128, keys and values one: q 4, k 3, v 3, o 4 for each of the rank
    assert paged.units == 8 * (4 + 3 + 3 + 4)
    assert paged.num_pages == -(-paged.units // 32)


def test_equal_widths_take_four_slots_a_rank() -> None:
    wide = ModelConfig.from_dict({**CONFIG.source, "num_key_value_heads": CONFIG.num_heads})
    room = LoraRoom(num_layers=8, unit_bytes=2 * wide.kv_size, units_per_block=32)
    shapes = {name: (12, *target_shapes(wide)[name]) for name in ATTENTION}
    paged = PagedLora(room, "float16", 1.0, shapes)
    assert paged.units == 2 * 4 * 12  # a slot of a page is two units: one beside the keys, one beside the values
    assert paged.num_pages * 16 == 4 * 12


@pytest.mark.parametrize(("rslora", "scale"), [(False, 32 / 16), (True, 32 / 4)])
def test_scale(tmp_path: Path, rslora: bool, scale: float) -> None:
    made = make_lora(tmp_path, CONFIG, rank=16, lora_alpha=32, use_rslora=rslora)
    assert LoraWeights.read(made, CONFIG).scale == scale


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("exact", [False, True])
def test_fetched_rows_give_the_factors_products(tmp_path: Path, dtype: Any, exact: bool) -> None:
    made = make_lora(tmp_path, CONFIG, rank=5, targets=TARGETS, dtype=dtype, layers=range(1, 4), lora_alpha=10)
    read = LoraWeights.read(made, CONFIG)
    paged = read.paged(ROOM, exact=exact)
    pool = np.full((paged.num_pages + 3, ROOM.page_bytes), 0xFF, np.uint8)
    paged.place(np.random.default_rng(0).permutation(len(pool))[: paged.num_pages].tolist())
    assert read.fetch(paged, pool) == read.nbytes
    batch = LoraBatch(ROOM, np.empty((2, 15), np.float32))
    batch.assign(pool, [(0, 2, paged)])
    draw = np.random.default_rng(1)
    for layer in (0, 1, 3):
        for place, name in enumerate(TARGETS):
            inputs, outputs = target_shapes(CONFIG)[name]
            x, out = draw.standard_normal((2, inputs)).astype(np.float32), np.zeros((2, outputs), np.float32)
            batch.add(layer, 0, x, [place], [out])
            factors = read.factors(layer, name)
            if layer == 0:
                assert factors is None
                assert not out.any()
                continue
            assert factors is not None
            if dtype is np.float32 and not exact:
                factors = factors[0].astype(np.float16), factors[1].astype(np.float16)
            a, b = (part.astype(np.float64) for part in factors)
            assert np.abs(out - 2.0 * (x @ a.T) @ b.T).max() < 1e-4


REFUSED = [
    ({"use_qalora": True}, "use_qalora is set"),
    ({"bias": "all"}, "bias must be one of none"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save is set"),
    ({"rank_pattern": {"q_proj": 4}}, "rank_pattern is set"),
    ({"peft_type": "IA3"}, "peft_type must be one of LORA"),
    ({"r": 0}, "r must be a whole number from 1"),
    ({"init_lora_weights": "pissa_niter_4"}, "changes the base's weights"),
    ({"r": 4}, r"rank 4 needs \[4, 256\]"),
]


@pytest.mark.parametrize(("fields", "words"), REFUSED)
def test_refused_configurations(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        LoraWeights.read(make_lora(tmp_path, CONFIG, rank=8, **fields), CONFIG)


def test_another_base_is_named(tmp_path: Path) -> None:
    other = ModelConfig.from_dict({**CONFIG.source, "hidden_size": 512, "num_attention_heads": 16})
    with pytest.raises(InputError, match=r"made for another base \('demo'\)"):
        LoraWeights.read(make_lora(tmp_path / "wide", other), CONFIG)
    deep = ModelConfig.from_dict({**CONFIG.source, "num_hidden_layers": 9})
    with pytest.raises(InputError, match="changes layer 8, but the model has 8 layers"):
        LoraWeights.read(make_lora(tmp_path / "deep", deep), CONFIG)


def test_refused_tensors(tmp_path: Path) -> None:
    made = make_lora(tmp_path, CONFIG)
    first = tensor_name(0, "q_proj", "A")
    a, b = np.zeros((8, 256), np.float16), np.zeros((256, 8), np.float16)
    cases = [
        ({"base_model.model.lm_head.lora_A.weight": a}, "not 'lm_head'"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": a}, "embed_tokens"),
        ({first: a}, "lora_A of q_proj without its other half"),
        (
            {tensor_name(0, "q_proj", "A"): a, tensor_name(0, "q_proj", "B"): b.astype(np.float32)},
            "several number formats",
        ),
        ({tensor_name(0, "q_proj", "A"): a.astype(np.int8), tensor_name(0, "q_proj", "B"): b}, "is I8; known are F32"),
        ({}, "holds no tensor"),
    ]
    for tensors, words in cases:
        write_lora(made, tensors, rank=8, alpha=8, base="demo")
        with pytest.raises(InputError, match=words):
            LoraWeights.read(made, CONFIG)


def test_missing_files_and_pickles(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        LoraWeights.read(tmp_path / "none", CONFIG)
    with pytest.raises(InputError, match=r"no adapter_config\.json"):
        LoraWeights.read(tmp_path, CONFIG)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 8}))
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(InputError, match="is a pickle, which is never read"):
        LoraWeights.read(tmp_path, CONFIG)


def test_a_file_that_changed_is_refused(tmp_path: Path) -> None:
    read = LoraWeights.read(make_lora(tmp_path, CONFIG), CONFIG)
    make_lora(tmp_path, CONFIG, seed=1)
    paged = read.paged(ROOM)
    paged.place(range(paged.num_pages))
    with pytest.raises(InputError, match="changed since it was read"):
        read.fetch(paged, np.zeros((paged.num_pages, ROOM.page_bytes), np.uint8))


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3),
)


@settings(max_examples=150, deadline=None)
@given(
    fields=st.dictionaries(
        st.sampled_from(["r", "lora_alpha", "bias", "use_rslora", "peft_type", "init_lora_weights", "use_dora", "x"]),
        ANY,
    )
)
def test_any_configuration_is_an_adapter_or_a_named_error(
    fields: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "any"
    if not folder.exists():
        make_lora(folder, CONFIG, layers=range(1))
    told = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, **fields}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    try:
        read = LoraWeights.read(folder, CONFIG)
    except InputError as error:
        message = str(error)
    else:
        assert read.rank == 8
        return
    assert str(folder) in message


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_damage_to_the_file_is_found_or_harmless(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged"
    whole = make_lora(folder, CONFIG, layers=range(1)) / "adapter_model.safetensors"
    raw = bytearray(whole.read_bytes())
    raw[data.draw(st.integers(0, 1500))] = data.draw(st.integers(0, 255))
    whole.write_bytes(bytes(raw[: data.draw(st.sampled_from([len(raw), len(raw) - 1, 700, 8, 0]))]))
    try:
        read = LoraWeights.read(folder, CONFIG)
    except InputError:
        return
    paged = read.paged(ROOM)
    paged.place(range(paged.num_pages))
    assert read.fetch(paged, np.zeros((paged.num_pages, ROOM.page_bytes), np.uint8)) == read.nbytes

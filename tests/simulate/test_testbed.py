"""Plans carried out by two processes make the tokens that one engine makes."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import pytest

from memwall.engine.arrivals import Load
from memwall.engine.serving import LoraSettings, ServingSettings, load_engine
from memwall.formats.safetensors_file import SafetensorsWriter
from memwall.models.config import ModelConfig
from memwall.models.lora import LoraWeights, target_shapes
from memwall.simulate.parts import Kind, cut_model, serve_loads
from memwall.simulate.testbed import Setting, TwoProcesses
from tests.models.loras import ATTENTION, make_lora

SETTINGS = ServingSettings(
    weights="float32", context_tokens=128, token_budget=32, max_sequences=4, keep_prefixes=False, swap_bytes=0,
    exact=True, threads=1,
)  # fmt: skip
LOADS = [Load(at=0.0, prompt_tokens=20 + 9 * i, output_tokens=6) for i in range(4)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    told = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 64,
        "intermediate_size": 96, "num_hidden_layers": 4, "vocab_size": 300, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True, "dtype": "float16", "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(told))
    config, draw = ModelConfig.from_directory(folder), np.random.default_rng(0)
    rows = [(tensor.name, np.float16, tensor.shape) for tensor in config.tensors()]
    with SafetensorsWriter(folder / "model.safetensors", rows) as writer:
        for tensor in config.tensors():
            values = draw.standard_normal(tensor.shape) / np.sqrt(tensor.shape[-1])
            writer.write(tensor.name, (np.ones(tensor.shape) if len(tensor.shape) == 1 else values).astype(np.float16))
    return folder


def alone(model: Path, loads: list[Load], adapters: tuple[Path, ...] = ()) -> list[tuple[int, ...]]:
    lora = LoraSettings(most_rank=16, exact=True) if adapters else None
    serving = load_engine(model, dataclasses.replace(SETTINGS, lora=lora))
    try:
        keys = [serving.add_adapter(path.name, LoraWeights.read(path, serving.config)) for path in adapters]
        served = serve_loads(
            serving.engine, loads, time.time(), serving.config.vocab_size, adapters=[*keys, None]
        )  # fmt: skip
    finally:
        serving.release()
    return [one.made for one in served]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["data", "tensor", "pipeline"])
def test_a_cut_model_makes_the_tokens_of_the_whole(model: Path, kind: Kind, tmp_path: Path) -> None:
    folders = (model, model) if kind == "data" else tuple(
        cut_model(model, tmp_path / str(rank), kind, rank) for rank in range(2)
    )  # fmt: skip
    setting = Setting(kind=kind, folders=folders, settings=SETTINGS, num_pages=64, wire=tmp_path / "wire")  # type: ignore[arg-type]
    with TwoProcesses(setting) as testbed:
        served = testbed.serve(LOADS)
        again = testbed.serve(LOADS)
    # each scheduler draws the prompts of its own loads from one seed
    parts = [LOADS] if kind == "tensor" else [LOADS[0::2], LOADS[1::2]]
    expected = sorted(made for part in parts for made in alone(model, part))
    assert sorted(one.made for one in served) == expected
    assert sorted(one.made for one in again) == expected
    assert all(one.tokens == 6 for one in served)


@pytest.mark.slow
def test_adapters_in_halves_make_the_tokens_of_whole_ones(model: Path, tmp_path: Path) -> None:
    config = ModelConfig.from_directory(model)
    ranks = {"attention": 8, "odd": 5, "everywhere": 4}
    adapters = tuple(
        make_lora(
            tmp_path / name, config, rank=rank, seed=rank, dtype=np.float32, strength=2.0,
            targets=ATTENTION if name != "everywhere" else tuple(target_shapes(config)),
        )
        for name, rank in ranks.items()
    )  # fmt: skip
    folders = (cut_model(model, tmp_path / "0", "tensor", 0), cut_model(model, tmp_path / "1", "tensor", 1))
    setting = Setting(
        kind="tensor", folders=folders, settings=SETTINGS, num_pages=64, wire=tmp_path / "wire", whole=model,
        adapters=adapters,
    )  # fmt: skip
    loads = [Load(at=0.0, prompt_tokens=11 + 9 * i, output_tokens=6) for i in range(8)]
    with TwoProcesses(setting) as testbed:
        served = testbed.serve(loads)
        told = testbed.lora_numbers()
    assert [one.made for one in served] == alone(model, loads, adapters)
    assert [one.made for one in served] != alone(model, loads)
    # each token passes once, the last one made not at all; ranks are filled up to even ones
    tokens = [load.prompt_tokens + load.output_tokens - 1 for load in loads]
    even, per_token = (
        [8, 6, 4],
        [5 / 2, 5 / 2, (5 + 4) / 2],
    )  # gathers of q, k, v, gate, up: a half; sums of o, down: all
    each = sum(count * even[at % 4] * per_token[at % 4] for at, count in enumerate(tokens) if at % 4 < 3)
    assert [sent for sent, _ in told] == [config.num_layers * each] * 2
    shapes = target_shapes(config)
    numbers = sum(
        rank * sum(sum(shapes[target]) for target in (ATTENTION if rank > 4 else shapes)) for rank in even
    )  # fmt: skip
    assert sum(nbytes for _, nbytes in told) == 4 * config.num_layers * numbers  # nothing is held twice


def test_parts_of_a_model_hold_all_of_it(model: Path, tmp_path: Path) -> None:
    whole = ModelConfig.from_directory(model)
    halves = [ModelConfig.from_directory(cut_model(model, tmp_path / f"t{r}", "tensor", r)) for r in range(2)]
    stages = [ModelConfig.from_directory(cut_model(model, tmp_path / f"p{r}", "pipeline", r)) for r in range(2)]
    matrices = sum(t.size for t in whole.tensors() if t.layer is not None and len(t.shape) == 2)
    for parts in (halves, stages):
        assert sum(t.size for p in parts for t in p.tensors() if t.layer is not None and len(t.shape) == 2) == matrices
    assert halves[0].hidden_size == whole.hidden_size
    assert stages[0].num_layers == 2


def test_a_process_that_fails_says_why_and_both_end(model: Path, tmp_path: Path) -> None:
    setting = Setting(
        kind="data", folders=(model, tmp_path / "nothing"), settings=SETTINGS, num_pages=8, wire=tmp_path / "wire"
    )
    with pytest.raises(RuntimeError, match="no such folder"), TwoProcesses(setting):
        pass


def test_a_flight_that_fails_is_told_and_nobody_waits_for_it(model: Path, tmp_path: Path) -> None:
    stages = (cut_model(model, tmp_path / "0", "pipeline", 0), cut_model(model, tmp_path / "1", "pipeline", 1))
    setting = Setting(kind="pipeline", folders=stages, settings=SETTINGS, num_pages=64, wire=tmp_path / "wire")
    too_long = [Load(at=0.0, prompt_tokens=500, output_tokens=6)]
    with TwoProcesses(setting) as testbed, pytest.raises(RuntimeError, match="the prompt has 500 tokens"):
        testbed.serve(too_long)


@pytest.mark.slow
def test_meeting_is_timed_between_products_and_halves_of_logits_too(model: Path, tmp_path: Path) -> None:
    folders = tuple(cut_model(model, tmp_path / str(rank), "tensor", rank) for rank in range(2))
    setting = Setting(kind="tensor", folders=folders, settings=SETTINGS, num_pages=64, wire=tmp_path / "wire")  # type: ignore[arg-type]
    with TwoProcesses(setting) as testbed:
        told = testbed.messages((256, 2048))
        served = testbed.serve(LOADS)  # the exchanges before leave the wire as they found it
    assert [size for size, _ in told.sums] == [256, 2048]
    assert [size for size, _ in told.gathers] == [4 * 300 * rows for rows in (1, 4, 4)]
    assert all(seconds > 0 for _, seconds in (*told.sums, *told.gathers))
    assert told.piped > 0
    assert sorted(one.made for one in served) == sorted(alone(model, LOADS))

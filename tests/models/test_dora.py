"""DoRA adapters worn by the CPU engine: the definition over any base, packed or not, one token or many."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from memwall import kernels
from memwall.engine import Sampling, Settings, load
from memwall.engine.lone_lora import lone_bytes, wear
from memwall.engine.sequence import Request
from memwall.engine.serving import LoraSettings, ServingSettings, load_engine
from memwall.errors import InputError
from memwall.kernels.lora import TARGETS
from memwall.models import DEMO_DIRECTORY, ModelConfig
from memwall.models.dora import row_bytes, row_changes, row_lengths
from memwall.models.lora import LoraWeights, tensor_name, write_lora
from tests.models.loras import make_lora

CONFIG = ModelConfig.from_directory(DEMO_DIRECTORY)


def make_dora(folder: Path, *, seed: int = 0, targets: tuple[str, ...] = TARGETS, strength: float = 0.2) -> Path:
    """A random adapter with lengths around those of the base."""
    plain = LoraWeights.read(make_lora(folder, CONFIG, rank=4, seed=seed, targets=targets, strength=strength), CONFIG)
    session = load(DEMO_DIRECTORY, Settings(weights="float32", context_tokens=32))
    draw, tensors = np.random.default_rng(seed), {}
    for layer in range(CONFIG.num_layers):
        for target in targets:
            factors = plain.factors(layer, target)
            assert factors is not None
            parent = "self_attn" if target in TARGETS[:4] else "mlp"
            matrix = session.decoder.weights.matrices[f"model.layers.{layer}.{parent}.{target}.weight"]
            lengths = row_lengths(matrix, *factors, 0.0)
            magnitude = lengths * draw.uniform(0.8, 1.2, len(lengths)).astype(np.float32)
            tensors[tensor_name(layer, target, "magnitude_vector")] = magnitude
            tensors |= {tensor_name(layer, target, part): value for part, value in zip("AB", factors, strict=True)}
    session.release()
    return write_lora(folder, tensors, rank=4, alpha=4, base="demo", use_dora=True)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_products_are_the_definition(tmp_path: Path, isa: str, tokens: int) -> None:
    """m (W + s B A) x / ||W + s B A||, whatever W is stored as."""
    try:
        kernels.force_isa(isa)
    except ValueError:
        pytest.skip(f"{isa} is not of this machine")
    try:
        folder = make_dora(tmp_path / "one", targets=("q_proj", "down_proj"))
        adapter = LoraWeights.read(folder, CONFIG)
        session = load(DEMO_DIRECTORY, Settings(weights="nf4-dq", context_tokens=64, exact=True))
        wear(session, adapter)
        batch = session.decoder._lora
        assert batch is not None
        assert batch.lengthens
        factors = adapter.factors(2, "q_proj")
        assert factors is not None
        name = "model.layers.2.self_attn.q_proj.weight"
        matrix = session.decoder.weights.matrices[name]
        dense = np.empty((matrix.rows, matrix.cols), np.float32)
        kernels.gather_rows(matrix, np.arange(matrix.rows), dense)
        adapted = dense + factors[1] @ factors[0]
        magnitude = adapter.magnitudes()[2, "q_proj"]
        adapted *= (magnitude / np.linalg.norm(adapted, axis=1))[:, None]
        x = np.random.default_rng(0).standard_normal((tokens, matrix.cols)).astype(np.float32)
        out = np.empty((tokens, matrix.rows), np.float32)
        kernels.linear(x, [matrix], [out], exact=True)
        batch.add(2, 0, x, [0], [out])
        np.testing.assert_allclose(out, x @ adapted.T, atol=2e-3 * np.abs(out).max())
        session.release()
    finally:
        kernels.force_isa(kernels.best_isa())


def test_one_token_at_a_time_gives_the_logits_of_all_at_once(tmp_path: Path) -> None:
    """Products that are added to the residual are complete before they are, recorded or not."""
    adapter = LoraWeights.read(make_dora(tmp_path / "one"), CONFIG)
    found = []
    for width in (20, 1):
        session = load(
            DEMO_DIRECTORY, Settings(weights="float32", kv="float32", context_tokens=32, threads=1, exact=True)
        )
        before = session.arena.used_bytes
        wear(session, adapter)
        assert session.ledger.owned("adapters/rows") == row_bytes(adapter, CONFIG)
        assert session.arena.used_bytes - before <= sum(lone_bytes(adapter, CONFIG, 512).values()) + 3 * 4096
        tokens = np.arange(3, 23)
        for first in range(0, 20, width):
            logits = session.decoder.forward(tokens[first : first + width], session.cache)
        found.append(logits.copy())
        session.release()
    assert np.abs(found[0] - found[1]).max() < 2e-3 * np.abs(found[0]).max()


def test_a_server_gives_each_its_own(tmp_path: Path) -> None:
    """Requests with a DoRA adapter, a plain one and none, together, make what each makes alone."""
    folders = {"dora": make_dora(tmp_path / "dora"), "plain": make_lora(tmp_path / "plain", CONFIG, rank=4)}
    prompt, sampling = tuple(range(5, 60, 3)), Sampling(max_new_tokens=8, ignore_eos=True)
    expected = {}
    for name in (*folders, None):
        session = load(DEMO_DIRECTORY, Settings(weights="float16", context_tokens=64, threads=1, segment_tokens=32))
        if name is not None:
            wear(session, LoraWeights.read(folders[name], CONFIG))
        list(session.generate(list(prompt), sampling))
        expected[name] = list(session.last.tokens)
        session.release()
    assert expected["dora"] != expected[None]
    held = load_engine(
        DEMO_DIRECTORY,
        ServingSettings(weights="float16", context_tokens=64, token_budget=32, threads=1, lora=LoraSettings()),
    )
    known = held.ledger.owned("adapters/known")
    for name, folder in folders.items():
        held.add_adapter(name, held.read_adapter(folder))
    assert held.ledger.owned("adapters/known") - known > row_bytes(LoraWeights.read(folders["dora"], CONFIG), CONFIG)
    runs = {
        name: held.engine.submit(Request(prompt=prompt, sampling=sampling, adapter=name)) for name in (*folders, None)
    }
    while held.engine.busy:
        held.engine.step()
    assert {name: list(run.made) for name, run in runs.items()} == expected
    held.release()


def test_what_is_refused(tmp_path: Path) -> None:
    folder = make_lora(tmp_path / "one", CONFIG, rank=4, use_dora=True)
    with pytest.raises(InputError, match="use_dora is set, but layer 0 has no lora_magnitude_vector of q_proj"):
        LoraWeights.read(folder, CONFIG)
    made = make_dora(tmp_path / "two", targets=("q_proj",))
    config = (made / "adapter_config.json").read_text().replace('"use_dora": true', '"use_dora": false')
    (made / "adapter_config.json").write_text(config)
    with pytest.raises(InputError, match="not set, and yet layer 0 has a lora_magnitude_vector"):
        LoraWeights.read(made, CONFIG)


def test_a_plain_adapter_changes_no_length(tmp_path: Path) -> None:
    adapter = LoraWeights.read(make_lora(tmp_path / "one", CONFIG, rank=4), CONFIG)
    session = load(DEMO_DIRECTORY, Settings(weights="float16", context_tokens=32))
    assert row_changes(adapter, session.decoder.weights, CONFIG) == {}
    assert row_bytes(adapter, CONFIG) == 0
    session.release()

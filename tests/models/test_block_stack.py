"""The stack of a loaded model: any number of blocks, what moving it reads and holds, and damaged folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memwall import kernels
from memwall.compress.calibration import PromptCache
from memwall.errors import BudgetExceeded, InputError
from memwall.formats.bitstack import block_bytes
from memwall.memory import Arena, Ledger, resident_bytes
from memwall.models import Checkpoint, ModelConfig
from memwall.models.block_stack import BlockStack
from memwall.models.decoder import Decoder
from memwall.models.precision import resolve, weight_bytes
from memwall.models.stack_index import StackIndex
from memwall.models.weights import Weights, load_weights
from tests.compress.tiny_model import make_model, make_stack

SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
TOKENS = np.arange(12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("stack")
    return make_stack(make_model(place / "source", **SHAPE), place / "out")


def loaded(folder: Path, choice: str, cap: int = 1 << 40) -> tuple[Weights, Decoder, Arena]:
    config = ModelConfig.from_directory(folder)
    arena = Arena(cap, Ledger())
    with Checkpoint(folder, config) as checkpoint:
        weights = load_weights(config, checkpoint, resolve(config, choice, checkpoint), arena)
    return weights, Decoder(config, weights, arena, segment_tokens=len(TOKENS)), arena


def stack_of(weights: Weights) -> BlockStack:
    assert weights.stack is not None
    return weights.stack


def logits(decoder: Decoder, count: int = len(TOKENS)) -> np.ndarray:
    return decoder.forward(TOKENS[:count], PromptCache(decoder.config)).copy()


def test_any_number_of_blocks_is_bit_identical_to_a_fresh_load(folder: Path, threads: int) -> None:
    weights, decoder, _ = loaded(folder, "stack-0")
    stack = stack_of(weights)
    most = stack.most_blocks
    for number in (most, 3, most // 2, 0, 1, most - 1):
        stack.resize(number)
        assert weights.specs[stack.index.tensors[0]] == weights.matrices[stack.index.tensors[0]].spec
        _, fresh, _ = loaded(folder, f"stack-{number}")
        for count in (1, len(TOKENS)):  # one token looks signs up, several decode strips
            np.testing.assert_array_equal(logits(decoder, count), logits(fresh, count))
    stack.resize(most)
    _, fresh, _ = loaded(folder, "saved")
    np.testing.assert_array_equal(logits(decoder), logits(fresh))


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Any:
    before = kernels.num_threads()
    kernels.set_num_threads(request.param)
    yield request.param
    kernels.set_num_threads(before)


def test_moving_reads_the_difference_and_gives_pages_back(folder: Path) -> None:
    weights, decoder, arena = loaded(folder, "stack-0")
    stack, index = stack_of(weights), stack_of(weights).index
    shapes = {tensor.name: tensor.shape for tensor in decoder.config.tensors()}
    sizes = [block_bytes(shapes[index.tensors[at]], index.rank) for at in index.order]
    logits(decoder)
    held, used = resident_bytes(exact=True), arena.used_bytes
    read = was = 0
    for number in (stack.most_blocks, 5, stack.most_blocks // 2, 0, stack.most_blocks):
        stack.resize(number)
        read += sum(sizes[was:number])
        was = number
        assert stack.bytes_read == read
        assert 0 <= stack.nbytes - sum(sizes[:number]) < 4096 + 64 * number
        assert arena.used_bytes - used == stack.nbytes == stack.nbytes_of(number)
        assert abs(resident_bytes(exact=True) - held - stack.nbytes) < 400_000
        assert sum(matrix.nbytes for name, matrix in weights.matrices.items() if name in index.tensors) == sum(
            sizes[:number]
        ) + sum(block_bytes(shapes[name], index.rank) for name in index.tensors)
    assert sum(sizes) > 800_000


def test_no_dense_copy_is_held(folder: Path) -> None:
    """The ledger's weights are the stored form to the byte; a product adds scratch, not a matrix."""
    weights, decoder, arena = loaded(folder, "saved")
    logits(decoder)
    rows = {row.owner: row.nbytes for row in arena.ledger.rows()}
    predicted = weight_bytes(decoder.config, weights.specs)
    assert abs(rows["weights/bitstack"] - predicted["weights/bitstack"]) <= 2 * 4096


def test_a_cap_is_never_crossed(folder: Path) -> None:
    weights, decoder, arena = loaded(folder, "stack-0")
    stack = stack_of(weights)
    arena.set_cap(arena.used_bytes + stack.nbytes_of(stack.most_blocks) // 2)
    before = logits(decoder)
    with pytest.raises(BudgetExceeded):
        stack.resize(stack.most_blocks)
    assert stack.num_blocks == 0
    np.testing.assert_array_equal(logits(decoder), before)
    number = stack.longest(arena.free_bytes)
    stack.resize(number)
    assert arena.used_bytes <= arena.cap_bytes
    assert stack.nbytes_of(number + 1) > arena.cap_bytes - (arena.used_bytes - stack.nbytes)
    assert stack.longest(0) == stack.longest(-5) == 0


def test_a_file_that_became_shorter_is_an_error_and_changes_nothing(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    weights, decoder, _ = loaded(copy, "stack-2")
    stack, before = stack_of(weights), logits(decoder)
    with open(copy / "model-00002-of-00002.safetensors", "r+b") as file:
        file.truncate(200_000)
    with pytest.raises(InputError, match="shorter"):
        stack.resize(stack.most_blocks)
    assert stack.num_blocks == 2
    np.testing.assert_array_equal(logits(decoder), before)


@pytest.mark.parametrize("choice", ["stack-", "stack-x", "stack--1", "stack-100000"])
def test_choices_that_the_stack_has_not(folder: Path, choice: str) -> None:
    with pytest.raises(InputError, match="this stack has 0 to"):
        loaded(folder, choice)


def test_stacks_are_for_folders_that_have_one(folder: Path) -> None:
    config = ModelConfig.from_directory(folder)
    with pytest.raises(InputError, match="--method bitstack"):
        resolve(config, "stack-3")
    with pytest.raises(InputError, match="--method bitstack"):
        resolve(config, "bitstack")


@pytest.mark.parametrize(
    "damage", [{"order": [0, 99999]}, {"order": "0"}, {"rank": 0}, {"tensors": []}, {"order": []}, {"order": [0] * 40}]
)
def test_a_damaged_order_is_refused(folder: Path, tmp_path: Path, damage: dict[str, Any]) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    manifest = json.loads((copy / "memwall.json").read_text())
    manifest["info"]["stack"].update(damage)
    (copy / "memwall.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="order of"):
        loaded(copy, "saved")


def test_the_index_by_hand() -> None:
    index = StackIndex.from_info({"tensors": ["a", "b"], "rank": 3, "order": [1, 0, 1]})
    assert index.counts(0) == {"a": 1, "b": 1}
    assert index.counts(2) == {"a": 2, "b": 2}
    assert index.specs(3) == {"a": "bitstack-r3-b2", "b": "bitstack-r3-b3"}
    assert index.length(index.specs(2)) == 2
    with pytest.raises(InputError, match="no first part"):
        index.length({"a": "bitstack-r3-b2", "b": "bitstack-r3-b1"})

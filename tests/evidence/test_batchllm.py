"""What BatchLLM's verdicts hang on: the best plan there is, the pages a batch needs, ways that differ in one thing."""

from __future__ import annotations

import random
from types import ModuleType

import pytest

from memwall.cli.evidence import load_experiment
from memwall.engine.batchllm import BatchLLM, plan_alone
from memwall.engine.fcfs import FirstComeFirstServed
from memwall.engine.prefix_tree import Prompts
from memwall.systems import find_system


@pytest.fixture(scope="module")
def batchllm() -> ModuleType:
    return load_experiment(find_system("batchllm"))


@pytest.mark.parametrize(
    ("prompts", "fewest"),
    [
        ([[1, 2, 3]], 3),
        ([[1, 2, 3], [4]], 4),
        ([[1, 2, 3], [1, 2, 4]], 4),
        ([[1, 2, 3]] * 3, 3),
        ([[1, 2, 3, 4], [1, 2]], 4),
        # two texts behind a header of one token: the header twice, rather than each text three times
        ([[9, *[t] * 5, i] for t in (1, 2) for i in (3, 4, 5)], 2 * 6 + 6),
    ],
)
def test_the_best_plan_of_one_level(batchllm: ModuleType, prompts: list[list[int]], fewest: int) -> None:
    assert batchllm.best_one_level(Prompts.of(prompts)) == fewest


def test_no_plan_beats_the_best(batchllm: ModuleType) -> None:
    draw = random.Random(3)
    for _ in range(20):
        rows = Prompts.of(batchllm.random_prompts(draw))
        assert batchllm.best_one_level(rows) <= batchllm.plan_batch(rows, least_prefix=1).sharing.physical


def test_the_batch_is_shuffled_and_its_need_is_counted_once(batchllm: ModuleType) -> None:
    sizes = batchllm.replace(batchllm.QUICK, documents=3, questions=4)
    load = batchllm.questions(batchllm.held_out_text(), sizes)
    assert len(load.prompts) == 12
    plan = load.plan()
    assert sorted(len(group.members) for group in plan.groups) == [4, 4, 4]
    assert [group.members for group in plan.groups] != [tuple(range(i, i + 4)) for i in (0, 4, 8)]
    least = sum(group.prefix for group in plan.groups) / 16
    assert least < load.need_pages < least + 12 * 4 + 3


def test_ways_on_a_virtual_clock_differ_in_the_scheduler_alone(batchllm: ModuleType) -> None:
    load = batchllm.mix(0, 6, batchllm.VARIED)
    pages = max(int(0.5 * load.need_pages), 64)
    ours = batchllm.virtual(load, load.plan(), BatchLLM(), pages, keep=False)
    recent = batchllm.virtual(load, plan_alone(load.rows), FirstComeFirstServed(), pages, keep=True)
    assert ours.computed == load.plan().sharing.physical < recent.computed
    assert [len(made) for made in ours.made] == [len(made) for made in recent.made] == load.outputs
    assert ours.prefix_pages <= pages


def test_fused_attention_is_measured_against_rows_in_a_line(batchllm: ModuleType) -> None:
    shape = batchllm.replace(batchllm.SHAPES[0], layers=1)
    groups = batchllm.Groups(shape, 2, 3, 50, 5, batchllm.np.float32)
    assert groups.error() < 1e-5
    fused = groups.fused().copy()
    groups.apart(0)
    assert batchllm.np.abs(groups.out - fused).max() < 1e-5


def test_a_peer_that_is_not_there_is_not_run(batchllm: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    load = batchllm.mix(0, 2, batchllm.ALIKE)
    monkeypatch.delenv("MEMWALL_PEER_PYTHON", raising=False)
    assert batchllm.peer_claim(load, 1.0).passed is None
    monkeypatch.setenv("MEMWALL_PEER_PYTHON", "false")
    assert batchllm.peer_claim(load, 1.0).passed is None

"""Groups by shared beginnings: against the gain rule written out on a plain tree, and against all partitions."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from memwall.engine.batchllm import Group, Room, decode_ratio, plan_batch
from memwall.engine.prefix_tree import Node, Prompts, one_level, sort_prompts

# few letters and pieces that repeat, so that beginnings are shared on several levels
PIECES = st.sampled_from([(1,), (2, 3), (2, 4), (5,) * 4, (6, 7, 8, 9), (1, 1, 2)])
PROMPT = st.lists(PIECES, min_size=1, max_size=5).map(lambda parts: [token for part in parts for token in part])
BATCH = st.lists(PROMPT, min_size=1, max_size=14)


@dataclass
class Plain:
    """A node of the tree as the source tells it: a span, children, and marks of prompts that end here."""

    span: list[int]
    children: list[Plain] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)

    def leaves(self) -> list[int]:
        return sorted([*self.marks, *(leaf for child in self.children for leaf in child.leaves())])


def insert(node: Plain, tokens: list[int], number: int) -> None:
    if not tokens:
        node.marks.append(number)
        return
    for child in node.children:
        same = 0
        while same < min(len(child.span), len(tokens)) and child.span[same] == tokens[same]:
            same += 1
        if not same:
            continue
        if same < len(child.span):
            child.children = [Plain(child.span[same:], child.children, child.marks)]
            child.span, child.marks = child.span[:same], []
        insert(child, tokens[same:], number)
        return
    node.children.append(Plain(list(tokens), [], [number]))


def merge(node: Plain, parent: Plain | None) -> None:
    at = 0
    while at < len(node.children):
        child = node.children[at]
        merge(child, node)
        leaves = len(child.leaves())
        if not leaves:  # all that it had went up: what is empty is no child that keeps another from being fused
            node.children.remove(child)
            continue
        if parent is not None and leaves > 1 and (leaves - 1) * len(child.span) - len(node.span) > 0:
            node.children.remove(child)
            child.span = node.span + child.span
            parent.children.append(child)
            continue
        at += 1
    if parent is not None and len(node.children) == 1 and not node.marks:
        child = node.children[0]
        node.span, node.children, node.marks = node.span + child.span, child.children, child.marks


def plain_groups(prompts: list[list[int]]) -> set[tuple[int, tuple[int, ...]]]:
    root = Plain([])
    for number, prompt in enumerate(prompts):
        insert(root, prompt, number)
    merge(root, None)
    return {(len(one.span), tuple(one.leaves())) for one in root.children if len(one.leaves()) > 1}


def groups_of(prompts: list[list[int]]) -> tuple[Node, set[tuple[int, tuple[int, ...]]]]:
    root = one_level(*sort_prompts(Prompts.of(prompts)))
    return root, {(node.span, tuple(node.prompts())) for node in root.children}


@given(BATCH)
@example([[2, 3], [2, 3], [2, 4, 1, 1], [2, 4, 2, 3], [2, 4, 2, 3], [2, 4, 1, 1, 2]])
@settings(max_examples=300, deadline=None)
def test_groups_are_those_of_the_gain_rule_on_a_plain_tree(prompts: list[list[int]]) -> None:
    _, found = groups_of(prompts)
    assert cost(prompts, found) == cost(prompts, plain_groups(prompts))


def cost(prompts: list[list[int]], groups: set[tuple[int, tuple[int, ...]]]) -> int:
    return sum(map(len, prompts)) - sum(span * (len(members) - 1) for span, members in groups)


@given(BATCH)
@settings(max_examples=300, deadline=None)
def test_every_prompt_is_once_in_the_plan_and_is_its_prefix_and_its_own(prompts: list[list[int]]) -> None:
    plan = plan_batch(Prompts.of(prompts), least_prefix=1)
    assert sorted(plan.order) == list(range(len(prompts)))
    physical = 0
    for group in plan.groups:
        first = prompts[group.members[0]]
        longest = max((prompts[m] for m in group.members), key=len)
        assert len(group.members) > 1 or group.prefix == 0
        physical += group.prefix
        for member in group.members:
            base = group.base(len(prompts[member]))
            assert longest[:base] == prompts[member][:base]
            assert 0 <= base < len(prompts[member])  # one token at least is its own
            physical += len(prompts[member]) - base
        assert first[:1] == longest[:1]
    assert plan.sharing.physical == physical
    assert plan.sharing.logical == sum(map(len, prompts))
    assert plan.sharing.tree <= physical <= plan.sharing.logical


def partitions(items: list[int]) -> Iterator[list[list[int]]]:
    if not items:
        yield []
        return
    first, *rest = items
    for smaller in partitions(rest):
        yield [[first], *smaller]
        for at, block in enumerate(smaller):
            yield [*smaller[:at], [first, *block], *smaller[at + 1 :]]


def common(prompts: list[list[int]], block: list[int]) -> int:
    shortest = min(len(prompts[i]) for i in block)
    return next((at for at in range(shortest) if len({prompts[i][at] for i in block}) > 1), shortest)


def best_saving(prompts: list[list[int]]) -> int:
    return max(
        sum((len(block) - 1) * common(prompts, block) for block in blocks)
        for blocks in partitions(list(range(len(prompts))))
    )


def test_one_level_saves_nearly_what_the_best_partition_saves() -> None:
    draw, saved, best = random.Random(4), 0, 0
    for _ in range(60):
        heads = [[draw.randrange(50) for _ in range(draw.randint(1, 12))] for _ in range(2)]
        texts = [[draw.randrange(50) for _ in range(draw.randint(5, 60))] for _ in range(3)]
        prompts = [
            [*draw.choice(heads), *draw.choice(texts), *(draw.randrange(50) for _ in range(draw.randint(0, 9)))]
            for _ in range(7)
        ]
        own = sum(map(len, prompts)) - cost(prompts, groups_of(prompts)[1])
        assert own <= best_saving(prompts)
        saved, best = saved + own, best + best_saving(prompts)
    assert saved >= 0.99 * best


def test_a_short_common_header_does_not_make_one_giant_group() -> None:
    texts = {letter: [letter] * 50 for letter in range(10, 14)}
    prompts = [[1, 2, 3, 4, 5, *texts[10 + i % 4], 100 + i] for i in range(12)]
    plan = plan_batch(Prompts.of(prompts))
    assert {(group.prefix, group.members) for group in plan.groups} == {(55, (i, i + 4, i + 8)) for i in range(4)}


def test_duplicates_a_prompt_that_is_a_prefix_and_one_token() -> None:
    long = list(range(1, 41))
    plan = plan_batch(Prompts.of([long, [*long, 50, 51], long, [7], [7]]), least_prefix=1)
    shared = {group.members: group for group in plan.groups}
    assert shared[(0, 1, 2)].prefix == 40
    assert [shared[(0, 1, 2)].base(n) for n in (40, 42)] == [39, 40]
    assert (3,) in shared  # one token alone has nothing to share
    assert plan.sharing.physical == 40 + 1 + 2 + 1 + 2
    copies = plan_batch(Prompts.of([long] * 3))
    assert [(group.prefix, group.members) for group in copies.groups] == [(39, (0, 1, 2))]


def test_groups_that_make_most_per_prompt_token_come_first() -> None:
    prompts = [[1] * 40 + [i] for i in range(5, 8)] + [[2] * 20 + [i] for i in range(5, 8)] + [[3] * 10]
    outputs = [1, 1, 100, 30, 30, 30, 1]
    plan = plan_batch(Prompts.of(prompts), outputs)
    assert [group.members for group in plan.groups] == [(3, 4, 5), (0, 1, 2), (6,)]
    lengths = np.array([len(prompt) for prompt in prompts])
    assert decode_ratio(plan.groups[0], lengths, outputs) == pytest.approx(90 / 23)  # over the tokens after sharing
    same = plan_batch(Prompts.of(prompts))
    assert [group.members for group in same.groups] == [(0, 1, 2), (3, 4, 5), (6,)]


def test_a_prefix_is_shortened_until_it_and_a_member_fit() -> None:
    prompts = [[1] * 37 + [i] for i in range(2, 4)]
    room = Room(page_tokens=16, pages=4, outputs=[20, 26])
    plan = plan_batch(Prompts.of(prompts), room=room)
    assert plan.groups[0].prefix == 32  # 37 would take 3 pages, and 27 of its own 2
    assert plan_batch(Prompts.of(prompts), room=Room(page_tokens=16, pages=5, outputs=[20, 26])).groups[0].prefix == 37


def test_a_prefix_below_the_least_is_left_alone() -> None:
    assert plan_batch(Prompts.of([[1, 2, 3], [1, 2, 4]])).groups == (
        Group(prefix=0, members=(0,)),
        Group(prefix=0, members=(1,)),
    )


def test_an_empty_batch_has_an_empty_plan() -> None:
    plan = plan_batch(Prompts.of([]))
    assert plan.groups == ()
    assert plan.sharing.ratio == 0


def test_many_levels_do_not_recurse() -> None:
    prompts = [[1] * length for length in range(1, 1500)]
    plan = plan_batch(Prompts.of(prompts), least_prefix=1)
    assert sorted(plan.order) == list(range(1499))
    assert plan.sharing.physical < 0.5 * plan.sharing.logical

"""BatchLLM: an offline batch whose sharing is planned for all prompts beforehand, and batches that memory alone bounds.

*Source*: BatchLLM (Zheng 2024, arXiv 2412.03594): global prefix identification, prefix-grouped and decode-heavy-first
scheduling, memory-centric token batching. The gain rule lies in `prefix_tree`, the fused attention in
`kernels.attention.attend_shared`.
*Idea*: prompts that begin alike are run together: their prefix is computed once, kept for exactly as long as one of
them is not over, and freed. Groups that decode much per prompt token go first, so that prompts of later groups fill
their steps. Requests enter while the predicted use of memory allows it, however many they are.
*Units*: tokens, pages.
*Differs from the paper*: how long an answer will be is told by each request (`RequestView.expected`); the prediction
walks over the ends of all running requests, since the paper names none. A prefix below `least_prefix` tokens is not
worth a page of its own.
*Cost*: planning sorts all prompts once; a step costs one pass over what runs, and one per request that enters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from memwall.engine.base import Preempt, RequestView, State, Step, Work
from memwall.engine.prefix_tree import Prompts, one_level, sort_prompts

LEAST_PREFIX_TOKENS = 16
THRESHOLD = 0.9
"""Share of the pages that the prediction may come to (assumed: the paper gives none)."""


# ---- the plan of a batch -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Prompts that run together. prefix: tokens that are computed once for all; 0 for a prompt alone."""

    prefix: int
    members: tuple[int, ...]

    def base(self, prompt_tokens: int) -> int:
        """Tokens of a member that it takes from the prefix: its last one is always its own, for its logits."""
        return min(self.prefix, prompt_tokens - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """What a plan saves, in prompt tokens. tree: what sharing on all levels would compute."""

    logical: int
    physical: int
    tree: int
    num_prompts: int
    num_groups: int
    mean_degree: float
    mean_prefix: float
    mean_distinct: float

    @property
    def ratio(self) -> float:
        """Share of the prompt tokens that nobody computes."""
        return 1 - self.physical / self.logical if self.logical else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """Groups in the order they run. mean_degree and mean_prefix of `sharing` are over groups of two and more."""

    groups: tuple[Group, ...]
    sharing: Sharing

    @property
    def order(self) -> list[int]:
        """Place in the run -> prompt: the permutation that leads answers back to their prompts."""
        return [member for group in self.groups for member in group.members]


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What one request may take alone: `pages` of `page_tokens`; outputs: the longest answer of each prompt."""

    page_tokens: int
    pages: int
    outputs: Sequence[int]


def plan_batch(
    prompts: Prompts,
    outputs: Sequence[float] | None = None,
    *,
    least_prefix: int = LEAST_PREFIX_TOKENS,
    room: Room | None = None,
) -> BatchPlan:
    """Groups by shared prefixes, those with most expected output per prompt token first.

    outputs: tokens expected for each prompt; None keeps the order of the groups' first prompts.
    """
    order, common = sort_prompts(prompts)
    root = one_level(order, common)
    lengths = prompts.lengths
    groups, alone = [], list(root.ends)
    for node in root.children:
        members = node.prompts()
        prefix = min(node.span, int(lengths[members].max()) - 1)  # where all are equal, the last token is nobody's
        if room is not None:
            prefix = _fitting(prefix, members, lengths, room)
        if prefix < max(least_prefix, 1):
            alone += members
        else:
            groups.append(Group(prefix=prefix, members=tuple(members)))
    groups += [Group(prefix=0, members=(number,)) for number in alone]
    groups.sort(key=lambda group: group.members[0])
    if outputs is not None:
        groups.sort(key=lambda group: -decode_ratio(group, lengths, outputs))
    # of a prompt that another one holds whole, the last token is computed
    last = np.minimum(common, lengths[order] - 1)
    return BatchPlan(groups=tuple(groups), sharing=_sharing(groups, lengths, int((lengths[order] - last).sum())))


def plan_alone(prompts: Prompts) -> BatchPlan:
    """Every prompt by itself, in order: the plan that plans nothing, which others are compared with."""
    groups = tuple(Group(prefix=0, members=(number,)) for number in range(len(prompts)))
    return BatchPlan(groups=groups, sharing=_sharing(groups, prompts.lengths, int(prompts.lengths.sum())))


def _fitting(prefix: int, members: Sequence[int], lengths: np.ndarray, room: Room) -> int:
    """The prefix, shortened until it and any member alone fit: what is cut in two may need a page more."""
    page = room.page_tokens
    own = np.array([int(lengths[m]) + room.outputs[m] for m in members], np.int64)

    def pages(cut: int) -> int:
        return -(-cut // page) + int((-(-(own - np.minimum(cut, lengths[members] - 1)) // page)).max())

    while prefix > 0 and pages(prefix) > room.pages:
        prefix = (prefix - 1) // page * page
    return prefix


def decode_ratio(group: Group, lengths: np.ndarray, outputs: Sequence[float]) -> float:
    """Expected output tokens per prompt token that is computed for the group."""
    own = sum(int(lengths[member]) - group.base(int(lengths[member])) for member in group.members)
    return sum(outputs[member] for member in group.members) / (group.prefix + own)


def _sharing(groups: Sequence[Group], lengths: np.ndarray, tree: int) -> Sharing:
    own = [int(lengths[m]) - group.base(int(lengths[m])) for group in groups for m in group.members]
    shared = [group for group in groups if group.prefix]
    return Sharing(
        logical=int(lengths.sum()),
        physical=sum(group.prefix for group in groups) + sum(own),
        tree=tree,
        num_prompts=len(lengths),
        num_groups=len(shared),
        mean_degree=float(np.mean([len(group.members) for group in shared])) if shared else 0.0,
        mean_prefix=float(np.mean([group.prefix for group in shared])) if shared else 0.0,
        mean_distinct=float(np.mean(own)) if own else 0.0,
    )


# ---- the scheduler -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLLM:
    """Decoding first, then prompts by rank; whoever fits into the predicted memory enters. Requests must come in the
    order of the plan's groups: a prefix, then its members.
    """

    threshold: float = THRESHOLD

    def plan_step(self, state: State, now: float) -> Step:
        """See `Scheduler`."""
        plan = _Plan(state)
        plan.keep_running()
        if not plan.preempt and state.free_pages >= 0:
            plan.bring_in(self.threshold)
        if not plan.work and not plan.preempt and plan.queue:
            plan.set_aside(plan.queue.pop())  # all wait for room that nobody will give back by itself
        return plan.step()


class Forecast:
    """Pages in use at each moment when a request ends, if every running one makes a token a step from now on."""

    def __init__(self, limit: float, page_tokens: int) -> None:
        self.limit = limit
        self._page = page_tokens
        self._ends = np.zeros(0)
        self._tokens = np.zeros(0)
        self._used = np.zeros(0)
        self._fixed = 0

    @property
    def peak(self) -> float:
        """The most pages that are in use at any moment."""
        return float(self._used.max(initial=0.0)) + self._fixed

    def keep(self, pages: int) -> None:
        """Pages that stay in use for as long as can be told."""
        self._fixed += pages

    def add(self, tokens: int, rest: float) -> None:
        """A request with so many tokens of its own that will make `rest` more."""
        self._used, self._ends, self._tokens = self._with(tokens, rest)

    def takes(self, tokens: int, rest: float, pages: int = 0) -> bool:
        """Whether one more stays within the limit; pages: what comes with it and stays."""
        used, _, _ = self._with(tokens, rest)
        return float(used.max(initial=0.0)) + self._fixed + pages <= self.limit

    def _with(self, tokens: int, rest: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        used = self._used + np.where(self._ends <= rest, self._pages(tokens + self._ends), 0.0)
        alive = self._ends >= rest
        at_end = self._pages(self._tokens[alive] + rest).sum() + self._pages(np.array(tokens + rest))
        return np.append(used, at_end), np.append(self._ends, rest), np.append(self._tokens, tokens)

    def _pages(self, tokens: np.ndarray) -> np.ndarray:
        return np.ceil(tokens / self._page)


@dataclass(slots=True)
class _Plan:
    """A step in the making. queue: who holds pages, by rank; extra: pages of a request's work in this step."""

    state: State
    free: int = 0
    budget: int = 0
    work: dict[int, int] = field(default_factory=dict)
    extra: dict[int, int] = field(default_factory=dict)
    preempt: dict[int, Preempt] = field(default_factory=dict)
    admit: list[int] = field(default_factory=list)
    queue: list[RequestView] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.free, self.budget = self.state.free_pages, self.state.limits.token_budget
        self.queue = sorted((*self.state.running, *self.state.held), key=lambda view: view.rank)

    def step(self) -> Step:
        work = tuple(Work(id=number, tokens=tokens) for number, tokens in self.work.items())
        return Step(preempt=tuple(self.preempt.values()), admit=tuple(self.admit), work=work)

    def keep_running(self) -> None:
        """Tokens and pages for those that run. Where pages fail, the youngest give way and are computed again: members
        of a group before its prefix, since a prefix comes before them. The youngest of all waits.
        """
        while self.free < 0 and self.queue:  # the budget shrank
            self.set_aside(self.queue.pop())
        limits = self.state.limits
        for view in sorted(self.state.running, key=lambda view: (not view.decodes, view.rank)):
            if view.id in self.preempt or self.budget < 1:
                continue
            tokens = min(view.remaining, self.budget)
            while self._pages_more(view, tokens) > self.free and self.queue[-1].id != view.id:
                self.set_aside(self.queue.pop())
            if self._pages_more(view, tokens) > self.free:
                tokens = (view.pages + self.free) * limits.page_tokens - view.own(view.computed)
            if tokens > 0:
                self._give(view, tokens, self._pages_more(view, tokens))

    def bring_in(self, threshold: float) -> None:
        """Members whose prefix is there, prefixes and prompts alone, by rank; the first that has no room ends it."""
        limits, running = self.state.limits, self._running()
        forecast = self._forecast(threshold, running)
        # what the prompts that have begun will still take is promised to them
        free = self.free - sum(limits.pages(one.own(one.known)) - self._pages_after(one) for one in running)
        for view in sorted(self.state.waiting, key=lambda view: view.rank):
            # pages that are kept from others need not be taken anew
            kept = limits.pages(view.hit) - view.hit_idle
            pages, rest = limits.pages(view.own(view.known)) - kept, view.expected - view.known
            if self.budget < 1 or pages > free:
                return
            # a prefix brings its members, the largest of them at least; where nobody runs, the first may go on
            fits = forecast.takes(0, rest, pages) if view.shares else forecast.takes(view.own(view.known), rest)
            if not fits and (running or self.admit):
                return
            if view.shares:
                forecast.keep(pages)
            else:
                forecast.add(view.own(view.known), rest)
            free -= pages
            self.admit.append(view.id)
            tokens = min(view.known - max(view.computed, view.hit), self.budget)
            self._give(view, tokens, pages)

    def set_aside(self, view: RequestView) -> None:
        """Its keys and values are forgotten; what it was given in this step is free again."""
        self.preempt[view.id] = Preempt(id=view.id, by="recompute")
        self.free += view.freeable + self.extra.pop(view.id, 0)
        self.budget += self.work.pop(view.id, 0)

    def _give(self, view: RequestView, tokens: int, pages: int) -> None:
        self.work[view.id], self.extra[view.id] = tokens, pages
        self.budget -= tokens
        self.free -= pages

    def _running(self) -> list[RequestView]:
        held = {view.id for view in self.state.held}
        return [view for view in self.queue if view.id not in held]

    def _forecast(self, threshold: float, running: Sequence[RequestView]) -> Forecast:
        limits = self.state.limits
        forecast = Forecast(threshold * self.state.total_pages, limits.page_tokens)
        for view in self.state.held:
            forecast.keep(view.pages)
        for view in running:
            if view.shares:
                forecast.keep(limits.pages(view.known))
            else:
                forecast.add(view.own(view.known), view.expected - view.known)
        return forecast

    def _pages_more(self, view: RequestView, tokens: int) -> int:
        return max(self.state.limits.pages(view.own(view.computed + tokens)) - view.pages, 0)

    def _pages_after(self, view: RequestView) -> int:
        """Pages that a running request holds once this step is done."""
        return max(self.state.limits.pages(view.own(view.computed + self.work.get(view.id, 0))), view.pages)

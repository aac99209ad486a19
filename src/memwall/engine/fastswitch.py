"""FastSwitch's scheduler: priorities that change while requests run, made cheap by few, overlapped, small copies.

Source: FastSwitch: Optimizing Context Switching Efficiency in Fairness-aware Large Language Model Serving, 2024, arXiv
2411.18424. Here are the decisions of a step: who runs (its fair scheduler) and which copies are waited for (its
adaptive rule). The copies, and what outlives them, are `switching`; block groups are `memory.page_groups`; priorities
are `priorities`.

Idea: everyone is sorted by priority, and runs from the top as long as pages last; the rest of those that run is swapped
out. Pages of those that come in move beside the steps of the others, as long as the others keep the machine busy; a
swap that is short against a step, or one without which the step would be too small, is waited for.

Units: pages, tokens, seconds. State in, step out; nothing is remembered between two calls.

Differs from the paper: its adaptive rule is not told in numbers; here a step waits when the copies are predicted to
take less than `short` of the last steps' mean time, or when those that compute are less than `busy` of those that
would with the swapped ones. Prompts come in chunks beside decoding. Where computing again is cheaper than moving, a
request is set aside without a copy. The first waiting one without room ends admission, but running ones below it go on
until their room is taken.

Cost: O(n log n) for n requests. Holds when: requests that are set aside have room in the swap area.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from memwall.engine.base import Preempt, RequestView, State, Step, Work
from memwall.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class FastSwitch:
    """overlap: whether copies may run beside steps. busy, short: see above. spare_pages: left free for each that runs
    when another is let in, so that it is not set aside again at once.
    """

    overlap: bool = True
    busy: float = 0.5
    short: float = 0.1
    spare_pages: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.busy <= 1 or self.short < 0 or self.spare_pages < 0:
            raise InputError(
                f"busy is {self.busy}, short {self.short}, spare_pages {self.spare_pages}; busy must be 0 to 1, the "
                "others not below 0"
            )

    def plan_step(self, state: State, now: float) -> Step:
        """See `Scheduler`."""
        plan = _Plan(state, self.spare_pages)
        plan.choose()
        if plan.preempt and any(view.hit for view in (*plan.fresh, *plan.joining)):
            # pages that one gives up may be the beginning that another takes: then they are not free
            plan = _Plan(state, self.spare_pages, hits_count=True)
            plan.choose()
        plan.share_tokens()
        if self._beside(plan):
            return plan.step(wait=False, overlap=self.overlap)
        plan.share_tokens(joining=True)
        return plan.step(wait=True, overlap=self.overlap)

    def _beside(self, plan: _Plan) -> bool:
        """Whether copies in run beside this step; decided anew for each."""
        joining = len(plan.joining) + len(plan.state.arriving)
        if not self.overlap or not joining:
            return False
        computing = len(plan.work)
        if not computing or computing < self.busy * (computing + joining):
            return False
        seconds = plan.pages_in * plan.state.costs.seconds_per_page
        return bool(plan.state.arriving) or seconds > self.short * plan.state.costs.seconds_per_step


@dataclass(slots=True)
class _Plan:
    """A step in the making. running: those that go on; joining: swapped ones, and waiting ones with a beginning in the
    swap area, that come in; fresh: waiting ones without. room: pages for those further down. hits_count: beginnings
    that are kept take room like other pages.
    """

    state: State
    spare_pages: int
    hits_count: bool = False
    room: int = 0
    swap_free: int = 0
    pages_in: int = 0
    running: list[RequestView] = field(default_factory=list)
    joining: list[RequestView] = field(default_factory=list)
    fresh: list[RequestView] = field(default_factory=list)
    preempt: list[Preempt] = field(default_factory=list)
    work: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        state = self.state
        self.room = state.free_pages + sum(view.freeable for view in state.running)
        self.swap_free = state.swap_free_pages

    def choose(self) -> None:
        """From the first down, as long as there is room."""
        state = self.state
        outside = {view.id for view in (*state.swapped, *state.waiting)}
        views = sorted((*state.running, *state.swapped, *state.waiting), key=lambda view: view.rank)
        open_, victims = state.free_pages >= 0, []
        for view in views:
            if view.id in outside:
                open_ = open_ and self._let_in(view)
            elif not self._keep(view):
                victims.append(view)
        for view in reversed(victims):  # those that go out last are back first
            self._set_aside(view)

    def share_tokens(self, *, joining: bool = False) -> None:
        """The step's tokens: one for each that decodes, then prompts by rank. joining: with those that come in."""
        state, left = self.state, self.state.limits.token_budget
        held = {view.id: view.restorable for view in self.joining}
        able = [*self.running, *self.fresh, *((*self.joining, *state.arriving) if joining else ())]
        self.work = {}
        for view in sorted(able, key=lambda view: (view.known - _begun(view, held) > 1, view.rank)):
            tokens = min(view.known - _begun(view, held), left, self._fitting(view))
            if tokens > 0:
                self.work[view.id] = tokens
                left -= tokens

    def step(self, *, wait: bool, overlap: bool) -> Step:
        """wait: for those that come in."""
        joining = tuple(view.id for view in self.joining)
        arriving = tuple(view.id for view in self.state.arriving)
        # a prompt that gets no token of this step is not let in before the next
        fresh = tuple(view.id for view in self.fresh if view.id in self.work)
        return Step(
            preempt=tuple(Preempt(id=one.id, by=one.by, wait=not overlap) for one in self.preempt),
            resume=(*arriving, *joining) if wait else (),
            fetch=() if wait else joining,
            admit=fresh,
            work=tuple(Work(id=number, tokens=tokens) for number, tokens in self.work.items()),
        )

    @property
    def _count(self) -> int:
        return len(self.running) + len(self.joining) + len(self.fresh) + len(self.state.arriving)

    def _keep(self, view: RequestView) -> bool:
        """Whether a running one goes on. The first may hold less than it wants: a budget may have shrunk below it."""
        limits = self.state.limits
        most = limits.pages(view.own(view.known))
        need = max(most, view.pages) - (view.pages - view.freeable)
        first = not self._count
        if need > self.room and first and view.freeable <= self.room and self._fits_some(view):
            need = self.room
        if need > self.room or self._count >= limits.max_sequences:
            return False
        self.room -= need
        self.running.append(view)
        return True

    def _fits_some(self, view: RequestView) -> bool:
        return (view.pages - view.freeable + self.room) * self.state.limits.page_tokens > view.computed

    def _fitting(self, view: RequestView) -> int:
        """Tokens that a request's pages hold if it is the only one and does not fit whole."""
        if self.room > 0 or len(self.running) != 1 or view is not self.running[0]:
            return view.known
        held = self.state.free_pages + view.pages + sum(v.freeable for v in self.state.running if v is not view)
        return held * self.state.limits.page_tokens - view.computed

    def _let_in(self, view: RequestView) -> bool:
        """Whether one that is swapped out, or waits, gets room."""
        limits = self.state.limits
        count = self._count
        need = limits.pages(view.own(view.known))
        if view.pages == 0 and not self.hits_count:  # it waits
            need += view.hit_idle - limits.pages(view.hit)
        spare = self.spare_pages * (count + 1) if count else 0
        if count >= limits.max_sequences or need + spare > self.room:
            return False
        self.room -= need
        moved = view.pages or max(view.restorable - view.hit, 0) // limits.page_tokens
        if view.pages or self._worth_reading(view, moved):
            self.pages_in += moved
            self.joining.append(view)
        else:
            self.fresh.append(view)
        return True

    def _worth_reading(self, view: RequestView, pages: int) -> bool:
        costs = self.state.costs
        computing = pages * self.state.limits.page_tokens * costs.seconds_per_token
        return pages > 0 and pages * costs.seconds_per_page < computing

    def _set_aside(self, view: RequestView) -> None:
        costs = self.state.costs
        moving = (2 * view.pages - view.clean) * costs.seconds_per_page
        swap = view.pages <= self.swap_free and moving < view.computed * costs.seconds_per_token
        if swap:
            self.swap_free -= view.pages
        self.preempt.append(Preempt(id=view.id, by="swap" if swap else "recompute"))


def _begun(view: RequestView, restored: dict[int, int]) -> int:
    """Tokens that need not be computed any more once the request runs."""
    if view.pages:
        return view.computed
    return max(view.computed, view.hit, restored.get(view.id, 0))

"""Planning for two workers over one pool of pages: prompts in one, tokens in the other, side by side.

A step plans for the workers that are idle and leaves what is under way alone. Whoever plans is also the only one who
hands out pages, so that two workers never race for one. A prompt that is done is handed over by its page numbers: the
decode worker goes on in the same pages.

`Split` has fixed shares and serves first come, first served: what the controllers are compared with.

Source: the request path of semi-PD (arXiv 2504.19867, section 4) and the two loops of Nexus (arXiv 2507.06608).
Differs from both: when pages run out, whoever came last is set aside as `fcfs` does it, by swapping or forgetting.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from memwall.engine.base import Phase, RequestView, Shares, State, Step
from memwall.engine.fcfs import Plan

Order = Callable[[RequestView], tuple[float, ...]]
FIRST_SHARES = Shares(prefill=50, decode=50)


def phase_of(view: RequestView) -> Phase:
    """Which worker a request is a matter for."""
    return "decode" if view.decodes else "prefill"


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Fixed shares. spare_pages: as in `fcfs`."""

    shares: Shares = FIRST_SHARES
    spare_pages: int = 1

    def plan_step(self, state: State, now: float) -> Step:
        """See `Scheduler`."""
        return plan_phases(state, self.spare_pages)


def plan_phases(state: State, spare_pages: int, order: Order | None = None, *, whole: bool = False) -> Step:
    """Work for the idle workers. order: of prompts, by default as they came; whole: only the first of them may be cut
    into chunks, and the first that does not fit ends the batch.
    """
    assert state.lanes is not None
    plan = PhasedPlan(state)
    plan.give_way()
    if "decode" in state.lanes.idle:
        plan.decode()
    if "prefill" in state.lanes.idle:
        plan.prefill(spare_pages, order or (lambda view: view.rank), whole=whole)
    return plan.step()


@dataclass(slots=True)
class PhasedPlan(Plan):
    """A step of two workers in the making."""

    flying: frozenset[int] = field(default_factory=frozenset)
    gone: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        super(PhasedPlan, self).__post_init__()
        assert self.state.lanes is not None
        self.flying = frozenset(work.id for work in self.state.lanes.flying)

    def give_way(self) -> None:
        """Requests that the budget no longer holds are set aside, those that came last first."""
        while self.free < 0 and (last := self._last_after(None)) is not None:
            self._drop(last)

    def decode(self) -> None:
        """A token for everyone who decodes. Those that were swapped out come back while nobody waits for room."""
        short = False
        for view in [view for view in self.running if view.decodes and view.id not in self.flying]:
            if view.id in self.gone:
                continue
            need = self._pages_more(view, 1)
            if need > self.free and not self._make_room(need, view):
                short = True
                continue
            self.free -= need
            self.work[view.id] = 1
        if not (short or self.preempt or self.free < 0):
            self._bring_back(self._by_rank("decode"))

    def prefill(self, spare_pages: int, order: Order, *, whole: bool) -> None:
        """Chunks of prompts that have begun, and of new ones whose whole prompt has room."""
        begun = {view.id for view in self.running}
        mine = [view for view in self.running if not view.decodes and view.id not in self.flying]
        swapped = {view.id for view in self.state.swapped}
        waiting = [*self.state.waiting, *(view for view in self.state.swapped if not view.decodes)]
        closed = bool(self.preempt) or self.free < 0
        for view in sorted((*mine, *waiting), key=order):
            if self.budget < 1 or (whole and self.work_of("prefill") and view.remaining - view.hit > self.budget):
                return
            if view.id in begun:
                if view.id not in self.gone:
                    self._go_on(view)
            elif not closed:
                closed = not self._begin(view, spare_pages, back=view.id in swapped)

    def work_of(self, phase: Phase) -> int:
        """Requests that a worker has in this step."""
        decoding = {view.id for view in (*self.running, *self.state.swapped) if view.decodes}
        return sum((number in decoding) == (phase == "decode") for number in self.work)

    def _by_rank(self, phase: Phase) -> list[RequestView]:
        return sorted((v for v in self.state.swapped if phase_of(v) == phase), key=lambda view: view.rank)

    def _bring_back(self, views: list[RequestView]) -> None:
        count = len(self.running)
        for view in views:
            pages = self.state.limits.pages(view.known)
            if count >= self.state.limits.max_sequences or pages + count + 1 > self.free:
                return
            self.free -= pages
            self.resume.append(view.id)
            self.work[view.id] = 1
            count += 1

    def _go_on(self, view: RequestView) -> None:
        tokens = min(view.remaining, self.budget)
        need = self._pages_more(view, tokens)
        if not self._make_room(need, view):
            fitting = (view.pages + max(self.free, 0)) * self.state.limits.page_tokens - view.computed
            tokens = min(tokens, fitting)
            if tokens < 1:
                return
            need = self._pages_more(view, tokens)
        self.work[view.id] = tokens
        self.budget -= tokens
        self.free -= need

    def _begin(self, view: RequestView, spare_pages: int, *, back: bool) -> bool:
        limits, count = self.state.limits, len(self.running) + len(self.admit) + len(self.resume)
        pages = limits.pages(view.known)
        if not back:
            pages += view.hit_idle - limits.pages(view.hit)
        # what the prompts that have begun will still take is promised to them
        promised = sum(limits.pages(one.known) - self._pages_after(one) for one in self.running if not one.decodes)
        spare = spare_pages * (count + 1) if count else 0
        if count >= limits.max_sequences or pages + spare + promised > self.free:
            return False
        self.free -= pages
        self.let_in(view, back=back, tokens=min(view.known - (view.computed if back else view.hit), self.budget))
        return True

    def _make_room(self, need: int, view: RequestView) -> bool:
        """Whether so many pages are free, those that came after `view` set aside if it must be.

        One that stands alone and has no room is set aside itself: it is computed again once there is.
        """
        while need > self.free and (last := self._last_after(view)) is not None:
            self._drop(last)
        if need > self.free and len(self.running) == 1 and not self.flying and view.decodes:
            self._drop(view)
        return need <= self.free and view.id not in self.gone

    def _last_after(self, view: RequestView | None) -> RequestView | None:
        for last in reversed(self.running):
            if view is not None and last.rank <= view.rank:
                return None
            if last.id not in self.flying and last.pages:
                return last
        return None

    def _drop(self, view: RequestView) -> None:
        self.running = [one for one in self.running if one.id != view.id]
        self.gone.add(view.id)
        self._set_aside(view)


def with_shares(step: Step, shares: Shares | None) -> Step:
    """The same step, with new shares if there are any."""
    return step if shares is None else replace(step, shares=shares)

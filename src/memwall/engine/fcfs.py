"""First come, first served, with chunked prefill: the scheduler that others are compared with.

Every running request that decodes gets its token first; what is left of the step's token budget goes to prompts, in
chunks, in the order of priority and arrival. When pages run out the request that came last is set aside; it comes back
before anyone who came after it. How it is set aside is a matter of cost: writing its pages to the swap area and reading
them again, or computing them again.

Source: iteration-level scheduling of Orca (Yu 2022, OSDI) with the stall-free chunks of Sarathi-Serve (Agrawal 2024,
arXiv 2403.02310, section 4); preemption as in PagedAttention (Kwon 2023, arXiv 2309.06180, section 4.5).
Differs from the papers: the choice between swapping and recomputing is made per request from measured costs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from memwall.engine.base import Preempt, RequestView, State, Step, Work


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstComeFirstServed:
    """spare_pages: pages left free when a request is admitted, for each that runs, so that it is not set aside again
    at once.
    """

    spare_pages: int = 1

    def plan_step(self, state: State, now: float) -> Step:
        """See `Scheduler`."""
        plan = Plan(state)
        plan.keep_running()
        if not plan.preempt and state.free_pages >= 0:
            plan.bring_in(self.spare_pages)
        return plan.step()


@dataclass(slots=True)
class Plan:
    """A step in the making."""

    state: State
    free: int = 0
    budget: int = 0
    swap_free: int = 0
    work: dict[int, int] = field(default_factory=dict)
    preempt: list[Preempt] = field(default_factory=list)
    resume: list[int] = field(default_factory=list)
    admit: list[int] = field(default_factory=list)
    running: list[RequestView] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.free = self.state.free_pages
        self.budget = self.state.limits.token_budget
        self.swap_free = self.state.swap_free_pages
        self.running = sorted(self.state.running, key=lambda view: view.rank)

    def step(self) -> Step:
        work = tuple(Work(id=number, tokens=tokens) for number, tokens in self.work.items() if tokens)
        return Step(preempt=tuple(self.preempt), resume=tuple(self.resume), admit=tuple(self.admit), work=work)

    def keep_running(self) -> None:
        """Tokens and pages for those that run; the last ones give way to the first ones."""
        wanted = self._shares()
        queue = list(self.running)
        while self.free < 0 and queue:  # the budget shrank
            self._set_aside(queue.pop())
        at = 0
        while at < len(queue):
            view = queue[at]
            need = self._pages_more(view, wanted[view.id])
            while need > self.free and len(queue) > at + 1:
                self._set_aside(queue.pop())
            if need > self.free:
                if view.growth is not None:  # all of it or none
                    self._set_aside(queue.pop())
                    continue
                fitting = (view.pages + max(self.free, 0)) * self.state.limits.page_tokens - view.computed
                if fitting < 1:  # alone and still no room
                    self._set_aside(queue.pop())
                    continue
                wanted[view.id] = min(wanted[view.id], fitting)
                need = self._pages_more(view, wanted[view.id])
            self.free -= need
            self.work[view.id] = wanted[view.id]
            at += 1
        self.running = queue
        self.budget -= sum(self.work.values())

    def bring_in(self, spare_pages: int) -> None:
        """Those set aside and those waiting, first come first served: the first that has no room ends it."""
        state, limits = self.state, self.state.limits
        swapped = {view.id for view in state.swapped}
        count = len(self.running)
        if self.budget < 1 or count >= limits.max_sequences:  # before a long queue is sorted
            return
        # what the prompts that have begun will still take is promised to them
        self.free -= sum(one.pages_at(one.known, limits) - self._pages_after(one) for one in self.running)
        for view in sorted((*state.swapped, *state.waiting), key=lambda view: view.rank):
            if self.budget < 1 or count >= limits.max_sequences:
                return
            back = view.id in swapped
            held = view.computed if back else view.hit
            tokens = min(view.known - held, self.budget) if view.growth is None else view.next_tokens(self.budget)
            if not tokens:
                return
            # a prompt comes in chunks, but only once all of it has room: else prompts would fill the pool half-way
            pages = view.pages_at(view.known, limits)
            if not back:
                pages += view.hit_idle - limits.pages(view.hit)
            spare = spare_pages * (count + 1) if count else 0
            if pages + spare > self.free:
                return
            self.free -= pages
            self.let_in(view, back=back, tokens=tokens)
            count += 1

    def let_in(self, view: RequestView, *, back: bool, tokens: int) -> None:
        """A waiting request runs from this step on; back: it was swapped out."""
        self.budget -= tokens
        (self.resume if back else self.admit).append(view.id)
        self.work[view.id] = tokens

    def _shares(self) -> dict[int, int]:
        """Tokens of the budget for each that runs: decoding first, then prompts by rank."""
        left = self.budget
        shares = {}
        for view in sorted(self.running, key=lambda view: (not view.decodes, view.rank)):
            shares[view.id] = view.next_tokens(left)
            left -= shares[view.id]
        return shares

    def _pages_more(self, view: RequestView, tokens: int) -> int:
        return max(view.pages_at(view.computed + tokens, self.state.limits) - view.pages, 0)

    def _pages_after(self, view: RequestView) -> int:
        """Pages that a running request holds once this step is done."""
        return max(view.pages_at(view.computed + self.work.get(view.id, 0), self.state.limits), view.pages)

    def _set_aside(self, view: RequestView) -> None:
        costs = self.state.costs
        moving = 2 * view.pages * costs.seconds_per_page
        swap = view.pages <= self.swap_free and moving < view.computed * costs.seconds_per_token
        if swap:
            self.swap_free -= view.pages
        self.preempt.append(Preempt(id=view.id, by="swap" if swap else "recompute"))
        self.free += view.freeable
        self.work.pop(view.id, None)

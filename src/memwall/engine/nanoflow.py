"""NanoFlow's batches: every step computes the same number of tokens, and nobody is let in whom memory will not hold.

Source: NanoFlow: Towards Optimal Large Language Model Serving Throughput, Zhu 2024, arXiv 2408.12757: batch formation
and asynchronous scheduling 4.4, memory prediction 4.4. Its other parts live beside this: batches formed while one is
computed in `ahead`, nano-batches that overlap in `nano_batches`, schedules in `nano_schedule`, cost model and search in
`simulate.nano_costs` and `simulate.nano_search`, caches of conversations off-loaded in `switching` and `staged`.

Idea: everyone who decodes comes first; what is left of the dense batch is filled with prompts, in chunks, to the last
token. A request is let in when the largest number of pages that all together will ever hold, each going on for the mean
answer's length and giving its pages back then, stays within memory. Where that was too hopeful, the one that came last
is written to the swap area, never computed again.

Units and shapes: tokens, pages, seconds. State in, step out; nothing is remembered between two calls.

Differs from the paper: requests that tell what they expect are believed before the mean. Where the swap area has no
room, a request is computed again after all.

Cost: O(n log n) for n requests. Holds when: answers are about as long as expected; the dense batch is the limits'
`token_budget`, and requests wait.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from memwall.engine.base import Preempt, RequestView, State, Step
from memwall.engine.fcfs import Plan
from memwall.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class NanoFlow:
    """mean_output: tokens of a usual answer; None takes what each request may make at most. most_memory: share of all
    pages that the predicted peak may take.
    """

    mean_output: float | None = None
    most_memory: float = 1.0

    def __post_init__(self) -> None:
        if self.mean_output is not None and not self.mean_output > 0:
            raise InputError(f"mean_output is {self.mean_output}; it must be above 0 tokens")
        if not 0 < self.most_memory <= 1:
            raise InputError(f"most_memory is {self.most_memory}; it must be above 0 and at most 1")

    def plan_step(self, state: State, now: float) -> Step:
        """See `Scheduler`."""
        plan = _Plan(state)
        plan.keep_running()
        if not plan.preempt and state.free_pages >= 0:
            plan.fill(self)
        return plan.step()

    def remaining(self, view: RequestView) -> int:
        """Tokens that a request is expected still to make."""
        if view.expected_tokens or self.mean_output is None:
            return view.expected - view.known
        made = view.known - view.prompt
        # one that has outgrown the mean is taken to be half-way
        left = self.mean_output - made if made < self.mean_output else made
        return max(min(round(left), view.most_tokens - view.known), 0)


def peak_pages(requests: Iterable[tuple[int, int]], page_tokens: int) -> int:
    """The most pages that requests will hold at one moment. Of each: tokens it has, tokens it is still to make.

    All make a token at a time; whoever is done gives its pages back, so that it is fullest when one of them ends.
    """
    most = held = count = 0
    for tokens, left in sorted(requests, key=lambda one: -one[1]):
        held, count = held + tokens, count + 1
        # a last page is half empty at most moments; it is counted whole
        most = max(most, (held + count * left) // page_tokens + count)
    return most


@dataclass(slots=True)
class _Plan(Plan):
    """A step in the making: what runs as in `fcfs`, but whoever gives way is swapped. coming: whose pages are read."""

    coming: list[int] = field(default_factory=list)

    def step(self) -> Step:
        """Pages come in beside the step, unless there is nothing else to do."""
        step = super(_Plan, self).step()
        return replace(step, fetch=tuple(self.coming)) if step.work else replace(step, resume=tuple(self.coming))

    def fill(self, policy: NanoFlow) -> None:
        """Lets in whoever fits the predicted peak, first come first served, until the batch is full."""
        state, limits = self.state, self.state.limits
        swapped = {view.id for view in state.swapped}
        most = int(policy.most_memory * state.total_pages)
        going = [(view.known, policy.remaining(view)) for view in (*self.running, *state.arriving)]
        count = len(going)
        for view in sorted((*state.swapped, *state.waiting), key=lambda view: view.rank):
            if self.budget < 1 or count >= limits.max_sequences:
                return
            back = view.id in swapped
            read = view.computed if back else view.restorable if view.restorable > view.hit else 0
            tokens = 0 if read else min(view.known - view.hit, self.budget)
            pages = limits.pages(read or view.hit + tokens)
            if not back:
                pages += view.hit_idle - limits.pages(view.hit)
            coming = [*going, (view.known, policy.remaining(view))]
            # one that is alone is let in whatever was predicted: nobody else will give it more room
            if pages > self.free or (count and peak_pages(coming, limits.page_tokens) > most):
                return
            self.free -= pages
            going, count = coming, count + 1
            if read:
                self.coming.append(view.id)
            else:
                self.let_in(view, back=False, tokens=tokens)

    def _set_aside(self, view: RequestView) -> None:
        swap = view.pages <= self.swap_free
        if swap:
            self.swap_free -= view.pages
        self.preempt.append(Preempt(id=view.id, by="swap" if swap else "recompute"))
        self.free += view.freeable
        self.work.pop(view.id, None)

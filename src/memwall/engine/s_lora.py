"""S-LoRA's scheduler: requests of many adapters over one base, admitted only if all of them can run to their ends.

Source: S-LoRA: Serving Thousands of Concurrent LoRA Adapters, Sheng 2023, arXiv 2311.03285; adapter clustering 4.2,
admission control (early abort) 4.3, unified paging 5.1, prefetching 5.2; constants from the released code.

Idea: adapters and cache share one pool of pages. A request is let in if the largest number of pages that all running
ones will ever hold at once, each growing to its last token, fits beside the pages of their adapters; so a batch never
runs out of pages on its way. What waits next tells which adapters to read ahead. Under more load than can be served,
those that came last are served first and those that would miss their time to the first token end at once.

Units: pages, tokens, seconds. State in, step out; averages over time come with the state (`Pace`).

Differs from the paper: prompts come in chunks beside decoding rather than in steps of their own, so the peak is taken
over all moments at which a prompt may end (equal to the paper's formula where none is under way). A budget that shrinks
may still set requests aside.

Cost: O(n^2) for n running requests, per candidate. Adapters of rank r take 4 r slots where keys are as wide as the
hidden size, more where they are narrower (`models.lora`).

Holds when: every request tells the most tokens it may make; one that asks for the whole context reserves it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from memwall.engine.base import Limits, RequestView, State, Step
from memwall.engine.fcfs import Plan
from memwall.errors import InputError

FIRST_TOKEN_SECONDS = 6.0
MARGIN_SECONDS = 0.5
"""Of the released code: a request that has waited this near to the limit is lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SLora:
    """most_adapters: distinct ones in a batch before requests of those in it are preferred (None: never). read_ahead:
    adapters of waiting requests that are read before their turn. abort: drop what would miss first_token_seconds.
    """

    most_adapters: int | None = None
    read_ahead: int = 8
    abort: bool = False
    first_token_seconds: float = FIRST_TOKEN_SECONDS
    margin_seconds: float = MARGIN_SECONDS

    def __post_init__(self) -> None:
        if self.most_adapters is not None and self.most_adapters < 1:
            raise InputError(f"most_adapters is {self.most_adapters}; it must be at least 1, or None for any number")
        if self.read_ahead < 0 or self.first_token_seconds <= 0:
            raise InputError("read_ahead must not be negative, and first_token_seconds be above zero")

    def plan_step(self, state: State, now: float) -> Step:
        """See `Scheduler`."""
        lost = self._lost(state, now)
        plan = Plan(state)
        plan.keep_running()
        room = self.room(state, plan.running)
        if not plan.preempt and state.free_pages >= 0:
            left = [view for view in self._order(state, lost) if not self._let_in(plan, room, view)]
        else:
            left = list(self._order(state, lost))
        step = replace(plan.step(), abort=tuple(sorted(lost)))
        return replace(step, prefetch=self._expected(state, room, left)) if self.read_ahead else step

    def room(self, state: State, running: list[RequestView]) -> Room:
        """What is left for more."""
        return Room(state, running)

    def _lost(self, state: State, now: float) -> set[int]:
        """Requests that wait for their first token and can no longer have it in time."""
        if not self.abort:
            return set()
        latest = now + self.margin_seconds - self.first_token_seconds
        return {view.id for view in state.waiting if view.known == view.prompt and view.arrival <= latest}

    def _order(self, state: State, lost: set[int]) -> Iterator[RequestView]:
        """First those of adapters at hand, once there are too many in the batch; all others as they came."""
        queue = sorted(
            (view for view in (*state.swapped, *state.waiting) if view.id not in lost), key=lambda view: view.rank
        )
        if self.abort and state.pace.arrived >= state.pace.admitted:  # it grows faster than it is served
            queue.sort(key=lambda view: (view.priority, -view.arrival, -view.id))
        if self.most_adapters is None:
            yield from queue
            return
        inside = {view.adapter for view in state.running if view.adapter is not None}
        later = []
        for view in queue:
            if view.adapter is not None and view.adapter not in inside and len(inside) >= self.most_adapters:
                later.append(view)
                continue
            if view.adapter is not None:
                inside.add(view.adapter)
            yield view
        yield from later

    def _let_in(self, plan: Plan, room: Room, view: RequestView) -> bool:
        """Whether the request runs from this step on. The first that has no room ends it for all behind it."""
        limits, back = plan.state.limits, bool(view.pages)
        if room.full or plan.budget < 1 or len(room.running) >= limits.max_sequences or not room.takes(view):
            room.full = True
            return False
        room.add(view)
        plan.let_in(view, back=back, tokens=min(view.known - (view.computed if back else view.hit), plan.budget))
        return True

    def _expected(self, state: State, room: Room, left: list[RequestView]) -> tuple[str, ...]:
        """Adapters of those that wait, in the order of service, as far as pages are left that nobody will need."""
        inside, spare = room.adapters, room.spare_pages
        found: list[str] = []
        for name in dict.fromkeys(view.adapter for view in left):
            if len(found) == self.read_ahead:
                break
            if name is None or name in inside:
                continue
            spare -= room.pages_of[name]
            if spare < 0:
                break
            found.append(name)
        return tuple(found)


class Room:
    """Pages that running requests and their adapters come to need."""

    def __init__(self, state: State, running: list[RequestView]) -> None:
        self.limits: Limits = state.limits
        self.total_pages = state.total_pages
        self.running = list(running)
        self.pages_of = {view.name: view.pages for view in state.adapters}
        self.full = False

    @property
    def adapters(self) -> set[str]:
        """Those in use."""
        return {view.adapter for view in self.running if view.adapter is not None}

    @property
    def spare_pages(self) -> int:
        """Pages that are never needed by what runs."""
        held = sum(self.pages_of[name] for name in self.adapters)
        return self.total_pages - held - peak_pages(self.running, self.limits)

    def takes(self, view: RequestView) -> bool:
        """Whether a request can run to its end beside the others. Where nothing runs, the first one goes on anyhow."""
        if not self.running:
            return True
        after = [*self.running, view]
        names = {one.adapter for one in after if one.adapter is not None}
        held = sum(self.pages_of[name] for name in names)
        return peak_pages(after, self.limits) + held <= self.total_pages

    def add(self, view: RequestView) -> None:
        """It runs."""
        self.running.append(view)


def peak_pages(running: list[RequestView], limits: Limits) -> int:
    """The most pages that these ever hold at once, if nobody ends early.

    Requests that decode grow by a token a step. With c tokens so far and o to come, sorted by o descending, the peak
    over the moments at which one ends is max_k sum_{j <= k} pages(c_j + o_k). A prompt under way begins to grow up to
    `late` steps later, so it may hold its last page until then.
    """
    prefill = [view.known - max(view.computed, view.hit) for view in running if not _decodes(view)]
    each_step = max(limits.token_budget - len(running) + 1, 1)  # the last prompt may have all others decode beside it
    late = -(-sum(prefill) // each_step)
    ends = [view.most_tokens - view.known + (0 if _decodes(view) else late) for view in running]
    grown = [(end, view.known, view.most_tokens) for end, view in zip(ends, running)]
    return max(
        (
            sum(limits.pages(min(known + end, most)) for other, known, most in grown if other >= end)
            for end in set(ends)
        ),
        default=0,
    )


def _decodes(view: RequestView) -> bool:
    return view.computed > 0 and view.remaining <= 1

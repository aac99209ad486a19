"""The step loop of many requests: asks a scheduler, carries its decision out, hands new tokens to whoever asked.

All that decides lives in the scheduler, all that computes in the executor; here is the bookkeeping between them, the
same for the engine with a model and for the simulator. One thread only: `Engine` has no lock.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from memwall.engine.adapters import Adapters
from memwall.engine.base import Costs, Limits, Pace, Preempt, RequestView, Scheduler, State, Step, Work
from memwall.engine.executor import Entry, Executor, Output, Totals
from memwall.engine.kv_pages import KVPages
from memwall.engine.priorities import Priorities, Ranking
from memwall.engine.sequence import Event, FinishReason, Request, Sequence
from memwall.engine.shared import SharedPrefixes, orphans
from memwall.engine.swap import SwapArea
from memwall.engine.switching import Switcher
from memwall.errors import BudgetExceeded, InputError, MemwallError
from memwall.memory import OutOfPages

SMOOTHING = 0.2
"""Weight of the newest measurement in the running costs."""
PACE_SMOOTHING = 0.7
"""The same for arrivals and admissions (S-LoRA's code)."""
log = logging.getLogger("memwall.engine")


class Engine:
    """Requests over a pool of pages. `step` until `busy` is false; events tell what came out."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        pages: KVPages,
        *,
        limits: Limits,
        context_tokens: int,
        eos: tuple[int, ...] = (),
        switch: Switcher | None = None,
        costs: Costs | None = None,
        adapters: Adapters | None = None,
        priorities: Priorities | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """switch: None where nothing can be swapped out. costs: fixed ones; None measures them. adapters: what
        `Request.adapter` may name. priorities: None for those of the requests alone.
        """
        self.scheduler = scheduler
        self.executor = executor
        self.pages = pages
        self.limits = limits
        self.context_tokens = context_tokens
        self.eos = eos
        self.switch = switch or Switcher(pages, SwapArea(pages.pool, 0))
        self.switch.learn = self._learn_pages
        self.priorities = Ranking(priorities)
        self.adapters = adapters
        self.pace = Pace()
        self._arrived = 0
        self.costs = costs or Costs()
        self._measures = costs is None
        self.clock = clock
        self.totals = Totals()
        self.running: dict[int, Sequence] = {}
        self.waiting: dict[int, Sequence] = {}
        self.swapped: dict[int, Sequence] = {}
        self.shared = SharedPrefixes(pages)
        self.wanted_pages = pages.pool.limit_pages
        self.observer: Callable[[State, Step], None] | None = None
        self.wakes_at: float | None = None
        """When something else comes up (the next arrival of a replay): no step waits beyond it."""
        self._next_id = 0
        self._untold: list[Event] = []

    # ---- requests --------------------------------------------------------------------------------------------------

    @property
    def swap(self) -> SwapArea:
        """Where requests that were set aside keep their pages."""
        return self.switch.area

    @property
    def busy(self) -> bool:
        """Whether a request is not over."""
        return bool(self.everyone())

    @property
    def in_flight(self) -> bool:
        """Whether something is being computed between two steps."""
        return False

    def wake(self) -> None:
        """Ends the wait of a step that goes on; any thread may."""

    def drain(self) -> list[Event]:
        """Waits until nothing is computed between steps."""
        return []

    @property
    def num_requests(self) -> int:
        """Requests that are not over."""
        return len(self.everyone())

    def check(self, request: Request) -> None:
        """InputError when the request could never run."""
        if len(request.prompt) >= self.context_tokens:
            raise InputError(
                f"the prompt has {len(request.prompt):,} tokens, but the context is {self.context_tokens:,} and at "
                f"least one must be left for the answer; shorten it to {self.context_tokens - 1:,}"
            )
        if self.adapters is not None:
            self.adapters.check(request.adapter)

    def submit(self, request: Request, arrival: float | None = None, number: int | None = None) -> Sequence:
        """A request enters the queue. number: its id, where the caller counts."""
        self.check(request)
        arrival = self.clock() if arrival is None else arrival
        number = self._next_id if number is None else number
        if self.adapters is not None and request.adapter is not None:
            request = replace(request, salt=self.adapters.salt(request.adapter, request.salt))
        sequence = Sequence(id=number, request=request, arrival=arrival, eos=self.eos)
        self.shared.enter(sequence)
        if self.adapters is not None and request.adapter is not None:
            self.adapters.open(request.adapter)
        self._next_id = max(self._next_id, number) + 1
        self._arrived += 1
        self.waiting[sequence.id] = sequence
        self.priorities.newcomers = True
        self.totals.prompt_tokens += 0 if request.members else sequence.num_prompt
        return sequence

    def cancel(self, number: int) -> Event | None:
        """Ends a request wherever it is and frees what it holds; None when it is over already."""
        return next((self._finish(one, "cancelled") for one in self.everyone() if one.id == number), None)

    def abandon(self) -> list[Event]:
        """Ends all requests after a fault that nobody foresaw; what they held is free again. Events of the step that
        failed come first.
        """
        # members first: a prefix that ends before them sends them to the queue
        everyone = sorted(self.everyone(), key=lambda one: one.request.members > 0)
        events, self._untold = self._untold, []
        events += [self._finish(one, "error") for one in everyone]
        for prefix in list(self.shared.held.values()):  # members that never came
            self._drop_prefix(prefix)
        return events

    # ---- steps -----------------------------------------------------------------------------------------------------

    def step(self) -> list[Event]:
        """One decision and what follows from it."""
        events = self._untold = []  # of a step that fails half-way, `abandon` tells
        self._advance(events)
        self._untold = []
        return events

    def _advance(self, events: list[Event]) -> None:
        now = self.clock()
        events += self._expire(now)
        events += self._land()
        self.fit_limit()
        if self.priorities.update(self.totals.steps, self.everyone()):
            for one in self.waiting.values():
                one.view = None
        state = self.snapshot()
        step = self.scheduler.plan_step(state, now)
        if self.observer is not None:
            self.observer(state, step)
        events += [self._finish(self.waiting[number], "aborted") for number in step.abort]
        try:
            events += self._rearrange(state, step, now)
            self.fit_limit()
            batch = self._entries(step)
        except BudgetExceeded:  # the process grew elsewhere
            self._keep_to_what_is_there()
            return
        if not batch:
            return
        self.switch.counts.steps_during += self.switch.active
        began = self.clock()
        outputs = self.executor.run(batch)
        self._learn(batch, self.clock() - began)
        self.totals.count(batch)
        now = self.clock()
        for entry, output in zip(batch, outputs, strict=True):
            event = self._computed(entry, output, now)
            if event is not None:
                events.append(event)

    def _keep_to_what_is_there(self) -> None:
        self.wanted_pages = self.pages.pool.committed_bytes // self.pages.pool.page_bytes

    def snapshot(self) -> State:
        """What the scheduler sees."""
        short = self.wanted_pages - self.pages.pool.limit_pages  # a shrunken budget that is not yet reached
        return State(
            running=tuple(self._view(one) for one in self.running.values()),
            waiting=tuple(self._waiting_view(one) for one in self.waiting.values() if one.ready),
            swapped=tuple(self._view(one) for one in self.swapped.values() if one.status == "swapped"),
            arriving=tuple(self._view(one) for one in self.swapped.values() if one.status == "arriving"),
            held=tuple(self._view(one) for one in self.shared.held.values()),
            free_pages=self.pages.available_pages + min(short, 0),
            total_pages=self.wanted_pages,
            swap_free_pages=self.switch.free_pages,
            limits=self.limits,
            costs=self.costs,
            adapters=() if self.adapters is None else self.adapters.views(r.request.adapter for r in self.everyone()),
            pace=replace(self.pace, arrived=_blend(self.pace.arrived, self._arrived, PACE_SMOOTHING)),
        )

    def _view(self, one: Sequence) -> RequestView:
        return RequestView(
            id=one.id,
            arrival=one.arrival,
            priority=one.request.priority,
            level=one.level,
            prompt=one.num_prompt,
            known=len(one.tokens),
            computed=one.computed,
            most_tokens=min(one.most_tokens, self.context_tokens),
            pages=len(one.pages) or self.limits.pages(one.computed - one.base),
            freeable=self.pages.freeable(one.pages),
            clean=0 if one.copy is None else one.copy.clean,
            session=one.request.session,
            adapter=one.request.adapter,
            prefix=None if one.parent is None else one.parent.id,
            base=one.base,
            shares=one.left,
            expected_tokens=one.request.expected_tokens,
            growth=one.growth,
        )

    def _waiting_view(self, one: Sequence) -> RequestView:
        if one.view is None or (one.version != self.pages.version and not self.switch.still_unknown(one)):
            hits = self._hits(one)
            idle, restorable = sum(self.pages.is_idle(page) for page in hits), self.switch.restorable(one)
            found = (len(hits) * self.pages.page_tokens, idle, restorable)
            if one.view is None or (one.view.hit, one.view.hit_idle, one.view.restorable) != found:
                one.view = replace(self._view(one), hit=found[0], hit_idle=idle, restorable=restorable)
            one.version = self.pages.version
        return one.view

    def _hits(self, one: Sequence) -> list[int]:
        """Pages of its beginning that are there; one token at least stays to be computed, for its logits."""
        if not self._digested(one):
            return []
        return self.pages.find(one.digests_of(len(one.tokens) - 1, self.pages.page_tokens))

    def fit_limit(self) -> None:
        """Moves the pool's limit towards the wanted one, as far as what is held allows."""
        pool = self.pages.pool
        if self.wanted_pages == pool.limit_pages:
            return
        if pool.used_pages > self.wanted_pages:
            self.switch.settle()
        self.pages.forget(pool.used_pages - self.wanted_pages)
        limit = max(self.wanted_pages, pool.used_pages)
        if limit != pool.limit_pages:
            if self.adapters is not None:
                self.adapters.settle()
            self.switch.settle()
            moves = pool.set_limit(limit)
            self.pages.moved(moves)
            self.shared.moved(moves)
            if self.adapters is not None:
                self.adapters.moved(moves)
            for one in (*self.running.values(), *self.swapped.values()):
                one.pages = [moves.get(page, page) for page in one.pages]

    def _rearrange(self, state: State, step: Step, now: float) -> list[Event]:
        for preempt in step.preempt:
            held = preempt.id in self.shared.held
            one = self.shared.take_back(preempt.id) if held else self.running.pop(preempt.id)
            self._set_aside(one, preempt)
        hits = {view.id: view.hit for view in state.waiting}
        for number in step.admit:  # beginnings first: pages taken below might be theirs
            self._admit(self.waiting.pop(number), hits[number], now)
        for number in (*step.fetch, *step.resume):
            self._bring_back(number, hits, now)
        for number in step.resume:
            if number in self.swapped:  # else nothing of it was left to be read
                self.switch.wait_for(self.swapped[number])
        self.switch.counts.overlapped += len(step.fetch)
        self.switch.counts.waited += len(step.resume)
        if step.admit:
            arrived = _blend(self.pace.arrived, self._arrived, PACE_SMOOTHING)
            admitted = _blend(self.pace.admitted, len(step.admit), PACE_SMOOTHING)
            self.pace, self._arrived = Pace(arrived=arrived, admitted=max(admitted, 1.0)), 0
        events = self._land()
        events += [event for number in step.admit if (event := self._hold_adapter(number)) is not None]
        if self.adapters is not None:
            self.adapters.prefetch(step.prefetch)
        return events

    def _hold_adapter(self, number: int) -> Event | None:
        """The adapter of a request that begins to run; without room it waits on, and without a file it ends."""
        one = self.running.get(number)
        if self.adapters is None or one is None or one.request.adapter is None:
            return None
        try:
            self.adapters.acquire(one.request.adapter)
        except (OutOfPages, BudgetExceeded) as error:
            del self.running[number]
            self._start_over(one)
            if isinstance(error, BudgetExceeded):
                self._keep_to_what_is_there()
            return None
        except MemwallError:
            log.warning("request %d ends: its adapter cannot be read", number, exc_info=True)
            return self._finish(one, "error")
        one.holds_adapter = True
        return None

    def _let_adapter_go(self, one: Sequence) -> None:
        if one.holds_adapter and self.adapters is not None and one.request.adapter is not None:
            self.adapters.release(one.request.adapter)
            one.holds_adapter = False

    def _set_aside(self, one: Sequence, preempt: Preempt) -> None:
        one.preemptions += 1
        one.view = None
        self._let_adapter_go(one)
        one.status = "swapped"
        swapped = preempt.by == "swap" and self.switch.out(one, wait=preempt.wait)
        self.totals.preempted["swap" if swapped else "recompute"] += 1
        if swapped:
            self.swapped[one.id] = one
        else:
            self._start_over(one)

    def _start_over(self, one: Sequence) -> None:
        """Back to the queue without keys and values."""
        self._let_adapter_go(one)
        self.switch.start_over(one)
        one.computed, one.registered = one.base, 0
        one.status, one.view = "waiting", None
        self.waiting[one.id] = one

    def _bring_back(self, number: int, hits: dict[int, int], now: float) -> None:
        """Pages of one that was swapped out, or the beginning of one that waits, are on their way; unless they are."""
        if number in self.waiting:
            self._admit(self.waiting.pop(number), hits[number], now, restore=True)
        elif self.swapped[number].status == "swapped":
            one = self.swapped[number]
            one.registered = 0
            with suppress(OutOfPages):  # the system has no place for them now: it stays where it is
                self.switch.back(one, self.limits.pages(one.computed - one.base))

    def _land(self) -> list[Event]:
        """Requests whose pages are here run from now on; those whose pages are lost begin anew."""
        told = self.switch.poll()
        for one in told.lost:
            self.swapped.pop(one.id, None)
            self._start_over(one)
        for one in told.arrived:
            self.running[one.id] = self.swapped.pop(one.id)
            one.status = "running"
        return [event for one in told.arrived if (event := self._hold_adapter(one.id)) is not None]

    def _admit(self, one: Sequence, hit: int, now: float, *, restore: bool = False) -> None:
        pages = self._hits(one)[: hit // self.pages.page_tokens]
        pages = self.pages.acquire(pages, one.id, self.limits.pages(len(one.tokens)))
        one.status, one.registered = "running", len(pages)
        self.switch.admit(one, pages, restore=restore)
        one.computed = max(len(one.pages) * self.pages.page_tokens, one.base)
        if one.admitted is None:
            one.admitted, one.cached = now, one.computed
            self.totals.prefix_queries += one.num_prompt
            self.totals.prefix_hits += one.computed
        (self.swapped if one.status == "arriving" else self.running)[one.id] = one

    def _entries(self, step: Step) -> list[Entry]:
        """Work of the step. One whose pages an adapter took, which its scheduler did not count, waits for the next."""
        found = []
        for work in step.work:
            if work.id in self.running:
                with suppress(OutOfPages):
                    found.append(self._entry(work))
        return found

    def _entry(self, work: Work) -> Entry:
        one = self.running[work.id]
        end = one.computed + work.tokens
        assert 0 < work.tokens <= len(one.tokens) - one.computed
        more = self._pages_behind(one, end) - len(one.pages)
        if more > 0:
            one.pages += self.pages.take(more, owner=one.id)
        return Entry(one, one.computed, work.tokens, end == len(one.tokens) and not one.request.members)

    def _pages_behind(self, one: Sequence, tokens: int) -> int:
        """Pages of its own that it needs for its first `tokens`."""
        return self.limits.pages(tokens - one.base)

    def _computed(self, entry: Entry, output: Output | None, now: float) -> Event | None:
        one = entry.sequence
        one.computed += entry.count
        self.priorities.served(one, entry.first, output is not None)
        self._register(one)
        if one.request.members and one.computed == one.num_prompt:
            self.shared.hold(self.running.pop(one.id))
        if output is None:
            return None
        if one.first_token is None:
            one.first_token = now
        one.last_token = now
        if output.vector is not None or (output.token in one.eos and not one.request.sampling.ignore_eos):
            return replace(self._finish(one, "stop"), vector=output.vector)
        one.tokens.append(output.token)
        self.totals.made_tokens += 1
        event = Event(id=one.id, token=output.token, logprobs=output.logprobs, cached_tokens=one.cached)
        end = one.end(output.token, self.context_tokens)
        if end is not None:
            self._finish(one, end)
            event = replace(event, finish=end)
        return event

    def _digested(self, one: Sequence) -> bool:
        """Whether its pages can be found by their digests; those of a batch whose sharing is planned need not be."""
        return self.pages.keep_prefixes and one.parent is None and not one.request.members

    def _register(self, one: Sequence) -> None:
        # most tokens fill no page: nothing to look up for them
        if one.computed // self.pages.page_tokens > one.registered and self._digested(one):
            digests = one.digests_of(one.computed, self.pages.page_tokens)
            for at in range(one.registered, len(digests)):
                self.pages.register(one.pages[at], digests[at])
            one.registered = len(digests)

    def _finish(self, one: Sequence, why: FinishReason) -> Event:
        for group in (self.running, self.waiting, self.swapped):
            group.pop(one.id, None)
        self.switch.over(one, whole=one.status == "running" and why in ("stop", "length"))
        self._let_adapter_go(one)
        if self.adapters is not None and one.request.adapter is not None:
            self.adapters.close(one.request.adapter)
        one.status, one.finish, one.finished = "finished", why, self.clock()
        self.totals.finished[why] += 1
        self.executor.forget(one)
        self._end_sharing(one)
        return Event(id=one.id, finish=why, cached_tokens=one.cached)

    def _end_sharing(self, one: Sequence) -> None:
        """The last member frees its prefix; members of a prefix that ended before them begin anew, each for itself."""
        prefix = self.shared.member_over(one)
        if prefix is not None:
            self._drop_prefix(prefix)
        if one.request.members:
            self.shared.forget(one)
            for member in orphans(one, [*self.running.values(), *self.waiting.values()]):
                member.parent = None
                self.running.pop(member.id, None)
                self._start_over(member)

    def _drop_prefix(self, prefix: Sequence) -> None:
        self.running.pop(prefix.id, None)
        self.waiting.pop(prefix.id, None)
        self.pages.release(prefix.pages)
        prefix.pages, prefix.status = [], "finished"
        self.shared.forget(prefix)

    def everyone(self) -> list[Sequence]:
        """Requests that are not over."""
        return [*self.running.values(), *self.waiting.values(), *self.swapped.values()]

    def _expire(self, now: float) -> list[Event]:
        return [self._finish(one, "cancelled") for one in self._late(now)]

    def _late(self, now: float) -> list[Sequence]:
        """Those whose time is up."""
        return [one for one in self.everyone() if one.request.until is not None and one.request.until < now]

    def _learn(self, batch: list[Entry], seconds: float) -> None:
        tokens = sum(entry.count for entry in batch)
        if self._measures:
            self.costs = replace(self.costs, seconds_per_step=_blend(self.costs.seconds_per_step or seconds, seconds))
        if self._measures and tokens >= 2 * len(batch):  # a step that is mostly prompt tells what a prompt costs
            self.costs = replace(self.costs, seconds_per_token=_blend(self.costs.seconds_per_token, seconds / tokens))

    def _learn_pages(self, count: int, seconds: float) -> None:
        if self._measures and count:
            self.costs = replace(self.costs, seconds_per_page=_blend(self.costs.seconds_per_page, seconds / count))


def _blend(old: float, new: float, share: float = SMOOTHING) -> float:
    return (1 - share) * old + share * new

"""The step loop over two workers with a memory each: prompts are computed in one, pulled, and go on in the other.

A request is in one of four places, and its pages with it: on the prefill side; `offered`, done there and still in its
pages; being pulled, with pages on both sides; on the decode side. The engine here is the decode side with its pages and
swap area; `front` is the prefill side. One process does the books of both, so that no page is ever given twice; the
workers compute, and the decode worker copies what it pulls before its next batch.

A worker that is lost is made anew. Its batch and its pulls are done again: a prompt's own pages are freed only once the
copy is known to be whole. Forked workers leave the memory behind when they end; one on another machine takes it along
(`Done.emptied`), and what was there is computed again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as Batch
from dataclasses import dataclass, replace
from typing import Any

from memwall.engine.adapters import Adapters
from memwall.engine.base import Limits, Phase, RequestView
from memwall.engine.distserve import DistServe, Offer
from memwall.engine.executor import Entry
from memwall.engine.hand_over import Pull, pulls_of
from memwall.engine.kv_pages import KVPages
from memwall.engine.phased import Done, PhasedEngine, Workers
from memwall.engine.sequence import Event, FinishReason, Request, Sequence
from memwall.errors import BudgetExceeded, MemwallError
from memwall.memory import OutOfPages

log = logging.getLogger("memwall.engine")


@dataclass(slots=True)
class Moves:
    """Prompts handed over since the start, their bytes, the seconds of the copies, and pulls done again."""

    requests: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    again: int = 0


class PrefillSide(PhasedEngine):
    """Prompts, and those of the other side that must be computed again."""

    phases = ("prefill",)

    def _view(self, one: Sequence) -> RequestView:
        """All that is known is to be computed here, tokens that were made before too."""
        return replace(super()._view(one), prompt=len(one.tokens))


class ApartEngine(PhasedEngine):
    """Requests over two pools of pages and two workers. `pages`, `limits`: of the decode side."""

    phases = ("decode",)

    def __init__(
        self,
        scheduler: DistServe,
        workers: Workers,
        pages: KVPages,
        *,
        limits: Limits,
        context_tokens: int,
        front_pages: KVPages,
        front_limits: Limits,
        front_adapters: Adapters | None = None,
        **others: Any,
    ) -> None:
        """front_limits: their token budget is what a batch of prompts comes near to. front_adapters: a mirror of
        `adapters` over the front's pages. others: as for `PhasedEngine`.
        """
        super().__init__(scheduler, workers, pages, limits=limits, context_tokens=context_tokens, **others)
        shared = {name: others[name] for name in ("eos", "costs", "clock", "window") if name in others}
        self.front = PrefillSide(
            scheduler, workers, front_pages, limits=front_limits, context_tokens=context_tokens,
            adapters=front_adapters, **shared,
        )  # fmt: skip
        self.front.totals, self.front._doomed = self.totals, self._doomed
        self.rule = scheduler
        self.offered: dict[int, Sequence] = {}
        """Prompts that are done and wait for room, in the order in which they were."""
        self.moves = Moves()
        self._pulling: dict[int, tuple[Sequence, list[int]]] = {}
        self._sourceless: set[int] = set()
        self._unread: list[Event] = []

    def fill(self, tokens: int) -> None:
        """Batches of prompts come near so many tokens from now on (`saturation`), and never above what fits a step."""
        self.front.limits = replace(self.front.limits, token_budget=min(tokens, self.front.limits.token_budget))

    # ---- requests --------------------------------------------------------------------------------------------------

    def everyone(self) -> list[Sequence]:
        """See `Engine`."""
        pulling = [one for one, _ in list(self._pulling.values())]  # metrics are read meanwhile
        return [*super().everyone(), *pulling, *self.offered.values(), *self.front.everyone()]

    @property
    def in_flight(self) -> bool:
        """See `Engine`."""
        return bool(self._flying or self.front._flying)

    def submit(self, request: Request, arrival: float | None = None, number: int | None = None) -> Sequence:
        """See `Engine`."""
        self.check(request)
        return self.front.submit(request, arrival, number)

    def pages_of(self, phase: Phase) -> KVPages:
        """See `PhasedEngine`."""
        return self.pages if phase == "decode" else self.front.pages

    def drain(self) -> list[Event]:
        """See `PhasedEngine`."""
        events: list[Event] = []
        while self.in_flight:
            events += self._take_in(self.workers.collect())
            if not self.workers.busy:  # after a fault: nobody will bring the rest
                self._flying.clear()
                self.front._flying.clear()
        return events

    # ---- steps -----------------------------------------------------------------------------------------------------

    def _hand_out(self, now: float) -> list[Event]:
        events = [*self.front._hand_out(now), *super()._hand_out(now)]
        if not self._flying and (pulls := self._accept()):
            self._flying["decode"] = []
            self.workers.start("decode", [], pulls)
        if self.adapters is not None:  # read while the prompts that want them are computed
            coming = [one.request.adapter for one in (*self.offered.values(), *self.front.running.values())]
            self.adapters.prefetch(list(dict.fromkeys(key for key in coming if key is not None)))
        unread, self._unread = self._unread, []
        return [*events, *unread]

    def _launch(self, phase: Phase, batch: list[Entry]) -> None:
        self._flying[phase] = batch
        self.workers.start(phase, batch, self._accept())

    def _accept(self) -> Batch[Pull]:
        """Takes pages for offered prompts, in order, as far as the rule goes; what is to be copied for them."""
        found: list[Pull] = []
        waiting = sum(len(one.pages) for one in list(self.running.values())[self.limits.max_sequences :])
        for one in list(self.offered.values()):
            need = self.limits.pages(len(one.tokens))  # with room for the token that comes next
            offer = Offer(
                need=need + self._adapter_pages(one), free=self.pages.available_pages,
                total=self.pages.pool.limit_pages, waiting=waiting,
                running=len(self.running) + len(self._pulling), set_aside=bool(self.swapped),
            )  # fmt: skip
            if not self.rule.accepts(offer):
                break
            try:
                self._take_adapter(one)
                pages = self.pages.take(need, owner=one.id)
            except (OutOfPages, BudgetExceeded):
                self._let_adapter_go(one)
                break
            except MemwallError:
                log.warning("request %d ends: its adapter cannot be read", one.id, exc_info=True)
                self._unread.append(self._finish(one, "error"))
                continue
            del self.offered[one.id]
            source, one.pages = one.pages, pages
            self._pulling[one.id] = (one, source)
            found += pulls_of(source, pages[: len(source)])
            waiting += need
        return found

    def _adapter_pages(self, one: Sequence) -> int:
        """What a request's adapter will take here beside its keys and values."""
        if self.adapters is None or one.request.adapter is None:
            return 0
        view = self.adapters.view(one.request.adapter)
        return 0 if view.resident else view.pages

    def _take_adapter(self, one: Sequence) -> None:
        if self.adapters is not None and one.request.adapter is not None:
            self.adapters.acquire(one.request.adapter)
            one.holds_adapter = True

    def _take_in(self, finished: list[Done]) -> list[Event]:
        events: list[Event] = []
        for done in finished:
            side = self.front if done.phase == "prefill" else self
            if side is self:
                events += self._pulled(done)
            if not done.batch:  # it only pulled, or was lost while it was idle
                side._flying.pop(done.phase, None)
            else:
                events += self.front._take_in([done]) if side is self.front else super()._take_in([done])
            if done.emptied:
                self._emptied(done.phase)
            self._offer()
        return events

    def _emptied(self, phase: Phase) -> None:
        """A side's memory is gone: what was there is computed again, from the prompt on."""
        side = self.front if phase == "prefill" else self
        there = list(side.running.values())
        if phase == "prefill":
            there += self.offered.values()
            self.offered.clear()
            self._sourceless |= set(self._pulling)  # unless their bytes were on their way already
        for one in there:
            side.running.pop(one.id, None)
            one.preemptions += 1
            side.totals.preempted["recompute"] += 1
            side._start_over(one)
        side.pages.forget(side.pages.idle_pages)

    def _offer(self) -> None:
        """Prompts whose first token is there, and requests whose tokens are all computed again, are done here."""
        flying = self.front._in_flight_ids()
        for one in list(self.front.running.values()):
            if one.num_made and one.computed == len(one.tokens) - 1 and one.id not in flying:
                self.offered[one.id] = self.front.running.pop(one.id)
                self.front._let_adapter_go(one)

    def _pulled(self, done: Done) -> list[Event]:
        """What was pulled with a batch goes on here and is freed there; offered anew where the worker was lost."""
        pulling, self._pulling = self._pulling, {}
        sourceless, self._sourceless = self._sourceless, set()
        if done.outputs is None:
            for one, source in pulling.values():
                self._let_adapter_go(one)
                self.pages.release(one.pages)
                one.pages = source
            self.moves.again += len(pulling)
            back = {number: one for number, (one, _) in pulling.items()}
            for number in sourceless & back.keys():
                self.front._start_over(back.pop(number))
            self.offered = back | self.offered
        else:
            for number, (one, source) in pulling.items():
                self._free_front(number, source)
                one.registered, one.view = 0, None
                self.running[number] = one
            self.moves.requests += len(pulling)
            self.moves.nbytes += done.pulled_bytes
            self.moves.seconds += done.pulled_seconds
        doomed = [one for number, (one, _) in pulling.items() if number in self._doomed]
        return [self._finish(one, self._doomed.pop(one.id)) for one in doomed]

    def _free_front(self, number: int, pages: list[int]) -> None:
        self.front.pages.release(pages)
        self.front.pages.pool.close(number)

    def _start_over(self, one: Sequence) -> None:
        """See `Engine`: it is a prompt again."""
        super()._start_over(one)
        self.front.waiting[one.id] = self.waiting.pop(one.id)

    def _finish(self, one: Sequence, why: FinishReason) -> Event:
        """See `Engine`, wherever it is."""
        if self.offered.pop(one.id, None) or one.id in self.front.running or one.id in self.front.waiting:
            return self.front._finish(one, why)
        if one.id in self._pulling:  # after a fault
            self._free_front(one.id, self._pulling.pop(one.id)[1])
        return super()._finish(one, why)

    def _in_flight_ids(self) -> set[int]:
        return super()._in_flight_ids() | self.front._in_flight_ids() | set(self._pulling)
